"""The report page: what stands on it, that nothing gets out of or into it, and that it can be read."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from report_data import error_graph, plan, quality

from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.ir.budget import FrontRow, StepTimes
from lemica_trt.ir.engine import EngineBuild, EngineEntry, EngineKey
from lemica_trt.ir.kept import HeldOut, Kept, KeptClip, KeptClips, KeptRun
from lemica_trt.ir.report import Agreement, BundleSummary, GraphCheck, Timing, VerifyReport
from lemica_trt.ir.resources import load_profile
from lemica_trt.ir.trials import Trial, TrialTable, TrialTables
from lemica_trt.report.charts import LETTER, front_chart
from lemica_trt.report.page import WEB, PageFacts, page_html
from lemica_trt.report.ways import ways_of

pytest.importorskip("jinja2", reason="Jinja is not installed: pip install 'lemica-trt[report]'")

pytestmark = pytest.mark.null

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">'\"&{{7*7}}"
STEPS = (0, 1, 4, 8, 12)
DIGEST = "ab" * 32
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def picture(shade: int) -> bytes:
    data = io.BytesIO()
    frames = np.full((3 * 16, 24, 3), shade, np.uint8)
    Image.fromarray(frames).save(data, "WEBP", lossless=True)
    return data.getvalue()


def kept(prompt: str) -> Kept:
    clips = []
    for sample in (1, 0):
        name = f"clips/{sample}-"
        runs = [KeptRun(method="uncached", full_steps=tuple(range(20)), num_steps=20, psnr=None,
                        frames=f"{name}uncached.webp", difference=None)]  # fmt: skip
        for method, steps, psnr in (("plan", STEPS, 40.0), ("lemica", (0, 2, 5, 9, 13), 30.0)):
            runs.append(KeptRun(method=method, full_steps=steps, num_steps=20, psnr=psnr + sample, flip=0.0123,
                                frames=f"{name}{method}.webp", difference=f"{name}{method}-difference.webp",
                                flip_map=f"{name}{method}-flip.webp"))  # fmt: skip
        clips.append(KeptClip(sample=sample, prompt=prompt, seed=7 + sample, runs=tuple(runs)))
    value = KeptClips(manifest_digest=DIGEST, plan="b5", samples=tuple(HeldOut(prompt=f"{prompt} {n}", seed=7 + n)
                      for n in range(2)), clips=tuple(clips), source=(3, 16, 24), frames=(0, 1, 2), height=16, width=24,
                      lossless=True)  # fmt: skip
    return Kept(value, {path: picture(40 * number % 256) for number, path in enumerate(value.files)})


def timing(name: str, budget: int, total: float) -> Timing:
    return Timing(plan=name, budget=budget, full_step=0.1, skipped_step=None, total=total, overhead=0.0, ratio=1.0,
                  speedup=2.0 / total)  # fmt: skip


def report(**changes: Any) -> VerifyReport:
    few = quality(5, "fewer-steps", 28.0, 2)
    fields: dict[str, Any] = dict(
        manifest_digest=DIGEST, samples=2, machine="a machine", backend="onnxruntime 1.2 cpu", dtype="fp32",
        graphs=(GraphCheck(role="full", difference=1e-6, scale=2.0),),
        agreement=tuple(
            Agreement(plan=name, against="torch", difference=1e-6, psnr=99.0) for name in ("b5", "b9", "all")
        ),
        quality=(quality(5, "plan", 40.5, 2), quality(5, "lemica", 30.5, 2), few, quality(9, "plan", 50.0, 1)),
        timing=(timing("all", 20, 2.0), timing("b9", 9, 0.9), timing("b5", 5, 0.5)),
        steps=StepTimes(full=0.1, skipped=0.01, rest=0.0),
    )  # fmt: skip
    return VerifyReport(**{**fields, **changes})


def facts(text: str = "a red circle", **changes: Any) -> PageFacts:
    plans = (plan(STEPS, 20, "b5", "fitted"), plan(tuple(range(0, 18, 2)), 20, "b9"), plan(tuple(range(20)), 20, "all"))
    key = EngineKey(backend="onnxruntime", version="1.2", target="cpu", dtype="fp32", graphs_digest="0", options={})
    build = EngineBuild(seconds=61.0, host_memory=3_000_000_000, device_memory=5_000_000_000,
                        precisions={"fp32": 12}, attentions=6, fused_attention=5)  # fmt: skip
    bundle = BundleSummary(
        profile=load_profile("cogvideox-tiny"), revision=text, dtype="fp32", plans=plans, default_plan="b5",
        engines=(EngineEntry(key=key, files={"full": "a.onnx", "skip": "b.onnx"}, builds={"full": build}),),
        size=12_000_000, files=17, versions={"torch": text}, pictures={},
    )  # fmt: skip
    trials = TrialTables(
        tables=(TrialTable(budget=5, samples=1, trials=(Trial(label=text, full_steps=STEPS, snr=(33.3,)),)),)
    )
    made = PageFacts(bundle, DIGEST, report(), kept(text), error_graph(20, 7), trials, ())
    return made._replace(**changes)


class Page(HTMLParser):
    """Elements with their attributes, and text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside[-1:] == [tag]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        self.text += "" if self._inside else data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def words(text: str) -> str:
    return " ".join(Page(text).text.split())


def test_what_stands_on_it() -> None:
    text = words(page_html(facts()))
    for expected in (
        "cogvideox-tiny in 5 of 20 steps", "Verified: engines", "a machine, onnxruntime 1.2 cpu", "4.0×", "40.5 dB",
        "same sampler, 5 steps", "LeMiCa", "≈ 3.08×", "5 of 6 fused", "12 layers fp32", "3.0 GB, 5.0 GB GPU",
        "loaded as exported", "33.3", DIGEST, "12.0 MB in 17 files", "worst", "best", "a red circle – kept",
    ):  # fmt: skip
        assert expected in text, expected
    assert text.index("a red circle 0") < text.index("a red circle 1")  # 40.25 dB, then 40.75


def test_each_clip_the_worst_first() -> None:
    falling = msgspec.structs.replace(quality(5, "plan", 40.5, 2), each_psnr=(44.0, 37.0))
    text = words(page_html(facts(report=report(quality=(falling,)))))
    assert text.index("a red circle 1") < text.index("a red circle 0")


def test_hostile_words_stay_words() -> None:
    text = page_html(facts(HOSTILE))
    page = Page(text)
    assert len(page.of("script")) == 2 and not page.of("img") and not page.of("iframe")
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert "javascript:" not in "".join(filter(None, attributes.values())).lower()
    assert HOSTILE in page.text and "{{7*7}}" in page.text
    data = re.search(r'id="clip-data">(.*?)</script>', text, re.DOTALL)
    assert data is not None and json.loads(data[1])["clips"][0]["prompt"] == HOSTILE


def test_nothing_is_loaded_and_nothing_else_runs() -> None:
    text = page_html(facts(HOSTILE))
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    style, script = ((WEB / name).read_text() for name in ("page.css", "page.js"))
    assert "url(" not in style and "@import" not in style and "fetch" not in script and "http" not in script
    (policy,) = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for kind, source in (("style", style), ("script", script)):
        assert f"<{kind}>{source}</{kind}>" in text
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_every_control_has_a_name_and_every_region_can_be_scrolled() -> None:
    text = page_html(facts())
    page = Page(text)
    labelled = {attributes["for"] for attributes in page.of("label") if "for" in attributes}
    wrapped = re.findall(r"<label>(?:(?!</label>).)*?<(?:input|select)[^>]*>", text, re.DOTALL)
    controls = [*page.of("input"), *page.of("select")]
    assert len(controls) == len(wrapped) + len([c for c in controls if c.get("id") in labelled])
    for attributes in page.of("div"):
        if attributes.get("class") == "wide":
            assert attributes["tabindex"] == "0" and attributes["aria-label"]
    assert all(attributes.get("aria-label") for tag in ("canvas", "svg") for attributes in page.of(tag))
    assert page.of("html")[0]["lang"] == "en" and page.of("fieldset") and text.count("<h1>") == 1


def schemes() -> dict[str, dict[str, str]]:
    """Colours of the light and the dark scheme, out of the style."""
    blocks = re.findall(r":root \{(.*?)\}", (WEB / "page.css").read_text(), re.DOTALL)
    assert len(blocks) == 2
    return {
        name: dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for name, block in zip(("light", "dark"), blocks)
    }


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's contrast ratio."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = schemes()[scheme]
    assert len(colours) == 10
    for text in ("ink", "quiet", "accent", "good", "bad"):
        for ground in ("back", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for drawn in ("mark", "accent"):  # what is no text: 3 : 1
        assert contrast(colours[drawn], colours["panel"]) >= 3, drawn
    styled = re.sub(r":root \{.*?\}", "", (WEB / "page.css").read_text(), flags=re.DOTALL)
    texts = set(re.findall(r"(?:^|[ ;{])(?:color|fill): var\(--([a-z]+)\)", styled))
    assert texts <= {"ink", "quiet", "accent", "good", "bad", "panel", "bar", "mark"}


def test_what_was_not_measured_is_not_shown() -> None:
    text = words(page_html(facts(report=None, kept=None, graph=None, trials=None)))
    assert "Not verified" in text and "b9" in text and "Provenance" in text
    for absent in ("Clips, side by side", "Quality and cost", "held-out", "Error graph", "Candidates", "Agreement"):
        assert absent not in text, absent
    assert "There is no FLIP map" in words(page_html(facts(kept=without_flip())))


def without_flip() -> Kept:
    data = kept("a red circle")
    clips = tuple(
        msgspec.structs.replace(
            clip, runs=tuple(msgspec.structs.replace(run, flip=None, flip_map=None) for run in clip.runs)
        )
        for clip in data.clips.clips
    )
    return Kept(msgspec.structs.replace(data.clips, clips=clips), data.pictures)


def test_failures_and_later_changes_are_said_first() -> None:
    failed = report(graphs=(GraphCheck(role="full", difference=1.0, scale=2.0),))
    assert "Verification failed: graph full differs from PyTorch by 1.0e+00" in words(page_html(facts(report=failed)))
    assert "changed after it was verified" in words(page_html(facts(digest="cd" * 32)))
    assert "changed after it was verified" not in words(page_html(facts()))


def test_labels_of_the_front_lie_on_no_other() -> None:
    rows = tuple(quality(b, "plan", 30.0 + b, 2) for b in (5, 6, 7, 9))
    made = report(
        quality=(*rows, quality(5, "lemica", 35.1, 2), quality(5, "fewer-steps", 35.0, 2)),
        timing=(timing("all", 20, 2.0), *(timing(f"b{b}", b, 0.1 * b) for b in (5, 6, 7, 9))),
    )
    front = FrontRow(plan="b5", method="fitted", budget=5, psnr=36.0, psnr_low=None, psnr_p5=30.0, psnr_worst=30.0,
                     seconds=0.5, speedup=4.0, dominated=False)  # fmt: skip
    plans = facts().bundle.plans
    chart = front_chart(made, plans, ways_of(made, plans[0]), [front])
    assert chart is not None and len(chart["points"]) == 6 and chart["validation"]
    boxes = []
    for point in chart["points"]:
        x, y = point["label"]
        boxes.append((x, y - 12, x + LETTER * len(point["text"]), y + 3))
        assert x >= 0 and boxes[-1][2] <= chart["width"] and 0 < point["y"] < chart["height"]
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in combinations(boxes, 2))


def test_the_same_facts_are_the_same_page() -> None:
    assert page_html(facts()) == page_html(facts())


def test_without_jinja_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lemica_trt.report import page as module

    module._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lemica-trt\[report\]'"):
        page_html(facts())


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_runs_it(scheme: str, tmp_path: Path) -> None:
    """The script has run under the policy, hostile words have not, and something was drawn in the right scheme."""
    (tmp_path / "page.html").write_text(page_html(facts(HOSTILE)), encoding="utf-8")
    flags = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--enable-logging=stderr",
        "--window-size=400,1200", f"--blink-settings=preferredColorScheme={'01'[scheme == 'light']}",
    ]  # fmt: skip
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*flags, "--dump-dom", address], capture_output=True, text=True)
    page = Page(done.stdout)
    assert "right: plan b5, 41.0 dB, FLIP 0.0123" in page.text, done.stderr[-500:]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] == "cogvideox-tiny: 5 of 20 steps"
    assert "CONSOLE" not in done.stderr, "the page has an error, or the policy refused something"
    subprocess.run([*flags, f"--screenshot={tmp_path / 'page.png'}", address], capture_output=True, check=True)
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert f"#{bytes(pixels[2, 2]).hex()}" == schemes()[scheme]["back"]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
