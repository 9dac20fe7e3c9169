"""ONNX Runtime, CPU and CUDA execution providers."""
