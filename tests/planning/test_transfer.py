"""Sensitivities: interpolated by timestep, and refused where they were not measured."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.calibration import RESULT, Provenance, Sensitivity
from lemica_trt.ir.plan import guidance_range
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.planning.transfer import knots_from_stops, require_retargetable

pytestmark = pytest.mark.null

SAME: dict[str, Any] = {
    "model": "m",
    "revision": "r",
    "dtype": "fp32",
    "scheduler": "Euler",
    "negative_prompt": "",
    "text_length": 4,
    "latent_shape": (3, 4),
    "seed": 0,
    "prompts_digest": "p",
}


def euler(num_steps: int, *, top: float = 1000.0, **last: Any) -> SamplerTable:
    rows = [SamplerRow(latents=(1.0,), timestep=top * (1 - i / num_steps)) for i in range(num_steps)]
    return SamplerTable(scheduler="Euler", rows=(*rows, SamplerRow(latents=(1.0,), **last)))


def known(knots: tuple[tuple[float, float], ...] = ((RESULT, 1.0), (500.0, 2.0), (960.0, 8.0))) -> Sensitivity:
    return Sensitivity(
        **SAME, sampler_digest="s", sampler_probe=(), num_steps=50, guidance_scale=4.0, samples=2, knots=(knots, knots)
    )


def wanted(table: SamplerTable, **changes: Any) -> Provenance:
    fields = (
        SAME
        | {
            "sampler_digest": table.digest,
            "sampler_probe": table.probe,
            "num_steps": table.num_steps,
            "guidance_scale": 4.0,
        }
        | changes
    )
    return Provenance(**fields)


def test_it_is_interpolated_in_its_logarithm_and_stays_beyond_its_ends() -> None:
    found = known(((RESULT, 1.0), (500.0, 2.0), (900.0, 8.0))).at(euler(10))
    assert found.shape == (11,)
    np.testing.assert_allclose(found[:2], 8.0)  # 1000, 900
    np.testing.assert_allclose(found[3], 4.0)  # 700: half way from 2 to 8
    np.testing.assert_allclose(found[5], 2.0)
    assert 1 < found[9] < 2**0.21 and found[10] == 1.0


@pytest.mark.parametrize("num_steps", [2, 5, 50])
def test_knots_give_back_what_they_were_made_of(num_steps: int) -> None:
    table = euler(num_steps)
    stops = {j: 1.0 + j * j for j in range(2, num_steps + 1, 3)}
    knots = knots_from_stops(stops, table)
    found = known(knots).at(table)
    np.testing.assert_allclose([found[j] for j in stops], list(stops.values()), rtol=1e-12)
    assert list(knots) == sorted(knots)


def test_stops_at_one_timestep_are_one_knot() -> None:
    rows = (*[SamplerRow(latents=(1.0,), timestep=t) for t in (9.0, 5.0, 5.0)], SamplerRow(latents=(1.0,)))
    table = SamplerTable(scheduler="Heun", rows=rows)
    assert knots_from_stops({1: 3.0, 2: 4.0, 3: 1.0}, table) == ((RESULT, 1.0), (5.0, 4.0))


def test_it_holds_for_fewer_and_more_steps_and_other_guidance() -> None:
    for table in (euler(25), euler(30), euler(75)):
        for scale in (2.0, 4.0, 7.0):
            require_retargetable(known(), wanted(table, guidance_scale=scale), table)


@pytest.mark.parametrize(
    ("table", "changes", "says"),
    [
        (euler(24), {}, r"25 … 75 steps \(50 were measured\), asked for is 24"),
        (euler(76), {}, "asked for is 76"),
        (euler(30), {"guidance_scale": 1.9}, r"guidance 2 … 7 \(4 was measured\), asked for is 1\.9"),
        (euler(30), {"guidance_scale": 7.5}, r"guidance 2 … 7"),
        (euler(30), {"guidance_scale": 1.0}, r"guidance 2 … 7"),
        (euler(30), {"revision": "x"}, "revision 'r', asked for is 'x'"),
        (euler(30), {"latent_shape": (3, 8)}, r"latent shape \(3, 4\), asked for is \(3, 8\)"),
        (euler(30), {"negative_prompt": "ugly"}, "negative prompt ''"),
        (euler(30, noise=0.5), {}, "a deterministic sampler, asked for is Euler, which draws noise"),
        (msgspec.structs.replace(euler(30), scheduler="Heun"), {}, "holds for Euler, asked for is Heun"),
        (euler(30, top=1100.0), {}, "timesteps up to 979 behind the second step, asked for is 1027"),
    ],
)
def test_it_is_refused_where_it_was_not_measured(table: SamplerTable, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says) as caught:
        require_retargetable(known(), wanted(table, **changes), table)
    assert caught.value.fix is not None and "--calibration-from" in caught.value.fix


def test_an_unguided_calibration_holds_unguided() -> None:
    table = euler(30)
    alone = msgspec.structs.replace(known(), guidance_scale=1.0)
    require_retargetable(alone, wanted(table, guidance_scale=1.0), table)
    with pytest.raises(UnsupportedError, match="guidance 1 … 1"):
        require_retargetable(alone, wanted(table, guidance_scale=1.5), table)
    assert (
        guidance_range(1.0) is None
        and guidance_range(4.0) == (2.0, 7.0)
        and guidance_range(4.0, fitted=True) == (2.0, 5.0)
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"samples": 3}, "knots are of 2 samples, not 3"),
        ({"knots": ((), ())}, r"knots\[0\] is empty"),
        ({"knots": (((1.0, 1.0), (1.0, 2.0)),) * 2}, r"knots\[0\]: timesteps must rise"),
        ({"knots": (((-2.0, 1.0),),) * 2}, r"knots\[0\]: timesteps must rise from -1"),
        ({"knots": (((1.0, 0.0),),) * 2}, "must be above 0"),
        ({"knots": (((1.0, float("nan")),),) * 2}, "must be finite"),
    ],
)
def test_a_sensitivity_refuses(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        msgspec.convert(msgspec.to_builtins(known()) | changes, Sensitivity)
