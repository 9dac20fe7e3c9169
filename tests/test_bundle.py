"""The bundle: strict manifest, digests, and writing that is killed anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lemica_trt.bundle import reading
from lemica_trt.bundle.manifest import FileEntry, manifest_digest_line, plan_path, portable_source, require_relative
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import add_plan, change_plans, copy_bundle, move_bundle, write_bundle
from lemica_trt.core import files
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import InputError, IntegrityError, LemicaError, MissingDependencyError, UsageError
from lemica_trt.core.files import PART_BYTES, PartedDigest, parted_digests
from lemica_trt.core.values import json_bytes, write_bytes
from lemica_trt.ir.engine import EngineEntry, EngineKey
from lemica_trt.ir.graphs import EncoderSpec, GraphSet, GraphSpec, step_layout
from lemica_trt.ir.plan import PlanRow, StepPlan, check_plan, trunk_reads
from lemica_trt.ir.profile import Profile, Shape

pytestmark = pytest.mark.null

PROFILE = Profile(
    name="toy",
    family="toy",
    source="package:toy",
    dtype="fp32",
    text_length=4,
    shape=Shape(frames=1, height=8, width=8),
)
LAYOUT = step_layout(latent_shape=(4, 4), latent_history=1, output_history=1)
ROLES = ("combine", "full", "skip")


def plan_of(name: str = "default", skip: bool = True, guidance_scale: float = 3.0) -> StepPlan:
    middle = PlanRow(
        variant="skip",
        step=1,
        latents=(1.0,),
        outputs=(-0.5,),
        timestep=0.5,
        caches=trunk_reads(1.0),
    )
    return StepPlan(
        name=name,
        num_steps=2,
        guidance_scale=guidance_scale,
        rows=(
            PlanRow(variant="full", step=0, latents=(1.0,), timestep=1.0),
            *((middle,) if skip else ()),
            PlanRow(variant=None, step=2, latents=(1.0,), outputs=(-0.5,)),
        ),
        scheduler="Toy",
        sampler_digest="0" * 64,
        method="given",
    )


def graphs_of(*roles: str) -> GraphSet:
    graphs = (GraphSpec(role=role, file=f"onnx/{role}.onnx", inputs=(), outputs=(), opset=20) for role in roles)  # type: ignore[arg-type]
    return GraphSet(dtype="fp32", layout=LAYOUT, max_batch=2, graphs=tuple(graphs))


def entry_of(backend: str = "onnxruntime") -> EngineEntry:
    key = EngineKey(backend=backend, version="1", target="cpu", dtype="fp32", graphs_digest="0" * 64)
    return EngineEntry(key=key, files={role: f"onnx/{role}.onnx" for role in ROLES})  # type: ignore[misc]


def write(target: Path, content: str = "1", count: int = 0, **changes: Any) -> Bundle:
    """A bundle whose every file says `content`."""
    files: dict[str, Path | bytes] = {f"onnx/{role}.onnx": content.encode() * 1000 for role in ROLES}
    files["tokenizer/tokenizer.json"] = b"{}" + content.encode()
    files.update({f"more/{number:03}": content.encode() * 5000 for number in range(count)})
    arguments: dict[str, Any] = {
        "profile": PROFILE,
        "graphs": graphs_of(*ROLES),
        "plans": [plan_of("slow"), plan_of()],
        "default_plan": "default",
        "encoders": [EncoderSpec(tokenizer="tokenizer/tokenizer.json", length=4, pad_id=0)],
        "engines": [entry_of()],
        "files": files,
        "reports": {"report.html": content.encode()},
        "versions": {"content": content},
    }
    return write_bundle(target, **{**arguments, **changes})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- reading


def test_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "b")
    bundle = Bundle.open(str(tmp_path / "new" / "b"))
    assert bundle.manifest == written.manifest
    assert bundle.plans == ("default", "slow")
    assert bundle.plan() == plan_of()
    assert bundle.plan("slow") == plan_of("slow")
    assert bundle.read_bytes("onnx/full.onnx") == b"1" * 1000
    assert bundle.file("onnx/full.onnx") == tmp_path / "new" / "b" / "onnx" / "full.onnx"
    assert bundle.engine() == bundle.engine("onnxruntime") == entry_of()
    bundle.check()
    assert names_in(tmp_path / "new") == ["b"]
    assert (bundle.path / "reports" / "report.html").read_bytes() == b"1"
    assert (bundle.path / "manifest.json").stat().st_mode & 0o777 == 0o644
    assert repr(bundle).endswith("/new/b': toy; plans default (default), slow; engines onnxruntime for cpu>")


def test_same_input_same_bytes(tmp_path: Path) -> None:
    """Whatever the order, the folder, the time and the environment."""
    write(tmp_path / "a")
    source = tmp_path / "source"
    source.write_bytes(b"1" * 1000)
    files = {f"onnx/{role}.onnx": source for role in reversed(ROLES)}
    write(
        tmp_path / "other" / "b",
        files={"tokenizer/tokenizer.json": b"{}1", **files},
        plans=[plan_of(), plan_of("slow")],
    )
    assert tree(tmp_path / "a") == tree(tmp_path / "other" / "b")
    assert str(tmp_path).encode() not in (tmp_path / "a" / "manifest.json").read_bytes()


def test_a_whole_number_where_a_float_is_meant_is_written_as_one(tmp_path: Path) -> None:
    """A pipeline's default guidance scale may be 3: the digest of the bundle is that of what is read from it."""
    profile = msgspec.structs.replace(PROFILE, sampling=msgspec.structs.replace(PROFILE.sampling, guidance_scale=3))
    bundle = write(tmp_path / "bundle", profile=profile, plans=[plan_of(guidance_scale=3)], default_plan="default")
    assert bundle.digest == bundle.manifest.digest
    assert '"guidance_scale": 3.0' in (bundle.path / "manifest.json").read_text()


def test_moved(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "link").symlink_to("b")
    Bundle.open(tmp_path / "b").check()
    Bundle.open(tmp_path / "link").check()
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "b").manifest.versions == {"content": "2"}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "b")


def damage_missing(folder: Path) -> None:
    (folder / "onnx/full.onnx").unlink()


def damage_short(folder: Path) -> None:
    (folder / "onnx/full.onnx").write_bytes(b"1" * 999)


def damage_bit(folder: Path) -> None:
    (folder / "onnx/full.onnx").write_bytes(b"1" * 999 + b"0")


def damage_link_out(folder: Path) -> None:
    shutil.move(folder / "onnx/full.onnx", folder.parent / "outside")
    (folder / "onnx/full.onnx").symlink_to(folder.parent / "outside")


def damage_folder_link_out(folder: Path) -> None:
    shutil.move(folder / "onnx", folder.parent / "outside")
    (folder / "onnx").symlink_to(folder.parent / "outside")


def damage_link_inside(folder: Path) -> None:
    (folder / "onnx/full.onnx").rename(folder / "onnx/renamed")
    (folder / "onnx/full.onnx").symlink_to("renamed")


def damage_folder(folder: Path) -> None:
    (folder / "onnx/full.onnx").unlink()
    (folder / "onnx/full.onnx").mkdir()


def damage_pipe(folder: Path) -> None:
    """Whoever opens it to read waits for ever."""
    (folder / "onnx/full.onnx").unlink()
    os.mkfifo(folder / "onnx/full.onnx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "onnx/full.onnx: expected a file of 1000 bytes, it is missing →"),
        (damage_short, "onnx/full.onnx: expected 1000 bytes, got 999 →"),
        (damage_bit, "onnx/full.onnx: expected SHA-256 .*…, got .*…: altered → copy the bundle again, or rebuild it"),
        (damage_link_out, "onnx/full.onnx: expected a file in the bundle, got a link → copy it with its content"),
        (damage_folder_link_out, "onnx/full.onnx: expected a file in the bundle, got a link →"),
        (damage_link_inside, "onnx/full.onnx: expected a file in the bundle, got a link →"),
        (damage_folder, "onnx/full.onnx: expected a file, got a folder, pipe or device →"),
        (damage_pipe, "onnx/full.onnx: expected a file, got a folder, pipe or device →"),
    ],
)
def test_damage_is_found_before_use(bundle: Bundle, damage: Callable[[Path], None], message: str) -> None:
    damage(bundle.path)
    bundle = Bundle.open(bundle.path)  # lazily: the manifest is whole
    bundle.plan()
    for use in (bundle.file, bundle.read_bytes):
        with pytest.raises(IntegrityError, match=message) as caught:
            use("onnx/full.onnx")
        assert caught.value.exit_code == 4
    with pytest.raises(IntegrityError):
        bundle.check()


def in_hub_cache(bundle: Bundle, cache: Path, below: str = ".") -> Path:
    """The bundle as `snapshot_download` of huggingface_hub leaves it: every file a link into `blobs`."""
    snapshot, blobs = cache / "models--a--b/snapshots/0123" / below, cache / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in bundle.path.rglob("*") if path.is_file()]:
        blob, link = blobs / hashlib.sha256(path.read_bytes()).hexdigest(), snapshot / path.relative_to(bundle.path)
        shutil.copy(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("below", [".", "bundles/one"])
def test_a_snapshot_in_the_cache_of_a_hub(bundle: Bundle, tmp_path: Path, below: str) -> None:
    snapshot = in_hub_cache(bundle, tmp_path / "hub", below)
    found = Bundle.open(snapshot)
    found.check()
    assert found.digest == bundle.digest
    assert found.read_bytes("onnx/full.onnx") == bundle.read_bytes("onnx/full.onnx")
    assert not any(path.is_symlink() for path in copy_bundle(found, tmp_path / "copy").path.rglob("*"))
    Bundle.open(tmp_path / "copy").check()
    for change in (lambda: add_plan(found, default="slow"), lambda: write(snapshot)):
        with pytest.raises(UsageError, match="got a snapshot in the cache of a hub → copy it"):
            change()


@pytest.mark.parametrize("target", ["outside", "blobs-too/x", "blobs/../x", "blobs/below/x"])
def test_links_of_a_snapshot_lead_into_its_blobs_only(bundle: Bundle, tmp_path: Path, target: str) -> None:
    snapshot = in_hub_cache(bundle, tmp_path / "hub")
    link = snapshot / "onnx/full.onnx"
    outside = Path(os.path.normpath(link.parent / "../../.." / target))
    outside.parent.mkdir(exist_ok=True)
    if not outside.exists():
        shutil.copy(bundle.path / "onnx/full.onnx", outside)
    link.unlink()
    link.symlink_to(f"../../../{target}")
    with pytest.raises(IntegrityError, match=r"onnx/full\.onnx: expected a file in the bundle, got a link"):
        Bundle.open(snapshot).file("onnx/full.onnx")
    blobs = tmp_path / "hub/models--a--b/blobs"
    blobs.rename(blobs.with_name("elsewhere"))
    blobs.symlink_to("elsewhere")
    with pytest.raises(IntegrityError):
        Bundle.open(snapshot)


def test_unlisted_files(bundle: Bundle) -> None:
    (bundle.path / "onnx" / "extra.onnx").write_bytes(b"")
    (bundle.path / "reports" / "later.json").write_bytes(b"")
    for name in (
        "onnx/extra.onnx",
        "reports/later.json",
        "../b/onnx/full.onnx",
        "/etc/hostname",
        "onnx",
        "manifest.json",
        "manifest.sha256",
        "",
    ):
        for use in (bundle.file, bundle.read_bytes):
            with pytest.raises(IntegrityError, match="not listed in the manifest"):
                use(name)
    with pytest.raises(IntegrityError, match=r"^onnx/extra\.onnx: not listed in the manifest"):
        bundle.check()
    (bundle.path / "onnx" / "extra.onnx").unlink()
    bundle.check()
    (bundle.path / "onnx" / "dangling").symlink_to("nowhere")
    with pytest.raises(IntegrityError, match="dangling: not listed"):
        bundle.check()


def test_an_altered_plan(bundle: Bundle) -> None:
    path = bundle.path / plan_path("slow")
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.7"))
    with pytest.raises(IntegrityError, match=r"plans/slow\.json: expected SHA-256"):
        bundle.plan("slow")
    with pytest.raises(UsageError, match="no plan 'fast' → use one of: default, slow"):
        bundle.plan("fast")


def forge(bundle: Bundle, manifest: bytes) -> Path:
    """Another manifest, with its digest."""
    (bundle.path / "manifest.json").write_bytes(manifest)
    (bundle.path / "manifest.sha256").write_bytes(manifest_digest_line(manifest))
    return bundle.path


def bucket(data: Any) -> Any:
    """The only shape bucket of a manifest."""
    (found,) = data["buckets"].values()
    return found


def edited(bundle: Bundle, edit: Callable[[Any], None]) -> Path:
    data = json.loads((bundle.path / "manifest.json").read_text())
    edit(data)
    return forge(bundle, json.dumps(data).encode())


def layout(**changes: Any) -> Callable[[Any], None]:
    return lambda data: bucket(data)["graphs"]["layout"].update(changes)


def tensors(role: str, inputs: list[Any], outputs: list[Any] | None = None) -> Callable[[Any], None]:
    """Other inputs and outputs (name, shape) of a graph."""

    def edit(data: Any) -> None:
        graph = next(graph for graph in bucket(data)["graphs"]["graphs"] if graph["role"] == role)
        for key, given in (("inputs", inputs), ("outputs", outputs or [])):
            graph[key] = [{"name": name, "dtype": "fp32", "shape": shape} for name, shape in given]

    return edit


def rename_file(name: str) -> Callable[[Any], None]:
    return lambda data: data["files"].update({name: data["files"].pop("onnx/skip.onnx")})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda data: data.update(format_version=5),
            "expected bundle format 4 or older, got 5 → pip install --upgrade",
        ),
        (lambda data: data.update(format_version=5, new="field"), "expected bundle format 4 or older, got 5"),
        (lambda data: data.update(format_version="1"), r"Expected `int`, got `str` - at `\$.format_version`"),
        (lambda data: data.pop("format_version"), "missing required field `format_version`"),
        (lambda data: data.update(new="field"), "unknown field `new`"),
        (lambda data: data["files"].pop("onnx/skip.onnx"), "files must list onnx/skip.onnx"),
        (lambda data: data["files"].pop("tokenizer/tokenizer.json"), "files must list tokenizer/tokenizer.json"),
        (lambda data: data["files"].pop("plans/slow.json"), "files must list plans/slow.json"),
        (rename_file("../skip.onnx"), "expected a relative path inside the bundle, got '../skip.onnx'"),
        (rename_file("/skip.onnx"), "expected a relative path inside the bundle, got '/skip.onnx'"),
        (rename_file("C:\\skip.onnx"), "expected a relative path inside the bundle"),
        (rename_file("reports/skip.onnx"), "reports/skip.onnx must not be listed"),
        (rename_file("manifest.sha256"), "manifest.sha256 must not be listed"),
        (lambda data: data["files"]["onnx/full.onnx"].update(sha256="A" * 64), "sha256 must be 64 hex digits"),
        (lambda data: data["files"]["onnx/full.onnx"].update(size=-1), "size must be at least 0"),
        (lambda data: data.update(default_plan="fast"), "default_plan must be one of plans, got 'fast'"),
        (lambda data: data.update(plans=["slow", "default"]), "plans must be sorted names"),
        (lambda data: data["buckets"]["1x8x8"].update(engines=[]), "engines must not be empty"),
        (lambda data: data["profile"].update(source="/home/me/model"), "source must not be an absolute path"),
        (lambda data: data["profile"].update(name="x\x1b]0;title\x07"), "got: a control character in line 1"),
        (lambda data: bucket(data)["shape"].update(fps=1 << 40), "shape.fps must be 1 … 1.04858e"),
        (
            lambda data: data["encoders"][0].update(length=10**12),
            "text_encoder: length must be 1 … 65536, got 1000000000000",
        ),
        (lambda data: data["encoders"][0].update(pad_id=1 << 70), "text_encoder: pad_id must be 0 … 2.14748e"),
        (lambda data: data["encoders"][0].update(end_id=-1), "text_encoder: end_id must be 0 … 2.14748e"),
        (lambda data: bucket(data)["graphs"].update(max_batch=0), "graphs.max_batch must be 1 … 4096, got 0"),
        (layout(latent_shape=[4, -8]), "layout.latent_shape must be 1 … 1.04858e"),
        (layout(latent_shape=[1 << 20] * 2), "elements of layout.latent_shape must be"),
        (layout(latent_history=1 << 40), "layout.latent_history must be 1 … 64"),
        (
            tensors("full", [("latents_0", ["batch", 4, 5])]),
            r"full, latents_0: expected latents \[4, 4\], got \[4, 5\]",
        ),
        (tensors("full", [("x", ["batch", 0])]), "graph full, x must be 1 …"),
        (tensors("full", [("x", ["x"])], [("y", ["batch"])]), "graph full, x: expected a multiple of batch, got .x."),
        (tensors("full", [("x", [4])], [("y", ["batch"])]), "graph full, y: no input has the dimension .batch."),
        (tensors("full", [("x", [4])]), "graph full, x: the step layout has no such tensor"),
    ],
)
def test_bad_manifests(bundle: Bundle, edit: Callable[[Any], None], message: str) -> None:
    with pytest.raises(IntegrityError, match=message) as caught:
        Bundle.open(edited(bundle, edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"null", b'{"format_version":' + b"[" * 100_000])
def test_manifests_that_are_none(bundle: Bundle, data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"manifest\.json: expected a valid"):
        Bundle.open(forge(bundle, data))


def test_one_bit_of_the_manifest_or_of_its_digest(bundle: Bundle) -> None:
    """Every one of them is found when the bundle is opened; a sample of the manifest's here, all of the digest's."""
    rng = random.Random(0)
    for name in ("manifest.json", "manifest.sha256"):
        data = (bundle.path / name).read_bytes()
        bits = range(8 * len(data)) if name == "manifest.sha256" else rng.sample(range(8 * len(data)), 300)
        for bit in bits:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            (bundle.path / name).write_bytes(flipped)
            with pytest.raises(IntegrityError, match=r"does not match manifest\.sha256: altered"):
                Bundle.open(bundle.path)
        (bundle.path / name).write_bytes(data)
    assert Bundle.open(bundle.path).digest == bundle.digest
    command = ["sha256sum", "--check", "manifest.sha256"]
    assert subprocess.run(command, cwd=bundle.path, capture_output=True, text=True).stdout == "manifest.json: OK\n"


def test_manifests_that_are_no_plain_files(bundle: Bundle) -> None:
    for name in ("manifest.json", "manifest.sha256"):
        data = (bundle.path / name).read_bytes()
        (bundle.path / name).unlink()
        kind = InputError if name == "manifest.json" else IntegrityError  # not a bundle; a damaged one
        with pytest.raises(kind, match=f"expected a bundle with a {name}, got: No such file"):
            Bundle.open(bundle.path)
        os.mkfifo(bundle.path / name)
        with pytest.raises(IntegrityError, match=f"{name}: expected a file of at most"):
            Bundle.open(bundle.path)
        (bundle.path / name).unlink()
        (bundle.path / name).write_bytes(data)
    with (bundle.path / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse; nobody reads it
    with pytest.raises(IntegrityError, match="expected a file of at most"):
        Bundle.open(bundle.path)


def test_reports_that_are_links_or_pipes(bundle: Bundle) -> None:
    """What is written there stays there, and what is read there ends."""
    link = bundle.path / "reports" / "verify.json"
    for make in (lambda: link.symlink_to("/etc/hostname"), lambda: os.mkfifo(link)):
        make()
        with pytest.raises(
            IntegrityError, match=r"reports/verify\.json: expected a file or folder, got a link or device"
        ):
            Bundle.open(bundle.path)
        link.unlink()
    (bundle.path / "reports").rename(bundle.path.parent / "elsewhere")
    (bundle.path / "reports").symlink_to(bundle.path.parent / "elsewhere")
    with pytest.raises(IntegrityError, match="reports: expected a file or folder"):
        Bundle.open(bundle.path)


def test_a_file_that_is_altered_after_it_was_used(bundle: Bundle) -> None:
    """Its size and even its time of modification may be what they were."""
    path = bundle.file("onnx/full.onnx")
    os.utime(path, ns=(0, 0))
    time.sleep(0.2)
    bundle.check()
    path.write_bytes(b"1" * 999 + b"0")
    os.utime(path, ns=(0, 0))
    with pytest.raises(IntegrityError, match=r"onnx/full\.onnx: expected SHA-256"):
        bundle.file("onnx/full.onnx")


def test_a_file_is_read_once_for_each_version(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.2)
    bundle.check()
    read: list[Path] = []

    def digests(paths: list[Path]) -> list[str]:
        read.extend(paths)
        return parted_digests(paths)

    monkeypatch.setattr(reading, "parted_digests", digests)
    bundle.check_files(bundle.manifest.files)
    assert read == []
    os.utime(bundle.path / "onnx/full.onnx")
    bundle.check_files(bundle.manifest.files)
    assert read == [bundle.path / "onnx/full.onnx"]


def test_a_bundle_that_was_replaced_is_not_called_damaged(bundle: Bundle) -> None:
    write(bundle.path, "2")
    with pytest.raises(IntegrityError, match=r"replaced after it was opened → open the bundle again"):
        bundle.file("onnx/full.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": 65}, r"rows\[0\]\.draws must be 0 … 64, got 65"),
        ({"latents": (1e39,)}, r"rows\[0\]: largest coefficient must be 0 … 3\.40282e\+38, got 1e\+39"),
    ],
)
def test_plans_without_bounds(bundle: Bundle, change: dict[str, Any], message: str) -> None:
    plan = plan_of()
    row = msgspec.structs.replace(plan.rows[0], **change)
    plan = msgspec.structs.replace(plan, rows=(row, *plan.rows[1:]))
    with pytest.raises(InputError, match=message):
        write(bundle.path.parent / "other", plans=[plan])
    data = json_bytes(plan)
    (bundle.path / plan_path("default")).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    opened = Bundle.open(edited(bundle, lambda manifest: manifest["files"].update({plan_path("default"): entry})))
    with pytest.raises(InputError, match=message):
        opened.plan()


def test_no_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        with pytest.raises(InputError, match=r"expected a bundle with a manifest\.json, got: No"):
            Bundle.open(path)


def test_plans_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the graphs combine, full, skip, the bundle has combine, full →"):
        check_plan(plan_of(), graphs_of("combine", "full"))
    check_plan(plan_of(skip=False), graphs_of("combine", "full"))
    deep = msgspec.structs.replace(
        plan_of(), rows=(*plan_of().rows[:2], PlanRow(variant=None, step=2, latents=(1.0, 0.5)))
    )
    with pytest.raises(InputError, match="plan default: step 2: 2 latents coefficients, the graphs take 1 → rebuild"):
        write(tmp_path / "b", plans=[deep])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "portable"),
    [
        ("THUDM/CogVideoX-2b", "THUDM/CogVideoX-2b"),
        ("package:cogvideox-tiny", "package:cogvideox-tiny"),
        ("models/mine", "models/mine"),
        ("/home/me/models/mine", "mine"),
        ("/home/me/models/mine/", "mine"),
        ("~/mine", "mine"),
        ("../../me/mine", "mine"),
        ("file:///home/me/mine", "mine"),
        ("C:\\Users\\me\\mine", "mine"),
        ("\\\\server\\share\\mine", "mine"),
    ],
)
def test_sources_without_machine_paths(source: str, portable: str, tmp_path: Path) -> None:
    assert portable_source(source) == portable
    assert portable_source(portable) == portable
    bundle = write(tmp_path / "b", profile=msgspec.structs.replace(PROFILE, source=source))
    assert bundle.manifest.profile.source == portable


def test_relative_paths() -> None:
    for path in ("a", "a/b.c", "a/.b", "…/ü"):
        require_relative(path)
    for path in ("", "/a", "a/", "a//b", "a/../b", "..", ".", "./a", "a\\b", "C:a", "a\x00"):
        with pytest.raises(ValueError, match="expected a relative path"):
            require_relative(path)


# ---------------------------------------------------------------- writing


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b"
    cases: list[tuple[type[LemicaError], str, dict[str, Any]]] = [
        (InputError, "default_plan must be one of plans", {"default_plan": "fast"}),
        (InputError, "cannot make a bundle: files must list tokenizer/", {"files": {}}),
        (InputError, "got '../evil'", {"files": {"../evil": b""}}),
        (InputError, "got '../evil'", {"reports": {"../evil": b""}}),
        (InputError, "expected a readable file for the bundle", {"files": {"onnx/full.onnx": tmp_path / "absent"}}),
        (InputError, "must not be listed", {"files": {"manifest.json": b""}}),
    ]
    for kind, message, changes in cases:
        with pytest.raises(kind, match=message):
            write(target, **changes)
        assert not list(tmp_path.iterdir()), "nothing is left"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(MissingDependencyError, match=r"needs \d\.\d kB beside .*, 100 B are free → free disk space"):
        write(target)
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine")  # empty: fine
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("home", "file"):
        with pytest.raises(UsageError, match="expected a bundle to replace, an empty folder or nothing"):
            write(tmp_path / name)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "b", "1")
    before = tree(tmp_path / "b")
    with pytest.raises(InputError):
        write(tmp_path / "b", "2", default_plan="fast")
    assert tree(tmp_path / "b") == before
    write(tmp_path / "b", "2", count=3)
    assert Bundle.open(tmp_path / "b").manifest.versions == {"content": "2"}
    assert names_in(tmp_path) == ["b"]


def test_add_plan(bundle: Bundle) -> None:
    before = tree(bundle.path)
    more = add_plan(bundle, plan_of("fast"), plan_of("slow", guidance_scale=1.5))
    assert more.plans == ("default", "fast", "slow")
    assert more.plan("slow").guidance_scale == 1.5
    assert more.manifest.default_plan == "default"
    more.check()
    after = tree(more.path)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"manifest.json", "manifest.sha256", "plans/fast.json", "plans/slow.json"}
    assert add_plan(more, default="fast").manifest.default_plan == "fast"
    with pytest.raises(UsageError, match="the bundle has no plan 'none' → use one of: default, fast, slow"):
        add_plan(more, default="none")
    stranger = msgspec.structs.replace(plan_of("fast"), sampler_digest="1" * 64)
    with pytest.raises(InputError, match="plan fast: expected a plan for the sampler 000000000000, got one for 1111"):
        add_plan(more, stranger)
    assert names_in(bundle.path.parent) == ["b"]


def test_plans_are_removed_and_renamed(bundle: Bundle) -> None:
    more = add_plan(bundle, plan_of("fast"), plan_of("slow", guidance_scale=1.5), plan_of("uncached"))
    left = change_plans(more, remove=["fast"], rename={"default": "good"})
    assert left.plans == ("good", "slow", "uncached") and left.manifest.default_plan == "good"
    assert left.plan("good").rows == plan_of().rows
    left.check()
    assert names_in(left.path / "plans") == ["good.json", "slow.json", "uncached.json"]
    assert change_plans(left, rename={"slow": "a", "good": "b"}, default="a").manifest.default_plan == "a"
    before = tree(bundle.path)
    for changes, message in (
        ({"remove": ["nonesuch"]}, "the bundle has no plan 'nonesuch' → use one of: a, b, uncached"),
        ({"rename": {"nonesuch": "c"}}, "the bundle has no plan 'nonesuch'"),
        ({"remove": ["uncached"]}, "plan uncached must stay: others are measured against it"),
        ({"rename": {"uncached": "c"}}, "plan uncached must stay"),
        ({"remove": ["a"]}, "plan a is the default one → name another: --default b or uncached"),
        ({"rename": {"a": "b"}}, "plan a: the name 'b' is taken"),
        ({"rename": {"a": "c", "b": "c"}}, "the name 'c' is taken"),
        ({"rename": {"a": "uncached"}}, "the name 'uncached' is taken"),
        ({"rename": {"a": "default"}}, "the name 'default' is taken"),
        ({"rename": {"a": "../c"}}, "name must be letters, digits"),
        ({"remove": ["b"], "rename": {"b": "c"}}, "plan b cannot be removed and renamed"),
        ({"remove": ["a"], "default": "a"}, "the bundle has no plan 'a' → use one of: b, uncached"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            change_plans(left, **changes)  # type: ignore[arg-type]
    assert tree(bundle.path) == before
    with held(bundle.path), pytest.raises(UsageError, match="is writing it"):
        change_plans(left, remove=["b"])


def test_a_bundle_is_moved_whole_with_what_is_not_listed(tmp_path: Path) -> None:
    """In place of an older one; what it may not replace stays."""
    old, new = write(tmp_path / "b", "1"), write(tmp_path / "b.unverified", "2")
    write_bytes(b"measured", new.path / "reports" / "step_times.json")
    expected = tree(new.path)
    (tmp_path / "other").mkdir()
    write_bytes(b"mine", tmp_path / "other" / "file")
    with pytest.raises(UsageError, match="expected a bundle to replace"):
        move_bundle(new, tmp_path / "other")
    assert tree(new.path) == expected and old.manifest == Bundle.open(tmp_path / "b").manifest
    assert move_bundle(new, tmp_path / "b").manifest == new.manifest
    assert tree(tmp_path / "b") == expected and names_in(tmp_path) == ["b", "other"]


def test_plans_join_whole_bundles_only(bundle: Bundle) -> None:
    damage_bit(bundle.path)
    with pytest.raises(IntegrityError, match="altered"):
        add_plan(bundle, plan_of("fast"))


def test_no_links_no_matter(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    add_plan(bundle, plan_of("fast")).check()


# ---------------------------------------------------------------- killed writers

WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_bundle as t

target, action = Path(sys.argv[1]), sys.argv[2]


def die_before(limit):  # the limit-th call that changes or syncs something
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for name in ("fsync", "rename", "mkdir", "link", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


print("ready", flush=True)
if action == "loop":  # write 2, 3, 4 … until killed
    number = 2
    while True:
        t.write(target, str(number % 10), count=5)
        number += 1
for line in sys.stdin:  # one writer a line, killed there; answers with its exit status
    pid = os.fork()
    if pid == 0:
        die_before(int(line))
        if action == "write":
            t.write(target, "2")
        else:
            t.add_plan(t.Bundle.open(target), t.plan_of("slow", guidance_scale=1.5), t.plan_of("fast"))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def worker(target: Path, action: str) -> subprocess.Popen[str]:
    script = WORKER.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(target), action]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def hidden(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.startswith(".")]


def content_of(target: Path) -> str:
    """Which bundle lies there, whole; every file says the same."""
    bundle = Bundle.open(target)
    bundle.check()
    content = bundle.manifest.versions["content"]
    assert bundle.read_bytes("onnx/full.onnx") == content.encode() * 1000
    return content


def runs_killed_everywhere(target: Path, action: str) -> Iterator[None]:
    """Kills a writer before its 1st, 2nd, … system call, from a fresh copy of the bundle; until one finishes."""
    original = target.parent / "original"
    target.rename(original)
    status, limit = -signal.SIGKILL, 0
    with worker(target, action) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while status == -signal.SIGKILL:
            limit += 1
            for leftover in target.parent.iterdir():
                if leftover.is_file():  # the lock, which nobody holds any more
                    leftover.unlink()
                elif leftover != original:
                    shutil.rmtree(leftover)
            shutil.copytree(original, target)
            process.stdin.write(f"{limit}\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            yield
    assert status == 0


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_before_any_system_call(tmp_path: Path) -> None:
    write(tmp_path / "b", "1")
    seen = []
    for _ in runs_killed_everywhere(tmp_path / "b", "write"):
        seen.append(content_of(tmp_path / "b"))
        write(tmp_path / "b", "3")  # the next run finishes, and cleans up
        assert content_of(tmp_path / "b") == "3"
        assert hidden(tmp_path) == []
    assert seen == sorted(seen), "old, then new"
    assert set(seen) == {"1", "2"}
    assert len(seen) > 20


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_while_a_plan_joins(tmp_path: Path) -> None:
    write(tmp_path / "b", "1")
    seen = []
    for _ in runs_killed_everywhere(tmp_path / "b", "add"):
        bundle = Bundle.open(tmp_path / "b")
        bundle.check()
        seen.append("fast" in bundle.plans)
        assert (bundle.plan("slow").guidance_scale == 1.5) == seen[-1]
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    target = tmp_path / "b"
    write(target, "1")
    rng = random.Random(0)
    for _ in range(4):
        process = worker(target, "loop")
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        process.communicate()
        content_of(target)
    write(target, "9")
    assert content_of(target) == "9"
    assert hidden(tmp_path) == []


def test_half_a_swap_is_undone(tmp_path: Path) -> None:
    """The one moment in which the name is free: between two renames."""
    write(tmp_path / "b", "1")
    (tmp_path / "b").rename(tmp_path / ".b.old")
    assert content_of(tmp_path / "b") == "1"
    assert hidden(tmp_path) == []


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    living, dead = tmp_path / f".b.tmp-{os.getppid()}-00000000", tmp_path / ".b.tmp-4194999-00000000"
    other = tmp_path / ".b.tmp-notes"
    for folder in (living, dead, other):
        folder.mkdir()
    write(tmp_path / "b")
    assert sorted(hidden(tmp_path)) == sorted([living.name, other.name])


def test_a_reader_who_may_not_write_waits_for_the_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames of a writer, whose first one it cannot undo: a model that Landlock binds."""
    write(tmp_path / "bundle")
    (tmp_path / "bundle").rename(tmp_path / ".bundle.old")
    looks = []

    def refused(folder: Path) -> None:
        looks.append(folder)
        if len(looks) == 3:
            (tmp_path / ".bundle.old").rename(folder)  # the writer goes on
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reading, "finish_swap", refused)
    assert content_of(tmp_path / "bundle") == "1"
    assert len(looks) >= 3


def test_readers_during_a_swap(tmp_path: Path) -> None:
    """Opening while another process writes gives one bundle or the other."""
    target = tmp_path / "b"
    write(target, "1", count=5)
    process = worker(target, "loop")
    end = time.monotonic() + 1.5
    opened = set()
    while time.monotonic() < end:
        opened.add(Bundle.open(target).manifest.versions["content"])
    assert process.poll() is None, "the writer goes on"
    process.kill()
    process.communicate()
    assert len(opened) > 1


def test_entries_are_what_they_say() -> None:
    assert FileEntry(sha256="0" * 64, size=0).size == 0


# ---------------------------------------------------------------- digests


def test_digests_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream and threads agree; up to one part it is the plain SHA-256, above the SHA-256 of the parts' digests."""
    assert PART_BYTES == 64 << 20, "another size is another format"
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    rng = random.Random(0)
    contents = [rng.randbytes(size) for size in (0, 1, 999, 1000, 1001, 2000, 5432)]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    expected = []
    for path, content in zip(paths, contents):
        path.write_bytes(content)
        parts = [content[start : start + 1000] for start in range(0, len(content), 1000)]
        joined = b"".join(hashlib.sha256(part).digest() for part in parts)
        expected.append(hashlib.sha256(content if len(content) <= 1000 else joined).hexdigest())
        stream = PartedDigest()
        for start in range(0, len(content), 77):
            stream.update(content[start : start + 77])
        assert stream.hexdigest() == expected[-1]
    assert parted_digests(paths) == expected
    assert parted_digests([]) == []
    with pytest.raises(InputError, match="absent: expected a readable file, got: No such file"):
        parted_digests([tmp_path / "absent"])


def test_a_bundle_of_an_older_format_is_refused_by_its_format(tmp_path: Path) -> None:
    """It has no digest beside the manifest either; that is not what is said of it."""
    golden = Path(__file__).parent / "golden/bundle/manifest.json"
    old = golden.read_bytes().replace(b'"format_version": 4', b'"format_version": 1')
    (tmp_path / "manifest.json").write_bytes(old)
    with pytest.raises(IntegrityError, match=r"expected bundle format 4, got 1.* → build it again: lemica-trt build"):
        Bundle.open(tmp_path)


# ---------------------------------------------------------------- several writers

ADDER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_bundle as t
from lemica_trt.core.errors import UsageError

bundle = t.Bundle.open(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:  # a name a line: "added" or who writes
    try:
        t.add_plan(bundle, t.plan_of(line.strip()))
        print("added", flush=True)
    except UsageError as error:
        print(error, flush=True)
"""


def test_of_several_writers_each_that_succeeds_has_its_plan_in(bundle: Bundle) -> None:
    """All have opened the bundle before any of them has written."""
    command = [sys.executable, "-c", ADDER.format(tests=str(Path(__file__).parent)), str(bundle.path)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said: dict[str, str] = {}
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        for turn in range(5):
            names = [f"p{turn}{number}" for number in range(len(writers))]
            for writer, name in zip(writers, names):
                assert writer.stdin is not None
                writer.stdin.write(f"{name}\n")
                writer.stdin.flush()
            said |= {name: writer.stdout.readline().strip() for writer, name in zip(writers, names) if writer.stdout}
    finally:
        for writer in writers:
            writer.communicate()
    added = {name for name, answer in said.items() if answer == "added"}
    assert len({name[:2] for name in added}) == 5  # in each turn at least one
    for name in said.keys() - added:
        match = re.search(r"another lemica-trt \(process (\d+|unknown)\) is writing it → wait for it", said[name])
        assert match and (match[1] == "unknown" or int(match[1]) in [writer.pid for writer in writers])
    found = Bundle.open(bundle.path)
    found.check()
    assert set(found.plans) == {*bundle.plans, *added}
    assert names_in(bundle.path.parent) == ["b"]


def test_a_bundle_that_is_held_is_not_written(bundle: Bundle) -> None:
    before = tree(bundle.path)
    with held(bundle.path):
        for write_it in (lambda: add_plan(bundle, plan_of("fast")), lambda: write(bundle.path, "2")):
            with pytest.raises(UsageError, match=rf"another lemica-trt \(process {os.getpid()}\) is writing it"):
                write_it()
        assert tree(bundle.path) == before
    add_plan(bundle, plan_of("fast"))
    lock = bundle.path.with_name(".b.lock")
    lock.write_text("1")  # what a killed writer leaves
    add_plan(bundle, plan_of("faster"))
    assert Bundle.open(bundle.path).plans == ("default", "fast", "faster", "slow") and not lock.exists()
