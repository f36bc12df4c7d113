"""What a machine may run out of in the middle of a run, in one line with the cure."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from peft_cpift.errors import CpiftError

# How PyTorch's allocator for the CPU, and its writer of files, say it: as a RuntimeError, like most else.
NO_MEMORY = re.compile(r"DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory")
NO_SPACE = re.compile(r"No space left on device|PytorchStreamWriter failed|inline_container\.cc.*unexpected pos", re.S)


@contextmanager
def explained(step: str) -> Iterator[None]:
    """Turn a want of memory or of disk in a block into an error that says what to do.

    Raises:
        CpiftError: memory ran out.
        OSError: the disk is full.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _no_memory(step) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOMEM or NO_MEMORY.search(str(error)):
            raise _no_memory(step) from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE.search(str(error)):
            raise OSError(
                f"the disk is full at {step}: make room and start the same command again; what was complete is kept"
            ) from error
        raise


def _no_memory(step: str) -> CpiftError:
    return CpiftError(
        f"memory ran out at {step}: lower per_device_train_batch_size, max_length or evaluation.batch_size, or set "
        "gradient_checkpointing, and start again; what was complete is kept"
    )
