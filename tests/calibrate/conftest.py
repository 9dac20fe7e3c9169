"""Calibration needs PyTorch: where it is missing, its tests are not collected."""

from __future__ import annotations

from importlib.util import find_spec

from torch_threads import one_thread

__all__ = ["one_thread"]

collect_ignore_glob = [] if find_spec("torch") and find_spec("diffusers") else ["test_*.py"]
