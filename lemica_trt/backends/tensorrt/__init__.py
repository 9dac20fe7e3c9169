"""TensorRT and TensorRT for RTX: one code for both, the library a value (`vendor.Vendor`)."""

from lemica_trt.backends.tensorrt.options import RtxOptions, TensorRTOptions

BACKENDS = {"tensorrt": TensorRTOptions, "tensorrt-rtx": RtxOptions}
