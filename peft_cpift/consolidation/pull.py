"""An elastic pull of a model's coordinates to the values that they have when a training begins.

Elastic weight consolidation (EWC) adds the gradient of strength / 2 * w * (theta - anchor)**2 to that of the loss,
where w says how much a coordinate mattered to what was learned before. Under Adam that is divided by the same root
second moment as the loss's own gradient, so that what the strength means depends on the task. Here the pull is taken
out of the gradient, as AdamW takes out weight decay: after each step

    theta <- anchor + (theta - anchor) / (1 + strength * rate / peak_rate * w)

which no strength can make unstable, needs nothing of the engine but the values, and adds nothing to the clipped norm.
A coordinate that Adam pushes by a full step every time comes to rest 1 / (strength * w) steps from its anchor. The
steps may be of any size, so that one strength does for models that are trained at different rates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from warnings import warn

import torch
from torch import Tensor, nn

from peft_cpift.checkpoint import Source, Tensors, open_source
from peft_cpift.core.importance import Importance, open_importance
from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.isolation.engines import Whole, locate_parameter, stepping_optimizer
from peft_cpift.isolation.names import saved_parameters
from peft_cpift.isolation.optimizer_state import COPIES

STRENGTH = 0.1
WEIGHT_DTYPE = torch.bfloat16  # a relative error of 1 / 256 is nothing to a weight, and float16 would overflow
SAME = 1e-6
CPU_PART, GPU_PART = 2**18, 2**26  # coordinates that are pulled at a time


@dataclass
class _Held:
    """One parameter, as far as this process has it."""

    name: str
    place: Whole
    anchor: Tensor
    """The values it is pulled to, at the positions of what the optimizer steps on."""
    weight: Tensor
    """How hard, at the same positions; the mean over all coordinates is 1 for each importance."""
    has_copies: bool | None = None
    """Whether the optimizer keeps second copies of the parameter; None before its first step."""


class Consolidation:
    """The pull on a live model, from what mattered to earlier trainings.

    It keeps a copy of what is pulled, and two bytes more for each coordinate; sharded where the parameters are.

    Args:
        model: a model in memory, as for `FrozenCore`, in the form in which it will train.
        importance: one or more files that `save_importance` or `ImportanceCallback` wrote, or tensors by name: how
            much each coordinate mattered, a root mean square of gradients. Its square, divided by its mean over all
            trainable coordinates, is the weight w; the weights of several trainings are added up.
        strength: > 0; see the module. The same for models and rates of all sizes.
        anchor: the saved model or adapter to whose values it is pulled; None for those that the model has now.

    Raises:
        CpiftError: names or shapes do not fit the model, a value of an importance is negative or not finite or all are
            zero, or the strength is not positive.

    Warns:
        NoEffectWarning: some trainable parameters have no importance, and are not pulled.
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Source | Iterable[Source],
        *,
        strength: float = STRENGTH,
        anchor: Source | None = None,
    ):
        check_strength(strength)
        self.strength = float(strength)
        self._handles: list = []
        self._peaks: dict[int, float] = {}
        places = {name: locate_parameter(name, parameter) for name, parameter in saved_parameters(model).items()}
        weights = _weights(places, [open_importance(one) for one in as_list(importance)])
        pulled = {id(places[name].parameter) for name in weights}  # a tied one has several names
        left_out = [
            name
            for name, place in places.items()
            if place.parameter.requires_grad and id(place.parameter) not in pulled
        ]
        if left_out:
            warn(
                f"{len(left_out)} trainable tensors, first '{left_out[0]}', have no importance, since they were not "
                "trained before: they are not pulled back",
                NoEffectWarning,
                stacklevel=2,
            )
        anchors = None if anchor is None else open_source(anchor)
        self._held = [_hold(name, places[name], weight, anchors) for name, weight in weights.items()]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull after every step of `optimizer` from now until `detach`.

        Args:
            optimizer: a torch optimizer, or accelerate's or DeepSpeed's wrapper of one.

        Raises:
            CpiftError: the optimizer has no step hooks, does not train what is to be pulled, or keeps second copies of
                the weights.
        """
        optimizer = stepping_optimizer(optimizer)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for held in self._held:
            if not held.place.has_master_copy and id(held.place.parameter) not in trained:
                raise CpiftError(
                    f"the optimizer does not train '{held.name}', which is to be pulled: give the optimizer of this "
                    "model, and all that trains"
                )
        self.detach()
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Pull no more."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        strength = self.strength * self._rate(optimizer)
        for held in self._held:
            if held.place.moved_in(optimizer):
                if held.has_copies is None:
                    held.has_copies = bool(held.place.state(optimizer).keys() & COPIES)
                if held.has_copies:
                    raise CpiftError(
                        f"{type(optimizer).__name__} keeps a second copy of the weights, which would undo the pull: "
                        "use AdamW"
                    )
                _pull(held.place.stored(), held.anchor, held.weight, strength)

    def _rate(self, optimizer: torch.optim.Optimizer) -> float:
        """The learning rate as a share of its peak, in [0, 1]."""
        shares = []
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            # Schedules of torch and transformers note their peak; of others it is the highest so far.
            peak = float(group.get("initial_lr", max(rate, self._peaks.get(id(group), 0.0))))
            self._peaks[id(group)] = peak
            if peak > 0:
                shares.append(rate / peak)
        if not shares:
            return 0.0
        if not math.isclose(min(shares), max(shares), rel_tol=SAME, abs_tol=SAME):
            raise CpiftError(
                "the optimizer's parameter groups follow different learning rate schedules, and the pull follows one: "
                "give all the same schedule (their rates may differ)"
            )
        return shares[0]


@contextmanager
def consolidate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    importance: Source | Iterable[Source],
    *,
    strength: float = STRENGTH,
    anchor: Source | None = None,
) -> Iterator[Consolidation]:
    """Pull all coordinates back to their values, inside the block, the harder the more they mattered before.

    For a plain training loop; `ConsolidationCallback` does it in a Trainer.

    Args:
        model, importance, strength, anchor: see `Consolidation`.
        optimizer: the one that trains the model, or accelerate's or DeepSpeed's wrapper of it.

    Raises, warns: as `Consolidation` and its `attach` do.

    Source: ours; the pull's form is that of elastic weight consolidation (arXiv 1612.00796), decoupled from the
    gradient as weight decay is in AdamW (arXiv 1711.05101).

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with consolidate(model, optimizer, {"weight": torch.tensor([[1.0, 0.0]])}, strength=1.5):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight - before).tolist()
        [[-0.25, -1.0]]
    """
    pull = Consolidation(model, importance, strength=strength, anchor=anchor)
    pull.attach(optimizer)
    try:
        yield pull
    finally:
        pull.detach()


def as_list(importance: Source | Iterable[Source]) -> list[Source]:
    """One source of an importance or several, as several.

    Raises:
        CpiftError: there is none.
    """
    sources = [importance] if isinstance(importance, Mapping | str | os.PathLike) else list(importance)
    if not sources:
        raise CpiftError("there is no importance to consolidate by: give one or more")
    return sources


def check_strength(strength: float) -> None:
    """Raise CpiftError if it is no finite number above 0."""
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 < strength < math.inf:
        raise CpiftError(f"strength must be a number above 0, got {strength!r}; 0.03 to 0.3 is usual")


def _weights(places: Mapping[str, Whole], importances: list[Importance]) -> dict[str, Tensor]:
    """The sum over importances of their squares, each of mean 1; by name, where this process stores them."""
    means: list[tuple[Tensors, float]] = []
    for tensors in (importance.tensors for importance in importances):
        _check(places, tensors)
        names = [name for name in tensors if places[name].parameter.requires_grad]
        if not names:
            raise CpiftError(f"the model trains no tensor of {tensors.label}: there is nothing to pull back")
        # Of the whole tensors, which every process reads, so that all have the same mean.
        total = sum(_square(tensors, name).sum(dtype=torch.float64).item() for name in names)
        if total == 0:
            raise CpiftError(f"no trainable coordinate has an importance above 0 in {tensors.label}: nothing to pull")
        means.append((tensors, total / sum(tensors.size(name) for name in names)))
    return {
        name: place.cut(sum(_square(tensors, name).div_(mean) for tensors, mean in means if name in tensors)).to(
            WEIGHT_DTYPE
        )
        for name, place in places.items()
        if place.parameter.requires_grad and any(name in tensors for tensors, _ in means)
    }


def _check(places: Mapping[str, Whole], tensors: Tensors) -> None:
    missing = [name for name in tensors if name not in places]
    if missing:
        known = ", ".join(list(places)[:2])
        raise CpiftError(
            f"the model has not {len(missing)} tensors of {tensors.label}, first '{missing[0]}'; its own are named "
            f"like {known or 'nothing at all'}: give the importance of this model or adapter type"
        )
    for name in tensors:
        if tensors.shapes[name] != places[name].shape:
            raise CpiftError(
                f"tensor '{name}' has shape {list(tensors.shapes[name])} in {tensors.label} and "
                f"{list(places[name].shape)} in the model: give the importance of this model"
            )
        if not tensors.dtypes[name].is_floating_point:
            raise CpiftError(f"tensor '{name}' in {tensors.label} is {tensors.dtypes[name]}: importance is in floats")


def _square(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors[name].float()
    if not tensor.isfinite().all():
        raise CpiftError(f"tensor '{name}' has a value that is not finite in {tensors.label}: that training diverged")
    if (tensor < 0).any():
        raise CpiftError(f"tensor '{name}' has a negative value in {tensors.label}: importance is 0 or more")
    return tensor.square()


def _hold(name: str, place: Whole, weight: Tensor, anchors: Tensors | None) -> _Held:
    stored = place.stored()
    if anchors is None:
        anchor = stored.clone()
    else:
        if name not in anchors:
            raise CpiftError(f"tensor '{name}' is missing in {anchors.label}: give the model that training began with")
        if anchors.shapes[name] != place.shape:
            raise CpiftError(
                f"tensor '{name}' has shape {list(anchors.shapes[name])} in {anchors.label} and "
                f"{list(place.shape)} in the model: give the model that training began with"
            )
        anchor = place.cut(anchors[name].to(stored.dtype)).to(stored.device)
    return _Held(name, place, anchor, weight.to(stored.device))


def _pull(stored: Tensor, anchor: Tensor, weight: Tensor, strength: float) -> None:
    """Part by part, so that what is formed on the way stays in a CPU's cache, and is no second model on a GPU."""
    if not stored.is_contiguous():
        _pull_part(stored, anchor, weight, strength)
        return
    size = CPU_PART if stored.device.type == "cpu" else GPU_PART
    flat = (tensor.view(-1).split(size) for tensor in (stored, anchor, weight))
    for part in zip(*flat, strict=True):
        _pull_part(*part, strength)


def _pull_part(stored: Tensor, anchor: Tensor, weight: Tensor, strength: float) -> None:
    # In float32 or better, in which also what is in bfloat16 is pulled as far as its rounding lets it.
    dtype = torch.promote_types(stored.dtype, torch.float32)
    share = weight.to(dtype).mul_(strength)
    share.div_(share + 1)
    away = stored.to(dtype) - anchor
    if stored.dtype == dtype:
        # Not lerp_, which makes 0.0 of a -0.0 that has not moved.
        stored.addcmul_(away, share, value=-1)
    else:
        stored.copy_(stored.to(dtype).addcmul_(away, share, value=-1))
