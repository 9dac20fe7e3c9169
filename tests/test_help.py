"""What the command line says of itself: sections, examples, true defaults, 80 columns, hints that lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from lemica_trt.cli.command import HELP_ALL, OUTPUT, SECTIONS, Command, Flag, kebab
from lemica_trt.cli.hints import COMMANDS, OF_COMMANDS, OPTIONS
from lemica_trt.cli.main import SECTIONS as COMMAND_SECTIONS
from lemica_trt.cli.main import main
from lemica_trt.ir.profile import CalibrationSettings
from lemica_trt.ir.resources import load_profile

pytestmark = pytest.mark.null

GOLDEN = Path(__file__).parent / "golden/bundle"


def typed(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_examples_that_parse_and_options_in_sections(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = main.commands[name]
    assert isinstance(command, Command) and command.examples, name
    monkeypatch.chdir(tmp_path)
    for folder in ("out/tiny", "out/video", "out/repository", "work"):
        (tmp_path / folder).mkdir(parents=True)
    for example in command.examples:
        first, *arguments = shlex.split(example)
        with main.commands[first].make_context(first, arguments):
            pass
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert isinstance(option, Flag) and option.help and option.help.endswith((".", ".npy")), option.name
            assert option.group in {None, OUTPUT, *SECTIONS}, option.name
    assert sum(name in names for names in COMMAND_SECTIONS.values()) == 1


@pytest.mark.parametrize("name", ["", *main.commands])
def test_help_fits_80_columns(name: str) -> None:
    for flag in ("--help", "--help-all") if name else ("--help",):
        done = typed(*filter(None, [name]), flag)
        assert done.exit_code == 0 and max(map(len, done.stdout.splitlines())) <= 80, done.stdout
        assert "…" not in re.sub(r"\[,\w+…\]|,…", "", done.stdout) or name, "a line of the list of commands is cut"


def test_short_help_is_what_a_newcomer_needs_and_says_what_it_leaves_out() -> None:
    short, everything = (typed("build", flag).stdout for flag in ("--help", "--help-all"))
    assert len(short.splitlines()) < 90 < len(everything.splitlines())
    hidden = [o for o in main.commands["build"].params if isinstance(o, Flag) and o.advanced and not o.hidden]
    assert f"{len(hidden)} more options: lemica-trt build --help-all" in " ".join(short.split())
    assert "--rollouts INTEGER" not in short and "--rollouts INTEGER" in everything
    assert "--num-frames" not in short and "(also --num-frames)" in everything
    assert [line for line in short.splitlines() if line in {f"{name}:" for name in (*SECTIONS, OUTPUT)}] == [
        f"{name}:" for name in ("Model", "Budget", "Method", "Calibration", "Engines", "Output")
    ]


def test_defaults_are_those_of_the_model_that_is_named() -> None:
    profile = load_profile("cogvideox-tiny")
    for arguments in (("--model", "cogvideox-tiny", "--help-all"), ("--help-all", "--model=cogvideox-tiny")):
        shown = " ".join(typed("build", *arguments).stdout.split())
        assert f"[default: {profile.sampling.guidance_scale:g}, from the profile]" in shown
        assert f"[default: {profile.shape.frames}, from the profile]" in shown
    shown = " ".join(typed("build", "--model", "nobody/nothing", "--help-all").stdout.split())
    assert f"one sampling each. [default: {CalibrationSettings().samples}, or the profile's]" in shown
    assert "from the profile]" not in shown


def test_names_of_other_tools_are_the_same_options() -> None:
    assert (kebab("--memPoolSize"), kebab("--num_frames"), kebab("--warmUp")) == (
        "--mem-pool-size",
        "--num-frames",
        "--warm-up",
    )
    command = main.commands["build"]
    others = ["--num_frames", "9", "--numInferenceSteps=8", "--cfg-scale", "3", "--memPoolSize", "workspace:1G"]
    with command.make_context("build", others) as context:
        given = context.params
    assert (given["frames"], given["denoising_steps"], given["guidance_scale"]) == (9, 8, 3.0)
    assert given["mem_pool_size"] == "workspace:1G"
    with main.commands["run"].make_context("run", ["b", "-o", "x.npy", "--", "--aPrompt"]) as context:
        assert context.params["prompt"] == "--aPrompt"


def test_hints_lead_to_commands_and_options_that_there_are() -> None:
    texts = [
        *COMMANDS.values(),
        *OPTIONS.values(),
        *(text for hints in OF_COMMANDS.values() for text in hints.values()),
    ]
    for name in re.findall(r"lemica-trt ([a-z]+)", " ".join(texts)):
        assert name in main.commands, name
    options = {name for command in main.commands.values() for p in command.params for name in p.opts}
    for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(texts)):
        assert name in options | {"--version", "--help"}, name
    for name, hints in OF_COMMANDS.items():
        known = {option.lstrip("-") for p in main.commands[name].params for option in p.opts if option[0] == "-"}
        assert not known & set(hints), name


@pytest.mark.parametrize(("arguments", "fix"), [
    (["generate"], 'lemica-trt run BUNDLE "a prompt" --output clip.mp4'),
    (["Convert", "--model", "x"], "lemica-trt build --model MODEL"),
    (["build", "cogvideox-tiny"], "lemica-trt build --model cogvideox-tiny"),
    (["build", "--saveEngine=x"], "engines are written into the bundle: --output DIR"),
    (["run", "b", "a", "red", "ball", "-o", "x.gif"], "put the prompt in quotes"),
    (["run", "b", "a ball", "--size", "64"], "--shape FxHxW, one of the bundle's"),
    (["build", "--qqqq"], "see 'lemica-trt build --help'"),
])  # fmt: skip
def test_what_is_not_there_gets_a_hint(arguments: list[str], fix: str) -> None:
    done = typed(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f" → {fix}" in done.stderr and done.stderr.count("\n") == 1
    if "--saveEngine=x" in arguments:
        assert "no option --saveEngine " in done.stderr


def test_errors_are_json_too() -> None:
    done = typed("inspect", GOLDEN, "--plan", "nonesuch", "--json")
    found = json.loads(done.stdout)
    error = found.pop("error")
    assert found == {"schema_version": 1}
    assert (error["kind"], error["exit_code"], done.exit_code) == ("UsageError", 2, 2)
    assert done.stderr == f"lemica-trt: {error['what']} → {error['fix']}\n"
    assert json.loads(typed("build", "--qqqq", "--json").stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize(("words", "incomplete", "offered"), [
    (["build", "--model"], "cogvideox-t", ["cogvideox-tiny"]),
    (["build", "--method"], "lemica,stock:u", ["lemica,stock:unipc"]),
    (["build", "--effort"], "th", ["thorough"]),
    (["build", "--backend"], "onnx", ["onnxruntime"]),
    (["inspect", str(GOLDEN), "--plan"], "unc", ["uncached"]),
    (["run", str(GOLDEN), "a prompt", "--plan"], "unc", ["uncached"]),
    (["run", "nowhere", "a prompt", "--plan"], "", []),
    (["build", "--model"], "my/fold", ["my/fold"]),
    (["ins"], "", ["build"]),
])  # fmt: skip
def test_names_are_completed(words: list[str], incomplete: str, offered: list[str]) -> None:
    items = ShellComplete(main, {}, "lemica-trt", "_LEMICA_TRT_COMPLETE").get_completions(words, incomplete)
    found = [item.value for item in items]
    assert found == offered or (words == ["ins"] and offered[0] in found)


def test_help_all_is_of_one_call() -> None:
    typed("build", "--help-all")
    with main.commands["build"].make_context("build", []) as context:
        assert HELP_ALL not in context.meta
