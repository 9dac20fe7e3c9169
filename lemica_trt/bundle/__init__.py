"""The folder that is deployed: manifest, reading, writing."""
