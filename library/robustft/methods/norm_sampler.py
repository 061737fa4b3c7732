"""Which norm attacks a batch, and why two are enough (E-AT, robustft.methods.multinorm)."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustft.errors import CheckpointError, ConfigError, UnknownNameError
from robustft.threat import NORMS, Norm, parse_number
from robustft.training.seeding import generator

__all__ = ["NormSampler", "SamplerSchedule", "check_norms", "hull_l2_radius"]

_logger = logging.getLogger(__name__)

SamplerSchedule = Literal["error_weighted", "uniform", "alternate"]


def hull_l2_radius(eps_l1: float | str, eps_linf: float | str) -> float:
    """Return the radius of the largest L2 ball inside the convex hull of an L1 and an Linf ball.

    An affine classifier that resists both balls resists their hull, hence this L2 ball. With
    r = eps_l1 / eps_linf and a = r - floor(r) it is eps_l1 / sqrt(r - a + a^2).

    Args:
        eps_l1, eps_linf: radii in [0, 1] pixel units, > 0. Neither ball may contain the other in
            the dimension at hand: eps_linf <= eps_l1 <= dimension * eps_linf.

    Raises:
        ConfigError: a radius is not positive.

    Example:
        >>> round(hull_l2_radius(12, "8/255"), 5)
        0.61377
    """
    l1, linf = parse_number(eps_l1), parse_number(eps_linf)
    if not (0 < l1 < math.inf and 0 < linf < math.inf):
        raise ConfigError(f"eps_l1 = {eps_l1!r}, eps_linf = {eps_linf!r}: both must be > 0")
    ratio = l1 / linf
    rest = ratio - math.floor(ratio)
    return l1 / math.sqrt(ratio - rest + rest**2)


class NormSampler:
    """Draws the norm of each batch, by default in proportion to each norm's robust error.

    The error is that of training batches over the whole run: it is never reset, and until every
    norm has been drawn once the draw is uniform. Sampler and statistics are the same on all ranks
    if all construct it alike and ``update`` is given sums over ranks.

    Args:
        norms: the norms, each once.
        schedule: "error_weighted" (E-AT), "uniform" (SAT) or "alternate" (in the given order).
        seed: of the draws.

    Example:
        >>> sampler = NormSampler(("Linf", "L1"))
        >>> sampler.update("Linf", correct=75, seen=100)
        >>> sampler.update("L1", correct=25, seen=100)
        >>> sampler.probabilities()
        {'Linf': 0.25, 'L1': 0.75}
    """

    def __init__(
        self, norms: Sequence[Norm], schedule: SamplerSchedule = "error_weighted", *, seed: int = 0
    ) -> None:
        check_norms(norms)
        if schedule not in get_args(SamplerSchedule):
            raise UnknownNameError("sampler schedule", str(schedule), get_args(SamplerSchedule))
        self.norms: tuple[Norm, ...] = tuple(norms)
        self.schedule: SamplerSchedule = schedule
        self.batches: dict[Norm, int] = dict.fromkeys(self.norms, 0)
        """How many batches each norm has attacked."""
        self._draws = 0
        self._correct: dict[Norm, int | Tensor] = dict.fromkeys(self.norms, 0)
        self._seen: dict[Norm, int | Tensor] = dict.fromkeys(self.norms, 0)
        self._generator = generator(seed, "norm")
        self._fell_back = False

    def errors(self) -> dict[Norm, float]:
        """Return the running robust error in [0, 1] of every norm that has attacked a batch."""
        seen = {norm: int(self._seen[norm]) for norm in self.norms}
        return {n: 1 - int(self._correct[n]) / count for n, count in seen.items() if count}

    def probabilities(self) -> dict[Norm, float]:
        """Return the probability of each norm in the next draw; they sum to 1."""
        if self.schedule == "alternate":
            due = self.norms[self._draws % len(self.norms)]
            return {norm: float(norm == due) for norm in self.norms}
        uniform = dict.fromkeys(self.norms, 1 / len(self.norms))
        if self.schedule == "uniform" or not all(self.batches.values()):
            return uniform
        # Reading the counts waits for the device, as any draw that depends on them must.
        errors = self.errors()
        total = sum(errors.values())
        if total == 0:
            if not self._fell_back:
                _logger.info(
                    "no training image has been misclassified under any of %s so far: norms are "
                    "drawn uniformly until one is",
                    ", ".join(self.norms),
                )
            self._fell_back = True
            return uniform
        return {norm: error / total for norm, error in errors.items()}

    def draw(self) -> Norm:
        """Return the norm of the next batch."""
        weights = self.probabilities()
        self._draws += 1
        position = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        possible = [norm for norm, weight in weights.items() if weight > 0]
        for norm in possible[:-1]:
            position -= weights[norm]
            if position < 0:
                return norm
        return possible[-1]

    def update(self, norm: Norm, correct: int | Tensor, seen: int | Tensor) -> None:
        """Take in a batch.

        Args:
            norm: what attacked it.
            correct: images that stayed correct at every iterate, the clean one included; a number
                or a tensor ``[]``, which is not read before a draw needs it.
            seen: images in the batch.
        """
        if norm not in self.batches:
            raise UnknownNameError("norm of this sampler", norm, self.norms)
        self.batches[norm] += 1
        self._correct[norm] = self._correct[norm] + correct
        self._seen[norm] = self._seen[norm] + seen

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` reads: counts, and the generator's state."""
        return {
            "norms": list(self.norms),
            "schedule": self.schedule,
            "draws": self._draws,
            "batches": dict(self.batches),
            "correct": {norm: int(count) for norm, count in self._correct.items()},
            "seen": {norm: int(count) for norm, count in self._seen.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            CheckpointError: the state is that of a sampler of other norms or another schedule.
        """
        own, other = (list(self.norms), self.schedule), (state["norms"], state["schedule"])
        if own != other:
            raise CheckpointError(
                f"the checkpoint's norm sampler is {other}, this run's {own}: resume with the old "
                "settings, or begin a new run"
            )
        self._draws = int(state["draws"])
        self.batches = dict(state["batches"])
        self._correct, self._seen = dict(state["correct"]), dict(state["seen"])
        self._generator.set_state(state["generator"])


def check_norms(norms: Sequence[str]) -> None:
    """Raise ConfigError unless there are norms, all known and each once."""
    for norm in norms:
        if norm not in NORMS:
            raise UnknownNameError("norm", str(norm), NORMS)
    if not norms or len(set(norms)) < len(norms):
        raise ConfigError(f"norms = {list(norms)!r}: name at least one, and each only once")
