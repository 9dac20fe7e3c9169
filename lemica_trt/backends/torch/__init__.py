"""PyTorch modules of the calling process, on CPU or CUDA: plans run without engines."""

from lemica_trt.backends.torch.options import TorchOptions

BACKENDS = {"torch": TorchOptions}
