"""The peak of what training allocates, on a GPU or a CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


def peak_bytes(call: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """The most bytes that are allocated at a time while `call` runs.

    On a GPU the allocator says so. On a CPU the storages of what operators return are counted from when they are made
    until they are freed; what an operator allocates and frees within itself is not seen.

    Args:
        call: such as a step of training.
        own: tensors that are there before, which do not count; such as the model's parameters.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with _Alive(own) as alive:
        call()
    return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators have made and that are still there."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = WeakIdKeyDictionary()  # a storage has one Python object for as long as it lives
        for tensor in own:
            self.seen[tensor.untyped_storage()] = True
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.seen[storage] = True
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.now -= size
