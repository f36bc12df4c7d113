"""Named tensors that can be read part by part, wherever they are."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from peft_cpift.errors import CpiftError

BLOCK_BYTES = 4096
"""How much of each tensor the digest looks at."""


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, in the order of their names, whose shapes are known before anything is read.

    `tensors[name]` is a whole tensor, `tensors.part(name, start, stop)` a flat part of it, so that a tensor larger
    than the memory can be worked on. Tied tensors are there once, under one of their names.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> dtype.
        label: what messages call them.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    label: str

    @abstractmethod
    def part(self, name: str, start: int, stop: int) -> Tensor:
        """The entries from `start` to `stop` of a tensor seen as one row-major vector, on the CPU."""

    def size(self, name: str) -> int:
        """The number of entries of a tensor."""
        return math.prod(self.shapes[name])

    def bytes(self, name: str) -> int:
        """The size of a tensor in bytes."""
        return self.size(name) * self.dtypes[name].itemsize

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of all names, shapes and dtypes, and of 4096 bytes from the middle of every tensor.

        It tells two trainings of one model apart at the cost of the headers, for a training moves nearly every value;
        it is no proof against forgery. How a checkpoint is split into files does not matter.
        """
        seen = hashlib.sha256()
        for name in self:
            seen.update(f"{name} {list(self.shapes[name])} {self.dtypes[name]}\n".encode())
            size, count = self.size(name), max(1, BLOCK_BYTES // self.dtypes[name].itemsize)
            start = max(0, (size - count) // 2)
            block = self.part(name, start, min(size, start + count)).contiguous()
            seen.update(block.view(torch.uint8).numpy().tobytes())
        return seen.hexdigest()

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Name -> dtype in the files; another than in `dtypes` where values are computed in a wider one."""
        return self.dtypes

    @property
    def peak_bytes(self) -> int:
        """About how much memory reading takes for a while, beyond the parts that it gives."""
        return 0

    @property
    def adapter_config(self) -> dict:
        """The configuration of the adapter whose own tensors these are; empty for the weights of a model."""
        return {}

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # a mapping's own way would read the tensor to look

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, 0, self.size(name)).reshape(self.shapes[name])

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    @override
    def __len__(self) -> int:
        return len(self.shapes)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label}, {len(self)} tensors)"


def kept_name(names: Iterable[str]) -> str:
    """The name under which tied tensors are kept: as in transformers' checkpoints, that of the input embedding.

    Example:
        >>> kept_name(["lm_head.weight", "model.embed_tokens.weight"])
        'model.embed_tokens.weight'
    """

    def rank(name: str) -> tuple[bool, bool, str]:
        embeds = any(part in name for part in ("embed", "wte")) and "embed_out" not in name
        return "shared" not in name, not embeds, name

    return min(names, key=rank)


class InMemory(Tensors):
    """Tensors that are in memory already, on any device.

    Raises:
        CpiftError: a value is not a tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "tensors in memory"):
        tied: dict[tuple, list[str]] = {}
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise CpiftError(f"'{name}' is a {type(tensor).__name__}, not a tensor: pass tensors by name")
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
                kind = "complex" if tensor.is_complex() else "meta" if tensor.is_meta else str(tensor.layout)
                raise CpiftError(f"tensor '{name}' is {kind}, and has no plain numbers as values")
            # Empty tensors all share address 0, so they are told apart by name.
            key = (
                (name,)
                if tensor.numel() == 0
                else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            )
            tied.setdefault(key, []).append(name)
        self._tensors = {name: tensors[name].detach() for name in sorted(map(kept_name, tied.values()))}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}
        self.label = label

    @override
    def part(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._tensors[name]
        tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
        row = max(1, math.prod(tensor.shape[1:]))
        first = start // row
        # Only these rows, for of a transposed tensor a flat view is a copy.
        return tensor[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row].cpu()
