"""`python -m lemica_trt`."""

from lemica_trt.cli import main

main()
