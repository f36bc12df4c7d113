"""Several processes doing one run together, as `accelerate launch` starts them; one process is the common case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from peft_cpift.checkpoint import complete_folder

T = TypeVar("T")


def on_main(make: Callable[[], T]) -> T:
    """Call a function on the main process alone, and give what it returns to all.

    An error there ends that process, and with it the launcher ends the others.
    """
    (result,) = broadcast_object_list([make() if PartialState().is_main_process else None])
    return result


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return PartialState().is_main_process


def say(text: str) -> None:
    """Print a line, once."""
    if is_main():
        print(text, flush=True)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """The folder to write to, in a block that all processes enter: what the main process writes appears at `path`.

    The others write nothing, so they are given `path` itself.
    """
    with complete_folder(path) if PartialState().is_main_process else nullcontext(path) as folder:
        yield folder
