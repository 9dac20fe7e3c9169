"""What several GPUs would give, by a model of time: nothing here has run on more than one device.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json

Operations are counted from the published configurations: those of the transformer by formula, those of the decoder on
fake tensors. Speed and links are data-sheet figures (`SPEED`, `LINKS`); `UTILISATION` and `LATENCY` are assumptions.
Writes JSON (`record.Scaling`) and prints its table.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from record import Scaling, ScalingRow, this_run, write_result
from tables import described
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lemica_trt.evaluate.estimate import ATTENTION

SPEED = 989.4e12
"""Dense bf16 operations a second of an H100 SXM, by NVIDIA's data sheet (1,979 TFLOPS with sparsity)."""

UTILISATION = 0.5
"""The part of it that a model reaches; assumed."""

LINKS = {"NVLink 4": 450e9, "PCIe 5 x16": 64e9, "InfiniBand NDR": 50e9}
"""Bytes a second in one direction: half of NVIDIA's 900 and 128 GB/s for an H100 SXM; 400 Gb/s of one NDR port."""

LATENCY = 20e-6
"""Seconds of a collective of no bytes; assumed."""

FULL_STEPS = 15

DEVICES = (2, 4, 5, 8)
"""Numbers of them that Ulysses is calculated for, where they divide the heads."""


@dataclass(frozen=True)
class Model:
    """A model at its published size and shape, bf16, both branches of guidance.

    Attributes:
        layers, heads, width, feed_forward: of the transformer.
        tokens: that attend to each other.
        text: tokens of the prompt; cross: whether they are attended to apart.
        latent: numbers of one latent.
        decode: operations of the decoder.
    """

    name: str
    layers: int
    heads: int
    width: int
    feed_forward: int
    tokens: int
    text: int
    cross: bool
    latent: int
    decode: float

    @property
    def branch(self) -> float:
        """Operations of one branch of a step: matrix products and attention, 2 a multiply-add."""
        s, d, t = self.tokens, self.width, self.text
        layer = 8 * s * d * d + 4 * s * d * self.feed_forward + 4 * s * s * d
        if self.cross:
            layer += 4 * s * d * d + 4 * t * d * d + 4 * s * t * d
        return float(self.layers * layer)

    @property
    def encode(self) -> float:
        """Operations of T5-XXL's or UMT5-XXL's encoder on both prompts: 24 layers, 4096 wide, gated 10240."""
        return 2.0 * 2 * self.text * 24 * (4 * 4096**2 + 3 * 4096 * 10240)


def seconds(operations: float) -> float:
    """On one GPU."""
    return operations / (SPEED * UTILISATION)


def all_gather(count: float, devices: int, link: float) -> float:
    """Seconds until each of some devices has what all have, `count` bytes together; ring."""
    return LATENCY + count * (devices - 1) / devices / link


def all_to_all(count: float, devices: int, link: float) -> float:
    """Seconds until a tensor of `count` bytes, a share on each device, is split along another axis: each device sends
    all of its share but its own part."""
    return LATENCY + count / devices * (devices - 1) / devices / link


def step_on_one(model: Model) -> float:
    """Both branches, one after the other or as a batch."""
    return seconds(2 * model.branch)


def step_by_branches(model: Model, link: float) -> float:
    """A branch on each of two devices, and one all-gather of both outputs in bf16."""
    return seconds(model.branch) + all_gather(2 * 2 * model.latent, 2, link)


def step_by_tokens(model: Model, devices: int, link: float) -> float:
    """Ulysses (arXiv 2309.14509): tokens on several devices; a layer sends q, k, v to heads and the result back."""
    moved = all_to_all(2 * 2 * model.tokens * model.width, devices, link)  # bytes of both branches
    return step_on_one(model) / devices + 4 * model.layers * moved


def request(model: Model, step: float) -> float:
    """Latency: text, steps, decoder one after the other on the device that has them."""
    return seconds(model.encode) + FULL_STEPS * step + seconds(model.decode)


def pipeline(stages: dict[str, float], instances: dict[str, int]) -> float:
    """Requests a second of stages on devices of their own, with enough requests waiting: the slowest stage says."""
    return min(instances[name] / taken for name, taken in stages.items())


def models() -> list[Model]:
    """Those of the table: 49 frames of 480 × 720, and 81 of 720 × 1280."""
    cog, wan = (16, 13, 60, 90), (16, 21, 90, 160)
    return [
        Model("CogVideoX-2B", 30, 30, 1920, 7680, 13 * 30 * 45 + 226, 226, False, math.prod(cog),
              decoded(AutoencoderKLCogVideoX, cog)),
        Model("Wan 2.1 14B", 40, 40, 5120, 13824, 21 * 45 * 80, 512, True, math.prod(wan),
              decoded(AutoencoderKLWan, wan)),
    ]  # fmt: skip


def decoded(kind: type, latent: tuple[int, ...]) -> float:
    """Operations of a decoder of diffusers' default configuration, which is the published one."""
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        kind().eval().decode(torch.empty(1, *latent))
    return float(counter.get_total_flops())


def rows_of(model: Model) -> list[ScalingRow]:
    """Every way on every link."""
    one = step_on_one(model)
    text, decode = seconds(model.encode), seconds(model.decode)

    def row(way: str, devices: int, link: str, step: float, rate: float | None = None) -> ScalingRow:
        latency = request(model, step)
        return ScalingRow(
            model=model.name, way=way, devices=devices, link=link, step=step, latency=latency,
            throughput=1 / latency if rate is None else rate,
        )  # fmt: skip

    rows = [row("one GPU", 1, "", one), row("a request on each GPU", 2, "", one, 2 / request(model, one))]
    for name, link in LINKS.items():
        rows.append(row("CFG-parallel", 2, name, step_by_branches(model, link)))
        rows += [row("Ulysses", n, name, step_by_tokens(model, n, link)) for n in DEVICES if model.heads % n == 0]
    for denoisers in (1, 3, 7):
        stages = {"denoise": FULL_STEPS * one, "text and decode": text + decode}
        rate = pipeline(stages, {"denoise": denoisers, "text and decode": 1})
        rows.append(row(f"{denoisers} × denoiser, 1 × text and decoder", denoisers + 1, "", one, rate))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    made = models()
    result = Scaling(
        run=this_run("torch", "diffusers"),
        speed=SPEED, utilisation=UTILISATION, latency=LATENCY, links=LINKS, full_steps=FULL_STEPS,
        operations={model.name: (model.encode, 2 * model.branch, model.decode) for model in made},
        rows=tuple(row for model in made for row in rows_of(model)),
    )  # fmt: skip
    write_result(result, args.output)
    print(described(result))


if __name__ == "__main__":
    main()
