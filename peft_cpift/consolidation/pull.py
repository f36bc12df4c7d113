"""An elastic pull of a model's coordinates to the values that they have when a training begins.

Elastic weight consolidation (EWC) adds the gradient of strength / 2 * w * (theta - anchor)**2 to that of the loss,
where w says how much a coordinate mattered to what was learned before. Under Adam that is divided by the same root
second moment as the loss's own gradient, so that what the strength means depends on the task. Here the pull is taken
out of the gradient, as AdamW takes out weight decay: after each step

    theta <- anchor + (theta - anchor) / (1 + strength * rate / peak_rate * w)

which no strength makes unstable, needs nothing of the engine but the values, and adds nothing to the clipped norm.
A coordinate that Adam pushes by a full step every time comes to rest 1 / (strength * w) steps from its anchor. The
steps may be of any size, so that one strength does for models that are trained at different rates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Set
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
MOST = 1e6  # of which the product with any weight is finite
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

    The peak of the learning rate is the one that the schedule notes in the optimizer's groups, as those of torch and
    transformers do but for `ReduceLROnPlateau` and `CyclicLR`: of these it is the highest since the pull was attached.

    Args:
        model: a model in memory, as for `FrozenCore`, in the form in which it will train.
        importance: one or more files that `save_importance` or `ImportanceCallback` wrote, or tensors by name: how
            much each coordinate mattered, a root mean square of gradients. Its square, divided by its mean over all
            trainable coordinates, is the weight w; the weights of several trainings are added up.
        strength: > 0, at most 1e6; see the module. The same for models and rates of all sizes.
        anchor: the saved model or adapter, or tensors by name, to whose values it is pulled; None for those that the
            model has now.

    Raises:
        CpiftError: names, shapes or dtypes do not fit the model, a value of an importance is negative or not finite or
            all are zero, or the strength is out of its range.

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
        self._stepped_on: set[int] = set()
        places = {name: locate_parameter(name, parameter) for name, parameter in saved_parameters(model).items()}
        weights = _weights(places, [open_importance(one) for one in as_list(importance)])
        pulled = {id(places[name].parameter) for name in weights}
        left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in pulled]
        if left_out:
            warn(
                f"{len(left_out)} trainable tensors, first '{left_out[0]}', have no importance, since they were not "
                "trained before: they are not pulled back",
                NoEffectWarning,
                stacklevel=2,
            )
        self._idle = {name: place.parameter for name, place in places.items() if not place.parameter.requires_grad}
        anchors = None if anchor is None else open_source(anchor)
        self._held = [_hold(name, places[name], weight, anchors) for name, weight in weights.items()]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull after every step of `optimizer` from now until `detach`.

        Args:
            optimizer: a torch optimizer, or accelerate's or DeepSpeed's wrapper of one.

        Raises:
            CpiftError: the optimizer has no step hooks, or trains nothing that is to be pulled. From its steps: it
                keeps second copies of the weights.
            RuntimeError: from its steps, if parameters were replaced or became trainable since.

        Warns:
            NoEffectWarning: the optimizer does not train all that is to be pulled.
        """
        try:
            optimizer = stepping_optimizer(optimizer)
        except CpiftError as error:
            raise CpiftError(f"nothing can be pulled back where no core can be frozen: {error}") from error
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        others = [h.name for h in self._held if not h.place.has_master_copy and id(h.place.parameter) not in trained]
        if len(others) == len(self._held):
            raise CpiftError(
                f"the optimizer trains nothing of what is to be pulled, '{others[0]}' for one: give that of this model"
            )
        if others:
            warn(
                f"{len(others)} tensors that are to be pulled, first '{others[0]}', are not in this optimizer: if "
                "another one steps on them, consolidate there too",
                NoEffectWarning,
                stacklevel=2,
            )
        self.detach()
        self._stepped_on = trained & {id(held.place.parameter) for held in self._held}
        handle = optimizer.register_step_post_hook(self._after_step)
        # First of all, so that what is frozen is restored after it.
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
        self._handles.append(handle)

    def detach(self) -> None:
        """Pull no more."""
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_) -> None:
        stepped = [(p, self._rate(group)) for group in optimizer.param_groups for p in group["params"]]
        rates = {id(parameter): rate for parameter, rate in stepped}
        self._check(rates.keys())
        # Under fp16's loss scale a fused optimizer is called for a step that it skips.
        skipped = getattr(optimizer, "found_inf", None)
        for held in self._held:
            if held.place.has_master_copy:
                rate = next((rate for flat, rate in stepped if held.place.is_part_of(flat)), None)
            else:
                rate = rates.get(id(held.place.parameter))
            if rate is None:  # another call of the engine's, or another optimizer, steps on it
                continue
            if held.has_copies is None:
                held.has_copies = bool(held.place.state(optimizer).keys() & COPIES)
            if held.has_copies:
                raise CpiftError(
                    f"{type(optimizer).__name__} keeps a second copy of the weights, which would undo the pull: use "
                    "AdamW"
                )
            strength = self.strength * rate
            if skipped is not None:
                strength = strength * (1 - skipped.to(held.anchor.device))
            _pull(held.place.stored(), held.anchor, held.weight, strength)

    def _rate(self, group: dict) -> float:
        """The learning rate of a parameter group as a share of its peak, in [0, 1]."""
        if group["lr"] is None:  # an optimizer that finds its own
            return 1.0
        rate, key = float(group["lr"]), id(group["params"][0])
        # OneCycleLR notes both; the first is where it begins.
        noted = (float(group.get(name, 0.0)) for name in ("initial_lr", "max_lr"))
        peak = self._peaks[key] = max(rate, self._peaks.get(key, 0.0), *noted)
        return rate / peak if peak else 0.0

    def _check(self, now: Set[int]) -> None:
        if not self._stepped_on <= now:
            raise RuntimeError(
                "parameters that are pulled back are no longer in the optimizer: consolidate when the model has its "
                "final form (adapters, engine)"
            )
        for name, parameter in self._idle.items():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"'{name}' was not trainable when the pull began, and is now: consolidate when all that will "
                    "train is trainable, or begin anew then"
                )


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
        >>> _ = nn.init.zeros_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with consolidate(model, optimizer, {"weight": torch.tensor([[1.0, 0.0]])}, strength=1.5):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.tolist()
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
    one = isinstance(importance, Mapping | str | os.PathLike)
    sources = [importance] if one else list(importance) if isinstance(importance, Iterable) else [importance]
    if not sources:
        raise CpiftError("there is no importance to consolidate by: give one or more")
    for source in sources:
        if not isinstance(source, Mapping | str | os.PathLike):
            raise CpiftError(f"an importance is a file, or tensors by name, not a {type(source).__name__}")
    return sources


def check_strength(strength: float) -> None:
    """Raise CpiftError if it is no number above 0, or too large."""
    if not isinstance(strength, Real) or isinstance(strength, bool) or not 0 < strength <= MOST:
        raise CpiftError(
            f"strength must be a number above 0, at most {MOST:g}, got {strength!r}; 0.03 to 0.3 is usual"
        )


def _weights(places: Mapping[str, Whole], importances: list[Importance]) -> dict[str, Tensor]:
    """The sum over importances of their squares, each of mean 1; by name, where this process stores them."""
    roots: list[tuple[Tensors, float]] = []
    for tensors in (importance.tensors for importance in importances):
        _check(places, tensors)
        names = [name for name in tensors if places[name].parameter.requires_grad]
        if not names:
            raise CpiftError(f"the model trains no tensor of {tensors.label}: there is nothing to pull back")
        # Of the whole tensors, which every process reads, so that all have the same.
        norms = [torch.linalg.vector_norm(_read(tensors, name), dtype=torch.float64).item() for name in names]
        if not any(norms):
            raise CpiftError(f"no trainable coordinate has an importance above 0 in {tensors.label}: nothing to pull")
        roots.append((tensors, math.hypot(*norms) / math.sqrt(sum(tensors.size(name) for name in names))))
    weights, seen = {}, set()
    for name, place in places.items():
        parts = [(tensors, root) for tensors, root in roots if name in tensors]
        if place.parameter.requires_grad and parts and id(place.parameter) not in seen:
            seen.add(id(place.parameter))  # a tied one has several names
            weight = sum(_read(tensors, name).div(root).float().square() for tensors, root in parts)
            weights[name] = place.cut(weight).to(WEIGHT_DTYPE)
    return weights


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


def _read(tensors: Tensors, name: str) -> Tensor:
    tensor = tensors[name]
    if not tensor.isfinite().all():
        raise CpiftError(f"tensor '{name}' has a value that is not finite in {tensors.label}: that training diverged")
    if (tensor < 0).any():
        raise CpiftError(f"tensor '{name}' has a negative value in {tensors.label}: importance is 0 or more")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _hold(name: str, place: Whole, weight: Tensor, anchors: Tensors | None) -> _Held:
    stored = place.stored()
    anchor = stored.clone() if anchors is None else _cut_anchor(name, place, anchors)
    return _Held(name, place, anchor, weight.to(stored.device))


def _cut_anchor(name: str, place: Whole, anchors: Tensors) -> Tensor:
    cure = "give the model that the training began with"
    if name not in anchors:
        raise CpiftError(f"tensor '{name}' is missing in {anchors.label}: {cure}")
    if anchors.shapes[name] != place.shape:
        raise CpiftError(
            f"tensor '{name}' has shape {list(anchors.shapes[name])} in {anchors.label} and {list(place.shape)} in "
            f"the model: {cure}"
        )
    if not anchors.dtypes[name].is_floating_point:
        raise CpiftError(f"tensor '{name}' in {anchors.label} is {anchors.dtypes[name]}: {cure}")
    # As a master copy begins: from what the model has, in its dtype.
    whole, stored = anchors[name].to(place.parameter.dtype), place.stored()
    if not whole.isfinite().all():
        raise CpiftError(f"tensor '{name}' has a value that is not finite in {anchors.label}: {cure}")
    return place.cut(whole).to(stored.device, stored.dtype, copy=True)


def _pull(stored: Tensor, anchor: Tensor, weight: Tensor, strength: float | Tensor) -> None:
    """Part by part, so that what is formed on the way stays in a CPU's cache, and is no second model on a GPU."""
    if not stored.is_contiguous():
        _pull_part(stored, anchor, weight, strength)
        return
    size = CPU_PART if stored.device.type == "cpu" else GPU_PART
    flat = (tensor.view(-1).split(size) for tensor in (stored, anchor, weight))
    for part in zip(*flat, strict=True):
        _pull_part(*part, strength)


def _pull_part(stored: Tensor, anchor: Tensor, weight: Tensor, strength: float | Tensor) -> None:
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
