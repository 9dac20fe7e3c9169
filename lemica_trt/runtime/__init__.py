"""Runs a step plan on engines: numpy in, numpy out, no torch.

    backend       the thin interface to an engine library: buffers, engines, calls
    onnxruntime   that interface on ONNX Runtime, CPU and CUDA
    tensorrt      that interface on TensorRT and TensorRT for RTX
    device        the thin interface to a GPU under it: memory, a stream, graphs
    cuda          that interface on cuda-core
    null          that interface, and a vendor, without a GPU
    rebuild       the command that builds a bundle again, where its engines are for another machine
    denoise       the loop over a plan's rows, written once against the interface
    random        initial noise from a seed, the numbers that torch draws
    text          prompt → token ids
    video         frames → .mp4, .gif, .png, .npy
    pipeline      prompt → frames: all of the above, for a bundle

Importing any of them imports numpy and msgspec, nothing heavier; vendors' packages load when an engine does.
"""
