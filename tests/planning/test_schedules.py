"""Schedules that need no error graph: equal distances, given, published."""

from __future__ import annotations

import pytest
from hypothesis import given as forall
from hypothesis import strategies as st

from lemica_trt.core.errors import InfeasibleError, InputError, UsageError
from lemica_trt.core.values import read_value
from lemica_trt.ir.resources import calibration_path
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.schedules import PublishedSchedules, given, published, uniform

pytestmark = pytest.mark.null


@forall(st.integers(1, 200), st.data())
def test_uniform(num_steps: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, num_steps))
    schedule = uniform(num_steps, budget)
    lengths = [j - i for i, j in schedule.segments]
    assert schedule.budget == budget
    assert max(lengths) - min(lengths) <= 1
    assert schedule.full_steps == tuple(int(i * num_steps / budget + 0.5) for i in range(budget))


def test_uniform_out_of_range() -> None:
    assert uniform(50, 15).full_steps == (0, 3, 7, 10, 13, 17, 20, 23, 27, 30, 33, 37, 40, 43, 47)
    for budget in (0, 51):
        with pytest.raises(InfeasibleError, match=r"1 … 50 full steps"):
            uniform(50, budget)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], r"schedule\[0\]: expected step 0, got nothing"),
        ([1, 2], r"schedule\[0\]: expected step 0, got 1"),
        ([0, 2, 2], r"schedule\[2\]: expected a step after 2"),
        ([0, 5, 3], r"schedule\[2\]: expected a step after 5"),
        ([0, 5, 50], r"schedule\[2\]: expected a step of 0 … 49, got 50"),
        ([0, -1], r"schedule\[1\]: expected a step of 0 … 49, got -1"),
    ],
)
def test_given_names_the_index(steps: list[int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        given(steps, 50)


def test_given() -> None:
    assert given([0, 1, 9], 10).segments == ((0, 1), (1, 9), (9, 10))


def test_published() -> None:
    assert published("wan2.1-t2v-1.3b", 17).full_steps == (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 18, 25, 32, 39, 46, 49)
    lists = read_value(PublishedSchedules, calibration_path("published_schedules.json"))
    assert len(lists.schedules) == 29
    assert len({(entry.model, entry.budget) for entry in lists.schedules}) == 29
    for entry in lists.schedules:
        assert len(entry.full_steps) == entry.budget
        if entry.model == "z-image-turbo":
            with pytest.raises(InputError, match=r"z-image-turbo with \d full steps.*expected a step of 0 … 8, got 9"):
                published(entry.model, entry.budget)
        else:
            schedule = published(entry.model, entry.budget)
            assert (schedule.num_steps, schedule.budget) == (entry.num_steps, entry.budget)


def test_published_unknown() -> None:
    with pytest.raises(InputError, match=r"got 'sora' → use one of flux\.1-dev, "):
        published("sora", 20)
    with pytest.raises(InputError, match="got 18 → use 14 or 17 or 20 or 25"):
        published("wan2.1-t2v-1.3b", 18)


@pytest.mark.parametrize(
    ("steps", "says"),
    [((), "begin with step 0"), ((1, 2), "begin with step 0"), ((0, 2, 2), "must rise"), ((0, 10), r"0 … 9, got 10")],
)
def test_schedule_refuses(steps: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Schedule(num_steps=10, full_steps=steps)
