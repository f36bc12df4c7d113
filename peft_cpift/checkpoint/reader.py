"""A folder of safetensors files seen as a mapping from names to tensors, each read only when it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_cpift.errors import CpiftError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
MODEL_WEIGHTS = "model.safetensors"

Source = str | os.PathLike | Mapping[str, Tensor]
"""Where tensors come from: a checkpoint or adapter folder, or tensors in memory by name."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a saved model or adapter, in the order of their names.

    Opening reads the headers only, so `names`, `shapes` and `dtypes` cost nothing; `checkpoint[name]` reads that
    tensor from a memory map and nothing else.

    Args:
        folder: holds `adapter_model.safetensors` (an adapter), or `model.safetensors.index.json` with its shards, or
            `model.safetensors`. The first that exists is taken.

    Attributes:
        folder: the folder.
        shapes: name -> shape.
        dtypes: name -> safetensors' name of the dtype, for instance `"BF16"`.

    Raises:
        CpiftError: the folder or a file is missing, is damaged, or an index names a file outside the folder.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> save_file({"w": torch.arange(3.0)}, f"{folder}/model.safetensors")
        >>> checkpoint = Checkpoint(folder)
        >>> checkpoint.shapes, checkpoint["w"].tolist()
        ({'w': (3,)}, [0.0, 1.0, 2.0])
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        files, indexed = _weight_files(self.folder)
        for file in files:
            with _open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    if name in self._files:
                        raise CpiftError(f"tensor '{name}' is in both {self._files[name]} and {file}: remove one")
                    self._files[name] = file
                    view = handle.get_slice(name)
                    shapes[name], dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        for name in sorted(indexed - self._files.keys()):
            raise CpiftError(f"{self.folder / MODEL_INDEX} names tensor '{name}', which no shard has: fetch it again")
        self.shapes = {name: shapes[name] for name in sorted(shapes)}
        self.dtypes = {name: dtypes[name] for name in sorted(dtypes)}

    def __getitem__(self, name: str) -> Tensor:
        with _open(self._files[name]) as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds a PEFT adapter rather than a whole model."""
        return (self.folder / ADAPTER_WEIGHTS).is_file()

    @cached_property
    def adapter_config(self) -> dict:
        """The adapter's configuration, as saved; empty for a whole model. CpiftError if an adapter has none."""
        return read_json(self.folder / ADAPTER_CONFIG) if self.is_adapter else {}

    def __repr__(self) -> str:
        return f"Checkpoint('{self.folder}', {len(self)} tensors)"


def open_source(source: Source) -> Mapping[str, Tensor]:
    """The tensors of `source` by name: a folder is opened as a `Checkpoint`, a mapping is taken as it is.

    Of names in a mapping that share one storage (tied weights), the first is kept, as in a saved checkpoint.
    """
    if not isinstance(source, Mapping):
        return Checkpoint(source)
    if isinstance(source, Checkpoint):
        return source
    distinct: dict[tuple, str] = {}
    for name, tensor in source.items():
        if not isinstance(tensor, Tensor):
            raise CpiftError(f"'{name}' is a {type(tensor).__name__}, not a tensor: pass tensors by name")
        # Empty tensors all share address 0, so they are told apart by name.
        key = (name,) if tensor.numel() == 0 else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        distinct.setdefault(key, name)
    return {name: source[name] for name in sorted(distinct.values())}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, from the headers where `tensors` is a `Checkpoint`."""
    return tensors.shapes if isinstance(tensors, Checkpoint) else {name: tuple(t.shape) for name, t in tensors.items()}


def read_json(file: Path) -> dict:
    """The JSON object in `file`; CpiftError names the file if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
        if Path(name).name != name or name in {"", ".", ".."}:
            raise CpiftError(f"{index} names '{name}', which is not a file of its own folder: refused")
        if not (folder / name).is_file():
            raise CpiftError(f"{index} names '{name}', which is missing: fetch the checkpoint again")
        files.append(folder / name)
    return files, set(weight_map)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CpiftError(f"cannot read {file}: {error}") from error


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the dtype of updates and interpolations (ours)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
