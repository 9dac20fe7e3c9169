"""The time left, on a model whose full steps take a second each, and all else nothing: as large ones are."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]  # of diffusers


def test_the_time_left_is_true_from_a_fifth_of_the_build_on(tmp_path: Path) -> None:
    from build_cost import Counting, counted

    from lemica_trt.compiler import work_commands
    from lemica_trt.compiler.requests import BuildRequest
    from lemica_trt.core.progress import Clock, Expected
    from lemica_trt.ir.resources import load_profile

    class Told(Counting):
        """Counted steps are the seconds of the clock."""

        def __init__(self) -> None:
            super().__init__()
            self.clock = Clock(lambda: float(self.counts.total()))
            self.left: list[tuple[int, float]] = []

        def expect(self, stages: Expected) -> None:
            self.clock.expect(stages)

        def stage(self, name: str, detail: str) -> None:
            super().stage(name, detail)
            self.clock.stage(name)

        def advance(self, done: float, total: float) -> None:
            self.clock.advance(done, total)
            if self.clock.counts and self.clock.seconds_left is not None:
                self.left.append((self.counts.total(), self.clock.seconds_left))

    profile = load_profile("cogvideox-tiny")
    profile = msgspec.structs.replace(profile, sampling=msgspec.structs.replace(profile.sampling, steps=20))
    told, request = Told(), BuildRequest(budgets=(6,))
    forecast = sum(stage.full_steps for stage in work_commands.dry_run(profile, tmp_path / "bundle", request))
    with counted(told):
        work_commands.build(profile, tmp_path / "bundle", request, told)
    total = told.counts.total()
    assert total / 1.1 < forecast < total * 1.1, "what --dry-run says"
    late = [(spent, left) for spent, left in told.left if spent >= total / 5]
    assert len(late) >= 20
    for spent, left in late:
        assert abs(spent + left - total) <= 0.15 * (total - spent) + 0.02 * total, (spent, left, total)
    assert 24 <= total / 20 <= 27, "samplings of a default build"
