"""A bundle as a model repository of Triton Inference Server.

    model/       the emitted model.py files, copied as they are
    serving      what they share: checks at load, request parameters, batches, metrics; runs inside the server
    repository   bundle → model repository
    check        lint of a model repository: configs, digests, shapes between the models
    client       a prompt to a server, a clip back, progress on the way

`serving` is imported by Triton's python backend, where PyTorch, click and rich are not; the rest by the command line.
"""
