"""Strategy: raise what PyTorch, safetensors and the system raise where memory or disk run out, in the words that they
were seen to use, and errors that only look alike."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from peft_cpift import CpiftError
from peft_cpift.pipeline.failures import explained

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: not enough memory: you tried ..."),
    RuntimeError("unable to mmap 65536 bytes from file </x>: Cannot allocate memory (12)"),
]
DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 192 vs 86"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.EACCES, "Permission denied"),
    SafetensorError("Error while deserializing header: HeaderTooLarge"),
    ValueError("No space left on device"),
    CpiftError("the training diverged"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_want_of_memory(error):
    said = "memory ran out at stages/01-a: lower per_device_train_batch_size"
    with pytest.raises(CpiftError, match=said) as found, explained("stages/01-a"):
        raise error
    assert found.value.__cause__ is error
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("error", DISK, ids=str)
def test_want_of_disk(error):
    said = "the disk is full at fused: make room and start the same command"
    with pytest.raises(OSError, match=said) as found, explained("fused"):
        raise error
    assert found.value.__cause__ is error
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_all_else_passes_as_it_is(error):
    with pytest.raises(type(error)) as found, explained("fused"):
        raise error
    assert found.value is error
