{
  "payload": "ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAicHJlZGljYXRlIjoge30sCiAgInByZWRpY2F0ZVR5cGUiOiAidXJuOmxlbWljYS10cnQ6YnVuZGxlIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAgICAgImRpZ2VzdCI6IHsKICAgICAgICAic2hhMjU2IjogIjlkOTExNmVkZjZiYzkwMzAzMWYzNjNlNDQ0ZTFjMzRiMTQ5NGU3Nzg3NzJkZDIzYjg1YzcyMDZmZjFlMTlhNjkiCiAgICAgIH0sCiAgICAgICJuYW1lIjogIm1hbmlmZXN0Lmpzb24iCiAgICB9CiAgXQp9Cg==",
  "payloadType": "application/vnd.in-toto+json",
  "signatures": [
    {
      "keyid": "47dea58ea00fae9417ee19d76755bfef690899021132effb04fe1f9e4f0c8059",
      "sig": "TCYZuJNbP6F4DWC9CPVW63SK+0yYS7bNLhXaWe1r1zEpN5JAgVYuwnPF92zdjWA9ye8E8HXt3U7cIy8xODBLCA=="
    },
    {
      "keyid": "fd110d301d2f077de1414b8f99f441b1403fab207b2052fbd2c065e4ee8e7dc2",
      "sig": "iCj0SyVUd3g/wB1NJUh8rX/6cdUtMvXtUeEzGbLqTheUO75T9pBCOqBzbBMvAhlBLaY12ju3A+rO4HlCo5wVDQ=="
    }
  ]
}
