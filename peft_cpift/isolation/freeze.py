"""Freeze single coordinates of a model's parameters in a plain training loop.

Two things together keep a coordinate to the bit, and neither is enough alone. Its gradient is zeroed as soon as it has
been accumulated, so that it adds nothing to the clipped gradient norm or to the optimizer's state. And its value is
written back inside every optimizer step, before anything else can see it, because an optimizer also moves entries
without a gradient: by weight decay, by momentum from before they were frozen, or by orthogonalising a whole matrix.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn

from peft_cpift.core.region import CoreRegion, load_regions
from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.isolation.engines import Whole, locate_parameter, put_, reduce_, stepping_optimizer, take, world_size
from peft_cpift.isolation.fingerprint import fingerprint
from peft_cpift.isolation.names import locate_region, saved_parameters
from peft_cpift.isolation.optimizer_state import CleanState


@dataclass
class _Held:
    """The frozen coordinates of one parameter, as far as this process has them."""

    name: str
    place: Whole
    masked: Tensor
    """Their flat positions in the gradient; int32 if that is enough, as below."""
    positions: Tensor
    """Their flat positions in what the optimizer steps on."""
    values: Tensor
    """What they keep, in the order of `positions`."""
    fingerprints: Tensor
    """int64, shape (2,): of the indices alone, and with the values; zero if another process speaks for them."""
    pull: Tensor | None = None
    """The gradient that was taken from them since the last step, in the order of `masked`."""
    pulled_in: int = -1
    """The step to which `pull` belongs, by the count of `FrozenCore`."""
    state_drifts: bool | None = None
    """Whether steps leave more than zeros in the optimizer's moments, gradient or not; None before that is known."""

    def state(self, optimizer: torch.optim.Optimizer) -> CleanState:
        """The optimizer's state, and what it should be."""
        return CleanState(self.place, optimizer, self.positions, self.values)


class FrozenCore:
    """The coordinates of core regions in a live model, with the values they have now and are to keep.

    The copy is compact: for each frozen coordinate its position, its value and its last gradient, nothing for the
    others. At 1% of a float32 or bfloat16 model that is 3 or 4% of the parameters' memory. FSDP2 shards it too; under
    DeepSpeed ZeRO every process keeps the positions and gradients of all coordinates.

    Args:
        model: a model in memory, wrapped by PEFT, `torch.compile`, DistributedDataParallel or DeepSpeed or not, or
            sharded by FSDP2, in the form in which it will train: what is prepared or unfrozen later is an error in the
            optimizer's next step, or in the next check if another optimizer steps.
        regions: one or more core regions, or their files. Their names are those of the saved checkpoint, or for a PEFT
            model those of its active adapter as saved.

    `len(frozen)` is the number of frozen coordinates that would otherwise train, over all processes.

    Raises:
        CpiftError: a region does not fit the model, naming the first tensors.

    Warns:
        NoEffectWarning: no frozen coordinate is trainable.
    """

    def __init__(self, model: nn.Module, regions: CoreRegion | str | os.PathLike | Iterable):
        self._model = model
        self._parameters = saved_parameters(model)
        trained = [locate_parameter(name, p).shape for name, p in model.named_parameters() if p.requires_grad]
        self._trained = sum(map(math.prod, trained))
        self._indices: dict[str, Tensor] = {}
        self._held: list[_Held] = []
        self._idle: dict[str, nn.Parameter] = {}  # in the region, and not trainable
        self._handles: list = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._step = 0  # begins with the first gradient after an optimizer step, which may take several calls
        self._stepped = False
        self._decays: dict[int, tuple] = {}
        self._stepped_on: set[int] = set()
        self.extend(regions)

    def __len__(self) -> int:
        return sum(indices.numel() for indices in self._indices.values())

    @property
    def fraction(self) -> float:
        """The frozen share of the coordinates that would otherwise train, in [0, 1]."""
        return len(self) / max(self._trained, 1)

    def check(self, regions: CoreRegion | str | os.PathLike | Iterable) -> None:
        """Raise CpiftError if regions that are to be frozen later do not fit the model."""
        locate_region(reduce(or_, load_regions(regions), CoreRegion({}, {})), self._parameters)

    def extend(self, regions: CoreRegion | str | os.PathLike | Iterable) -> None:
        """Freeze more coordinates at the values they have now.

        Raises, warns: as the class does; RuntimeError if what is frozen already has changed.
        """
        regions = load_regions(regions)
        self.verify()
        shapes = {held.name: held.place.shape for held in self._held}
        before = CoreRegion({name: indices.long() for name, indices in self._indices.items()}, shapes)
        region = reduce(or_, regions, before)
        places = locate_region(region, self._parameters)
        optimizer = self._optimizer
        self.detach()
        self._held, self._indices = [], {}  # what is idle stays known, so that it cannot begin to train unseen
        for names in _group_tied(places):
            place = places[names[0]]
            if not place.parameter.requires_grad:
                self._idle[names[0]] = place.parameter
            else:
                indices = region.indices[names[0]]
                if len(names) > 1:
                    indices = torch.cat([region.indices[name] for name in names]).unique()
                indices = _compact(indices, math.prod(place.shape))
                self._indices[names[0]] = indices
                self._held.append(_hold(names[0], place, indices))
        if regions and not self._held:
            warnings.warn(
                f"none of the {len(region)} frozen coordinates belongs to a trainable parameter: nothing is isolated",
                NoEffectWarning,
                stacklevel=3,
            )
        if optimizer is not None:
            self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hold the coordinates in every step of `optimizer` from now until `detach`.

        Args:
            optimizer: a torch optimizer, or accelerate's or DeepSpeed's wrapper of one.

        Raises:
            CpiftError: the optimizer cannot be held, or trains none of the frozen coordinates.
        """
        optimizer = stepping_optimizer(optimizer)
        self._check(optimizer)
        self.detach()
        self._clear_state(optimizer)
        for held in self._held:
            if isinstance(held.place.parameter.grad, Tensor):  # of a micro-batch that came before
                self._mask_gradient(held)
            self._handles.append(_register_first(held.place.parameter, self._mask(held)))
        self.begin_step()
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._handles.append(optimizer.register_load_state_dict_post_hook(self._clear_state))
        self._optimizer = optimizer

    def detach(self) -> None:
        """Let the coordinates go."""
        while self._handles:
            self._handles.pop().remove()
        self._optimizer = None

    @torch.no_grad()
    def restore(self) -> None:
        """Write the frozen values back. Attached, every optimizer step ends so."""
        for held in self._held:
            put_(held.place.stored(), held.positions, held.values)

    @torch.no_grad()
    def verify(self) -> None:
        """Raise RuntimeError on every process, naming the first parameter with a frozen coordinate that changed."""
        if not self._held:
            return
        present = {id(parameter) for parameter in self._model.parameters()}
        for held in self._held:
            # FSDP2 shows whole parameters in place of its shards now and then.
            if id(held.place.parameter) not in present and held.place.gradient_is_whole:
                raise RuntimeError(
                    f"core isolation was broken: '{held.name}' is another parameter of the model now; freeze when the "
                    "model has its final form (adapters, engine)"
                )
        moved = reduce_(_stack([_count_moved(held) for held in self._held]), "max").tolist()
        for held, count in zip(self._held, moved, strict=True):
            if count:
                raise RuntimeError(
                    f"core isolation was broken: {count} of {self._indices[held.name].numel()} frozen coordinates of "
                    f"'{held.name}' changed; something wrote to the parameter outside the optimizer step"
                )

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of the frozen indices and values of each parameter, the same on any number of processes."""
        if not self._held:
            return {}
        sums = reduce_(_stack([held.fingerprints for held in self._held])).tolist()
        return {
            held.name: ":".join(f"{part % 2**64:016x}" for part in both)
            for held, both in zip(self._held, sums, strict=True)
        }

    @torch.no_grad()
    def masked_grad_norm(self) -> float:
        """The norm of the gradient that the frozen coordinates had in the latest step, before it was zeroed.

        It says how hard the task pulls at the frozen core. Micro-batches are added up and processes averaged, as in
        the gradient itself; with loss scaling it is the norm of the scaled gradient. To be called by all processes.
        """
        if not self._held:
            return 0.0
        device = self._held[0].masked.device
        pulls = [_pull(held, self._step).to(device) for held in self._held if held.place.gradient_is_whole]
        if pulls and world_size() > 1:
            pulls = [reduce_(torch.cat(pulls)).div_(world_size())]
        square = _square(pulls, device)
        sharded = [held for held in self._held if not held.place.gradient_is_whole]
        if sharded:
            parts = [held for held in sharded if held.place.counts()]
            square += reduce_(_square([_pull(held, self._step).to(device) for held in parts], device))
        return math.sqrt(square)

    def shares_parameters(self, other: FrozenCore) -> bool:
        """Whether this freezes coordinates of the live model that `other` was made for."""
        theirs = {id(parameter) for parameter in other._parameters.values()}
        return any(id(held.place.parameter) in theirs for held in self._held)

    def begin_step(self) -> None:
        """Let the next gradient be the first of a step in `masked_grad_norm`, also if the last step was skipped."""
        self._stepped = True

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        trained = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
        known = [held for held in self._held if held.place.has_master_copy or id(held.place.parameter) in trained]
        self._stepped_on = trained.keys() & {id(held.place.parameter) for held in self._held}
        for name, parameter in self._idle.items():
            if id(parameter) in trained and (parameter.grad is not None or optimizer.state.get(parameter)):
                raise CpiftError(
                    f"parameter '{name}' requires no gradient, but the optimizer would move it by what it had before: "
                    "give the optimizer its trainable parameters only"
                )
        if known and len(known) < len(self._held):
            other = next(held.name for held in self._held if held not in known)
            warnings.warn(
                f"{len(self._held) - len(known)} frozen parameters, first '{other}', are not in this optimizer: if "
                "another one steps on them, freeze them there too",
                NoEffectWarning,
                stacklevel=4,
            )
        if self._held and not known:
            raise CpiftError(
                f"the optimizer trains none of the frozen parameters, '{self._held[0].name}' for one: give the "
                "optimizer of this model, and one that keeps no flattened copy of it"
            )

    def _mask(self, held: _Held) -> Callable[[nn.Parameter], None]:
        # A parameter owns its hooks where Python's garbage collector does not look: one that owned the parameter in
        # turn would keep a model alive for good. The optimizer's hook is what keeps `self` alive.
        owner, part = weakref.ref(self), weakref.ref(held)

        @torch.no_grad()
        def hook(parameter: nn.Parameter) -> None:
            frozen, held = owner(), part()
            if frozen is not None and held is not None:
                frozen._mask_gradient(held)

        return hook

    def _mask_gradient(self, held: _Held) -> None:
        gradient = held.place.gradient()
        if gradient.is_sparse:
            raise CpiftError(
                f"parameter '{held.name}' has a sparse gradient, which core isolation does not support: make its "
                "embedding with sparse=False"
            )
        if self._stepped:
            self._step, self._stepped = self._step + 1, False
        pull = take(gradient, held.masked)
        held.pull = held.pull.add_(pull) if held.pulled_in == self._step else pull
        held.pulled_in = self._step
        # Written, not multiplied: infinity times a zero mask would be NaN.
        put_(gradient, held.masked, 0.0)

    @torch.no_grad()
    def _clear_state(self, optimizer: torch.optim.Optimizer) -> None:
        self._decays = {}
        for held in self._held:
            held.state_drifts = None
            state = held.state(optimizer)
            state.write_copies()
            state.write_moments()

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self._idle.items():
            if parameter.requires_grad:
                raise RuntimeError(
                    f"core isolation was broken: '{name}' was not trainable when its coordinates were frozen, and is "
                    "now; freeze when all that will train is trainable, or freeze anew then"
                )
        if self._stepped_on:
            now = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for held in self._held:
                if id(held.place.parameter) in self._stepped_on - now:
                    raise RuntimeError(
                        f"core isolation was broken: the optimizer has another parameter in place of '{held.name}' "
                        "now; freeze after the model and optimizer have their final form"
                    )

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._check_parameters(optimizer)
        self.restore()
        self._stepped = True
        for group in optimizer.param_groups:
            decay = (group.get("weight_decay"), group.get("decoupled_weight_decay"))
            if self._decays.setdefault(id(group), decay) != decay:  # what was judged under another decay is open again
                self._decays[id(group)] = decay
                for held in self._held:
                    held.state_drifts = None
        open_questions = []
        for held in self._held:
            if not held.place.moved_in(optimizer):
                continue
            state = held.state(optimizer)
            state.write_copies()
            if held.state_drifts:
                state.write_moments()
            elif held.state_drifts is None and held.pulled_in == self._step and state.moments:
                open_questions.append((held, state))
        if open_questions:
            _judge(open_questions)


@contextmanager
def freeze_core(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regions: CoreRegion | str | os.PathLike | Iterable,
) -> Iterator[FrozenCore]:
    """Hold the coordinates of `regions` fixed, to the bit, inside the block; verified when it ends.

    Gradients are masked as autograd accumulates them; one that is assigned by hand, or that a communication hook
    reconstructs after the reduction (PowerSGD), counts in the clipped norm, though it moves no frozen value.

    Args:
        model, regions: see `FrozenCore`. All processes of a distributed training enter the block together.
        optimizer: the optimizer whose steps are to leave the coordinates alone, or accelerate's or DeepSpeed's wrapper
            of it. Where several step on one model, nest a block for each.

    Raises:
        CpiftError: a region does not fit the model, or the optimizer cannot be held.
        RuntimeError: at the end, if a frozen coordinate changed all the same.

    Source: stage 4 of CPI-FT (arXiv 2508.21741), which masks gradients; the restoring and the check are ours.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> region = CoreRegion({"weight": torch.tensor([1])}, {"weight": (1, 2)})
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> with freeze_core(model, optimizer, region):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """
    regions = load_regions(regions)
    if not regions:
        raise CpiftError("there is no region to freeze: give one or more")
    frozen = FrozenCore(model, regions)
    frozen.attach(optimizer)
    try:
        yield frozen
    except BaseException:
        frozen.restore()  # it may have come in the middle of a step
        raise
    else:
        frozen.verify()
    finally:
        frozen.detach()


def _group_tied(places: dict[str, Whole]) -> list[list[str]]:
    """The names of `places`, those of one parameter together."""
    groups: dict[int, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(id(place.parameter), []).append(name)
    return list(groups.values())


def _hold(name: str, place: Whole, indices: Tensor) -> _Held:
    stored = place.stored()
    here, positions = place.locate(indices)
    positions = _compact(positions, stored.numel()).to(stored.device)
    # ZeRO's gradients are whole when they are masked, though only a piece of the values is here.
    masked = indices.to(place.parameter.device) if place.has_master_copy else positions
    values = take(stored, positions)
    prints = torch.zeros(2, dtype=torch.int64, device=stored.device)
    if place.counts():
        ours = indices[here].to(stored.device)
        prints = torch.stack([fingerprint(ours), fingerprint(ours, values)])
    return _Held(name, place, masked, positions, values, prints)


def _compact(positions: Tensor, size: int) -> Tensor:
    return positions.to(torch.int32 if size <= 2**31 else torch.int64)


def _judge(questions: list[tuple[_Held, CleanState]]) -> None:
    """Find out which parameters' moments do not stay clean by themselves. Rarely, since it makes a GPU wait."""
    answers = _stack([state.judge() for _, state in questions]).tolist()
    stepped = any(used for _, used in answers)  # a step that was skipped shows nothing
    for (held, state), (clean, _) in zip(questions, answers, strict=True):
        if not clean:
            held.state_drifts = True
            state.write_moments()
        elif stepped:
            held.state_drifts = False


def _pull(held: _Held, step: int) -> Tensor:
    if held.pulled_in == step:
        return held.pull
    return torch.zeros(held.masked.shape, dtype=held.values.dtype, device=held.masked.device)


def _square(pulls: list[Tensor], device: torch.device) -> Tensor:
    """The squared norm of all together, in float32 or better so that bfloat16 sums do not stall."""
    norms = (pull.norm(dtype=torch.promote_types(pull.dtype, torch.float32)) for pull in pulls)
    return sum((norm.abs().float().square() for norm in norms), torch.zeros((), device=device))


def _stack(figures: list[Tensor]) -> Tensor:
    return torch.stack([figure.to(figures[0].device) for figure in figures])  # a model may span several devices


def _count_moved(held: _Held) -> Tensor:
    moved = _differ(take(held.place.stored(), held.positions), held.values)
    visible = held.place.visible()
    if visible is not None:
        moved = moved | _differ(take(visible, held.positions), held.values.to(visible.dtype)).to(moved.device)
    return moved.sum()


def _differ(now: Tensor, before: Tensor) -> Tensor:
    if now.dtype != before.dtype:
        return torch.ones_like(now, dtype=torch.bool)
    # Compared as bytes, because -0.0 == 0.0 and NaN != NaN.
    differs = now.view(torch.uint8) != before.to(now.device).view(torch.uint8)
    return differs.view(now.numel(), -1).any(dim=1) if now.numel() else differs


def _register_first(parameter: nn.Parameter, hook) -> object:
    """Register a hook that runs before those already there: an engine's own would have sent the gradient off."""
    handle = parameter.register_post_accumulate_grad_hook(hook)
    hooks = parameter._post_accumulate_grad_hooks
    earlier = {key: hooks[key] for key in hooks if key != handle.id}
    for key in earlier:
        del hooks[key]
    hooks.update(earlier)
    return handle
