"""Fuse checkpoints or adapters of several tasks into one, tensor by tensor."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from peft_cpift.checkpoint.reader import ADAPTER_WEIGHTS, Checkpoint, working_dtype
from peft_cpift.checkpoint.writer import ShardWriter, check_free, complete_folder, write_json
from peft_cpift.core.region import CoreRegion, is_frozen, starts_at_one
from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.fusion.slerp import LINEAR_ABOVE, slerp
from peft_cpift.fusion.transplant import CONFLICTS, transplant

SPACES = ("weights", "delta")
REPORT = "fusion.json"
# Adapters in which each tensor acts for itself. The mean of two products is not the product of the means, so a
# LoRA-like adapter, fused factor by factor, would be something else than what its tasks learned.
FUSABLE_ADAPTERS = ("PROPULSION", "IA3", "LN_TUNING")
# Weights are written anew, pickles are never carried along.
CARRIED_SUFFIXES = {".json", ".jinja", ".model", ".txt"}


@dataclass
class TensorFusion:
    """How one tensor was fused."""

    angles: list[float] = field(default_factory=list)
    """Per task, the angle in radians of the interpolation; None where it is undefined (a zero vector)."""
    linear: int = 0
    """How many of the tasks were folded in linearly instead of along the sphere."""
    core: int = 0
    """Coordinates that were transplanted."""
    conflicts: int = 0
    """Coordinates that are in more than one core."""


@dataclass
class FusionReport:
    """How every tensor was fused, by name."""

    tensors: dict[str, TensorFusion]

    @property
    def folds(self) -> int:
        """Interpolations made: tensors with coordinates outside all cores, times tasks."""
        return sum(len(tensor.angles) for tensor in self.tensors.values())

    @property
    def linear_folds(self) -> int:
        """Interpolations among them that fell back to linear."""
        return sum(tensor.linear for tensor in self.tensors.values())

    @property
    def core(self) -> int:
        """Coordinates transplanted, over all tensors."""
        return sum(tensor.core for tensor in self.tensors.values())

    @property
    def conflicts(self) -> int:
        """Coordinates in more than one core, over all tensors."""
        return sum(tensor.conflicts for tensor in self.tensors.values())

    def to_dict(self) -> dict:
        """The totals and the tensors, ready for JSON."""
        totals = {key: getattr(self, key) for key in ("folds", "linear_folds", "core", "conflicts")}
        return {**totals, "tensors": {name: asdict(tensor) for name, tensor in self.tensors.items()}}


def fuse(
    tasks: Mapping[str, str | os.PathLike],
    cores: Mapping[str, CoreRegion | str | os.PathLike],
    *,
    start: str | os.PathLike,
    output: str | os.PathLike,
    pretrained: str | os.PathLike | None = None,
    weights: Mapping[str, float] | None = None,
    start_weight: float = 1.0,
    omega: float | None = None,
    conflict: str = "largest_update",
    space: str = "weights",
    linear_above: float = LINEAR_ABOVE,
    overwrite: bool = False,
) -> FusionReport:
    """Fuse the fine-tuned parameters of several tasks and write the result as a folder that `from_pretrained` loads.

    Coordinates in a task's core take that task's value, to the bit (`transplant`). All others start from `start`, and
    the tasks are folded in one after another, in the order of `tasks`, by `slerp` over the tensor's coordinates
    outside all cores. The n-th task's factor is w_n / (w_0 + ... + w_n), so that equal weights treat all tasks and the
    start alike (ours), or `omega` for every task.

    Args:
        tasks: name -> folder of the task's checkpoint or adapter.
        cores: name -> its core region, or the region's file; the same names as `tasks`.
        start: folder of theta_base, from which the other coordinates start. Its configuration and tokenizer files are
            carried over, and its dtypes kept.
        output: the folder to write; it appears when it is complete.
        pretrained: folder of theta_0, before any fine-tuning. Not needed for Propulsion adapters, which start at 1,
            nor where no rule asks for it: with `space="weights"`, and no tensor that has coordinates in several cores
            or another `conflict` than `"largest_update"`.
        weights: name -> w_n > 0; default 1 each.
        start_weight: w_0 >= 0; 0 forgets the start.
        omega: a fixed factor in [0, 1] in place of weights, as in the paper.
        conflict: what a coordinate in several cores takes: `"largest_update"`, `"last"` or `"mean"`.
        space: interpolate `"weights"` (the paper), or `"delta"`, their differences from `pretrained`.
        linear_above: |cosine| above which to interpolate linearly.
        overwrite: replace an existing `output`, if it is an earlier fusion.

    Returns:
        A report of every tensor, also written as `fusion.json` beside the result.

    Raises:
        CpiftError: names, shapes, dtypes or adapter settings differ, the adapter cannot be fused by its tensors (LoRA
            and its kin: merge them into the model first), or a setting is out of range, all before writing;
            or a value is not finite.

    Source: stage 3 of CPI-FT (arXiv 2508.21741); weights, conflict rules and delta space are ours.
    """
    output = Path(output)
    check_free(output, overwrite=overwrite)
    _check_overwritten(output, [start, *tasks.values(), *([] if pretrained is None else [pretrained])])
    _check_settings(tasks, cores, weights, start_weight, omega, conflict, space, linear_above)
    regions = {task: core if isinstance(core, CoreRegion) else CoreRegion.load(core) for task, core in cores.items()}
    base = Checkpoint(start)
    tuned = {task: Checkpoint(folder) for task, folder in tasks.items()}
    before = None if pretrained is None else Checkpoint(pretrained)
    for task, checkpoint in tuned.items():
        _check_alike(base, checkpoint, f"task '{task}'")
        _check_core(base, regions[task], task)
    if before is not None:
        _check_alike(base, before, "pretrained")
    else:
        _check_starts_known(base, regions.values(), conflict, space)

    omegas = _omegas([1.0 if weights is None else weights[task] for task in tasks], start_weight, omega)
    report = FusionReport({})
    with complete_folder(output, overwrite=overwrite) as folder:
        writer = ShardWriter(folder, ADAPTER_WEIGHTS, max_shard_bytes=None) if base.is_adapter else ShardWriter(folder)
        for name in base:
            tensors = {task: checkpoint[name] for task, checkpoint in tuned.items()}
            first = base[name]
            _check_finite(name, {"start": first, **tensors})
            fused, report.tensors[name] = fuse_tensor(
                first,
                list(tensors.values()),
                [regions[task].indices.get(name, torch.empty(0, dtype=torch.int64)) for task in tasks],
                omegas,
                pretrained=_pretrained(before, name, base),
                conflict=conflict,
                space=space,
                linear_above=linear_above,
            )
            writer.add(name, fused)
        writer.close()
        _carry_over(base.folder, folder)
        write_json(folder / REPORT, {"tasks": list(tasks), "omegas": omegas, **report.to_dict()})
    if report.folds and report.linear_folds == report.folds:
        cure = "; space='delta' interpolates their differences from the base" if space == "weights" else ""
        warnings.warn(
            f"all {report.folds} interpolations fell back to linear ones, for their tensors were zero or parallel "
            f"(|cosine| above {linear_above}), as fine-tuned weights of one base nearly are{cure}",
            NoEffectWarning,
            stacklevel=2,
        )
    return report


def fuse_tensor(
    start: Tensor,
    tuned: Sequence[Tensor],
    cores: Sequence[Tensor],
    omegas: Sequence[float],
    *,
    pretrained: Tensor | None = None,
    conflict: str = "largest_update",
    space: str = "weights",
    linear_above: float = LINEAR_ABOVE,
) -> tuple[Tensor, TensorFusion]:
    """Fuse one tensor of several tasks; see `fuse`.

    Args:
        start, pretrained, tuned: of equal shape and dtype; `pretrained` where `conflict` or `space` asks for it.
            Integers are taken from `start` unchanged.
        cores: per task, flat indices into the tensor, int64, ascending.
        omegas: per task, its interpolation factor.

    Returns:
        The fused tensor, of the shape and dtype of `start`, and how it was made.
    """
    if not start.is_floating_point():
        return start, TensorFusion()
    dtype = working_dtype(start, *tuned)
    fused = start.clone().reshape(-1)
    rest = torch.ones(fused.numel(), dtype=torch.bool)
    for core in cores:
        rest[core] = False
    made = TensorFusion(core=int((~rest).sum()))
    if made.core < rest.numel():
        origin = pretrained.reshape(-1)[rest].to(dtype) if space == "delta" else 0
        running = fused[rest].to(dtype) - origin
        for values, omega in zip(tuned, omegas, strict=True):
            running, angle, linear = slerp(
                running, values.reshape(-1)[rest].to(dtype) - origin, omega, linear_above=linear_above
            )
            made.angles.append(angle if angle == angle else None)
            made.linear += linear
        fused[rest] = (running + origin).to(fused.dtype)
    made.conflicts = transplant(
        fused,
        [values.reshape(-1) for values in tuned],
        cores,
        conflict=conflict,
        pretrained=None if pretrained is None else pretrained.reshape(-1),
    )
    return fused.reshape(start.shape), made


def _pretrained(before: Checkpoint | None, name: str, base: Checkpoint) -> Tensor | None:
    if before is not None:
        return before[name]
    if starts_at_one(base, name):
        return torch.ones_like(base[name])
    return base[name] if is_frozen(name) else None


def _omegas(weights: Sequence[float], start_weight: float, omega: float | None) -> list[float]:
    if omega is not None:
        return [omega] * len(weights)
    total, omegas = start_weight, []
    for weight in weights:
        total += weight
        omegas.append(weight / total)
    return omegas


def _check_overwritten(output: Path, inputs: Iterable[str | os.PathLike]) -> None:
    """Only an earlier fusion is replaced, and only if nothing that is to be fused lies in it."""
    if not output.exists():
        return
    if not (output / REPORT).is_file():
        raise CpiftError(f"{output} has no {REPORT}, so it is no earlier fusion and not overwritten: choose another")
    for folder in inputs:
        if Path(folder).resolve().is_relative_to(output.resolve()):
            raise CpiftError(f"{output} holds {folder}, which is to be fused: choose another output")


def _check_settings(tasks, cores, weights, start_weight, omega, conflict, space, linear_above) -> None:
    if not tasks:
        raise CpiftError("there is no task to fuse")
    for kind, names in (("cores", cores), ("weights", tasks if weights is None else weights)):
        if set(names) != set(tasks):
            raise CpiftError(f"{kind} are given for {sorted(names)}, but the tasks are {sorted(tasks)}: name the same")
    if weights is not None and omega is not None:
        raise CpiftError("weights and omega contradict each other: give one of them")
    if weights is not None and not all(isinstance(w, int | float) and 0 < w < float("inf") for w in weights.values()):
        raise CpiftError(f"weights must be positive, got {dict(weights)}")
    if not 0 <= start_weight < float("inf"):
        raise CpiftError(f"start_weight must be at least 0, got {start_weight}")
    if omega is not None and not 0 <= omega <= 1:
        raise CpiftError(f"omega must be in [0, 1], got {omega}")
    if conflict not in CONFLICTS:
        raise CpiftError(f"unknown conflict rule '{conflict}': use one of {', '.join(CONFLICTS)}")
    if space not in SPACES:
        raise CpiftError(f"unknown space '{space}': use one of {', '.join(SPACES)}")
    if not 0 <= linear_above <= 1:
        raise CpiftError(f"linear_above must be in [0, 1], got {linear_above}")


def _check_alike(base: Checkpoint, other: Checkpoint, label: str) -> None:
    """Raise CpiftError unless `other` has the tensors of `base`, their shapes and dtypes, and its adapter settings."""
    odd = sorted(base.shapes.keys() ^ other.shapes.keys())
    if odd:
        where = "start" if odd[0] in base.shapes else label
        raise CpiftError(f"tensor '{odd[0]}' is only in {where}, not in {label if where == 'start' else 'start'}")
    for name in base:
        mine = (base.shapes[name], base.dtypes[name])
        theirs = (other.shapes[name], other.dtypes[name])
        if mine != theirs:
            raise CpiftError(
                f"tensor '{name}' is {theirs[1]} {list(theirs[0])} in {label} and {mine[1]} {list(mine[0])} in start: "
                "fuse checkpoints of one model saved in one dtype"
            )
    mine, theirs = base.adapter_config, other.adapter_config
    if theirs and theirs.get("peft_type") not in FUSABLE_ADAPTERS:
        raise CpiftError(
            f"{label} is a {theirs.get('peft_type')} adapter, which cannot be fused tensor by tensor (only "
            f"{', '.join(FUSABLE_ADAPTERS)} can): merge it into its model with merge_and_unload and fuse the models"
        )
    # How an adapter was last used, and by which release of PEFT, does not change what its tensors mean.
    keys = sorted((mine.keys() | theirs.keys()) - {"inference_mode", "revision", "peft_version"})
    differing = [key for key in keys if not _same_setting(key, mine.get(key), theirs.get(key))]
    if differing:
        listed = ", ".join(f"{key}: {theirs.get(key)!r} and {mine.get(key)!r}" for key in differing)
        raise CpiftError(f"the adapters of {label} and start differ in {listed}: fuse adapters of one configuration")


def _same_setting(key: str, a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return sorted(map(str, a)) == sorted(map(str, b))  # PEFT saves its sets in any order
    if key == "base_model_name_or_path" and a and b:
        return Path(str(a)).resolve() == Path(str(b)).resolve()  # one folder has many names
    return a == b


def _check_starts_known(base: Checkpoint, regions: Iterable[CoreRegion], conflict: str, space: str) -> None:
    """Raise CpiftError if a rule asks for a tensor's value before training, which only Propulsion's vectors tell."""
    claimed = Counter(name for region in regions for name in region.indices)
    for name in base:
        asked = space == "delta" or (conflict == "largest_update" and claimed[name] > 1)
        if asked and not starts_at_one(base, name) and not is_frozen(name):
            raise CpiftError(
                f"conflict='{conflict}' with space='{space}' needs the value of '{name}' before training: give "
                "pretrained=, or use conflict='last' or 'mean' with space='weights'"
            )


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for label, tensor in tensors.items():
        # float8 has no isfinite of its own
        if tensor.is_floating_point() and not bool(tensor.to(working_dtype(tensor)).isfinite().all()):
            raise CpiftError(f"tensor '{name}' has a value that is not finite in '{label}': that training diverged")


def _check_core(base: Checkpoint, region: CoreRegion, task: str) -> None:
    for name in region.indices:
        if name not in base.shapes:
            raise CpiftError(f"the core of task '{task}' has tensor '{name}', which start has not: wrong region file?")
        if region.shapes[name] != base.shapes[name]:
            raise CpiftError(
                f"the core of task '{task}' has shape {list(region.shapes[name])} for '{name}', start has "
                f"{list(base.shapes[name])}: wrong region file?"
            )


def _carry_over(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        made_anew = file.name == REPORT or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in CARRIED_SUFFIXES and not made_anew:
            shutil.copy2(file, target / file.name)
