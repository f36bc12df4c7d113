"""Warns at the first optimizer step when z cannot move, or moves so far that `z**k` runs away."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_cpift.errors import NoEffectWarning
from peft_cpift.propulsion.float32 import Float32Parameter
from peft_cpift.propulsion.layer import PropulsionLayer

LARGEST_CHANGE = 0.1
"""The share by which one step may change a layer's outputs before it counts as too large; ours."""


def watch_learning_rate(model: nn.Module) -> None:
    """Look at the first step of any optimizer that moves a z of `model`, and warn of what looks wrong.

    What counts is how z really moves, whatever the optimizer. A step during warm-up is projected to the peak of the
    learning rate, which torch's schedulers write into the optimizer as `initial_lr`, or `max_lr`.

    Warns:
        NoEffectWarning: Most entries of z with a gradient did not move, because the step is lost in float32.
        UserWarning: At the peak, one step changes outputs by more than `LARGEST_CHANGE`; or weight decay acts on z.

    Source: ours.
    """
    global _watch
    if _watch is None:  # one pair of hooks for all models, because hooks cannot take themselves away while they run
        _watch = _Watch()
    _watch.models.add(model)


_watch: _Watch | None = None


class _Watch:
    """What the hooks on all optimizers do at the first step of each z that belongs to a watched model."""

    def __init__(self) -> None:
        self.models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # by id: looking for the layers of every z at every step would cost time
        self.judged: dict[int, weakref.ref[Tensor]] = {}
        self.before: list[list[_Before]] = []
        register_optimizer_step_pre_hook(self.remember)
        register_optimizer_step_post_hook(self.compare)

    def remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        new = {
            id(z): (z, group)
            for group in optimizer.param_groups
            for z in group["params"]
            if isinstance(z, Float32Parameter) and id(z) not in self.judged and z.grad is not None
        }
        self.before = []
        for model in self.models if new else ():
            layers = [layer for layer in model.modules() if isinstance(layer, PropulsionLayer)]
            entries = [
                _Before(layer, name, z, z.detach().clone(), new[id(z)][1])
                for layer in layers
                for name, z in layer.propulsion_z.items()
                if id(z) in new and float(new[id(z)][1]["lr"]) > 0
            ]
            self.before.append(entries)

    def compare(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before, self.before = self.before, []
        for entries in before:
            if entries and _judge(entries):
                for entry in entries:
                    key = id(entry.z)
                    self.judged[key] = weakref.ref(entry.z, lambda _, key=key: self.judged.pop(key, None))


class _Before(NamedTuple):
    layer: PropulsionLayer
    adapter: str
    z: Tensor
    value: Tensor
    group: dict[str, Any]


def _judge(entries: list[_Before]) -> bool:
    """Warn of what the step did to z; False if it is too early to tell."""
    with_gradient = unmoved = 0
    largest, where = 0.0, entries[0]
    for entry in entries:
        if entry.z.grad is None:  # some optimizers take it away
            return True
        if not torch.isfinite(entry.z.grad).all():  # a step that loss scaling skips
            return False
        pulled = entry.z.grad != 0
        change = (entry.z.detach() - entry.value).abs()
        with_gradient += int(pulled.sum())
        unmoved += int((pulled & (change == 0)).sum())
        rate, peak = _rates(entry.group)
        share = entry.layer.degree[entry.adapter] * float(change.max()) * peak / rate
        if share > largest:
            largest, where = share, entry
    if not with_gradient:
        return False
    rate, peak = _rates(where.group)
    if unmoved > with_gradient / 2:
        if rate < peak:
            return False
        warnings.warn(
            f"the learning rate {rate:g} is too small for Propulsion: {unmoved} of {with_gradient} entries of z did "
            "not move, because in float32 a step below 6e-8 from 1 is lost; use Adam at learning_rate=1e-3.",
            NoEffectWarning,
            stacklevel=2,
        )
    elif largest > LARGEST_CHANGE:
        degree = where.layer.degree[where.adapter]
        warnings.warn(
            f"the learning rate {peak:g} is too large for Propulsion: one step changes outputs of "
            f"{where.layer.module_name} by {largest:.0%}, and z**{degree} runs away; "
            f"divide it by {largest / 0.015:.0f}.",
            stacklevel=2,
        )
    if decay := float(where.group.get("weight_decay") or 0):
        warnings.warn(
            f"weight_decay={decay:g} pulls z towards 0, and the outputs with it, instead of towards 1, where z "
            "starts; set weight_decay=0 for z.",
            stacklevel=2,
        )
    return True


def _rates(group: dict[str, Any]) -> tuple[float, float]:
    """Return the learning rate of a group of parameters, now and at its peak."""
    rate = float(group["lr"])
    return rate, max(rate, float(group.get("initial_lr", rate)), float(group.get("max_lr", rate)))
