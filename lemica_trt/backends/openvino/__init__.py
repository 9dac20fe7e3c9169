"""OpenVINO on the CPU."""

from lemica_trt.backends.openvino.options import OpenVinoOptions

BACKENDS = {"openvino": OpenVinoOptions}
