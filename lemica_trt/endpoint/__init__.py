"""An endpoint as OpenAI's clients speak it, for one bundle: `/v1/videos`, `/v1/images/generations`, `/v1/models`.

    requests    what a request asks for, checked against the bundle
    errors      exceptions as OpenAI's error objects with an HTTP status
    makers      who makes the clips: engines of this process, or a Triton server
    jobs        a bounded queue, progress, cancelling, and finished clips until they expire
    health      liveness, and readiness by a real first step
    metrics     what Prometheus reads
    guard       before any route: API key, host, size of a request; one line of log
    app         the routes
    server      uvicorn: where it listens, and how it stops

`requests`, `errors`, `makers`, `jobs` and `health` know nothing of HTTP libraries. Only `metrics`, `guard`, `app` and
`server` need the packages of `lemica-trt[serve]`.
"""
