"""Networks without weights: the same trace, the same layout and operations, in no memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import msgspec
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from traced_bundles import FLAGS, lemica, saved

from lemica_trt.ir.trace import Trace
from lemica_trt.models.load import is_bare, load_pipeline
from lemica_trt.models.stand_ins import (
    WeightsNeededError,
    is_stand_in,
    network_from_config,
    stand_in_numbers,
)
from lemica_trt.models.trace import trace_pipeline
from lemica_trt.models.trace.symbols import Symbols
from lemica_trt.models.trace.trunk import find_trunk
from lemica_trt.testing.pipelines import CASES

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers

IN_CI = (("flux", "fp32"), ("lumina2", "fp32"), ("wan", "bf16"))

OTHERS = ("ltx2",)
"""Those of which the trace without weights is another: a network gives a mask, whose numbers stand in for it."""

REST = [
    pytest.param(name, "fp32", marks=pytest.mark.long)
    for name, case in CASES.items()
    if not case.refusal and name not in (*OTHERS, "flux", "lumina2")
]


def bare(folder: Path, target: Path) -> Path:
    """A copy of a pipeline's folder without its weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
    return target


def without_numbers(trace: Trace) -> Any:
    """A trace without what was measured, deviations of replays and of trunks, and without what networks read in Python
    that are rewritten where they have no weights."""
    trunks = tuple(msgspec.structs.replace(trunk, error=0.0) for trunk in trace.trunks)
    guidance = msgspec.structs.replace(trace.guidance, nonlinearity=round(trace.guidance.nonlinearity, 3))
    return msgspec.structs.replace(trace, trunks=trunks, guidance=guidance, error=0.0, without_weights=False, python=())


@pytest.mark.parametrize(("name", "dtype"), [*IN_CI, *REST])
def test_a_trace_without_weights_is_the_one_with_them(name: str, dtype: Any, tmp_path: Path) -> None:
    """In every value but how far its replays are off."""
    source = saved(name, tmp_path / name)
    request = CASES[name].request
    whole = trace_pipeline(load_pipeline(str(source), dtype=dtype), request)
    found = trace_pipeline(load_pipeline(str(bare(source, tmp_path / "bare")), dtype=dtype, weights=False), request)
    assert found.without_weights and not whole.without_weights
    assert without_numbers(found) == without_numbers(whole)
    assert all(trunk.streams for trunk in found.trunks)


def test_a_network_that_reads_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not rewritten."""
    monkeypatch.setattr("lemica_trt.models.stand_ins.rewritten", lambda network: network)
    source = bare(saved("hunyuanvideo-1.5", tmp_path / "whole"), tmp_path / "bare")
    assert is_bare(str(source)) and not is_bare(str(tmp_path / "whole"))
    with pytest.raises(WeightsNeededError, match=r"^HunyuanVideo15Transformer3DModel .* reads values"):
        trace_pipeline(load_pipeline(str(source), weights=False), CASES["hunyuanvideo-1.5"].request)


def test_a_rewritten_network_is_looked_at_as_a_build_does(tmp_path: Path) -> None:
    source = bare(saved("mochi", tmp_path / "whole"), tmp_path / "bare")
    done = lemica("build", "--model", source, *FLAGS["mochi"], "--output", tmp_path / "out", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    stages = {stage["name"]: stage for stage in json.loads(done.stdout)["result"]}
    assert stages["export"]["disk"] > 0 and stages["calibrate"]["full_steps"] > 0


def test_the_command_needs_no_weights(tmp_path: Path) -> None:
    """A folder without weights is traced, and its build estimated as if it had some; a build says what is missing."""
    whole = saved("flux", tmp_path / "whole")
    source = bare(whole, tmp_path / "bare")
    shown = lemica("trace", "--model", source, *FLAGS["flux"])
    assert shown.exit_code == 0 and "none were read" in shown.output
    assert json.loads(lemica("trace", "--model", whole, *FLAGS["flux"], "--without-weights", "--json").stdout)[
        "result"
    ]["without_weights"]
    stages = []
    for folder in (whole, source):
        done = lemica("build", "--model", folder, *FLAGS["flux"], "--output", tmp_path / "out", "--dry-run", "--json")
        assert done.exit_code == 0, done.output
        stages.append({stage["name"]: stage for stage in json.loads(done.stdout)["result"]})
    one, other = stages
    weights = sum(
        p.numel() * p.element_size() for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
        for p in getattr(diffusers.FluxPipeline.from_pretrained(whole), part).parameters()
    )  # fmt: skip
    assert one["export"]["disk"] == other["export"]["disk"] == weights
    assert one["calibrate"]["full_steps"] == other["calibrate"]["full_steps"] > 0
    assert other["calibrate"]["seconds"] > 0
    refused = lemica("build", "--model", source, *FLAGS["flux"], "--output", tmp_path / "out", "--quiet")
    assert refused.exit_code == 3 and "expected a complete pipeline, got: Error no file named" in refused.output
    assert refused.output.count("\n") == 1


def test_parameters_take_no_memory_and_are_tied_as_they_are(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    config.save_pretrained(tmp_path)
    network = network_from_config(transformers.T5EncoderModel, tmp_path, torch.bfloat16)
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) > 4e9
    assert sum(p.untyped_storage().nbytes() for p in parameters) < 1e4
    assert network.shared.weight is network.encoder.embed_tokens.weight  # type: ignore[union-attr]
    assert isinstance(network, transformers.T5EncoderModel) and type(network).__name__ == "T5EncoderModel"


def test_blocks_that_are_built_alike_run_once_for_a_shape(tmp_path: Path) -> None:
    """The first block of a T5 has a table of positions; the third and fourth are as the second."""
    transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4).save_pretrained(
        tmp_path
    )
    network: Any = network_from_config(transformers.T5EncoderModel, tmp_path, torch.float32)
    ran: list[int] = []
    for k, block in enumerate(network.encoder.block):
        block.layer[1].register_forward_hook(lambda *_, k=k: ran.append(k))
    for length in (5, 5, 6):
        assert network(input_ids=torch.ones(1, length, dtype=torch.long)).last_hidden_state.shape == (1, length, 32)
    assert ran == [0, 1, 0, 1], "once for each length"


def test_what_a_class_keeps_in_fp32_stays_in_fp32(tmp_path: Path) -> None:
    source = saved("wan", tmp_path / "wan")
    part = diffusers.WanTransformer3DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    network = network_from_config(diffusers.WanTransformer3DModel, source / "transformer", torch.bfloat16)
    wanted = {name: (p.dtype, p.shape) for name, p in part.named_parameters()}
    assert {name: (p.dtype, p.shape) for name, p in network.named_parameters()} == wanted
    assert len({dtype for dtype, _ in wanted.values()}) == 2


def test_numbers_follow_their_own_row_and_token_alone() -> None:
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3)
    other, longer = ids.clone(), torch.tensor([[1, 2, 3, 9]])
    other[0, 1] = 7
    found, changed = (stand_in_numbers((2, 3, 8), torch.float32, [its, mask]) for its in (ids, other))
    same = (found == changed).all(-1)
    assert same.tolist() == [[True, False, True], [True, True, True]]
    whole = stand_in_numbers((1, 4, 8), torch.float32, [longer, torch.ones(1, 4)])
    assert torch.allclose(whole[0, 0] - whole[0, 1], found[0, 0] - found[0, 1], atol=1e-6)
    x = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    near = [stand_in_numbers((1, 4, 6, 6), torch.float32, [x + shift]) for shift in (0.0, 1e-4)]
    assert 0 < float((near[1] - near[0]).abs().max()) < 1e-2, "smooth: a replay is off by roundings"


class Blocks(nn.Module):
    """Two lists of blocks, of which the second reads what the first gives, and a head of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in "ab")
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = x
        for block in (*self.first, *self.second):
            y = y + block(y)
        y = y.clone().mul_(scale)
        mask = torch.ones_like(y)  # has nothing of the blocks but its shape
        found: Tensor = self.head(y * torch.tensor([1.0, 2.0, 3.0, 4.0])) * mask
        return found


def test_a_trunk_is_found_by_how_things_are_computed() -> None:
    """As on numbers: the same lists, the same stream."""
    calls = [{"x": torch.randn(2, 4), "scale": torch.tensor(s)} for s in (1.5, 2.5)]
    numbers, shapes = Blocks(), Blocks()
    shapes._lemica_stand_in = True  # type: ignore[assignment]
    found, symbolic = (find_trunk("transformer", network, calls) for network in (numbers, shapes))
    assert is_stand_in(shapes) and symbolic.error == 0.0
    assert msgspec.structs.replace(found, error=0.0) == symbolic
    assert symbolic.lists == {"first": 2, "second": 2} and symbolic.streams == (("head", "0"),)


def test_symbols_are_equal_where_tensors_are_computed_alike() -> None:
    symbols = Symbols()
    with FakeTensorMode(), symbols:
        x, y = torch.zeros(3, 4), torch.ones(3, 4)
        one, other, third = x + y, x + y, y + x
        assert symbols.of(one) == symbols.of(other) != symbols.of(third)
        assert symbols.of(torch.zeros_like(x)) == symbols.of(torch.zeros_like(y))
        before, view = symbols.of(one), one[:2]
        seen = symbols.of(view)
        other.mul_(2)
        assert symbols.of(one) == before and symbols.of(view) == seen
        one.mul_(2)
        assert symbols.of(one) == symbols.of(other) != before and symbols.of(view) != seen
