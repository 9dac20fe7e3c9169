"""Every kind of request with strange parameters and tensors: an answer that says what is allowed, or a result."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from mutations import STRANGE_VALUES, TIERS, run
from test_fuzz_files import refused

from lemica_trt.core.values import read_value
from lemica_trt.ir.plan import StepPlan
from lemica_trt.runtime import validation
from lemica_trt.triton.interface import Port
from lemica_trt.triton.server import requests

GOLDEN = Path(__file__).parents[1] / "golden/bundle"
PLANS = {name: read_value(StepPlan, GOLDEN / f"plans/{name}.json") for name in ("b3", "uncached")}
NAMES = ("plan", "steps", "quality", "seed", "guidance_scale", "negative_prompt", "output")

VALUES = st.one_of(
    st.sampled_from((*STRANGE_VALUES, "b3", "default", "uncached", 3, 6, 4.0, float("nan"), float("inf"), -0.0)),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)
PARAMETERS = st.dictionaries(st.sampled_from((*NAMES, "caller", "triton_x", "Seed")), VALUES, max_size=4)


@st.composite
def parameter_texts(draw: st.DrawFn) -> str:
    """What `request.parameters()` may give: JSON, with JSON in `settings` where another model calls, or no JSON."""
    parameters: Any = draw(PARAMETERS)
    if draw(st.booleans()):
        inner: Any = draw(st.one_of(PARAMETERS.map(json.dumps), VALUES.map(json.dumps), VALUES))
        parameters = {**parameters, "settings": inner, **({"caller": "x"} if draw(st.booleans()) else {})}
    text = json.dumps(draw(st.one_of(st.just(parameters), VALUES)) if draw(st.integers(0, 9)) == 0 else parameters)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 9)) == 0 else text


def parameters_of_a_request(text: str) -> None:
    request = SimpleNamespace(parameters=lambda: text)
    found = refused(lambda: requests.read_parameters(request, (*NAMES, "caller")))
    if found is None:
        return
    assert set(found) <= {*NAMES, "caller", "triton_x"}
    plan = refused(lambda: validation.choose_plan(found, PLANS, "b3"))
    assert plan is None or plan in PLANS.values()
    seed = refused(lambda: validation.seed_from(found))
    assert seed is None or 0 <= seed < 1 << 63
    for guided in (True, False):
        scale = refused(partial(validation.guidance_from, found, PLANS["b3"], guided=guided))
        assert scale is None or 0 <= scale <= 100
    prompt = refused(lambda: validation.text_from("negative_prompt", found.get("negative_prompt")))
    assert prompt is None or isinstance(prompt.encode(), bytes)


@pytest.mark.cpu
@TIERS
def test_parameters_of_triton_requests(many: bool) -> None:
    run(parameters_of_a_request, parameter_texts(), many=many)


DTYPES = ("float32", "float64", "float16", "int64", "uint8", "bool", "object", "S4")
SHAPES = ((), (0,), (1,), (1, 4), (2, 4), (1, 0), (1, 4, 1))


def tensor_of_a_request(drawn: tuple[str, tuple[int, ...], float, bool]) -> None:
    dtype, shape, number, there = drawn
    with np.errstate(all="ignore"):
        array = np.full(shape, number).astype(dtype)
    tensor = SimpleNamespace(as_numpy=lambda: array) if there else None
    server = SimpleNamespace(get_input_tensor_by_name=lambda request, name: tensor)
    for port in (Port("latents", kind, (size,)) for kind in ("FP32", "FP16", "INT64", "STRING") for size in (4, -1)):
        found = refused(partial(requests.tensor_from, server, None, port))
        assert found is None or (found.ndim == 1 and len(found) in (0, 4) and found.dtype == port.numpy)
        assert found is None or port.dims == (-1,) or len(found) == 4


@pytest.mark.cpu
@TIERS
def test_tensors_of_triton_requests(many: bool) -> None:
    numbers = st.sampled_from((0.0, 1.0, -1e300, 1e30, float("nan"), float("inf")))
    inputs = st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), numbers, st.booleans())
    run(tensor_of_a_request, inputs, many=many)


@pytest.mark.cpu
@TIERS
def test_requests_in_process(many: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Through the pipeline, engines and all: a clip of the right shape, or a refusal."""
    import toy
    from test_runtime_pipeline import make_bundle

    from lemica_trt.runtime.pipeline import Pipeline

    pipe = Pipeline(make_bundle(tmp_path_factory.mktemp("fuzz") / "toy", tmp_path_factory.mktemp("work")), threads=1)
    call = st.fixed_dictionaries(
        {"prompt": st.one_of(VALUES, st.lists(VALUES, max_size=2))},
        optional={name: VALUES for name in ("seed", "guidance_scale", "negative_prompt", "plan")},
    )

    def target(given: dict[str, Any]) -> None:
        found = refused(lambda: pipe(**given))
        for one in found if isinstance(found, list) else [found] if found is not None else []:
            assert one.latents.shape == toy.LATENT_SHAPE

    run(target, call, many=many)
