"""What stages leave for other stages, besides the files of a bundle. These files lie in no folder; no bundle has them.

| file | written by | |
|---|---|---|
| model.json | lower | `ModelFacts` |
| layout.json | layout | `ir.graphs.StepLayout` |
| export.json | export | `Exported` |
| engines.json | engine | `Engines` |
| times.json | time | `ir.report.Measured` |
| draft.json, draft.npy | draft | `Draft`, and the latents of its `run` |
| early.json | early | `Draft` with a first fitted plan |
| plans.json | plan | `PlanIndex` |
| bundle.json | bundle | `Written` |
| verified.json | verify | `Verified` |
"""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from lemica_trt.core.values import Value
from lemica_trt.ir.engine import EngineEntry
from lemica_trt.ir.graphs import EncoderSpec, GraphSet, TensorSpec
from lemica_trt.ir.report import FirstRun

MODEL_FILE = "model.json"
LAYOUT_FILE = "layout.json"
EXPORT_FILE = "export.json"
ENGINES_FILE = "engines.json"
TIMES_FILE = "times.json"
DRAFT_FILE = "draft.json"
DRAFT_LATENTS = "draft.npy"
EARLY_FILE = "early.json"
PLANS_FILE = "plans.json"
BUNDLE_FILE = "bundle.json"
VERIFIED_FILE = "verified.json"


class ModelFacts(Value, frozen=True):
    """What stages know of a model that they do not load; see `models.Model`.

    Attributes:
        loras: SHA-256 (hex) of the files of LoRA weights that are fused, in their order; unset: none are.
        experts: where there are several.
    """

    revision: str
    latent_shape: tuple[int, ...]
    guided: bool
    branches: bool
    conditions: tuple[TensorSpec, ...]
    loras: tuple[str, ...] | UnsetType = UNSET
    experts: tuple[str, ...] | UnsetType = UNSET


class Exported(Value, frozen=True):
    """The graphs, how a prompt becomes conditions, a text encoder each, and versions of the libraries that exported."""

    graphs: GraphSet
    encoders: tuple[EncoderSpec, ...]
    versions: dict[str, str]


class Engines(Value, frozen=True):
    """Engines, in order of preference."""

    entries: tuple[EngineEntry, ...]


class Draft(Value, frozen=True):
    """The draft of the bundle.

    Attributes:
        manifest: digest of its manifest; None: there was a bundle already, or one that is better.
        run: what its verification found; None: there was none.
    """

    manifest: str | None = None
    run: FirstRun | None = None


class PlanIndex(Value, frozen=True):
    """Names of the plans that were made, the default first; and the plan of each budget, in the order asked for."""

    plans: tuple[str, ...]
    budgets: tuple[str, ...]


class Written(Value, frozen=True):
    """Digest of the manifest of the bundle that was written."""

    manifest: str


class Verified(Value, frozen=True):
    """What a verification did.

    Attributes:
        backend: whose engines were verified; None where none run here.
        unverified: why the others were not.
        replaced: digests of two manifests: of the bundle that was written, and of that with a better plan in the place
            of its default one; unset: it stayed as written.
    """

    backend: str | None
    unverified: dict[str, str]
    replaced: tuple[str, str] | UnsetType = UNSET
