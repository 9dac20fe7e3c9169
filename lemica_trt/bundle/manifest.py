"""The bundle format, version 1: a folder that holds everything needed to run a model, and nothing that runs by itself.

    manifest.json          `Manifest`: what the bundle is, and every other file with size and digest
    manifest.sha256        SHA-256 of manifest.json, as `sha256sum` writes it
    manifest.sig           signatures over that digest, if it is signed (`signing`)
    onnx/                  the exported graphs and their weights
    engines/               engines built from them, where a backend has files of its own
    tokenizer/             tokenizer.json
    plans/NAME.json        step plans (`lemica_trt.ir.plan.StepPlan`)
    calibration/           what the plans were made from, so that `plan BUNDLE` can make others without PyTorch, and
                           other builds can be calibrated from it
    shapes/FxHxW/…         graphs and engines of a further shape, as above; its uncached plan where that is another
    reports/               for people: verification, pictures, times. Not listed, not trusted, may change at any time

Rules that readers enforce:

- `manifest.sha256` matches `manifest.json`; a file in use matches its size and digest there. A digest is SHA-256, of
  files above 64 MiB in parts (`lemica_trt.core.files.PartedDigest`). One bit changed anywhere is found.
- Nothing is loaded that the manifest does not list. Paths are relative, `/`-separated and stay inside the folder;
  files are regular files: no links, no devices, no pipes. In a snapshot of a hub's cache (`snapshots/REVISION` beside
  `blobs`) a file may be a link into `blobs`, and nowhere else.
- JSON, ONNX, safetensors and engines only; no pickle. JSON is strict (unknown keys are refused) and canonical: sorted
  keys, two-space indent, so that the same input gives the same bytes.
- Numbers are bounded (`limits`), strings hold no control characters.

A digest beside a file finds damage, and whatever changed one of the two. It does not say who wrote them: engines are
machine code, so run bundles of people you trust. `signing` says who that is; or compare `Bundle.digest` with one that
came another way.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath, PureWindowsPath

import msgspec
from msgspec import UNSET, UnsetType

from lemica_trt.bundle.limits import require_bounded
from lemica_trt.core.errors import InputError, IntegrityError
from lemica_trt.core.values import Value, json_bytes, require, value_from_json
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import EncoderSpec, GraphSet
from lemica_trt.ir.measured import PlanAtShape
from lemica_trt.ir.plan import UNCACHED
from lemica_trt.ir.profile import Profile, Shape

BUNDLE_FORMAT = 4

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
MANIFEST_SIGNATURE = "manifest.sig"
REPORTS = "reports"

OF_MANIFEST = (MANIFEST, MANIFEST_DIGEST, MANIFEST_SIGNATURE)
"""Files that a manifest does not list, because they are made from it."""

SAMPLER_FILE = "calibration/sampler.json"
ERROR_GRAPH_FILE = "calibration/error_graph.json"
GRAMS_FILE = "calibration/grams.json"
SENSITIVITY_FILE = "calibration/sensitivity.json"
SELECTION_FILE = "calibration/selection.json"
REFERENCE_FILE = "calibration/reference.json"
FRONT_FILE = "calibration/front.json"
PROMPTS_FILE = "calibration/prompts.json"

VERIFY_REPORT = f"{REPORTS}/verify.json"
STEP_TIMES = f"{REPORTS}/step_times.json"
PLANS_REPORT = f"{REPORTS}/plans.json"
KEPT_CLIPS = f"{REPORTS}/clips.json"
KEPT_FOLDER = f"{REPORTS}/clips"

REBUILD = "copy the bundle again, or rebuild it"
"""What to do about a bundle that is not whole."""


class FileEntry(Value, frozen=True):
    """A listed file: digest (`PartedDigest`, hex) and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        require(bool(re.fullmatch("[0-9a-f]{64}", self.sha256)), f"sha256 must be 64 hex digits, got {self.sha256!r}")
        require(self.size >= 0, f"size must be at least 0, got {self.size}")


class Bucket(Value, frozen=True):
    """What a bundle has for one shape. Step plans hold no shape: all buckets share those that hold there.

    Attributes:
        shape: what it serves.
        graphs: all graphs that were exported.
        engines: sets of engines, in order of preference.
        plans: of a further shape, what was measured of the bundle's plans there; unset: they were made for this shape.
        uncached: path of the uncached plan here, where the sampler follows the size (FLUX) and is another than the
            bundle's; then no other plan holds. Unset: the bundle's own.
    """

    shape: Shape
    graphs: GraphSet
    engines: tuple[EngineEntry, ...]
    plans: tuple[PlanAtShape, ...] | UnsetType = UNSET
    uncached: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        require(bool(self.engines), "engines must not be empty")
        require(self.uncached is UNSET or self.plans == (), "of another sampler no plan was measured")

    @property
    def held(self) -> frozenset[str]:
        """`rows_digest` of the plans that hold at a further shape."""
        return frozenset(found.rows_digest for found in self.plans or () if found.holds)


def bucket_folder(name: str) -> str:
    """Where the files of a further shape lie in a bundle: graphs, engines, and a plan of its own."""
    return f"shapes/{name}"


def shape_report(name: str) -> str:
    """Where the report of a further shape lies."""
    return f"{REPORTS}/{bucket_folder(name)}.json"


class Manifest(Value, frozen=True):
    """All about a bundle that is not in its files.

    Attributes:
        profile: what it was built as; family, dtype, shape and sampling are read from here at run time. `source` is
            what the user gave, or only its last part where that was a path of one machine (`portable_source`).
        revision: revision of the model; None where it has none.
        buckets: what there is for each shape, by `Shape.name`; the profile's shape has one.
        plans: names, sorted; plan NAME lies in `plans/NAME.json`.
        default_plan: the plan of a request that names none.
        encoders: how a prompt becomes conditions, one for each text encoder.
        files: path relative to the bundle, with `/` → digest and size; all files, except `manifest.*` and `reports/`.
        versions: library → version, as built.
        format_version: 4.
    """

    profile: Profile
    buckets: dict[str, Bucket]
    plans: tuple[str, ...]
    default_plan: str
    encoders: tuple[EncoderSpec, ...]
    files: dict[str, FileEntry]
    revision: str | None = None
    versions: dict[str, str] = {}
    format_version: int = BUNDLE_FORMAT

    def __post_init__(self) -> None:
        require(
            self.format_version == BUNDLE_FORMAT, f"format_version must be {BUNDLE_FORMAT}, got {self.format_version}"
        )
        for source in (self.profile.source, *(lora.source for lora in self.profile.loras or ())):
            require(source == portable_source(source), f"a source must not be an absolute path, got {source!r}")
        for path in self.files:
            require_relative(path)
            unlisted = path in OF_MANIFEST or PurePosixPath(path).parts[0] == REPORTS
            require(not unlisted, f"{path} must not be listed")
        require(list(self.plans) == sorted(set(self.plans)), "plans must be sorted names")
        require(self.default_plan in self.plans, f"default_plan must be one of plans, got {self.default_plan!r}")
        require(self.default_bucket in self.buckets, f"buckets must have one for {self.default_bucket}")
        require(len(self.buckets) == 1 or UNCACHED in self.plans, f"with further shapes, plans must have {UNCACHED}")
        loaded = [plan_path(name) for name in self.plans] + [encoder.tokenizer for encoder in self.encoders]
        for bucket in self.buckets.values():
            loaded += [path for entry in bucket.engines for path in entry.paths]
            loaded += [path for graph in bucket.graphs.graphs for path in (graph.file, *graph.data_files)]
            loaded += [bucket.uncached] if bucket.uncached else []
        for path in loaded:
            require(path in self.files, f"files must list {path}")
        for name, bucket in self.buckets.items():
            require(name == bucket.shape.name, f"bucket {name} must be named {bucket.shape.name}")
            for entry in bucket.engines:
                require(entry.key.dtype == bucket.graphs.dtype, f"bucket {name} must be of one dtype")
            require_bounded(bucket.shape, self.profile.sampling, bucket.graphs, self.encoders)

    @property
    def default_bucket(self) -> str:
        """Name of the bucket of the profile's shape."""
        return self.profile.shape.name

    @property
    def graphs(self) -> GraphSet:
        """The graphs of the default bucket."""
        return self.buckets[self.default_bucket].graphs

    @property
    def engines(self) -> tuple[EngineEntry, ...]:
        """The engines of the default bucket, in order of preference."""
        return self.buckets[self.default_bucket].engines


class _Named(msgspec.Struct, frozen=True):
    name: str = "NAME"


class _Version(msgspec.Struct, frozen=True):
    """What every manifest has had since the first format."""

    format_version: int
    profile: _Named = _Named()


def manifest_from_json(data: bytes, *, where: str) -> Manifest:
    """Decode a manifest strictly.

    Raises:
        IntegrityError: it is damaged, or of a newer format.
    """

    try:
        found = value_from_json(_Version, data, where=where)
        version = found.format_version
        if version > BUNDLE_FORMAT:
            raise IntegrityError(
                f"{where}: expected bundle format {BUNDLE_FORMAT} or older, got {version}",
                fix="pip install --upgrade lemica-trt",
            )
        if version < BUNDLE_FORMAT:
            raise IntegrityError(
                f"{where}: expected bundle format {BUNDLE_FORMAT}, got {version}, of an older lemica-trt",
                fix=f"build it again: lemica-trt build --model {found.profile.name} --budget 15",
            )
        return value_from_json(Manifest, data, where=where)
    except IntegrityError:
        raise
    except InputError as error:
        raise IntegrityError(error.what, fix=REBUILD) from None


def manifest_digest_line(manifest: bytes) -> bytes:
    """Content of `manifest.sha256` beside a `manifest.json` with this content."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def manifest_files(manifest: Manifest) -> dict[str, bytes]:
    """`manifest.json` and `manifest.sha256` with their content.

    What is written is what a reader would write again: numbers that were given as 3 where the type says float are 3.0.

    Raises:
        InputError: no reader would accept it.
    """
    data = json_bytes(value_from_json(Manifest, json_bytes(manifest), where=MANIFEST))
    return {MANIFEST: data, MANIFEST_DIGEST: manifest_digest_line(data)}


def plan_path(name: str) -> str:
    """Where plan `name` lies in a bundle."""
    return f"plans/{name}.json"


def portable_source(source: str) -> str:
    """A model's source without the path of one machine: absolute paths, `~` and `..` keep their last part only."""
    path = PureWindowsPath(source) if re.match(r"[A-Za-z]:[\\/]|\\\\", source) else PurePosixPath(source)
    local = path.is_absolute() or source.startswith(("~", "file:")) or ".." in path.parts
    return path.name if local else source


def portable_profile(profile: Profile) -> Profile:
    """A profile whose sources are `portable_source`."""
    replace = msgspec.structs.replace
    loras = profile.loras and tuple(replace(lora, source=portable_source(lora.source)) for lora in profile.loras)
    return replace(profile, source=portable_source(profile.source), loras=loras)


def require_relative(path: str) -> None:
    """Raise ValueError unless `path` is plain, relative, `/`-separated and stays below its folder."""
    parts = path.split("/")
    plain = not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\:\x00-\x1f]", path)
    require(plain, f"expected a relative path inside the bundle, got {path!r}")
