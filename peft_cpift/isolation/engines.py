"""Where the values and the gradient of one parameter are, under each of PyTorch's training engines.

A core region names coordinates of whole tensors. What an optimizer steps on may be that tensor (one process, DDP), the
part of it that this process holds (FSDP2's DTensor), or a part of a master copy in another dtype (DeepSpeed ZeRO). The
classes here answer the same few questions for each of them, so that freezing need not know the engine.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from typing_extensions import override

from peft_cpift.errors import CpiftError

# The optimizers of DeepSpeed whose master weights the classes below know. Others step elsewhere, or later.
DEEPSPEED_OPTIMIZERS = {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer"}
# They step inside backward, before anything could be masked or restored.
STEPS_IN_BACKWARD = {"Lomo", "AdaLomo"}


class Whole:
    """A parameter that every process holds in full: one process, DataParallel, DistributedDataParallel.

    Attributes:
        shape: of the whole tensor.
        gradient_is_whole: whether `gradient` is that of the whole tensor and of this process's rows alone, not yet
            averaged over the processes; else it has the positions of `stored` and is averaged.
        has_master_copy: whether `stored` is a copy that the engine made, and `visible` is what the model has.
    """

    gradient_is_whole = True
    has_master_copy = False

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter
        self.shape = tuple(parameter.shape)

    def counts(self) -> bool:
        """Whether this process speaks for the coordinates it stores when all processes are summed."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def locate(self, indices: Tensor) -> tuple[Tensor | slice, Tensor]:
        """(which of the flat `indices` of the whole tensor this process stores, their positions in `stored`)."""
        return slice(None), indices

    def stored(self) -> Tensor:
        """The tensor on which the optimizer steps; the engine refreshes every other copy from it after the step."""
        return self.parameter.detach()

    def visible(self) -> Tensor | None:
        """What the model computes with, at the positions of `stored`, where that is another tensor."""
        return None

    def gradient(self) -> Tensor:
        """The gradient, at the moment when it has been accumulated."""
        return self.parameter.grad

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """The optimizer's state for the parameter, at the positions of `stored`."""
        return optimizer.state.get(self.parameter, {})

    def moved_in(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the call of the optimizer's step that has just ended was one for this parameter."""
        return True

    def gather(self, values: Tensor) -> Tensor:
        """The whole tensor that has `values` at the positions of `stored`; all processes call this together."""
        return values

    def cut(self, whole: Tensor) -> Tensor:
        """What of a whole tensor, which every process has, is at the positions of `stored`: `gather` undone."""
        return whole


class Sharded(Whole):
    """A DTensor, as FSDP2 and tensor parallelism make them: any mix of shards and replicas, even or not."""

    gradient_is_whole = False

    @override
    def counts(self) -> bool:
        coordinate = self.parameter.device_mesh.get_coordinate()
        if coordinate is None:  # this process is not in the mesh
            return False
        placed = zip(coordinate, self.parameter.placements, strict=True)
        return all(position == 0 for position, placement in placed if placement.is_replicate())

    @override
    def locate(self, indices: Tensor) -> tuple[Tensor | slice, Tensor]:
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        here = torch.ones_like(indices, dtype=torch.bool)
        positions = torch.zeros_like(indices, dtype=torch.int64)
        # However it was cut, a shard is the product of the lines that it holds along each dimension.
        for dim, coordinate in enumerate(torch.unravel_index(indices.long(), self.shape)):
            size = self.shape[dim]
            cut = [placement if getattr(placement, "dim", None) == dim else Replicate() for placement in placements]
            lines = torch.arange(size).view([size if other == dim else 1 for other in range(len(self.shape))])
            # Without a source every process cuts its own, and nothing is sent.
            held = distribute_tensor(lines, mesh, cut, src_data_rank=None).to_local().flatten().cpu()
            position = torch.full((size,), -1)
            position[held] = torch.arange(held.numel())
            position = position[coordinate]
            here &= position >= 0
            positions = positions * held.numel() + position
        return here, positions[here]

    @override
    def stored(self) -> Tensor:
        return self.parameter.detach().to_local()

    @override
    def gradient(self) -> Tensor:
        gradient = self.parameter.grad
        if gradient.placements != self.parameter.placements:  # tensor parallelism may leave it otherwise cut
            gradient = gradient.redistribute(placements=self.parameter.placements)
            self.parameter.grad = gradient
        return gradient.to_local()

    @override
    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        state = optimizer.state.get(self.parameter, {})
        return {key: value.to_local() for key, value in state.items() if isinstance(value, DTensor)}

    @override
    def gather(self, values: Tensor) -> Tensor:
        like = self.parameter
        values = values.to(like.device_mesh.device_type)  # where they are sent, if they are kept elsewhere
        whole = DTensor.from_local(
            values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return whole.full_tensor()

    @override
    def cut(self, whole: Tensor) -> Tensor:
        like = self.parameter
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


class MasterPiece(Whole):
    """A parameter under DeepSpeed ZeRO, which steps on a piece of a flat master copy and refreshes the rest from it.

    Attributes:
        start: the first flat index of the whole tensor that this process's piece holds.
        master: that piece, 1-D, sharing memory with what the optimizer steps on; empty if there is none.
    """

    has_master_copy = True
    start: int
    master: Tensor

    @override
    def counts(self) -> bool:
        return True

    @override
    def locate(self, indices: Tensor) -> tuple[Tensor | slice, Tensor]:
        here = (indices >= self.start) & (indices < self.start + self.master.numel())
        return here, indices[here] - self.start

    @override
    def stored(self) -> Tensor:
        return self.master

    @override
    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        for flat, state in optimizer.state.items():
            if self.is_part_of(flat):
                offset = self.master.storage_offset() - flat.storage_offset()
                return {
                    name: value.narrow(0, offset, self.master.numel())
                    for name, value in state.items()
                    if torch.is_tensor(value) and value.shape == flat.shape
                }
        return {}

    @override
    def moved_in(self, optimizer: torch.optim.Optimizer) -> bool:
        # DeepSpeed steps on one flat tensor at a time, and shows the optimizer no other meanwhile.
        return any(self.is_part_of(flat) for group in optimizer.param_groups for flat in group["params"])

    @override
    def gather(self, values: Tensor) -> Tensor:
        whole = values.new_zeros(math.prod(self.shape), device=self.parameter.device)
        part = whole[self.start : self.start + values.numel()]
        part.copy_(values[: part.numel()])  # ZeRO-3 pads the last pieces, some of nothing else
        return reduce_(whole).view(self.shape)  # every entry is one process's, and zero on the others

    @override
    def cut(self, whole: Tensor) -> Tensor:
        piece = whole.new_zeros(self.master.numel())  # as long as the last pieces are padded
        part = whole.flatten()[self.start : self.start + piece.numel()]
        piece[: part.numel()] = part
        return piece

    def is_part_of(self, flat: Tensor) -> bool:
        """Whether `flat`, on which the optimizer steps, has this process's piece in it."""
        return (
            self.master.numel() > 0 and flat.untyped_storage().data_ptr() == self.master.untyped_storage().data_ptr()
        )


class ZeroFragment(MasterPiece):
    """A parameter under DeepSpeed ZeRO-1 or 2: every process has it whole, and some a piece of its master copy."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        fragment = parameter._hp_mapping
        self.start = 0 if fragment is None else fragment.lp_fragment_address.start

    @cached_property
    def master(self) -> Tensor:
        """This process's piece, where it has one."""
        fragment = self.parameter._hp_mapping
        return self.parameter.detach().flatten()[:0] if fragment is None else fragment.get_hp_fragment().detach()

    @override
    def visible(self) -> Tensor | None:
        return self.parameter.detach().flatten().narrow(0, self.start, self.master.numel())


class ZeroPartition(MasterPiece):
    """A parameter under DeepSpeed ZeRO-3: every process has one piece of it, and the same piece of its master copy."""

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self.shape = tuple(parameter.ds_shape)  # the live tensor is an empty placeholder
        self.start = parameter.ds_tensor.ds_numel * dist.get_rank(group=parameter.ds_process_group)

    @cached_property
    def master(self) -> Tensor:
        """This process's piece."""
        # Not deepspeed.utils.safe_get_local_fp32_param, which copies a master that is offloaded to the CPU.
        return self.parameter._z3_optimizer._get_fp32_opt_state_partition(self.parameter, True)[0].detach()

    @override
    def visible(self) -> Tensor | None:
        return self.parameter.ds_tensor.detach()


def locate_parameter(name: str, parameter: nn.Parameter) -> Whole:
    """The place of a parameter, told by the marks that engines leave on it.

    Raises:
        CpiftError: a DTensor that waits for a reduction.
    """
    if isinstance(parameter, DTensor):
        if any(placement.is_partial() for placement in parameter.placements):
            raise CpiftError(f"parameter '{name}' is a partial sum on each process: core isolation needs its values")
        return Sharded(parameter)
    if hasattr(parameter, "ds_id"):
        return ZeroPartition(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return ZeroFragment(parameter)
    return Whole(parameter)


def stepping_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The torch optimizer under accelerate's and DeepSpeed's wrappers, in whose step the stored values move.

    Raises:
        CpiftError: there is none, it does not run step hooks, or its engine keeps master weights that are not known.
    """
    from accelerate.optimizer import AcceleratedOptimizer

    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer) or not isinstance(inner, torch.optim.Optimizer):
        kind = type(inner)
        if kind.__module__.startswith("deepspeed") and kind.__name__ not in DEEPSPEED_OPTIMIZERS:
            raise CpiftError(
                f"core isolation does not know where DeepSpeed's {kind.__name__} keeps its weights: use ZeRO stage 1, "
                "2 or 3 in bfloat16 or float32, or FSDP2"
            )
        if getattr(inner, "round_robin_gradients", False) and world_size() > 1:
            raise CpiftError(
                "core isolation does not support DeepSpeed's round_robin_gradients, under which its map from "
                "parameters to master weights is wrong: set it to false"
            )
        if getattr(inner, "swap_optimizer", False):
            raise CpiftError("core isolation does not support optimizers that DeepSpeed offloads to NVMe: use the CPU")
        if not hasattr(inner, "optimizer"):
            raise CpiftError(
                f"core isolation needs a torch.optim.Optimizer, and {kind.__name__} neither is nor wraps one"
            )
        inner = inner.optimizer
    kind = type(inner).__name__
    if kind in STEPS_IN_BACKWARD:
        raise CpiftError(f"core isolation does not support {kind}, which steps inside backward: use AdamW")
    if not hasattr(inner, "_optimizer_step_post_hooks"):
        raise CpiftError(f"core isolation needs step hooks, which {kind} lacks: it must call Optimizer.__init__")
    return inner


def loss_scale(optimizer: object) -> float:
    """The factor by which gradients are larger than they are: of accelerate's GradScaler or of DeepSpeed's fp16."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None:
        return scaler.get_scale()
    return float(getattr(getattr(optimizer, "optimizer", None), "loss_scale", 1.0))


def take(tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries at flat `positions`, copied."""
    return tensor.reshape(-1).index_select(0, positions)


def put_(tensor: Tensor, positions: Tensor, values: Tensor | float) -> None:
    """Write `values` at flat `positions`, also where the tensor is not contiguous and a flat view would be a copy."""
    positions = positions.long()
    if not tensor.is_contiguous():
        values = values.to(tensor.dtype) if torch.is_tensor(values) else values
        tensor[torch.unravel_index(positions, tensor.shape)] = values
    elif torch.is_tensor(values):
        tensor.view(-1).index_copy_(0, positions, values.to(tensor.dtype))
    else:  # a number, since a scalar tensor would be fetched from the GPU
        tensor.view(-1).index_fill_(0, positions, values)


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_(tensor: Tensor, operation: str = "sum") -> Tensor:
    """Sum (or "max") over all processes, in place; as it is where there is but one."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation.upper()))
    return tensor
