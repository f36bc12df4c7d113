"""Core regions: the coordinates that a task moved most, found in its fine-tuned parameters, and their file."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_cpift.checkpoint.reader import Checkpoint, Source, open_source, shapes_of, working_dtype
from peft_cpift.checkpoint.writer import complete_file
from peft_cpift.core.selection import select_largest
from peft_cpift.errors import CpiftError, NoEffectWarning

FORMAT = "cpift-core-region"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class CoreRegion:
    """A set of single coordinates of a model's or adapter's tensors.

    Attributes:
        indices: tensor name -> flat (row-major) indices, int64, ascending and unique; only tensors with at least one.
        shapes: the shape of every tensor that was considered, by name, whether it has core coordinates or not.
        percent: the p that was asked for, in (0, 100]; None for a union.

    `len(region)` is the number of coordinates, `region.total` the number D of those considered, `a | b` the union.

    Raises:
        CpiftError: indices unsorted, repeated or out of range, or for a tensor without a shape.

    Source: stage 1 of CPI-FT (arXiv 2508.21741); the file format is ours.

    Example:
        >>> region = CoreRegion({"w": torch.tensor([0, 3])}, {"w": (2, 2)}, percent=50.0)
        >>> len(region), region.total
        (2, 4)
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    percent: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})
        if self.percent is not None:
            _check_percent(self.percent)
        for name, index in self.indices.items():
            if name not in self.shapes:
                raise CpiftError(f"core region has indices for '{name}' but no shape: give its shape too")
            size = math.prod(self.shapes[name])
            if index.dtype != torch.int64 or index.dim() != 1 or index.numel() == 0:
                raise CpiftError(f"core region's indices for '{name}' must be a non-empty vector of int64")
            if index[0] < 0 or index[-1] >= size or bool((index[1:] <= index[:-1]).any()):
                raise CpiftError(f"core region's indices for '{name}' must be ascending and unique in [0, {size})")

    def __len__(self) -> int:
        return sum(index.numel() for index in self.indices.values())

    @property
    def total(self) -> int:
        """D: the number of coordinates that were considered."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __or__(self, other: CoreRegion) -> CoreRegion:
        check_same_shapes(self, other)
        indices = dict(self.indices)
        for name, index in other.indices.items():
            indices[name] = torch.cat([indices[name], index]).unique() if name in indices else index
        return CoreRegion(indices, {**self.shapes, **other.shapes})

    def save(self, file: str | os.PathLike) -> None:
        """Write the region as safetensors: a tensor of indices per name; percent and shapes in the metadata."""
        metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "percent": json.dumps(self.percent),
            "shapes": json.dumps(self.shapes),
        }
        with complete_file(file) as temporary:
            # Copied, since safetensors refuses names that share one tensor.
            save_file({name: index.clone() for name, index in self.indices.items()}, temporary, metadata)

    @classmethod
    def load(cls, file: str | os.PathLike) -> CoreRegion:
        """Read a region written by `save`.

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
            shapes = {name: tuple(map(_size, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
            return cls(indices, shapes, percent)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise CpiftError(f"{file} is damaged: {error}") from error


def find_core_region(tuned: Source, base: Source | None = None, *, percent: float = 1.0) -> CoreRegion:
    """Find the core region of a task: the coordinates that fine-tuning on it moved most.

    Exactly floor(percent * D / 100) coordinates with the largest |tuned - base| over all tensors at once, D being the
    number of coordinates of the floating-point tensors. Ties go to the smaller (name, flat index). A coordinate that
    did not move is never core: if fewer moved, the region is smaller, with a warning. Differences are formed in
    float32, or in float64 where either side is (ours).

    Args:
        tuned: the parameters after fine-tuning on the task: checkpoint folder, adapter folder, or tensors by name.
        base: the same before fine-tuning. May be left out for Propulsion adapters only, whose vectors start at 1.
        percent: p, in (0, 100].

    Raises:
        CpiftError: a tensor is missing on one side, shapes differ, a value is not finite, or a base is needed.

    Source: stage 1 of CPI-FT (arXiv 2508.21741); tie rule, warning and dtype are ours.

    Example:
        >>> tuned, base = {"w": torch.tensor([0.0, 5.0, -7.0, 1.0])}, {"w": torch.zeros(4)}
        >>> find_core_region(tuned, base, percent=50).indices
        {'w': tensor([1, 2])}
    """
    _check_percent(percent)
    tuned = open_source(tuned)
    base = None if base is None else open_source(base)
    shapes = _check_pair(tuned, base)

    floating = {name: shape for name, shape in shapes.items() if _is_floating(tuned, name) and not is_frozen(name)}
    total = sum(math.prod(shape) for shape in floating.values())
    # The decimal as written: in binary floating point 0.29 % of 10,000 would come to 28.
    wanted = math.floor(Fraction(str(percent)) * total / 100)
    region = CoreRegion(select_largest(_updates(tuned, base, floating), wanted), floating, percent)
    if len(region) < wanted:
        warnings.warn(
            f"only {len(region)} of {total} coordinates moved, fewer than the {wanted} asked for with "
            f"percent={percent}: the core region is smaller",
            NoEffectWarning,
            stacklevel=2,
        )
    elif wanted == 0:
        warnings.warn(
            f"percent={percent} of {total} coordinates is none: the core region is empty; raise percent",
            NoEffectWarning,
            stacklevel=2,
        )
    return region


def load_regions(
    regions: CoreRegion | str | os.PathLike | Iterable[CoreRegion | str | os.PathLike],
) -> list[CoreRegion]:
    """One or several regions, given as such or as files, as a list of regions."""
    if isinstance(regions, CoreRegion | str | os.PathLike):
        regions = [regions]
    return [region if isinstance(region, CoreRegion) else CoreRegion.load(region) for region in regions]


def is_frozen(name: str) -> bool:
    """Whether a tensor of a saved adapter is the base model's own: PEFT saves an embedding that is adapted with it.

    Example:
        >>> is_frozen("base_model.model.model.embed_tokens.base_layer.weight")
        True
    """
    return name.endswith(".base_layer.weight")


def starts_at_one(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor is a Propulsion vector that started at 1, so that its base is known without a file."""
    if isinstance(tensors, Checkpoint) and tensors.adapter_config.get("init_weights", True) is False:
        return False
    return name.endswith("propulsion_z")


def check_same_shapes(a: CoreRegion, b: CoreRegion) -> None:
    """Raise CpiftError naming the first tensor that has different shapes in the two regions."""
    for name in sorted(a.shapes.keys() & b.shapes.keys()):
        if a.shapes[name] != b.shapes[name]:
            raise CpiftError(
                f"tensor '{name}' has shape {list(a.shapes[name])} in one core region and {list(b.shapes[name])} in "
                "the other: they belong to different models"
            )


def _check_percent(percent: float) -> None:
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 < percent <= 100:
        raise CpiftError(f"percent must be in (0, 100], got {percent!r}")


def _check_pair(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> dict[str, tuple[int, ...]]:
    """The shapes of `tuned`, after checking from the headers alone that `base` has the same tensors."""
    shapes = shapes_of(tuned)
    if not shapes:
        raise CpiftError("there is no tensor to compare: give a checkpoint or adapter with weights")
    if base is None:
        without = [name for name in shapes if not is_frozen(name) and not starts_at_one(tuned, name)]
        if without:
            kind = tuned.adapter_config.get("peft_type") if isinstance(tuned, Checkpoint) else None
            raise CpiftError(
                f"tensor '{without[0]}'{f' of this {kind} adapter' if kind else ''} has no known starting value: give "
                "base=, the same as saved before training (only Propulsion vectors start at 1, if not told otherwise)"
            )
        return shapes
    base_shapes = shapes_of(base)
    for missing, side in ((shapes.keys() - base_shapes.keys(), "base"), (base_shapes.keys() - shapes.keys(), "tuned")):
        if missing:
            raise CpiftError(
                f"tensor '{min(missing)}'{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} is missing in "
                f"{side}: compare two checkpoints of one model, with the same weights tied"
            )
    for name, shape in shapes.items():
        if shape != base_shapes[name]:
            raise CpiftError(
                f"tensor '{name}' has shape {list(shape)} in tuned and {list(base_shapes[name])} in base: compare two "
                "checkpoints of one model with one vocabulary"
            )
    return shapes


def _updates(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor] | None, names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        after = tuned[name].detach().cpu()
        before = torch.ones_like(after) if base is None else base[name].detach().cpu()
        dtype = working_dtype(after, before)
        after, before = after.to(dtype), before.to(dtype)
        for side, tensor in (("tuned", after), ("base", before)):
            if not bool(torch.isfinite(tensor).all()):
                raise CpiftError(f"tensor '{name}' has a value that is not finite in {side}: the training diverged")
        update = (after - before).abs()
        yield name, update


def _is_floating(tensors: Mapping[str, Tensor], name: str) -> bool:
    if isinstance(tensors, Checkpoint):
        return tensors.dtypes[name].startswith(("F", "BF"))
    return tensors[name].is_floating_point()


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value
