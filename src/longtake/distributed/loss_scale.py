"""The factor of a loss in fp16, found by its overflows (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

One for every engine, so that none of them shows in the numbers. The rule and its names in a checkpoint are those of
`torch.amp.GradScaler`, which would ask each rank for itself whether its part of the gradient overflowed.
"""

from collections.abc import Mapping


class LossScale:
    """The factor of a loss where `enabled`, under an engine that averages gradients over `ranks` to sum them up.

    That sum is made up for by the loss, and in fp16 behind the reduction: values there are then those of one process,
    and overflow when its do.
    """

    def __init__(self, enabled: bool, ranks: int = 1) -> None:
        self.enabled = enabled
        self.ranks = ranks
        self._state = {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        }

    @property
    def value(self) -> float:
        """What the loss is multiplied by."""
        return float(self._state["scale"]) if self.enabled else float(self.ranks)

    @property
    def inverse(self) -> float:
        """What the reduced gradients are to be multiplied by."""
        return self.ranks / float(self._state["scale"]) if self.enabled else 1.0

    def update(self, finite: bool) -> None:
        """After a step with a gradient that is `finite` or not; an overflow halves the factor."""
        state = self._state
        if not finite:
            state["scale"] *= state["backoff_factor"]
            state["_growth_tracker"] = 0
            return
        state["_growth_tracker"] += 1
        if state["_growth_tracker"] == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            state["_growth_tracker"] = 0

    def state(self) -> dict[str, float]:
        """What must be in a checkpoint; empty where not enabled."""
        return dict(self._state) if self.enabled else {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Inverse of `state`."""
        if self.enabled:
            self._state = dict(state)
