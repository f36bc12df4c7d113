"""The search for a core region: which coordinates a task's fine-tuning moved most, or which mattered most to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from peft_cpift.checkpoint.chunks import CHUNK, MAX_WORKERS
from peft_cpift.checkpoint.reader import Checkpoint, Source, check_unquantized, open_source
from peft_cpift.checkpoint.tensors import Tensors
from peft_cpift.core.importance import UPDATE, open_importance
from peft_cpift.core.region import SCOPES, CoreRegion, check_percent, share_of
from peft_cpift.core.selection import select_largest
from peft_cpift.errors import CpiftError, NoEffectWarning

COORDINATES = ("own", "delta")


def find_core_region(
    tuned: Source,
    base: Source | None = None,
    *,
    importance: Source | None = None,
    percent: float = 1.0,
    scope: str = "global",
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    coordinates: str = "own",
    progress: Callable[[int], object] | None = None,
) -> CoreRegion:
    """Find the core region of a task: the coordinates that fine-tuning on it moved most.

    Exactly floor(percent * D / 100) coordinates with the largest |tuned - base|, D being the number of coordinates of
    the floating-point tensors. Ties go to the smaller (name, flat index). A coordinate that did not move is never
    core: if fewer moved, the region is smaller, with a warning. Differences are formed in float32, or in float64
    where either side is (ours). Both sides are read in parts, usually once; how they are split into files, and the
    number of threads, make no difference to the result.

    With `importance` it is the coordinates with the largest importance instead, by the same rules: one of 0 is never
    core. What was not trained, such as buffers and frozen tensors, has none, but counts in D as ever.

    Args:
        tuned: the parameters after fine-tuning on the task: checkpoint folder, adapter folder, or tensors by name.
        base: the same before fine-tuning. May be left out for Propulsion adapters only, whose vectors start at 1.
            With `coordinates="delta"`: the folder of the model that the adapter is for, if not the one that it names;
            or the adapter as it was before training, if it did not start at a change of zero. With `importance` it
            may always be left out: its values are not looked at.
        importance: a file that `save_importance` or `ImportanceCallback` wrote in the same training; or tensors by
            name, >= 0, in the shapes of `tuned`, one for each of its floating-point tensors (ours).
        percent: p, in (0, 100].
        scope: p of all coordinates together (`"global"`, the paper), or of each tensor by itself (`"tensor"`, ours).
        include, exclude: patterns of tensor names, as in file names (`"*.mlp.*"`): what is considered at all.
        coordinates: an adapter's `"own"` tensors, or the `"delta"` that it adds to the model's weights, as LoRA
            needs, whose factors mean nothing by themselves. Loads PEFT and transformers (ours).
        progress: called with a number of bytes after each part that was read.

    Raises:
        CpiftError: a tensor is missing on one side, shapes differ, a value is not finite, an importance is negative, a
            base is needed, a pattern matches nothing, or a setting is out of range.

    Source: stage 1 of CPI-FT (arXiv 2508.21741); tie rule, warning, dtype and importance are ours.

    Example:
        >>> tuned, base = {"w": torch.tensor([0.0, 5.0, -7.0, 1.0])}, {"w": torch.zeros(4)}
        >>> find_core_region(tuned, base, percent=50).indices
        {'w': tensor([1, 2])}
        >>> find_core_region(tuned, importance={"w": torch.tensor([3.0, 2.0, 0.0, 1.0])}, percent=50).indices
        {'w': tensor([0, 1])}
    """
    search = CoreSearch(
        tuned,
        base,
        importance=importance,
        percent=percent,
        scope=scope,
        include=include,
        exclude=exclude,
        coordinates=coordinates,
    )
    return search.run(progress)


class CoreSearch:
    """A search that was checked, as far as the headers tell, and can be run; see `find_core_region`.

    Attributes:
        shapes: name -> shape of the tensors that are considered.
        wanted: how many coordinates the region has, if so many moved, or have an importance.
        measure: what it is chosen by, as in `CoreRegion.importance`.
        bytes_to_read: how much is read, if one pass is enough.
        peak_bytes: how much memory is needed at most, about, beyond that of the libraries.
    """

    def __init__(
        self,
        tuned: Source,
        base: Source | None = None,
        *,
        importance: Source | None = None,
        percent: float = 1.0,
        scope: str = "global",
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        coordinates: str = "own",
    ):
        check_percent(percent)
        for kind, value, known in (("scope", scope, SCOPES), ("coordinates", coordinates, COORDINATES)):
            if value not in known:
                raise CpiftError(f"unknown {kind} '{value}': use one of {', '.join(known)}")
        if importance is not None and coordinates == "delta":
            raise CpiftError(
                "importance is of an adapter's own tensors, and says nothing of the weights that they add up to: find "
                "the core with coordinates='delta' by the update, without importance"
            )
        self._tuned, self._base = _open_own(tuned, base) if coordinates == "own" else _open_deltas(tuned, base)
        self._importance = None if importance is None else open_importance(importance)
        self.measure = UPDATE if self._importance is None else self._importance.measure
        self._percent, self._scope = percent, scope
        sides = [side for side in (self._tuned, self._base) if side is not None]
        read = sides if self._importance is None else [self._importance.tensors]
        names = sorted(set().union(*sides, *read))
        considered = [name for name in _matching(names, include, exclude) if not is_frozen(name)]
        if self._importance is not None:
            self._importance.check(self._tuned, considered)
        elif self._base is None:
            _check_starts_known(self._tuned, considered)
        self.shapes = {
            name: self._tuned.shapes[name]
            for name in _check_pair(self._tuned, self._base, considered)
            if self._tuned.dtypes[name].is_floating_point
        }
        if not self.shapes:
            raise CpiftError(f"no tensor of {self._tuned.label} that is considered has floating-point values")
        # One dtype for all updates, so that they can be compared.
        self._read = {name: [side for side in read if name in side] for name in self.shapes}
        self._dtype = working_dtype(*(side.dtypes[name] for name, found in self._read.items() for side in found))
        groups = [list(self.shapes)] if scope == "global" else [[name] for name in self.shapes]
        self._searches = [
            (sizes, share_of(sum(sizes.values()), percent))
            for sizes in ({name: self._tuned.size(name) for name in group} for group in groups)
        ]
        self.wanted = sum(count for _, count in self._searches)
        self.bytes_to_read = sum(side.bytes(name) for name, found in self._read.items() for side in found)
        # An index and a value of each that passes the bar, and a few parts of both sides for every worker.
        width, at_work = self._dtype.itemsize, min(torch.get_num_threads(), MAX_WORKERS) + 1
        self.peak_bytes = 2 * (4 + width) * self.wanted + 14 * width * CHUNK * at_work
        self.peak_bytes += sum(side.peak_bytes for side in read)

    @property
    def total(self) -> int:
        """D: the number of coordinates that are considered."""
        return sum(map(math.prod, self.shapes.values()))

    def run(self, progress: Callable[[int], object] | None = None) -> CoreRegion:
        """Search; `progress` is called with a number of bytes after each part."""

        def count_bytes(name: str, entries: int) -> None:
            progress(entries * sum(side.dtypes[name].itemsize for side in self._read[name]))

        told = None if progress is None else count_bytes
        indices: dict[str, Tensor] = {}
        # In one vector, for small ones that stay between large ones that go would tear the memory to shreds.
        narrow = all(self._tuned.size(name) <= 1 << 31 for name in self.shapes)
        kept, end = torch.empty(self.wanted, dtype=torch.int32 if narrow else torch.int64), 0
        rate = self._update if self._importance is None else self._rated
        for sizes, count in self._searches:
            for name, found in select_largest(sizes, rate, count, progress=told).items():
                indices[name] = kept[end : end + len(found)].copy_(found)
                end += len(found)
        base = None if self._base is None else self._base.digest
        region = CoreRegion(indices, self.shapes, self._percent, self._scope, self._tuned.digest, base, self.measure)
        if len(region) < self.wanted:
            did = "moved" if self._importance is None else "have an importance above 0"
            warnings.warn(
                f"only {len(region)} of {self.total} coordinates {did}, fewer than the {self.wanted} asked for with "
                f"percent={self._percent}: the core region is smaller",
                NoEffectWarning,
                stacklevel=3,
            )
        elif self.wanted == 0:
            warnings.warn(
                f"percent={self._percent} of {self.total} coordinates is none: the core region is empty, raise it",
                NoEffectWarning,
                stacklevel=3,
            )
        return region

    def _update(self, name: str, start: int, stop: int) -> Tensor:
        """How far each coordinate moved, all finite."""
        after = self._tuned.part(name, start, stop)
        before = torch.ones_like(after) if self._base is None else self._base.part(name, start, stop)
        dtype = working_dtype(after.dtype, before.dtype)
        update = (after.to(dtype) - before.to(dtype)).abs_()
        if not math.isfinite(update.amax()):
            for side, part in (("tuned", after), ("base", before)):
                if not bool(part.to(dtype).isfinite().all()):
                    raise CpiftError(
                        f"tensor '{name}' has a value that is not finite in {side}: the training diverged"
                    )
            raise CpiftError(f"tensor '{name}' moved further than {dtype} can hold: the training diverged")
        return update.to(self._dtype)

    def _rated(self, name: str, start: int, stop: int) -> Tensor:
        """How much each coordinate matters, all finite and >= 0."""
        tensors = self._importance.tensors
        if name not in tensors:  # it was not trained
            return torch.zeros(stop - start, dtype=self._dtype)
        rating = tensors.part(name, start, stop).to(self._dtype)
        lowest, highest = rating.aminmax()
        if not (lowest >= 0 and math.isfinite(highest)):  # also if they are NaN
            if bool((rating < 0).any()):
                raise CpiftError(f"tensor '{name}' has a negative value in {tensors.label}: importance is 0 or more")
            raise CpiftError(
                f"tensor '{name}' has a value that is not finite in {tensors.label}: the training diverged"
            )
        return rating


def working_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any is float64, else float32: the dtype of updates (ours)."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def is_frozen(name: str) -> bool:
    """Whether a tensor of a saved adapter is the base model's own: PEFT saves an embedding that is adapted with it.

    Example:
        >>> is_frozen("base_model.model.model.embed_tokens.base_layer.weight")
        True
    """
    return name.endswith(".base_layer.weight")


def starts_at_one(tensors: Tensors, name: str) -> bool:
    """Whether a tensor is a Propulsion vector that started at 1, so that its base is known without a file."""
    return name.endswith("propulsion_z") and tensors.adapter_config.get("init_weights", True) is not False


def _open_own(tuned: Source, base: Source | None) -> tuple[Tensors, Tensors | None]:
    after, before = open_source(tuned), None if base is None else open_source(base)
    if not after:
        raise CpiftError(f"there is no tensor in {after.label}: give a checkpoint or adapter with weights")
    for side in (after, before):
        check_unquantized(side)
    if before is not None and after.adapter_config and isinstance(before, Checkpoint) and not before.is_adapter:
        raise CpiftError(
            f"{after.label} is an adapter and {before.label} a whole model: give the adapter as it was before "
            "training as base, or coordinates='delta' to compare the weights"
        )
    return after, before


def _check_starts_known(tuned: Tensors, names: Iterable[str]) -> None:
    """Raise CpiftError if a tensor's value before training is not known without a base."""
    for name in names:
        if not starts_at_one(tuned, name):
            kind = tuned.adapter_config.get("peft_type")
            whose, other = (f" of this {kind} adapter", ", or coordinates='delta'") if kind else ("", "")
            raise CpiftError(
                f"tensor '{name}'{whose} has no known starting value: give base=, the same as saved before training "
                f"(only Propulsion vectors start at 1, if not told otherwise){other}"
            )


def _open_deltas(tuned: Source, base: Source | None) -> tuple[Tensors, Tensors]:
    from peft_cpift.adapters import open_deltas  # loads PEFT, which takes seconds

    return open_deltas(tuned, base)


def _matching(names: Iterable[str], include: str | Iterable[str], exclude: str | Iterable[str]) -> list[str]:
    """The names that match a pattern of `include` and none of `exclude`; CpiftError if a pattern is of no use."""
    names = list(names)
    include, exclude = ([patterns] if isinstance(patterns, str) else list(patterns) for patterns in (include, exclude))
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CpiftError(f"no tensor matches '{pattern}': the first is called '{names[0]}'")
    chosen = [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        raise CpiftError("no tensor is left to look at: include more of them, or exclude fewer")
    return chosen


def _check_pair(tuned: Tensors, base: Tensors | None, names: Iterable[str]) -> Iterable[str]:
    """`names`, after checking from the headers alone that both sides have them with the same shape."""
    for name in names if base is not None else ():
        for side, other in ((tuned, "tuned"), (base, "base")):
            if name not in side.shapes:
                raise CpiftError(
                    f"tensor '{name}' is missing in {other}: compare two checkpoints of one model, with the same "
                    "weights tied, or exclude it"
                )
        if tuned.shapes[name] != base.shapes[name]:
            raise CpiftError(
                f"tensor '{name}' has shape {list(tuned.shapes[name])} in tuned and {list(base.shapes[name])} in "
                "base: compare two checkpoints of one model with one vocabulary, or exclude it"
            )
        if tuned.dtypes[name].is_floating_point != base.dtypes[name].is_floating_point:
            raise CpiftError(
                f"tensor '{name}' is {tuned.dtypes[name]} in tuned and {base.dtypes[name]} in base: compare two "
                "checkpoints of one model, or exclude it"
            )
    return names
