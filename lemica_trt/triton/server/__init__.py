"""What the emitted models share; runs inside Triton's python backend.

    load        what a model checks before it serves, and its pipeline
    requests    parameters and tensors of a request, checked
    cancel      requests that end before their result: cancelled, out of time, or their process died
    lifetime    processes of models end with their server
    confinement models' processes write nothing into the repository
    temporary   their temporary files, and what killed ones left
    batching    requests that run together, where that changes no bit of any result
    metrics     what `/metrics` shows beside Triton's own
    errors      exceptions as answers

A model that loads answers correctly, or it does not load. `pb_utils` (`triton_python_backend_utils`) exists only inside
the server: it is passed in.
"""
