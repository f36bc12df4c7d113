"""How much a coordinate may matter to a task: measures taken while and after a model trains on it.

- `update`: how far it moved, |θ1 - θ0|, the paper's; `least_update`: those that moved least, but did
- `random`: nothing, the control
- `relative`: how far it moved, relative to where it was (or to 1% of its tensor's RMS, if that is more)
- `magnitude`: its size after training, |θ1|
- `consistency`: how far it moved, relative to the way it took
- `path`: the sum over the steps of -gradient times step: its part in the loss's fall (synaptic intelligence)
- `squared_gradient`: the sum over the steps of the batch gradient's square, clipped as the optimizer gets it, as in
  `path` and `second_moment`
- `second_moment`: the same as AdamW remembers it when the training ends, its `exp_avg_sq`
- `fisher`: the mean over rows of the squared gradient after training (empirical Fisher information)
- `put_back`: `fisher` times the squared update: the second-order rise of the loss if it were put back
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from evidence.language import Row, per_row_squares, trained, values_of

RECORDED = ("path", "squared_gradient", "moved")
MEASURES = (
    *("update", "least_update", "random", "relative", "magnitude", "consistency"),
    *("path", "squared_gradient", "second_moment", "fisher", "put_back"),
)


class Recorder:
    """Sums what only the steps themselves show; give its two methods to `train`."""

    def __init__(self, model: nn.Module):
        self._parameters = trained(model)
        self._before = values_of(model)
        self.sums = {kind: {n: torch.zeros_like(p) for n, p in self._before.items()} for kind in RECORDED}

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember where the step starts."""
        for name, parameter in self._parameters.items():
            self._before[name].copy_(parameter)

    @torch.no_grad()
    def after_step(self) -> None:
        """Add up the step's part."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                step = parameter - self._before[name]
                self.sums["path"][name].addcmul_(parameter.grad, step, value=-1)
                self.sums["squared_gradient"][name].addcmul_(parameter.grad, parameter.grad)
                self.sums["moved"][name].add_(step.abs_())


def fisher(model: nn.Module, rows: list[Row]) -> dict[str, Tensor]:
    """The mean over rows of the squared gradient of a row's loss."""
    total = {name: torch.zeros_like(parameter) for name, parameter in trained(model).items()}
    for squares in per_row_squares(model, rows):
        for name, square in squares.items():
            total[name].add_(square, alpha=1 / len(rows))
    return total


def measure(kind: str, name: str, records: dict[str, dict[str, Tensor]], seed: int) -> Tensor:
    """One measure of one tensor: not negative, of its shape.

    Args:
        kind: one of `MEASURES`.
        name: the tensor's.
        records: `start` and `end`, the values before and after training, `fisher`, `second_moment`, and the
            `Recorder`'s sums.
        seed: of `random`.
    """
    start, end = records["start"][name], records["end"][name]
    update = (end - start).abs()
    if kind == "update":
        return update
    if kind == "least_update":
        return torch.where(update > 0, 1 / (update + 1e-30), 0)
    if kind == "random":
        generator = torch.Generator().manual_seed(hash_seed(name, seed))
        return torch.rand(update.shape, generator=generator).clamp_min_(1e-9).to(update.device)
    if kind == "relative":
        floor = 0.01 * start.square().mean().sqrt()
        return update / start.abs().clamp_min(floor.clamp_min(1e-12))
    if kind == "magnitude":
        return end.abs()
    if kind == "consistency":
        return update / records["moved"][name].clamp_min(1e-30)
    if kind == "put_back":
        return records["fisher"][name] * update.square()
    return records[kind][name].clamp_min(0)


def hash_seed(name: str, seed: int) -> int:
    """A seed of its own for each tensor, the same in every process."""
    return zlib.crc32(f"{seed}/{name}".encode())
