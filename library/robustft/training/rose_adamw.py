"""RoseAdamW: AdamW that lets only the less risky parameters move.

Jiang, Zhou, Lin, Li, Zhou, Jiang, "ROSE: Robust Selective Fine-tuning for Pre-trained Language
Models", EMNLP 2022, arXiv 2210.09658; the update is that of the released code, whose unmasked form
is the AdamW that Hugging Face Transformers had before version 5.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from robustft.errors import CheckpointError, ConfigError
from robustft.training.checks import require_at_least, require_choice, require_range
from robustft.training.rose_masks import (
    Eligible,
    EligiblePreset,
    MaskControl,
    MaskOptions,
    Variant,
    combine,
    deviation,
    in_normalisation,
    is_eligible,
    layer_of,
    select_within,
    shuffle_within,
    unit_norms,
    unit_shape,
)
from robustft.training.seeding import generator

__all__ = ["NamedParameters", "RoseAdamW", "StepRecord", "check_selection", "is_undecayed"]

NamedParameters: TypeAlias = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""``named_parameters()``, or parameter groups, whose "params" are (name, parameter) pairs or have
their names in "param_names"."""

NUM_NAMED = 3
"""How many parameters an error message names."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did.

    Args:
        masks: name -> mean mask in [0, 1] of every eligible parameter; empty without a mask
            (vanilla, warm-up).
        skipped: a gradient was not finite, and nothing has changed.
        first_order_skipped: the first-order gradients were not finite; their mask was all ones.
    """

    masks: Mapping[str, float]
    skipped: bool = False
    first_order_skipped: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """A parameter that has a gradient in this step; ``whole`` has the shape of all of it."""

    name: str
    parameter: Tensor
    whole: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]

    @property
    def num_steps(self) -> int:
        """Return how many steps it has taken."""
        return int(self.state["step"].item())


class RoseAdamW(torch.optim.Optimizer):
    """AdamW whose update is masked by ROSE; ``_update`` has the formulas.

    Variants: "vanilla" masks nothing; "first" keeps parameters whose gradient of the disagreement
    between two dropout passes is small; "second" keeps those whose gradient is like its running
    average; "ensemble" mixes both masks. "vanilla" and "second" need nothing of the loss. The
    caller has unscaled and clipped the gradients.

    ``state_dict`` is an ordinary one (step, exp_avg, exp_avg_sq; also mask where one outlives a
    step); the masks of the published method carry no state. One host transfer per step.

    Attributes:
        eligible_sizes: name -> number of scalars of every parameter that may be masked.
        record: what the last step did; None before the first.

    Args:
        named_params_or_groups: pairs (name, parameter), of which biases and normalisation are not
            decayed; or groups of such pairs, which are taken as they are.
        lr: learning rate, >= 0.
        variant: see above.
        upper: percentile up to which parameters are kept, in [0, 100]; needed by all variants but
            "vanilla".
        lower: percentile from which they are kept, in [0, 100], <= upper.
        gamma: weight of the first-order mask in "ensemble", in [0, 1].
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, > 0.
        weight_decay: decoupled and masked, >= 0.
        warmup_steps: steps at the start without a mask, >= 0, counted for each parameter.
        eligible: what may be masked, see ``is_eligible``.
        mask: "rose"; or the controls "fixed" (after ``options.fixed_steps`` what was kept most
            often stays so) and "random" (each step's mask values dealt out at random).
        seed: of "random", >= 0; the same on every rank.
        options: granularity and other ablations.

    Raises:
        ConfigError: a value out of range, parameters without names, or nothing eligible.

    Note:
        Unlike ``torch.optim.AdamW``, eps is added before the bias correction and the decay acts
        on the new weights, as in the authors' code.
    """

    def __init__(
        self,
        named_params_or_groups: NamedParameters,
        *,
        lr: float = 5e-5,
        variant: Variant = "vanilla",
        upper: float | None = None,
        lower: float = 0.0,
        gamma: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        eligible: Eligible = "official",
        mask: MaskControl = "rose",
        seed: int = 0,
        options: MaskOptions | None = None,
    ) -> None:
        self.variant, self.lower, self.gamma = variant, lower, gamma
        self.upper = 100.0 if upper is None else upper
        self.warmup_steps, self.eligible, self.mask, self.seed = warmup_steps, eligible, mask, seed
        self.options = MaskOptions() if options is None else options
        self.record: StepRecord | None = None
        self._wholes: Mapping[str, Tensor] = {}
        self._part_norms: Callable[[Sequence[Tensor]], Tensor] | None = None
        self._handed: Mapping[str, Tensor] | None = None
        self._handed_norms = False
        if upper is None and variant != "vanilla":
            raise ConfigError(f"variant = {variant!r} needs upper, the percentile kept: e.g. 60")
        check_selection(self)
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        groups = _groups(named_params_or_groups)
        for group in groups:
            _check_group({**defaults, **group})
        pairs = [pair for group in groups for pair in group["params"]]
        super().__init__(groups, defaults)
        # Now: engines may share the tensors out between workers.
        self.eligible_sizes = {
            name: value.numel() for name, value in pairs if is_eligible(eligible, name, value)
        }
        if variant != "vanilla" and not self.eligible_sizes:
            raise ConfigError(
                f"eligible = {eligible!r} selects none of the {len(pairs)} parameters, so ROSE "
                "would do nothing: choose 'matrices', 'all' or a callable"
            )

    # Parts of tensors.

    def hold_parts(
        self, wholes: Mapping[str, Tensor], norms: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        """Say that the parameters are this worker's parts of larger tensors.

        Risks are those of whole tensors, so their norms have to come from all workers; everything
        else is computed part by part.

        Args:
            wholes: name -> a tensor in the shape of the whole, without values (meta device).
            norms: returns the Frobenius norms ``[n]`` of the n whole tensors of which each worker
                gives its parts, on every worker the same; every worker calls it equally often.

        Raises:
            ConfigError: units finer than tensors, which may be split between workers themselves.
        """
        if self.variant != "vanilla" and self.options.granularity != "tensor":
            raise ConfigError(
                f"granularity = {self.options.granularity!r} ranks units that may be split between "
                "workers: choose 'tensor'"
            )
        self._wholes, self._part_norms = wholes, norms

    def _norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Frobenius norms ``[n]`` of whole tensors."""
        if self._part_norms is not None:
            return self._part_norms(tensors)
        return torch.stack(torch._foreach_norm(list(tensors)))

    def _unit_norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the norms of the units of tensors."""
        if self._part_norms is None:
            return unit_norms(tensors, self.options)
        # Of whatever kind: a risk is the ratio of two norms of one tensor, in which sizes cancel.
        return list(self._norms(tensors).reshape(-1, 1).unbind())

    # First-order gradients.

    @property
    def wants_first_order(self) -> bool:
        """Whether the coming step forms a first-order mask."""
        turn = self._turn()
        return self.variant in ("first", "ensemble") and turn >= 1 and self._is_fresh(turn)

    def is_eligible(self, name: str, parameter: Tensor) -> bool:
        """Return whether a parameter may be masked."""
        return is_eligible(self.eligible, name, parameter)

    def hand_over(self, values: Mapping[str, Tensor], *, norms: bool = False) -> None:
        """Give the coming ``step()`` its first-order gradients: for engines that call it bare.

        Args:
            values: name -> gradient of the disagreement term, on every rank the same. Names that
                are not eligible are ignored.
            norms: the values are the gradients' Frobenius norms (0-dim), not the gradients;
                granularity "tensor" only.

        Raises:
            ConfigError: norms with a finer granularity.
        """
        if norms and self.options.granularity != "tensor":
            raise ConfigError(
                f"granularity = {self.options.granularity!r} needs the whole gradients: choose "
                "first_order_reduce = 'gradients'"
            )
        self._handed, self._handed_norms = values, norms

    # The step.

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, first_order_grads: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take one step; ``record`` says what it did.

        Args:
            first_order_grads: name -> gradient of the disagreement term, for "first" and
                "ensemble" (or handed over before). Its scale does not matter.

        Raises:
            ConfigError: first-order gradients are needed and missing.
        """
        if first_order_grads is not None:
            self.hand_over(first_order_grads)
        members = self._members()
        if not members:
            raise ConfigError("no parameter has a gradient: call backward before step")
        masks = self._masks(members)
        self._handed = None
        if self.record is None or self.record.skipped:
            return
        for group in self.param_groups:
            chosen = [index for index, member in enumerate(members) if member.group is group]
            if chosen:
                self._update(group, [members[i] for i in chosen], [masks[i] for i in chosen])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            CheckpointError: it is the state of parameters of other names or in another order.
        """
        ours = [group["param_names"] for group in self.param_groups]
        theirs = [group.get("param_names") for group in state_dict["param_groups"]]
        if ours != theirs:
            raise CheckpointError(
                "the optimiser's state belongs to other parameters: resume with the model and the "
                "parameter groups that wrote it"
            )
        super().load_state_dict(state_dict)

    def _members(self) -> list[_Member]:
        members = []
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ConfigError(f"{name} has a sparse gradient: build it with sparse=False")
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                whole = self._wholes.get(name, parameter)
                members.append(_Member(name, parameter, whole, parameter.grad, state, group))
        return members

    def _update(
        self, group: dict[str, Any], members: Sequence[_Member], masks: Sequence[Any]
    ) -> None:
        """Apply the masked AdamW step; a mask of 0 changes neither weights nor first moment.

        Args:
            group: its hyper-parameters.
            members: parameters of this group.
            masks: per parameter, all numbers or all tensors that broadcast.
        """
        lr, (beta1, beta2) = group["lr"], group["betas"]
        weights = [member.parameter for member in members]
        grads = [member.grad for member in members]
        moments = [member.state["exp_avg"] for member in members]
        squares = [member.state["exp_avg_sq"] for member in members]
        sizes = []
        for member, mask in zip(members, masks, strict=True):
            member.state["step"] += 1
            t = member.num_steps
            sizes.append(mask * (-lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)))
        # g' = a g + (1 - a) m, the running average in place of what is missing. As an
        # interpolation it is exactly g at a = 1 and exactly m at a = 0.
        replaced = torch._foreach_lerp(moments, grads, list(masks))
        # b1 m + (1 - b1) g' = m + (1 - b1) a (g - m)
        torch._foreach_lerp_(moments, grads, [(1 - beta1) * mask for mask in masks])
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, replaced, replaced, value=1 - beta2)
        del replaced
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        changes = torch._foreach_div(moments, roots)
        del roots
        torch._foreach_mul_(changes, sizes)
        torch._foreach_add_(weights, changes)
        if group["weight_decay"]:
            rates = [-lr * group["weight_decay"] * mask for mask in masks]
            torch._foreach_add_(weights, torch._foreach_mul(weights, rates))

    # The masks of a step.

    def _turn(self) -> int:
        """Return the 1-based number of the coming step among those with a mask."""
        steps = [int(state["step"].item()) for state in self.state.values() if state]
        return max(steps, default=0) + 1 - self.warmup_steps

    def _is_fresh(self, turn: int) -> bool:
        """Return whether step ``turn`` forms a mask, or uses one that was formed before."""
        if self.mask == "fixed":
            return turn <= self.options.fixed_steps
        return (turn - 1) % self.options.mask_every == 0

    def _masks(self, members: Sequence[_Member]) -> list[Any]:
        """Return the mask of each member, set ``record``; the step's only host transfer is here."""
        turn = self._turn()
        masked = self.variant != "vanilla" and turn >= 1
        chosen = [m for m in members if masked and self.is_eligible(m.name, m.whole)]
        norms = self._norms([member.grad for member in members])
        finite = norms.isfinite().all()
        units, first_finite, means = list[Tensor](), torch.ones_like(finite), norms[:0]
        if chosen:
            units, first_finite = self._unit_masks(chosen, turn)
            means = torch.cat([unit.mean().reshape(1) for unit in units])
        flags = torch.stack([finite, first_finite]).to(means.dtype)
        is_finite, first_is_finite, *values = torch.cat([flags, means]).tolist()
        warm = [member.num_steps < self.warmup_steps for member in chosen]
        values = [1.0 if early else value for early, value in zip(warm, values, strict=True)]
        means_by_name = dict(zip([member.name for member in chosen], values, strict=True))
        self.record = StepRecord(
            masks=means_by_name if is_finite else {},
            skipped=not is_finite,
            first_order_skipped=not first_is_finite,
        )
        if is_finite and self._is_fresh(turn):
            self._hold(chosen, units)
        if self.options.granularity == "tensor" or not chosen:
            return [means_by_name.get(member.name, 1.0) for member in members]
        shaped = {
            member.name: unit.reshape(unit_shape(member.whole, self.options))
            for member, unit, early in zip(chosen, units, warm, strict=True)
            if not early
        }
        one = torch.ones((), dtype=norms.dtype, device=norms.device)
        return [shaped.get(member.name, one) for member in members]

    def _hold(self, members: Sequence[_Member], units: Sequence[Tensor]) -> None:
        """Remember masks that outlive this step: the last one, or for "fixed" their sum."""
        if self.mask == "fixed" or self.options.mask_every > 1:
            for member, mask in zip(members, units, strict=True):
                before = member.state.get("mask", 0) if self.mask == "fixed" else 0
                member.state["mask"] = before + mask

    def _unit_masks(self, members: Sequence[_Member], turn: int) -> tuple[list[Tensor], Tensor]:
        """Return masks ``[units]`` per member and whether the first-order gradients were finite."""
        per_layer = self.options.scope == "per_layer"
        scopes = [layer_of(member.name) if per_layer else "" for member in members]
        grad_norms = self._unit_norms([member.grad for member in members])
        masks = [torch.ones_like(norm) for norm in grad_norms]
        finite = torch.tensor(True, device=masks[0].device)
        if not self._is_fresh(turn):
            # A parameter that has its first gradient only now holds no mask and is kept.
            pairs = zip(members, masks, strict=True)
            held = [member.state.get("mask", one) for member, one in pairs]
            if self.mask != "fixed":
                return held, finite
            share = self.upper - self.lower
            return select_within([-mask for mask in held], scopes, lower=0, upper=share), finite
        if self.variant in ("first", "ensemble"):
            masks, finite = self._first_order(members, scopes)
        if self.variant in ("second", "ensemble"):
            second = self._second_order(members, grad_norms, scopes)
            if self.variant == "ensemble":
                both = zip(masks, second, strict=True)
                second = [combine(a, b, gamma=self.gamma) for a, b in both]
            masks = second
        if self.mask == "random":
            masks = shuffle_within(masks, scopes, generator=generator(self.seed, "mask", turn))
        return masks, finite

    def _first_order(
        self, members: Sequence[_Member], scopes: Sequence[str]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the first-order masks, all ones if a gradient is not finite, and whether not."""
        handed = self._handed or {}
        missing = [member.name for member in members if member.name not in handed]
        if missing:
            raise ConfigError(
                f"variant = {self.variant!r} has no first_order_grads for {len(missing)} eligible "
                f"parameters ({', '.join(missing[:NUM_NAMED])}): pass the gradients of the "
                "disagreement of two dropout passes by name"
            )
        values = [handed[member.name].detach() for member in members]
        if self._handed_norms:
            scores = [value.reshape(1) for value in values]
            if self.options.norm == "rms":
                pairs = zip(scores, members, strict=True)
                scores = [score / math.sqrt(m.whole.numel()) for score, m in pairs]
        else:
            scores = unit_norms(values, self.options)
        finite = torch.cat(scores).isfinite().all()
        masks = select_within(scores, scopes, lower=self.lower, upper=self.upper)
        return [torch.where(finite, mask, 1.0) for mask in masks], finite

    def _second_order(
        self, members: Sequence[_Member], grad_norms: Sequence[Tensor], scopes: Sequence[str]
    ) -> list[Tensor]:
        """Return the second-order masks; a parameter without a first moment is kept, unranked."""
        masks = [torch.ones_like(norm) for norm in grad_norms]
        old = [index for index, member in enumerate(members) if member.num_steps]
        if not old:
            return masks
        moment_norms = self._unit_norms([members[i].state["exp_avg"] for i in old])
        scores = [
            deviation(grad_norms[i], moment_norm, beta1=members[i].group["betas"][0])
            for i, moment_norm in zip(old, moment_norms, strict=True)
        ]
        chosen = select_within(scores, [scopes[i] for i in old], lower=self.lower, upper=self.upper)
        for index, mask in zip(old, chosen, strict=True):
            masks[index] = mask
        return masks


def check_selection(config: Any) -> None:
    """Raise ConfigError unless a configuration's fields are what ``RoseAdamW`` takes.

    Args:
        config: has variant, upper, lower, gamma, warmup_steps, seed, eligible, mask, options.
    """
    require_choice(config, "variant", Variant)
    require_choice(config, "mask", MaskControl)
    require_range(config, 0, 100, "upper", "lower")
    require_range(config, 0, 1, "gamma")
    require_at_least(config, 0, "warmup_steps", "seed")
    if not callable(config.eligible):
        require_choice(config, "eligible", EligiblePreset)
    if config.lower > config.upper:
        raise ConfigError(f"lower = {config.lower!r}: must not exceed upper = {config.upper!r}")
    if config.mask != "rose" and config.variant == "vanilla":
        raise ConfigError(
            f"mask = {config.mask!r} with variant = 'vanilla', which masks nothing: choose a "
            "variant that does, or leave mask at 'rose'"
        )
    if config.mask == "fixed" and config.options.mask_every > 1:
        raise ConfigError(
            f"mask_every = {config.options.mask_every!r} with mask = 'fixed', which is one mask: "
            "leave it at 1"
        )


def _groups(named: NamedParameters) -> list[dict[str, Any]]:
    """Return parameter groups; of bare pairs, biases and normalisation are not decayed.

    Raises:
        ConfigError: parameters without names.
    """
    items = list(named)
    groups: list[dict[str, Any]] = [dict(item) for item in items if isinstance(item, dict)]
    pairs: list[Any] = [item for item in items if not isinstance(item, dict)]
    if groups and pairs:
        raise ConfigError("groups and single parameters are mixed: pass either")
    if pairs:
        _require_pairs(pairs)
        plain = [pair for pair in pairs if is_undecayed(pair[0])]
        decayed = [pair for pair in pairs if not is_undecayed(pair[0])]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    for group in groups:
        group["params"] = list(group["params"])
        if "param_names" in group:
            group["params"] = list(zip(group.pop("param_names"), group["params"], strict=True))
        _require_pairs(group["params"])
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ConfigError("no parameter to train: pass model.named_parameters()")
    names = [name for group in groups for name, _ in group["params"]]
    if len(set(names)) < len(names):
        raise ConfigError("two parameters have the same name: masks are found by name")
    return groups


def _check_group(group: Mapping[str, Any]) -> None:
    lr, eps, decay, betas = (group[name] for name in ("lr", "eps", "weight_decay", "betas"))
    if not (math.isfinite(lr) and lr >= 0):
        raise ConfigError(f"lr = {lr!r}: must be a number >= 0")
    if not (math.isfinite(eps) and eps > 0):
        raise ConfigError(f"eps = {eps!r}: must be a number > 0")
    if not (math.isfinite(decay) and decay >= 0):
        raise ConfigError(f"weight_decay = {decay!r}: must be a number >= 0")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas = {betas!r}: must be two numbers >= 0 and < 1")


def is_undecayed(name: str) -> bool:
    """Return whether a parameter is a bias or belongs to a normalisation, by its name."""
    return name.rpartition(".")[2] == "bias" or in_normalisation(name)


def _require_pairs(items: Sequence[Any]) -> None:
    if not all(isinstance(item, tuple) and isinstance(item[0], str) for item in items):
        raise ConfigError(
            "RoseAdamW finds masks by name: pass model.named_parameters(), or groups whose "
            "'params' are (name, parameter) pairs"
        )
