"""A folder of safetensors files seen as a mapping from names to tensors, each read only when it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from peft_cpift.checkpoint.chunks import chunks
from peft_cpift.checkpoint.header import Place, read_header
from peft_cpift.checkpoint.tensors import InMemory, Tensors, kept_name
from peft_cpift.errors import CpiftError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_INDEX = "model.safetensors.index.json"
MODEL_WEIGHTS = "model.safetensors"

Source = str | os.PathLike | Mapping[str, Tensor]
"""Where tensors come from: a checkpoint or adapter folder, or tensors in memory by name."""


class TensorFile(Tensors):
    """The tensors of one safetensors file, in the order of their names, read as those of a `Checkpoint` are.

    Raises:
        CpiftError: the file is damaged, or a tensor is of a dtype whose values are not plain numbers.
    """

    def __init__(self, file: str | os.PathLike):
        self.label = str(file)
        self._open([Path(file)])

    def _open(self, files: list[Path]) -> None:
        self._places: dict[str, Place] = {}
        self._stamps = {}
        for file in files:
            self._stamps[file] = _stamp(os.stat(file))
            for name, place in read_header(file).items():
                if name in self._places:
                    raise CpiftError(f"tensor '{name}' is in both {self._places[name].file} and {file}: remove one")
                self._places[name] = place
        self.shapes = {name: self._places[name].shape for name in sorted(self._places)}
        self.dtypes = {name: self._places[name].dtype for name in self.shapes}

    @override
    def part(self, name: str, start: int, stop: int) -> Tensor:
        dtype, _, file, offset = self._places[name]
        raw = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        view = memoryview(raw.numpy())
        try:
            with open(file, "rb", buffering=0) as stream:
                if _stamp(os.fstat(stream.fileno())) != self._stamps[file]:
                    raise CpiftError(f"{file} was changed after it was opened: run again")
                stream.seek(offset + start * dtype.itemsize)
                while len(view):  # a single read gives at most 2 GiB
                    count = stream.readinto(view)
                    if not count:
                        raise CpiftError(
                            f"{file} ends within tensor '{name}': it was changed meanwhile, or is damaged"
                        )
                    view = view[count:]
        except OSError as error:
            raise CpiftError(f"cannot read {file}: {error}") from error
        return raw.view(dtype)


class Checkpoint(TensorFile):
    """The tensors of a saved model or adapter, in the order of their names.

    Opening reads the headers only, so `shapes` and `dtypes` cost nothing; `checkpoint[name]` reads that tensor, and
    `checkpoint.part(name, start, stop)` no more than that part of it. Files are read rather than mapped: as fast, and
    neither address space nor resident memory grows with the model. Nothing is held open.

    A model whose configuration ties its word embeddings, and whose files hold them twice all the same, has them once.

    Args:
        folder: holds `adapter_model.safetensors` (an adapter), or `model.safetensors.index.json` with its shards, or
            `model.safetensors`. The first that exists is taken.

    Attributes:
        folder: the folder.

    Raises:
        CpiftError: the folder or a file is missing, is damaged, or an index names a file outside the folder; or a
            tensor is of a dtype whose values are not plain numbers.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.arange(3.0)}, f"{folder}/model.safetensors")
        >>> checkpoint = Checkpoint(folder)
        >>> checkpoint.shapes, checkpoint["w"].tolist(), checkpoint.part("w", 1, 2).tolist()
        ({'w': (3,)}, [0.0, 1.0, 2.0], [1.0])
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.label = str(self.folder)
        files, indexed = _weight_files(self.folder)
        self._open(files)
        for name in sorted(indexed - self._places.keys()):
            raise CpiftError(f"{self.folder / MODEL_INDEX} names tensor '{name}', which no shard has: fetch it again")
        for name in self._repeated_embeddings():
            del self.shapes[name], self.dtypes[name]

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter rather than a whole model."""
        return (self.folder / ADAPTER_WEIGHTS).is_file()

    @cached_property
    @override
    def adapter_config(self) -> dict:
        """The adapter's configuration, as saved; empty for a whole model. CpiftError if an adapter has none."""
        if not self.is_adapter:
            return {}
        config = read_json(self.folder / ADAPTER_CONFIG)
        for key in ("peft_type", "task_type", "base_model_name_or_path"):
            value = config.get(key)
            if not isinstance(value, str | None) or (key == "peft_type" and not value):
                raise CpiftError(f"{self.folder / ADAPTER_CONFIG} has {key}={value!r}: save the adapter again")
        return config

    @cached_property
    def model_config(self) -> dict:
        """The model's configuration, as saved; empty if there is none, as in an adapter's folder."""
        file = self.folder / MODEL_CONFIG
        return read_json(file) if file.is_file() else {}

    def _repeated_embeddings(self) -> list[str]:
        """All but one name of the word embeddings, if the configuration ties them and the files repeat them."""
        text = self.model_config.get("text_config")
        config = self.model_config | (text if isinstance(text, dict) else {})
        if self.is_adapter or not config.get("tie_word_embeddings"):
            return []
        words = config.get("vocab_size")
        tables = [name for name, shape in self.shapes.items() if len(shape) == 2 and shape[0] == words]
        groups: list[list[str]] = []
        for name in tables:
            group = next((group for group in groups if self._equal(group[0], name)), None)
            groups.append([name]) if group is None else group.append(name)
        return [name for group in groups for name in group if name != kept_name(group)]

    def _equal(self, first: str, second: str) -> bool:
        if self.shapes[first] != self.shapes[second] or self.dtypes[first] != self.dtypes[second]:
            return False
        parts = (
            [self.part(name, start, stop).view(torch.uint8) for name in (first, second)]
            for start, stop in chunks(self.size(first))
        )
        return all(torch.equal(a, b) for a, b in parts)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written again."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def open_source(source: Source) -> Tensors:
    """The tensors of `source` by name: a folder is opened as a `Checkpoint`, a mapping is taken as it is.

    Of names in a mapping that share one storage (tied weights), one is kept, as in a saved checkpoint.
    """
    if isinstance(source, Tensors):
        return source
    return InMemory(source) if isinstance(source, Mapping) else Checkpoint(source)


def read_json(file: Path) -> dict:
    """The JSON object in `file`; CpiftError names the file if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CpiftError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CpiftError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files that hold the tensors, and the names that an index, if there is one, says they hold."""
    if not folder.is_dir():
        raise CpiftError(f"no folder {folder}: give a folder written by save_pretrained")
    if (folder / ADAPTER_WEIGHTS).is_file():
        return [folder / ADAPTER_WEIGHTS], set()
    if (folder / MODEL_INDEX).is_file():
        return _shards(folder)
    if (folder / MODEL_WEIGHTS).is_file():
        return [folder / MODEL_WEIGHTS], set()
    raise CpiftError(
        f"no {ADAPTER_WEIGHTS}, {MODEL_INDEX} or {MODEL_WEIGHTS} in {folder}: save the model with save_pretrained "
        "(only safetensors is read, never pickled files)"
    )


def _shards(folder: Path) -> tuple[list[Path], set[str]]:
    index = folder / MODEL_INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CpiftError(f"{index} has no 'weight_map' of tensor names to file names: save the model again")
    files = []
    for name in sorted(set(weight_map.values())):
        # A name with a folder in it could lead anywhere on the disk.
        if Path(name).name != name or name in {"", ".", ".."} or len(name.encode(errors="replace")) > 255:
            raise CpiftError(f"{index} names '{name[:200]}', which is not a file of its own folder: refused")
        if not (folder / name).is_file():
            raise CpiftError(f"{index} names '{name}', which is missing: fetch the checkpoint again")
        files.append(folder / name)
    return files, set(weight_map)


def check_unquantized(checkpoint: Tensors) -> None:
    """Raise CpiftError if the values mean nothing without scales that are kept beside them."""
    if isinstance(checkpoint, Checkpoint) and checkpoint.model_config.get("quantization_config"):
        raise CpiftError(
            f"{checkpoint.folder} is quantized (its {MODEL_CONFIG} has a quantization_config), and such values cannot "
            "be compared or averaged: dequantize the model and save it again"
        )
