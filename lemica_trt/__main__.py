"""`python -m lemica_trt`."""

from lemica_trt.cli.main import main

main()
