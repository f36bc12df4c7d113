"""Core regions: the coordinates that matter most to a task, and their file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_cpift.checkpoint.header import MAX_BYTES, MAX_SIZE
from peft_cpift.checkpoint.writer import write_tensors
from peft_cpift.core.importance import MEASURES, UPDATE
from peft_cpift.core.indices import Indices
from peft_cpift.errors import CpiftError

FORMAT = "cpift-core-region"
FORMAT_VERSION = 2
SCOPES = ("global", "tensor")
FOLDER = "cores"
"""Where a run and its repository on the Hub hold the regions, as `<task>.safetensors`."""
TASK = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""The form of a task's name, which leads to no other folder."""


@dataclass(frozen=True, eq=False)
class CoreRegion:
    """A set of single coordinates of a model's or adapter's tensors.

    Attributes:
        indices: tensor name -> flat (row-major) indices, ascending and unique, given in any integer dtype and read as
            int64; only tensors with at least one.
        shapes: the shape of every tensor that was considered, by name, whether it has core coordinates or not.
        percent: the p that was asked for, in (0, 100]; None for a union.
        scope: whether p is of all coordinates together (`"global"`, the paper), or of each tensor (`"tensor"`).
        tuned, base: digests of the tensors that the region was found in, or None.
        importance: what it was chosen by: `"update"`, how far fine-tuning moved each coordinate (the paper, and the
            default), `"second_moment"`, the gradients that each had, as `save_importance` writes them (ours), or
            `"given"`, tensors of the caller's; None for a union.

    `len(region)` is the number of coordinates, `region.total` the number D of those considered, `a | b` the union.

    Raises:
        CpiftError: indices unsorted, repeated or out of range, for a tensor without a shape, or more than p allows.

    Source: stage 1 of CPI-FT (arXiv 2508.21741); the file format is ours, see docs/core-region.md.

    Example:
        >>> region = CoreRegion({"w": torch.tensor([0, 3])}, {"w": (2, 2)}, percent=50.0)
        >>> len(region), region.total, region.indices["w"]
        (2, 4, tensor([0, 3]))
    """

    indices: Mapping[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    percent: float | None = None
    scope: str = "global"
    tuned: str | None = None
    base: str | None = None
    importance: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "shapes", {name: tuple(self.shapes[name]) for name in sorted(self.shapes)})
        object.__setattr__(self, "indices", Indices(self.indices, self.shapes))
        if self.scope not in SCOPES:
            raise CpiftError(f"unknown scope '{self.scope}': use one of {', '.join(SCOPES)}")
        if self.importance not in (None, *MEASURES):
            raise CpiftError(f"unknown importance '{self.importance}': use one of {', '.join(MEASURES)}")
        if self.percent is None:
            return
        if self.importance is None:
            object.__setattr__(self, "importance", UPDATE)
        check_percent(self.percent)
        object.__setattr__(self, "percent", float(self.percent))  # 1 and 1.0 are written alike
        groups = [self.shapes] if self.scope == "global" else [[name] for name in self.shapes]
        for names in groups:
            most = share_of(sum(math.prod(self.shapes[name]) for name in names), self.percent)
            count = sum(map(self.indices.count, names))
            if count > most:
                where = "it" if self.scope == "global" else f"tensor '{names[0]}'"
                raise CpiftError(f"core region of {self.percent} percent: {where} has {count} coordinates, not {most}")

    def __len__(self) -> int:
        return sum(map(self.indices.count, self.indices))

    @property
    def total(self) -> int:
        """D: the number of coordinates that were considered."""
        return sum(map(math.prod, self.shapes.values()))

    def __or__(self, other: CoreRegion) -> CoreRegion:
        check_same_shapes(self, other)
        indices = dict(self.indices.compact)
        for name in other.indices:
            both = [region.indices[name] for region in (self, other) if name in region.indices]
            indices[name] = torch.cat(both).unique()
        return CoreRegion(indices, {**self.shapes, **other.shapes})

    def save(self, file: str | os.PathLike) -> None:
        """Write the region as safetensors: a vector of indices per name, the rest in the metadata."""
        given = {"tuned": self.tuned, "base": self.base}
        if self.importance != UPDATE:  # which is what a file means that says nothing
            given["importance"] = self.importance
        metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "total": str(self.total),
            "percent": json.dumps(self.percent),
            "scope": self.scope,
            "shapes": json.dumps(self.shapes),
            **{key: value for key, value in given.items() if value is not None},
        }
        file, compact = Path(file), self.indices.compact
        layout = {name: (tuple(index.shape), index.dtype) for name, index in compact.items()}
        write_tensors(
            file.parent, layout, lambda name: [compact[name]], file.name, max_shard_bytes=None, metadata=metadata
        )

    @classmethod
    def load(cls, file: str | os.PathLike) -> CoreRegion:
        """Open a region written by `save`. Its indices are checked, and stay in the file, mapped into memory.

        Raises:
            CpiftError: the file is missing, damaged, of another format, or its indices do not fit its shapes.
        """
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CpiftError(f"{file} is not a core region: write one with `cpift core` or CoreRegion.save")
                if metadata.get("version") != str(FORMAT_VERSION):
                    raise CpiftError(
                        f"{file} has version {metadata.get('version')!r} of the core-region format, which this "
                        f"package does not read (but {FORMAT_VERSION}): upgrade peft-cpift, or find the region again"
                    )
                indices = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CpiftError(f"cannot read core region {file}: {error}") from error
        try:
            percent = json.loads(metadata["percent"])
            if len(metadata["shapes"]) > MAX_BYTES:
                raise ValueError(f"its shapes take more than {MAX_BYTES} bytes")
            shapes = {name: tuple(map(_size, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
            region = cls(
                indices,
                shapes,
                percent,
                metadata["scope"],
                **{key: metadata.get(key) for key in ("tuned", "base", "importance")},
            )
            if str(region.total) != metadata["total"]:
                raise ValueError(f"its shapes have {region.total} coordinates, not {metadata['total']}")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise CpiftError(f"{file} is damaged: {str(error)[:300]}") from error
        return region

    @classmethod
    def from_pretrained(
        cls,
        repository_or_folder: str | os.PathLike,
        task: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> CoreRegion:
        """Open a task's region in a run's folder, or in the repository on the Hub that the run was pushed to.

        Args:
            repository_or_folder: a folder that has `cores/<task>.safetensors`, or a repository as `user/name`. A
                folder comes first.
            task: the task's name in the run.
            revision: a repository's branch, tag or commit.
            token: as in `from_pretrained` of other libraries; by default the one that you are logged in with.

        Raises:
            CpiftError: the task's name is not one, the folder or repository has no such region (it lists those that
                it has), the Hub refuses or is not to be reached, or the file is damaged.

        Example:
            >>> import tempfile
            >>> folder = tempfile.mkdtemp()
            >>> CoreRegion({"w": torch.tensor([3])}, {"w": (2, 2)}).save(f"{folder}/cores/maths.safetensors")
            >>> len(CoreRegion.from_pretrained(folder, "maths"))
            1
        """
        if not re.fullmatch(TASK, task):
            raise CpiftError(f"{task!r} is no name of a task: letters, digits, '.', '_' and '-' make one")
        folder, name = Path(repository_or_folder), f"{FOLDER}/{task}.safetensors"
        if not folder.is_dir():
            return cls.load(_download(os.fspath(repository_or_folder), task, name, revision, token))
        if not (folder / name).is_file():
            raise _no_region(folder, task, (f"{FOLDER}/{file.name}" for file in folder.glob(f"{FOLDER}/*")))
        return cls.load(folder / name)


def check_free_region(file: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Raise CpiftError if there is something at `file`, unless it is a core region that may be overwritten."""
    if os.path.lexists(file) and not overwrite:
        raise CpiftError(f"{file} exists: choose another output, or ask for it to be overwritten")
    if os.path.lexists(file):
        try:
            CoreRegion.load(file)
        except CpiftError as error:
            raise CpiftError(f"{file} is not overwritten, for it is no core region: choose another output") from error


def load_regions(
    regions: CoreRegion | str | os.PathLike | Iterable[CoreRegion | str | os.PathLike],
) -> list[CoreRegion]:
    """One or several regions, given as such or as files, as a list of regions."""
    if isinstance(regions, CoreRegion | str | os.PathLike):
        regions = [regions]
    return [region if isinstance(region, CoreRegion) else CoreRegion.load(region) for region in regions]


def check_same_shapes(a: CoreRegion, b: CoreRegion) -> None:
    """Raise CpiftError naming the first tensor that has different shapes in the two regions."""
    for name in sorted(a.shapes.keys() & b.shapes.keys()):
        if a.shapes[name] != b.shapes[name]:
            raise CpiftError(
                f"tensor '{name}' has shape {list(a.shapes[name])} in one core region and {list(b.shapes[name])} in "
                "the other: they belong to different models"
            )


def check_percent(percent: float) -> None:
    """Raise CpiftError unless `percent` is a number in (0, 100]."""
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= 100:
        raise CpiftError(f"percent must be in (0, 100], got {percent!r}")


def share_of(total: int, percent: float) -> int:
    """floor(percent * total / 100), with `percent` as the decimal that is written.

    Example:
        >>> share_of(10_000, 0.29)  # in binary floating point it would come to 28
        29
    """
    return math.floor(Fraction(str(percent)) * total / 100)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ValueError("a shape has numbers that are not sizes")
    return value


def _download(repository: str, task: str, name: str, revision: str | None, token: str | bool | None) -> str:
    """The local copy of a region in a repository."""
    from huggingface_hub import HfApi  # deferred: nothing else in this part needs the Hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    hub = HfApi(token=token)
    try:
        try:
            return hub.hf_hub_download(repository, name, revision=revision)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise _no_region(repository, task, hub.list_repo_files(repository, revision=revision)) from error
    except (HTTPError, LocalEntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        raise CpiftError(
            f"cannot read {name} of {repository}, which is no folder ({' '.join(str(error).split())}): check the name "
            "and the connection, and log in with `hf auth login` if the repository is private"
        ) from error


def _no_region(where: str | Path, task: str, files: Iterable[str]) -> CpiftError:
    found = (re.fullmatch(rf"{FOLDER}/({TASK})\.safetensors", file) for file in files)
    tasks = sorted(match.group(1) for match in found if match)
    there = f"it has {', '.join(tasks)}" if tasks else "it has none: give a run's folder or what `cpift push` made"
    return CpiftError(f"{where} has no core region of a task '{task}': {there}")
