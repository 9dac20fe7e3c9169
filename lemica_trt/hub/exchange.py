"""Push and pull: bundles whole and as they are, plans one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from lemica_trt.bundle.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    MANIFEST_SIGNATURE,
    OF_MANIFEST,
    REPORTS,
    plan_path,
)
from lemica_trt.bundle.reading import Bundle, files_below, read_signatures
from lemica_trt.bundle.reports import stored_report
from lemica_trt.bundle.signing import TrustedKey
from lemica_trt.bundle.writing import copy_bundle, require_replaceable
from lemica_trt.core.errors import InputError, IntegrityError, UsageError
from lemica_trt.core.values import Value, json_bytes, read_value, write_value
from lemica_trt.hub.card import bundle_card, plans_card
from lemica_trt.hub.places import CARD, Place, holds_bundle
from lemica_trt.ir.plan import StepPlan

SHORTEST_DIGEST = 32
"""Hex digits of a digest that is asked for: 128 bits."""

OWN = frozenset({CARD, ".gitattributes"})
"""What a new repository may have."""


class Exchanged(Value, frozen=True):
    """What was pushed or pulled.

    Attributes:
        kind: `bundle` or `plan`.
        where: for people.
        digest: of the bundle's manifest, or of the plan.
        names: of the plans.
    """

    kind: str
    where: str
    digest: str
    names: tuple[str, ...]


def push(path: Path, place: Place, name: str) -> Exchanged:
    """Put a bundle or a plan into a repository, with a card.

    A bundle goes as it is, engines and all: its digest stays the one that others can compare. Its machine-bound engines
    are of no use elsewhere, but say what they were built with, and the graphs beside them are what others build from.

    Args:
        path: a bundle's folder, or a plan's JSON file.
        place: where to.
        name: of the place, for messages.

    Raises:
        LemicaError: it is neither, or damaged; the repository holds the other kind, or cannot be written.
    """
    return _push_plan(path, place, name) if path.suffix == ".json" else _push_bundle(Bundle.open(path), place, name)


def _push_bundle(bundle: Bundle, place: Place, name: str) -> Exchanged:
    bundle.check_listed()
    there = place.files()
    if there - OWN and not holds_bundle(there):
        raise UsageError(
            f"{name}: expected a new repository or one that holds a bundle, it holds something else",
            fix="give another one",
        )
    reports = sorted(path for path in files_below(bundle.path) if PurePosixPath(path).parts[0] == REPORTS)
    listed = (MANIFEST, MANIFEST_DIGEST, *bundle.manifest.files, *reports)
    contents: dict[str, Path | bytes] = {path: bundle.path / path for path in listed}
    if (signatures := read_signatures(bundle.path)) is not None:
        contents[MANIFEST_SIGNATURE] = signatures
    pictures = [path for path in reports if path.endswith(".png")]
    plans = [bundle.plan(plan) for plan in bundle.plans]
    report = stored_report(bundle)
    if report is not None and report.manifest_digest != bundle.digest:
        report = None
    contents[CARD] = bundle_card(bundle.manifest, bundle.digest, plans, report, pictures, place.name).encode()
    stale = {path for path in there if path not in contents and not path.startswith(".")}
    where = place.write(contents, stale, f"Bundle {bundle.digest[:12]}: {', '.join(bundle.plans)}")
    return Exchanged(kind="bundle", where=where, digest=bundle.digest, names=bundle.plans)


def _push_plan(path: Path, place: Place, name: str) -> Exchanged:
    plan, there = read_value(StepPlan, path), place.files()
    if there - OWN and (holds_bundle(there) or not any(path.startswith("plans/") for path in there)):
        what = "a bundle" if holds_bundle(there) else "something else"
        raise UsageError(
            f"{name}: expected a new repository or one that holds plans, it holds {what}", fix="give another one"
        )
    others = [found for found in _plans_in(place, there) if found.name != plan.name]
    plans = sorted([plan, *others], key=lambda found: found.name)
    contents = {plan_path(plan.name): json_bytes(plan), CARD: plans_card(plans, place.name).encode()}
    where = place.write(contents, (), f"Plan {plan.name}: {plan.budget} of {plan.num_steps} steps in full")
    return Exchanged(kind="plan", where=where, digest=plan.digest, names=(plan.name,))


def _plans_in(place: Place, there: frozenset[str]) -> list[StepPlan]:
    paths = sorted(path for path in there if PurePosixPath(path).match("plans/*.json"))
    if not paths:
        return []
    folder = place.folder(paths)
    return [read_value(StepPlan, folder / path) for path in paths]


def pull(
    place: Place,
    name: str,
    output: Path,
    *,
    plan: str | None = None,
    digest: str | None = None,
    trusted: Sequence[TrustedKey] | None = None,
) -> Exchanged:
    """Get a bundle, or one plan.

    Nothing lies at `output` before all of it has been checked; a pull that is killed leaves nothing there.

    Args:
        place, name: see `push`.
        output: the bundle's folder, replacing a bundle; of a plan the folder that gets `NAME.json`.
        plan: the plan; None: the bundle, or the only plan.
        digest: what is expected, 32 hex digits at least.
        trusted: keys one of which must have signed the bundle, as `Bundle.open` takes them.

    Raises:
        UsageError: `output` is something else, or there is no such plan.
        IntegrityError: it is damaged, or not what was expected.
        InputError: there is nothing to pull.
    """
    wanted = (digest or "").lower()
    if digest is not None and (len(digest) < SHORTEST_DIGEST or set(wanted) - set("0123456789abcdef")):
        raise UsageError(f"expected at least {SHORTEST_DIGEST} hex digits of a digest, got {digest!r}")
    there = place.files()
    if holds_bundle(there):
        head = [path for path in OF_MANIFEST if path in there]
        bundle = Bundle.open(place.folder(head), trusted=trusted)
        if plan is None:
            _require_digest(name, bundle.digest, wanted)
            require_replaceable(output)
            whole = Bundle.open(place.folder((*head, *bundle.manifest.files)), trusted=trusted)
            _require_digest(name, whole.digest, bundle.digest)  # somebody may have pushed another one meanwhile
            made = copy_bundle(whole, output)
            return Exchanged(kind="bundle", where=str(output), digest=made.digest, names=made.plans)
        if plan not in bundle.plans:
            raise UsageError(f"{name}: there is no plan {plan!r}", fix=f"use one of: {', '.join(bundle.plans)}")
        bundle = Bundle.open(place.folder((*head, plan_path(plan))), trusted=trusted)  # all of one revision
        return _pull_plan(bundle.plan(plan), name, output, wanted)
    plans = {found.name: found for found in _plans_in(place, there)}
    if not plans:
        raise InputError(f"{name}: expected a repository with a bundle or plans, got another, or none")
    if plan not in plans and not (plan is None and len(plans) == 1):
        raise UsageError(f"{name}: expected --plan, it holds plans", fix=f"use one of: {', '.join(plans)}")
    return _pull_plan(plans[plan or next(iter(plans))], name, output, wanted)


def _pull_plan(plan: StepPlan, name: str, output: Path, wanted: str) -> Exchanged:
    _require_digest(name, plan.digest, wanted)
    target = output / f"{plan.name}.json"
    write_value(plan, target)
    return Exchanged(kind="plan", where=str(target), digest=plan.digest, names=(plan.name,))


def _require_digest(name: str, digest: str, wanted: str) -> None:
    if not digest.startswith(wanted):
        raise IntegrityError(f"{name}: expected digest {wanted[:12]}…, got {digest[:12]}…", fix="ask who pushed it")
