"""Options: whose they are, what they take, and the flags and tables made of them."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from lemica_trt.backends.options import builder_names, option_fields, options_by_backend, options_from, options_table
from lemica_trt.backends.tensorrt.options import pool_sizes
from lemica_trt.cli.engine_flags import given_options, option_flags
from lemica_trt.core.errors import UsageError

pytestmark = pytest.mark.null


def test_options_go_to_the_backends_that_have_them() -> None:
    given = {"provider": "cpu", "weight_streaming": True, "compute_capabilities": "8.9"}
    assert options_by_backend(["onnxruntime", "tensorrt-rtx"], given) == {
        "onnxruntime": {"provider": "cpu"},
        "tensorrt-rtx": {"weight_streaming": True, "compute_capabilities": "8.9"},
    }
    assert options_by_backend(["tensorrt", "tensorrt"], {}) == {"tensorrt": {}}


@pytest.mark.parametrize(
    ("backend", "option", "others"),
    [
        ("tensorrt-rtx", "version_compatible", "tensorrt"),
        ("tensorrt-rtx", "hardware_compatibility_level", "tensorrt"),
        ("tensorrt", "compute_capabilities", "tensorrt-rtx"),
        ("onnxruntime", "weight_streaming", "tensorrt or tensorrt-rtx"),
        ("tensorrt", "provider", "onnxruntime"),
    ],
)
def test_what_a_vendor_does_not_offer_is_refused_by_name(backend: str, option: str, others: str) -> None:
    with pytest.raises(UsageError, match=f"{backend} has no option --{option.replace('_', '-')}.*{others}$"):
        options_by_backend([backend], {option: True})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("builder_optimization_level", 6, "--builder-optimization-level must be an integer, 0 … 5, got 6"),
        ("builder_optimization_level", "3", "--builder-optimization-level must be an integer, 0 … 5, got '3'"),
        ("mem_pool_size", "workspace", "--mem-pool-size must be POOL:SIZE.*got 'workspace'"),
        ("mem_pool_size", "dlaSRAM:1M", "one of workspace, tacticSharedMem, got 'dlaSRAM:1M'"),
        ("profiling_verbosity", "loud", "must be one of layer_names_only, detailed, none, got 'loud'"),
        ("compute_capabilities", "9.0", r"must be current, or some of .*12\.1, got '9.0'"),
        ("weight_streaming", "yes", "--weight-streaming must be true or false, got 'yes'"),
    ],
)
def test_values_that_an_option_does_not_take(option: str, value: str | int, message: str) -> None:
    with pytest.raises(UsageError, match=f"^tensorrt-rtx: .*{message}$"):
        options_from("tensorrt-rtx", {option: value})


def test_pool_sizes_are_those_of_trtexec() -> None:
    assert pool_sizes("workspace:4G,tacticSharedMem:48K") == {"workspace": 4 << 30, "tacticSharedMem": 48 << 10}
    assert pool_sizes("workspace:1.5") == {"workspace": 3 << 19}
    assert pool_sizes("") == {}


def test_every_option_is_a_flag() -> None:
    """With its help and default; given or not is told apart."""
    found = {}

    @click.command()
    def command(**flags: object) -> None:
        found.update(given_options(flags))

    for flag in reversed(option_flags()):
        command = flag(command)
    assert CliRunner().invoke(command, []).exit_code == 0 and found == {}
    arguments = ["--weight-streaming", "--builder-optimization-level", "3", "--provider", "cuda", "--mem-pool-size", ""]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert found == {
        "weight_streaming": True,
        "builder_optimization_level": 3,
        "provider": "cuda",
        "mem_pool_size": "",
    }
    for wrong in (["--provider", "tpu"], ["--builder-optimization-level", "6"], ["--threads", "-1"]):
        assert CliRunner().invoke(command, wrong).exit_code == 2
    shown = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    table = options_table().splitlines()
    assert len(table) == 2 + len(option_fields()) and all(name in "".join(table) for name in builder_names())
    for field in option_fields().values():
        assert field.flag in shown and " ".join(field.help.split()[:4]) in shown
