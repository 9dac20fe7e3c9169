"""A bundle as a model repository of Triton Inference Server.

    interface    the models, and the tensors that go in and out of them
    repository   bundle → model repository: the models' code, `config`s, a start script, a `readme`
    model/       the emitted model.py files, copied as they are
    server/      what they share: checks at load, requests, cancellation, batches, metrics; runs inside the server
    check        lint of a model repository: configs, digests, shapes between the models
    probe        an emitted script: does the server answer something real?
    client       a prompt to a server, a clip back, progress on the way

`server` is imported by Triton's python backend, where PyTorch is not; the rest by the command line.
"""
