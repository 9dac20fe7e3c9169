"""ONNX Runtime, CPU and CUDA execution providers."""

from lemica_trt.backends.onnxruntime.options import OrtOptions

BACKENDS = {"onnxruntime": OrtOptions}
