"""Writing files and folders that appear under their name only once they are complete."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from peft_cpift.checkpoint.header import make_header
from peft_cpift.checkpoint.reader import MODEL_INDEX, MODEL_WEIGHTS
from peft_cpift.errors import CpiftError

MAX_SHARD_BYTES = 5 * 10**9
"""Default size at which a checkpoint is split (ours)."""


@contextmanager
def complete_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and rename it to `path` when the block ends without an error.

    A killed process leaves the temporary folder, `.NAME.*.part`, which can be deleted, and nothing else.

    Args:
        path: the folder to make. Its parents are made too.
        overwrite: replace an existing folder, once the new one is complete.

    Raises:
        CpiftError: `path` exists and `overwrite` is false, or it is not a folder; raised before the block runs, and
            again after it if something else was written there meanwhile.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "run"
        >>> with complete_folder(target) as folder:
        ...     _ = (folder / "note.txt").write_text("done")
        >>> (target / "note.txt").read_text()
        'done'
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; a result is an ordinary one
        check_free(path, overwrite=overwrite)  # again: another run may have written it meanwhile
        _replace(path, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(path: Path, new: Path) -> None:
    """Put `new` in the place of `path`; whatever happens, one of the two is complete under its name."""
    if not path.exists():
        os.replace(new, path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path`, and rename that file to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike) -> None:
    """Remove what killed processes left half written of `path`; for a caller that knows that none is at it now."""
    path = Path(path)
    form = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.(part|old)")  # what mkdtemp and complete_file make of it
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
        if form.fullmatch(leftover.name):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Raise CpiftError if there is something at `path`, unless it is a folder that may be overwritten."""
    if os.path.lexists(path) and not overwrite:
        raise CpiftError(f"{path} exists: choose another output, or ask for it to be overwritten")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise CpiftError(f"{path} is not a folder, and only a folder is overwritten: choose another output")


def write_json(path: Path, content: dict | list) -> None:
    """Write `content` to `path` as indented JSON, complete or not at all."""
    with complete_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(
    folder: Path,
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    parts: Callable[[str], Iterable[Tensor]],
    file_name: str = MODEL_WEIGHTS,
    *,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors part by part as files that `from_pretrained` loads, holding one part in memory at a time.

    Shapes and dtypes are given beforehand, so that each file can begin with its header. safetensors' own writer wants
    all tensors of a file at once, which is why this one exists.

    Args:
        folder: an existing folder.
        layout: name -> (shape, dtype) of every tensor. Dtypes with wide items are written first, so that each tensor
            starts at a multiple of its item size, and equal ones in the order of their names.
        parts: called with each name in turn; gives the tensor's entries in row-major order, in parts of any size.
        file_name: the name if everything fits one file; for an adapter, whose loaders know no shards, give
            `adapter_model.safetensors` and `max_shard_bytes=None`.
        max_shard_bytes: split above this size, with an index; None never splits. A tensor is never split.
        metadata: for the header of every file; by default that of a PyTorch model, which transformers asks for.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_tensors(folder, {"w": ((2, 2), torch.float32)}, lambda name: [torch.zeros(3), torch.ones(1)])
        >>> load_file(folder / "model.safetensors")["w"].tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    shards = _split(layout, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = file_name
        if len(shards) > 1:
            file = f"{Path(file_name).stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        with complete_file(folder / file) as temporary, open(temporary, "wb") as stream:
            stream.write(make_header(shard, metadata or {"format": "pt"}))
            for name, (shape, dtype) in shard.items():
                written = 0
                for part in parts(name):
                    if part.dtype != dtype:
                        raise ValueError(f"a part of '{name}' is {part.dtype}, not {dtype}")
                    written += part.numel()
                    stream.write(part.contiguous().reshape(-1).view(torch.uint8).numpy())
                if written != math.prod(shape):
                    raise ValueError(f"'{name}' of shape {shape} was given {written} entries")
    if len(shards) > 1:
        total = sum(_bytes(*tensor) for tensor in layout.values())
        write_json(folder / MODEL_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(layout: Mapping[str, tuple], max_bytes: int | None) -> list[dict[str, tuple]]:
    """The tensors of each file, in the order in which they lie there."""
    shards: list[dict[str, tuple]] = [{}]
    filled = 0
    for name in sorted(layout, key=lambda name: (-layout[name][1].itemsize, name)):
        size = _bytes(*layout[name])
        if shards[-1] and max_bytes is not None and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = layout[name]
        filled += size
    return shards


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
