"""Tracing: every tiny pipeline, found by listing; and toy pipelines that do what must be refused."""

from __future__ import annotations

import importlib.util
import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import msgspec
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.trace import Trace, TraceRequest
from lemica_trt.models.load import load_pipeline
from lemica_trt.models.trace import trace_pipeline
from lemica_trt.models.trace.arguments import Arguments
from lemica_trt.models.trace.body import Body, Line, Network, fitted_line
from lemica_trt.models.trace.replay import ROUNDINGS, TOLERANCE, precision, tolerance
from lemica_trt.models.trace.runs import Runs
from lemica_trt.models.trace.tape import Recorder
from lemica_trt.models.trace.tracing import trace_runs
from lemica_trt.models.trace.trunk import find_trunk
from lemica_trt.report.trace import trace_table
from lemica_trt.testing.pipelines import CASES, tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers and transformers

FOUND: dict[str, Trace] = {}


def traced(name: str) -> Trace:
    """The trace of a case, made once."""
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    if name not in FOUND:
        FOUND[name] = trace_pipeline(tiny_pipeline(name), case.request)
    return FOUND[name]


def traceable() -> list[str]:
    return [name for name, case in CASES.items() if not case.refusal]


@pytest.mark.parametrize("name", traceable())
def test_every_pipeline_is_reproduced_for_another_request(name: str) -> None:
    trace = traced(name)
    assert trace.error <= 1e-4
    prompted = {what for slot in trace.role("condition") for what in slot.of}
    assert "prompt" in prompted
    assert all(trunk.streams and trunk.error <= 2e-5 for trunk in trace.trunks), trace.trunks
    assert value_from_json(Trace, json_bytes(trace), where="here") == trace
    assert not [slot for slot in trace.slots if slot.role in ("condition", "column") and not slot.of]


HALF_CI = ("cogvideox-dpm", "easyanimate", "hidream", "hunyuan-dit", "sana", "sd3", "wan2.2", "z-image")
"""Those that CI traces in half precision; test_traced.py has others, and the rest is `long`."""

NOT_LOADED = ("hidream", "ltx2")
"""Tiny pipelines that a folder does not give back: their parts are cast in place."""


@pytest.mark.parametrize(
    "name", [name if name in HALF_CI else pytest.param(name, marks=pytest.mark.long) for name in traceable()]
)
def test_every_pipeline_is_reproduced_in_half_precision(name: str, tmp_path: Path) -> None:
    """Loaded as a build loads it, with what the classes keep in fp32: each step to two roundings, the same trunk."""
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    pipeline = tiny_pipeline(name)
    if name in NOT_LOADED:
        pipeline = pipeline.to(torch.bfloat16)
    else:
        pipeline.save_pretrained(str(tmp_path))  # modular ones take no path
        pipeline = load_pipeline(str(tmp_path), dtype="bf16")
    assert pipeline.dtype == torch.bfloat16
    trace = trace_pipeline(pipeline, case.request)
    assert trace.error <= tolerance(torch.bfloat16) == ROUNDINGS * 2**-7
    assert all(trunk.streams and trunk.error <= 2e-5 for trunk in trace.trunks), trace.trunks
    assert {trunk.streams for trunk in trace.trunks} == {trunk.streams for trunk in traced(name).trunks}
    assert [len(kind.steps) for kind in trace.kinds] == [len(kind.steps) for kind in traced(name).kinds]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refusal])
def test_known_refusals_say_why(name: str) -> None:
    with pytest.raises(UnsupportedError, match=CASES[name].refusal):
        trace_pipeline(tiny_pipeline(name), CASES[name].request)


def test_guidance_is_told_apart() -> None:
    embedded, doubled, calls = traced("flux"), traced("cogvideox"), traced("wan")
    assert [slot.component for slot in embedded.role("guidance")] == ["transformer"]
    assert (doubled.guidance.doubled, doubled.guidance.calls) == (True, 1)
    assert (calls.guidance.doubled, calls.guidance.calls) == (False, 2)
    assert max(trace.guidance.nonlinearity for trace in (embedded, doubled, calls)) < 1e-5
    assert traced("qwen-image").guidance.nonlinearity > 1e-2  # it rescales the guided output


def test_dynamic_guidance_is_a_line_at_each_step() -> None:
    (slot,) = traced("cogvideox-dpm").role("guidance")
    assert slot.of == ("step", "guidance_scale")
    offsets, factors = zip(*(row.guidance for row in _dynamic_rows()))
    assert slot.column == pytest.approx(offsets, abs=1e-4)
    assert slot.factor == pytest.approx(factors, abs=1e-4)


def _dynamic_rows() -> Any:
    from lemica_trt.models.scheduler import sampler_table

    scheduler = tiny_pipeline("cogvideox-dpm").scheduler
    scheduler.set_timesteps(4)
    return sampler_table(scheduler, dynamic_guidance=True).rows[:-1]


def test_two_experts_are_two_kinds_of_steps_that_share_conditions() -> None:
    trace = traced("wan2.2")
    assert [kind.calls for kind in trace.kinds] == [("transformer",) * 2, ("transformer_2",) * 2]
    assert [trunk.component for trunk in trace.trunks] == ["transformer", "transformer_2"]
    assert len(trace.role("condition")) == 2


def test_several_states_have_a_sampler_each() -> None:
    trace = traced("ltx2")
    assert len(trace.states) == 2
    assert len(trace.trunks[0].streams) == 2


def test_masks_are_conditions_although_equal_prompts_share_them() -> None:
    arguments = {slot.argument for slot in traced("pixart-sigma").role("condition")}
    assert arguments == {"encoder_hidden_states", "encoder_attention_mask"}


def test_shapes_that_follow_the_prompt_are_told() -> None:
    assert traced("latte").text == "free"
    assert traced("latte").text_slots == ("encoder_hidden_states",)
    assert traced("flux").text == "fixed"


def test_values_that_become_pythons_inside_a_network_are_told() -> None:
    assert traced("lumina2").python == ("transformer: tolist",)
    assert traced("flux").python == ()


def test_templates_of_chats_are_found() -> None:
    templates = [encoder.template for encoder in traced("z-image").encoders]
    assert any("{prompt}" in template and "user" in template for template in templates)


def test_the_pipeline_is_left_as_it_was() -> None:
    pipeline = tiny_pipeline("wan")
    kinds = (type(pipeline.scheduler), type(pipeline.tokenizer))
    before = [dict(vars(kind)) for kind in kinds]
    trace_pipeline(pipeline, CASES["wan"].request)
    assert [dict(vars(kind)) for kind in kinds] == before
    assert "decode" not in vars(pipeline.vae)
    hooks = [m for m in pipeline.transformer.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


class Net(nn.Module):
    """x, t, text → output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.rate = 0.001

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x = self.inner(x) + text + self.rate * t
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Toy:
    """A pipeline whose loop is overridden by what a test wants of it."""

    def __init__(self, body: Any = None) -> None:
        torch.manual_seed(0)
        self.transformer = Net()
        self.text_encoder = nn.Embedding(128, 4)
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        self.body = body or (lambda toy, x, t, text, state: toy.transformer(x, t, text))
        self.after = lambda toy, x, state: x
        self.times = 1

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("transformer", "text_encoder", "scheduler")}

    def __call__(self, prompt: str, num_inference_steps: int = 4, generator: Any = None) -> Tensor:
        letters = torch.tensor([ord(letter) for letter in prompt.ljust(80)[:80]])
        text = self.text_encoder(letters)[:8].mean(0) + self.text_encoder(letters).std(0)
        x = torch.randn((1, 3, 4), generator=generator).to(self.text_encoder.weight.dtype)
        state = SimpleNamespace(
            text=text, generator=generator, momentum=torch.zeros_like(x), length=len(prompt.split())
        )
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.body(self, x, t, text, state)
            for _ in range(self.times):
                x = self.scheduler.step(output, t, x, return_dict=False)[0]
            x = self.after(self, x, state)
        return x


def test_a_plain_loop_is_traced() -> None:
    trace = trace_pipeline(Toy())
    assert [slot.name for slot in trace.role("condition")] == ["text"]
    assert [slot.name for slot in trace.role("column")] == ["t"]
    assert trace.trunks[0].lists == {"blocks": 2}
    assert trace.trunks[0].streams == (("head", "0"),)
    assert trace.guidance.parameters == ()


@pytest.mark.parametrize("boundary", [240.0, 990.0, 600.0])
def test_every_kind_of_steps_is_traced_three_times(boundary: float) -> None:
    """Also one that no step of a short run is of, or only the first of any run; networks do not compute to find out."""
    calls = []

    def body(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
        return (toy.transformer if t >= boundary else toy.transformer_2)(x, t, text)

    class Two(Toy):
        components = property(lambda self: {**super().components, "transformer_2": self.transformer_2})

    toy = Two(body)
    toy.transformer_2 = Net()
    for net in (toy.transformer, toy.transformer_2):
        net.register_forward_hook(lambda *_: calls.append(1))
        net.inner.register_forward_hook(lambda *_: calls.append(0))
    runs = Runs(toy, Arguments(toy, TraceRequest()))
    kinds = Counter(program.calls[0].what for program in runs.base.programs)
    assert kinds["transformer_2"] >= 3
    assert (kinds["transformer"] == 1) if boundary == 990 else (kinds["transformer"] >= 3)
    calls.clear()
    assert len(runs.at_steps(24).programs) == 24
    assert calls.count(1) == 24 and calls.count(0) == 0  # called, and nothing inside


def _by_list(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    return toy.transformer(x, t, torch.tensor(text.tolist())) * (1.0 + sum(text.tolist()))


def _momentum(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    state.momentum = 0.5 * state.momentum + toy.transformer(x, t, text)
    return state.momentum


def _noise(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    return toy.transformer(x, t, text) + torch.randn(x.shape, generator=state.generator)


def _branch(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    output = toy.transformer(x, t, text)
    return 2 * output if output.mean() > 1e9 else output


def _random(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    """Another operator in every call of the pipeline."""
    state.calls = toy.calls = getattr(toy, "calls", 0) + 1
    output = toy.transformer(x, t, text)
    return output.sin() if (state.calls - 1) // 4 % 2 else output


def _length(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    return toy.transformer(x, t, text) if state.length % 2 else toy.transformer(x, t, text).sin()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_momentum, "aten.add.Tensor reads for the sampler's input changes with the step and the request"),
        (_noise, r"made by aten.randn.generator"),
        (_branch, r"step 0 reads what depends on the latents by .item\(\)"),
        (_random, r"step \d runs other operators with another"),
        (lambda toy, x, t, text, state: toy.transformer(x, t, torch.ones(4)), "follows the prompt"),
        (lambda toy, x, t, text, state: -x, "none of which calls a network"),
    ],
    ids=["momentum", "noise", "branch", "random", "no-prompt", "no-network"],
)  # fmt: skip
def test_loops_that_cannot_be_traced_are_refused_by_name(body: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        trace_pipeline(Toy(body))


def test_operators_that_follow_the_length_of_the_prompt_are_told() -> None:
    trace = trace_pipeline(Toy(_length))
    assert (trace.text, trace.text_slots) == ("free", ())


def test_values_that_leave_through_python_are_conditions_or_refused() -> None:
    """Numbers of a list become constants of the program; they follow the prompt, and so show as conditions."""
    trace = trace_pipeline(Toy(_by_list))
    assert {slot.argument for slot in trace.role("condition")} >= {"text"}


def test_samplers_that_are_stepped_twice_are_refused() -> None:
    toy = Toy()
    toy.times = 2
    with pytest.raises((UnsupportedError, InputError), match=r"FlowMatchEulerDiscreteScheduler|index"):
        trace_pipeline(toy)


def test_latents_that_are_changed_between_steps_are_refused() -> None:
    toy = Toy()
    toy.after = lambda toy, x, state: 0.9 * x
    with pytest.raises(UnsupportedError, match="changes the latents between two steps"):
        trace_pipeline(toy)


def test_arguments_that_the_pipeline_has_not_are_refused() -> None:
    with pytest.raises(UsageError, match="takes no height"):
        trace_pipeline(Toy(), TraceRequest(height=8))
    with pytest.raises(UsageError, match="takes no argument 'speed'"):
        trace_pipeline(Toy(), TraceRequest(arguments={"speed": 2}))


def test_shapes_that_the_pipeline_refuses_are_told_in_its_words() -> None:
    with pytest.raises(InputError, match=r"WanPipeline refuses its arguments: .*height.*divisible by 16"):
        trace_pipeline(tiny_pipeline("wan"), TraceRequest(height=33, width=48, frames=9))


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 57)])
def test_shapes_that_the_pipeline_rounds_are_told(height: int, width: int) -> None:
    with pytest.raises(InputError, match=rf"makes 48x32 where {width}x{height} .*→ --width 48 --height 32"):
        trace_pipeline(tiny_pipeline("qwen-image"), TraceRequest(height=height, width=width))


def test_in_place_writes_are_seen() -> None:
    """A buffer that is written to in each step, and read whole."""

    def body(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
        buffer = torch.zeros(1, 5, 4)
        buffer[:, :3] = x
        buffer[:, 3:] = text
        return toy.transformer(buffer, t, text)[:, :3]

    assert trace_pipeline(Toy(body)).error < 1e-5


def half(toy: Toy, dtype: torch.dtype = torch.bfloat16) -> Toy:
    toy.transformer.to(dtype)
    toy.text_encoder.to(dtype)
    return toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_a_replay_may_deviate_by_follows_from_the_dtype(dtype: torch.dtype) -> None:
    toy = half(Toy(), dtype)
    runs = Runs(toy, Arguments(toy, TraceRequest()))
    assert precision(runs.base) == dtype
    allowed = {torch.float32: TOLERANCE, torch.float16: ROUNDINGS * 2**-10, torch.bfloat16: ROUNDINGS * 2**-7}
    assert tolerance(dtype) == allowed[dtype]
    assert trace_pipeline(toy).error <= allowed[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hides_no_wrong_trace(dtype: torch.dtype) -> None:
    """What is refused in fp32 is refused, although roundings are larger: latents that are rounded are no others."""
    changed = half(Toy(), dtype)
    changed.after = lambda toy, x, state: 0.99 * x
    with pytest.raises(UnsupportedError, match="changes the latents between two steps"):
        trace_pipeline(changed)
    for body in (_momentum, _branch, _random):
        with pytest.raises(UnsupportedError):
            trace_pipeline(half(Toy(body), dtype))
    with pytest.raises(UnsupportedError, match=r"guidance scales differ by .*, 1.0e-06 allowed"):
        trace_pipeline(half(Guided(_curved), dtype))


class Guided(Toy):
    """One that is called with a guidance scale."""

    def __call__(
        self, prompt: str, num_inference_steps: int = 4, generator: Any = None, guidance_scale: Any = 5.0
    ) -> Any:
        self.scale = guidance_scale
        return super().__call__(prompt, num_inference_steps, generator)


def _curved(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
    """Guidance that is no straight line in its scale, by 0.8 % of the latents."""
    return toy.transformer(x, t, text) * (1 + 0.02 * toy.scale**1.5)


def test_one_half_tensor_makes_no_pipeline_half() -> None:
    """Latents and outputs say what precision a loop has, and so what a wrong guidance may hide in."""

    def body(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
        return _curved(toy, x, t.bfloat16(), text, state)

    toy = Guided(body)
    assert precision(Runs(toy, Arguments(toy, TraceRequest())).base) == torch.float32
    with pytest.raises(UnsupportedError, match=r"latents differ by .*, 1.0e-04 allowed"):
        trace_pipeline(toy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("usual", "other"), [(999, 984), (999.0, 998.5)])
def test_an_argument_without_effect_must_be_the_same(dtype: torch.dtype, usual: float, other: float) -> None:
    """Whole numbers exactly, others to 1e-4, whatever the precision of the rest."""

    def body(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
        checked = state.generator.initial_seed() == 77
        return toy.transformer(x, torch.tensor(other if checked else usual), text)

    toy = half(Toy(body), dtype)
    toy.transformer.rate = 0.0
    with pytest.raises(UnsupportedError, match=r"the first difference is transformer\.t at step 0"):
        trace_pipeline(toy)


def test_latents_that_overflow_are_told() -> None:
    large = half(Toy(lambda toy, x, t, text, state: toy.transformer(x, t, text) * 6e4 * 6e4), torch.float16)
    with pytest.raises(UnsupportedError, match="not finite behind step 0 in float16 → --dtype bf16 or fp32"):
        trace_pipeline(large)


def test_timesteps_that_were_rounded_are_a_line_of_few_digits() -> None:
    """FLUX in bf16 rounds its timesteps, divides them by 1000, and rounds again; all are reproduced to the bit."""
    times = torch.linspace(1000, 17, 50)
    rounded = (times.bfloat16() / 1000).tolist()
    few = slice(None, None, 12)
    line = fitted_line("timestep", times[few].tolist(), rounded[few], "t", dtypes=[torch.bfloat16])
    assert line == Line("timestep", 0.001, 0.0, torch.bfloat16, torch.bfloat16)
    own = line.factor * times.bfloat16().float() + line.offset
    assert own.bfloat16().tolist() == rounded
    direct = fitted_line("timestep", times.tolist(), times.half().tolist(), "t", dtypes=[torch.float16])
    assert direct == Line("timestep", 1.0, 0.0, None, torch.float16)


def test_a_curve_is_no_line_in_half_precision_either() -> None:
    times = torch.linspace(1000, 17, 20)
    for curve in ((times / 1000) ** 1.2, times / 1000 + 0.004 * (20 * times / 1000).sin()):
        for dtype in (torch.bfloat16, torch.float16):
            with pytest.raises(UnsupportedError, match="t is no straight line in the timestep"):
                fitted_line("timestep", times.tolist(), curve.to(dtype).tolist(), "t", dtypes=[dtype])


def test_a_line_that_was_rounded_is_rounded_in_its_slot_though_that_is_fp32() -> None:
    """t / 1000 in bf16, given to a network in fp32."""

    def body(toy: Any, x: Tensor, t: Tensor, text: Tensor, state: Any) -> Tensor:
        return toy.transformer(x, (t.bfloat16() / 1000).float(), text)

    toy = half(Toy(body))
    traced = trace_runs(toy, TraceRequest(steps=6))
    (slot,) = traced.trace.role("column")
    assert slot.dtype == "float32"
    times = [row.timestep or 0.0 for row in traced.trace.states[0].table.rows[:-1]]
    line = fitted_line("timestep", times, slot.column, slot.name, dtypes=[torch.bfloat16])
    program = traced.runs.base.programs[-1]
    network = Network(toy.transformer, traced.trace.trunks[0])
    (k,) = (k for k, value in enumerate(program.values) if traced.named.name(0, k) == slot.name)
    made = Body(program, {k: line}, network, branches=False)
    seen: list[Tensor] = []
    toy.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["t"]), with_kwargs=True)
    one, x = torch.ones(1), torch.zeros(1, 3, 4)
    for time, want in zip(times, slot.column):
        made(x, torch.tensor([time]), one, None, {})
        assert float(seen[-1]) == want


class Scaled(nn.Module):
    """Multiplies by weights."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights


class Small(nn.Module):
    """A block leaves 1.3·2⁻¹⁹ of a number; the head makes a part of the output of it."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scaled(1.3 * 2**-19, 1.5)])
        self.head = Scaled(part * 2**19, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_trunk_in_half_precision_may_be_off_by_one_rounding() -> None:
    """A stream of 2⁻¹⁹ is 1 % off where 1 comes before it: by less than a rounding of the output, or by more."""
    call = {"x": torch.ones(1, 2, dtype=torch.bfloat16)}
    trunk = find_trunk("net", Small(0.1).bfloat16(), [call])
    assert trunk.streams == (("head", "0"),)
    assert 2e-5 < trunk.error <= 2**-7
    assert "the output differs by 9.6e-03" in find_trunk("net", Small(10.0).bfloat16(), [call]).reason
    assert "the output differs by" in find_trunk("net", Small(0.1), [{"x": torch.ones(1, 2)}]).reason


def test_a_check_in_half_precision_is_said_to_be_of_each_step() -> None:
    trace = trace_pipeline(half(Toy()))
    assert trace.dtype == "bfloat16"
    assert "each step in bfloat16 agrees to" in shown(trace)
    full = trace_pipeline(Toy())
    fields = [msgspec.json.decode(json_bytes(each)) for each in (trace, full)]
    assert ["dtype" in each for each in fields] == [True, False]  # what is fp32 is written as before
    assert "latents agree to" in shown(full)


def shown(trace: Trace) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(trace_table(trace))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_a_recording_ends_where_it_is_told_to() -> None:
    toy = Toy()
    recorder = Recorder(toy.components, last_step=2)
    with torch.no_grad(), recorder() as tape:
        toy("a bird")
    assert tape.steps == 2
