"""What the commands share: how they take pairs, show progress, and print."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Annotated, Any

import typer

from peft_cpift.errors import CpiftError

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print sizes and memory, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def named(pairs: list[str], form: str = "task=PATH") -> dict[str, str]:
    """Pairs of the command line by name; one that is not of the form, or is given twice, is a CpiftError."""
    by_name: dict[str, str] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name or not value:
            raise CpiftError(f"'{pair}' is not of the form {form}")
        if name in by_name:
            raise CpiftError(f"'{name}' is given twice")
        by_name[name] = value
    return by_name


def import_torch() -> ModuleType:
    """Import torch without looking for garbage among its objects, which stay to the end: 0.2 of 0.9 seconds."""
    gc.disable()
    import torch

    gc.freeze()
    gc.enable()
    return torch


@contextmanager
def progress_bar(total: int, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=True, disable=None) as bar:
        yield bar.update


def print_result(content: dict[str, Any], text: str, as_json: bool) -> None:
    """Print one or the other."""
    print(json.dumps(content) if as_json else text)


def size(count: int) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
