"""What a skipped step computes: a recipe (`Predictor`), and its weights for one schedule (`Prediction`)."""

from __future__ import annotations

from typing import Literal

from lemica_trt.core.values import Value, require, require_finite

Of = Literal["residual", "output"]


Method = Literal["reuse", "linear", "lsq2", "lsq3"]


Variable = Literal["step", "log-snr"]


class Predictor(Value, frozen=True):
    """A recipe for skipped steps.

    Attributes:
        of: what is predicted: the trunk residual, or the guided output.
        method: see the module docstring.
        variable: τ of `linear`; the others have none.
        gains: whether `linear` has gains.
    """

    of: Of = "residual"
    method: Method = "reuse"
    variable: Variable = "step"
    gains: bool = False

    def __post_init__(self) -> None:
        linear = self.method == "linear"
        require(linear or self.variable == "step", f"variable {self.variable} belongs to linear, not to {self.method}")
        require(linear or not self.gains, f"gains belong to linear, not to {self.method}")

    @property
    def name(self) -> str:
        """For tables: `residual-reuse`, `output-linear-log-snr-gains`."""
        variable = f"-{self.variable}" if self.variable != "step" else ""
        return f"{self.of}-{self.method}{variable}{'-gains' if self.gains else ''}"

    @property
    def fitted(self) -> bool:
        """Whether the weights come from measurements."""
        return self.gains or self.method in ("lsq2", "lsq3")


LEMICA = Predictor()
"""The paper: the last residual as it is."""


class Prediction(Value, frozen=True):
    """The weights of a recipe for one schedule.

    Attributes:
        predictor: the recipe.
        weights: for each step 0 … N − 1 the weight of the k-th last full step at index k; empty exactly at full steps.
    """

    predictor: Predictor
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for t, weights in enumerate(self.weights):
            require_finite(weights, f"weights[{t}]")
