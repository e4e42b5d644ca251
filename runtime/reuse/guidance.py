"""The difference between the guidance halves, kept from the last step that computed both."""

from __future__ import annotations

__all__ = ["KeptDifference"]


class KeptDifference:
    """How old the kept difference is, and what it counts for.

    With d the difference, v = v_conditional + (guidance - 1) * decay ** age * d; at age 0 and without decay that is guidance
    itself. The difference lies where the head wrote the prediction of both halves.
    """

    def __init__(self, decay: float = 1.0):
        self._decay = decay
        self.reset()

    def reset(self) -> None:
        """Nothing is kept."""
        self._age: int | None = None

    def refreshed(self) -> None:
        """Both halves were computed in this step."""
        self._age = 0

    def factor(self, guidance: float) -> float:
        """What the difference is multiplied with in a step that keeps it; counts the step."""
        if self._age is None:
            raise RuntimeError("no difference has been kept")
        self._age += 1
        return (guidance - 1.0) * self._decay**self._age
