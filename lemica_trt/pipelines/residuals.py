"""Plans that reuse the trunk's residual: hooks on the transformer of a pipeline whose trunk is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.ir.plan import StepPlan
from lemica_trt.models.load import FAMILIES
from lemica_trt.models.split import added, residual_of, trunk_ends, watched
from lemica_trt.pipelines.scheduler import PlanScheduler


class ResidualReuse:
    """Hooks that keep the residual of each call of a row that computes everything, and use it where a row reads it.

    Calls are counted in each row: a pipeline that runs the branches of its guidance one after the other keeps one
    residual for each.

    Args:
        pipeline_class: class name of the pipeline.
        transformer: its transformer.
        scheduler: says which row runs.

    Raises:
        UnsupportedError: no family has this pipeline, or the transformer is compiled.
    """

    def __init__(self, pipeline_class: str, transformer: Any, scheduler: PlanScheduler) -> None:
        plan = scheduler.plan
        family = next((f for f in FAMILIES.values() if f.pipeline_class == pipeline_class), None)
        fix = "use a plan that reuses no residual: lemica_trt.fit makes one"
        if family is None:
            known = ", ".join(sorted(f.pipeline_class for f in FAMILIES.values()))
            raise UnsupportedError(
                f"plan {plan.name} ({plan.method}) reuses residuals, which works in {known}, not in {pipeline_class}",
                fix=fix,
            )
        if hasattr(transformer, "_orig_mod"):
            raise UnsupportedError(
                f"plan {plan.name} ({plan.method}) reuses residuals, which a compiled transformer cannot", fix=fix
            )
        self._scheduler, self._transformer, self._lists = scheduler, transformer, family.block_lists
        self._ends = trunk_ends(transformer, family.block_lists, family.epilogue)
        self._depth = max(plan.cache_depths.values())
        self._at: tuple[int, int] | None = None
        self._call = 0
        self._kept: list[list[Tensor]] = []
        self._open = contextlib.ExitStack()
        self._seen: list[Tensor] | None = None
        self._hooks = [
            transformer.register_forward_pre_hook(self._before),
            transformer.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        self._open.close()
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        scheduler = self._scheduler
        if self._at is None or self._at[0] != scheduler.position[0]:
            self._kept = []
        if self._at != scheduler.position:
            self._at, self._call = scheduler.position, 0
        if scheduler.row.cached:
            (read,) = scheduler.row.caches
            residual = sum(weight * kept for weight, kept in zip(read.weights, self._kept[self._call]))
            self._open.enter_context(without_blocks(self._transformer, self._lists))
            self._open.enter_context(added(self._ends[1], residual))  # type: ignore[arg-type]
        else:
            self._seen = self._open.enter_context(watched(*self._ends))

    def _after(self, *_: Any) -> None:
        self._open.close()
        seen, self._seen = self._seen, None
        if seen is not None and len(seen) == len(self._ends):
            if self._call == len(self._kept):
                self._kept.append([])
            kept = self._kept[self._call]
            kept.insert(0, residual_of(seen))
            del kept[self._depth :]
        self._call += 1


def reuses_residuals(plan: StepPlan) -> bool:
    """Whether some rows read caches."""
    return bool(plan.cache_depths)


@contextlib.contextmanager
def without_blocks(transformer: nn.Module, lists: tuple[str, ...]) -> Iterator[None]:
    """A transformer whose block lists are empty."""
    blocks = {name: transformer._modules[name] for name in lists}
    transformer._modules.update(dict.fromkeys(lists, nn.ModuleList()))
    try:
        yield
    finally:
        transformer._modules.update(blocks)
