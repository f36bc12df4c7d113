"""Several processes doing one run together, as `accelerate launch` starts them; one process is the common case.

Before any of these functions is called, an SFTConfig must have been made: it sets up the processes' communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState

from peft_cpift.checkpoint import complete_folder

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long processes wait for what the main one does alone, which may take hours: the fusion of large models, or
another run at the same step. Training's own limit, `ddp_timeout`, does not apply to that."""


def on_main(make: Callable[[], T]) -> T:
    """Call a function on the main process alone, and give what it returns to all.

    An error there is raised by all.
    """
    result, error = None, None
    if is_main():
        try:
            result = make()
        except Exception as caught:  # whatever it is, all are to raise it: the others would wait for ever
            if PartialState().num_processes == 1:
                raise
            error = caught
    result, error = share((result, error))
    if error is not None:
        raise error
    return result


def share(value: T) -> T:
    """The main process's value, on all; for as long as that takes, the others wait."""
    if PartialState().num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_patient_group())
    return values[0]


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return PartialState().is_main_process


def say(text: str) -> None:
    """Print a line, once."""
    if is_main():
        print(text, flush=True)


def part() -> None:
    """End the communication, which nothing may need any more: else its threads may abort a process that exits."""
    PartialState().destroy_process_group()
    _patient_group.cache_clear()


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """The folder to write to, in a block that all processes enter: what the main process writes appears at `path`.

    The others write nothing, so they are given `path` itself.
    """
    with complete_folder(path) if PartialState().is_main_process else nullcontext(path) as folder:
        yield folder


@lru_cache
def _patient_group() -> dist.ProcessGroup:
    """All processes, with another timeout, and on the CPU: a GPU that waits would be kept busy."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)
