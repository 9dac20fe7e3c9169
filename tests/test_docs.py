"""README.md and docs/: generated parts are up to date, commands parse, links lead somewhere, Python runs, and no figure
is written by hand."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import make_docs
import pytest
from PIL import Image, ImageChops
from record import read_results

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.reports import stored_kept, stored_report
from lemica_trt.cli.main import main
from lemica_trt.ir.resources import load_profile
from lemica_trt.models.load import revision_of
from lemica_trt.report import CONTACT_SHEET, SCHEDULES

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*make_docs.pages(), ROOT / "CONTRIBUTING.md"]
}
EVERYTHING = "\n".join(PAGES.values())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _lines(text: str) -> list[str]:
    """Lines of the fenced blocks that are commands, continuation lines joined, comments cut."""
    blocks = (body.replace("\\\n", " ") for language, body in FENCE.findall(text) if not language)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


COMMANDS = sorted({line for line in _lines(EVERYTHING) if line.startswith("lemica-trt ")})
SCRIPTS = sorted({line for line in _lines(EVERYTHING) if line.startswith("python ")})


@pytest.mark.parametrize("page", PAGES)
def test_generated_parts_are_up_to_date(page: str) -> None:
    fresh = make_docs.rendered(PAGES[page], read_results())
    assert fresh == PAGES[page], "run python tools/make_docs.py"


def test_every_kind_of_part_is_on_some_page() -> None:
    assert {name for _, name, _ in make_docs.PART.findall(EVERYTHING)} == set(make_docs.PARTS)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out/tiny", "out/repository", "work"):
        (tmp_path / folder).mkdir(parents=True)
    _, name, *arguments = shlex.split(line)
    with main.commands[name].make_context(name, arguments) as context:
        assert context.command is main.commands[name]


def test_the_main_commands_are_shown() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {
        "build",
        "run",
        "inspect",
        "plan",
        "verify",
        "calibrate",
        "triton",
    }


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_exist_and_have_the_flags(line: str) -> None:
    _, script, *arguments = shlex.split(line)
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", "\n".join(_lines(EVERYTHING)), re.MULTILINE))
    assert targets == {"demo", "test", "peers"}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", FENCE.sub("", PAGES[page]))
    for link in links:
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), f"{page}: {link}"
        assert not anchor or anchor in _anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    for page in set(PAGES) - {"README.md"}:
        assert f"]({page})" in PAGES["README.md"], page


def _pinned(package: str) -> str:
    return next(
        line.partition("==")[2].partition(";")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith(f"{package}==")
    )


def test_pictures_are_those_of_the_values_beside_them(tmp_path: Path) -> None:
    """What `python tools/make_docs.py --pictures` drew, drawn again: to the pixel."""
    for package in ("matplotlib", "pillow"):
        if version(package) != _pinned(package):
            pytest.skip(f"the pictures were drawn with {package} {_pinned(package)}, here is {version(package)}")
    make_docs.draw_pictures(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs").glob("*.png"))
    for name in drawn:
        with Image.open(tmp_path / name) as fresh, Image.open(ROOT / "docs" / name) as there:
            same = fresh.size == there.size and ImageChops.difference(fresh.convert("RGB"), there.convert("RGB"))
            assert same and same.getbbox() is None, f"{name}: run python tools/make_docs.py --pictures"


def test_pictures_are_of_the_bundled_model_as_it_is() -> None:
    bundle = Bundle.open(make_docs.DRAWN)
    profile = load_profile("cogvideox-tiny")
    assert bundle.manifest.revision == revision_of(profile)
    assert (bundle.manifest.profile.shape, bundle.manifest.profile.sampling) == (profile.shape, profile.sampling)
    assert {*bundle.plans} == {"uncached", *(f"b{budget}" for budget in make_docs.BUDGETS)}
    report, kept = stored_report(bundle), stored_kept(bundle)
    assert report is not None and kept is not None and not report.failures()
    assert report.manifest_digest == kept.clips.manifest_digest == bundle.digest
    assert all(f"](docs/{name})" in PAGES["README.md"] for name in (CONTACT_SHEET, SCHEDULES))


FIGURE = re.compile(r"(?<![\w.])\d[\d.]*\s?(dB|ms|[kMG]B|fps|×(?!\d))(?!\w)")


@pytest.mark.parametrize("page", PAGES)
def test_measured_figures_come_from_results(page: str) -> None:
    by_hand = re.sub(r"`[^`]*`", "", FENCE.sub("", make_docs.PART.sub("", PAGES[page])))
    assert not FIGURE.search(by_hand), FIGURE.search(by_hand)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python\n" in text])
def test_python_runs(
    page: str,
    built: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tiny").symlink_to(built[0])
    for language, body in FENCE.findall(PAGES[page]):
        if language == "python":
            exec(compile(body, page, "exec"), {})
    if page == "README.md":
        assert (tmp_path / "clip.mp4").stat().st_size > 500
