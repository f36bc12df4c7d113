"""Writing files and folders that appear under their name only once they are complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from peft_cpift.checkpoint.reader import MODEL_INDEX, MODEL_WEIGHTS
from peft_cpift.errors import CpiftError

MAX_SHARD_BYTES = 2 * 1024**3
"""Default size at which a checkpoint is split: as many bytes as are held in memory before they are written (ours)."""


@contextmanager
def complete_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and rename it to `path` when the block ends without an error.

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
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path`, and rename that file to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


class ShardWriter:
    """Write tensors one by one as a checkpoint that `from_pretrained` loads, holding at most one shard in memory.

    Args:
        folder: an existing folder.
        file_name: the name if everything fits one shard; for an adapter, whose loaders know no shards, give
            `adapter_model.safetensors` and `max_shard_bytes=None`.
        max_shard_bytes: split above this size; None never splits.
    """

    def __init__(self, folder: Path, file_name: str = MODEL_WEIGHTS, *, max_shard_bytes: int | None = MAX_SHARD_BYTES):
        self.folder = folder
        self.file_name = file_name
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; the order of the calls is the order in the files."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self.max_shard_bytes is not None and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self._total_bytes += size

    def close(self) -> None:
        """Write what is left, name the shards by their final count, and write the index if there are several."""
        self._flush()
        if len(self._shards) == 1:
            os.replace(self._part(0), self.folder / self.file_name)
            return
        stem = Path(self.file_name).stem
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"{stem}-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(self._part(number), self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        write_json(
            self.folder / MODEL_INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        )

    def _flush(self) -> None:
        # transformers refuses a file whose metadata does not name the framework.
        part = self._part(len(self._shards))
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o666 & ~_umask())
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"shard-{number}.part"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
