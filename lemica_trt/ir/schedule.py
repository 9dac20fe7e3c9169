"""Which steps run in full."""

from __future__ import annotations

from lemica_trt.core.values import Value, require


class Schedule(Value, frozen=True):
    """Full steps of an N-step run.

    Attributes:
        num_steps: N.
        full_steps: rising; the first is 0.
        bottleneck: the errors of the cached segments sorted descending – the key that was minimised; empty where
            no error graph was used.
    """

    num_steps: int
    full_steps: tuple[int, ...]
    bottleneck: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.full_steps) and self.full_steps[0] == 0, "full_steps must begin with step 0")
        require(
            all(a < b for a, b in zip(self.full_steps, self.full_steps[1:])), "full_steps must rise without repetition"
        )
        require(
            self.full_steps[-1] < self.num_steps,
            f"full_steps must lie in 0 … {self.num_steps - 1}, got {self.full_steps[-1]}",
        )

    @property
    def budget(self) -> int:
        """B, the number of full steps."""
        return len(self.full_steps)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(i, j) for each full step i and the next one j, the last to N."""
        return tuple(zip(self.full_steps, (*self.full_steps[1:], self.num_steps)))
