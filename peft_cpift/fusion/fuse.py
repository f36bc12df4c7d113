"""Fuse checkpoints or adapters of several tasks into one, tensor by tensor and chunk by chunk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_cpift.checkpoint.chunks import CHUNK, MAX_WORKERS, InOrder, chunks, workers
from peft_cpift.checkpoint.reader import ADAPTER_WEIGHTS, MODEL_WEIGHTS, Checkpoint
from peft_cpift.checkpoint.tensors import Tensors
from peft_cpift.checkpoint.writer import MAX_SHARD_BYTES, check_free, complete_folder, write_json, write_tensors
from peft_cpift.core.region import CoreRegion
from peft_cpift.core.search import starts_at_one
from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.fusion.card import write_card
from peft_cpift.fusion.inputs import (
    Folder,
    changed_weights,
    check_starts_known,
    open_cores,
    open_merged,
    open_own,
    output_dtypes,
    warn_of_other_values,
)
from peft_cpift.fusion.output import carry_over, check_overwritten, check_room
from peft_cpift.fusion.report import FusionReport, TensorFusion
from peft_cpift.fusion.rule import Rule, rules_by_name
from peft_cpift.fusion.slerp import LINEAR_ABOVE
from peft_cpift.fusion.tensor import TensorInputs, fuse_tensor

REPORT = "fusion.json"


def fuse(
    tasks: Mapping[str, Folder],
    cores: Mapping[str, CoreRegion | Folder],
    *,
    start: Folder,
    output: Folder,
    pretrained: Folder | None = None,
    weights: Mapping[str, float] | None = None,
    start_weight: float = 1.0,
    omega: float | None = None,
    conflict: str = "largest_update",
    space: str = "weights",
    linear_above: float = LINEAR_ABOVE,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    merged: bool = False,
    base: Folder | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> FusionReport:
    """Fuse the fine-tuned parameters of several tasks and write the result as a folder that `from_pretrained` loads.

    Coordinates in a task's core take that task's value, to the bit (`transplant`). All others start from `start`, and
    the tasks are folded in one after another, in the order of `tasks`, by `slerp` over the tensor's coordinates
    outside all cores. The n-th task's factor is w_n / (w_0 + ... + w_n), so that equal weights treat all tasks and the
    start alike (ours), or `omega` for every task. Arithmetic is in float64, and in float32 for sums of
    two-byte values.

    Every tensor is read twice in chunks, once for the inner products that the angles follow from and once for the
    result, so the memory grows neither with the tensors nor with the model. The result does not depend on how the
    checkpoints are split into files, nor on the number of threads.

    Args:
        tasks: name -> folder of the task's checkpoint or adapter.
        cores: name -> its core region, or the region's file; the same names as `tasks`.
        start: folder of theta_base, from which the other coordinates start. Its configuration and tokenizer files are
            carried over, its dtypes kept, and its tensors of integers copied.
        output: the folder to write; it appears when it is complete.
        pretrained: folder of theta_0, before any fine-tuning. Not needed for Propulsion adapters, which start at 1,
            nor where no rule asks for it: with `space="weights"`, and no tensor that has coordinates in several cores
            or another `conflict` than `"largest_update"`. With `merged`, the adapters' model if not given.
        weights: name -> w_n > 0, of every task; without it, 1 each.
        start_weight: w_0 >= 0; 0 forgets the start.
        omega: a fixed factor in [0, 1] in place of weights and start_weight, as in the paper.
        conflict: what a coordinate in several cores takes: `"largest_update"`, `"last"` or `"mean"`.
        space: interpolate `"weights"` (the paper), or `"delta"`, their differences from `pretrained`.
        linear_above: |cosine| above which to interpolate linearly.
        overrides: pattern of tensor names -> settings among the six above that these tensors have instead, such as
            `{"*.embed_tokens.*": {"omega": 0.0}}`; of several patterns that match, later ones count.
        merged: fuse weights, with every adapter merged into its model first, and write a whole model. For adapters
            that are not fusable tensor by tensor (LoRA), for different kinds, and for adapters with whole models. The
            cores must then be of the weights: found with `coordinates="delta"`. Loads PEFT and transformers.
        base: folder of the model that the adapters are for, if it is not where they say.
        rank: as `merged`, but write the fused change of the weights as a LoRA adapter of this rank; the report has
            the error of each weight.
        dtype: of the result's floating-point tensors, where it should be another than that of the inputs.
        max_shard_bytes: split a model's file above this size.
        overwrite: replace an existing `output`, if it is an earlier fusion.
        progress: called with a number of bytes after each part that was read.

    Returns:
        A report of every tensor, also written as `fusion.json` beside the result.

    Raises:
        CpiftError: names, shapes, dtypes or adapter settings differ, an adapter cannot be fused by its tensors, a
            setting is out of range, or the disk has no room, all before writing; or a value is not finite, or does not
            fit the dtype of the result.

    Source: stage 3 of CPI-FT (arXiv 2508.21741); weights, conflict rules, delta space and overrides are ours.
    """
    rule = Rule(weights, start_weight, omega, conflict, space, linear_above)
    plan = FusionPlan(
        tasks,
        cores,
        rule,
        start=start,
        output=output,
        pretrained=pretrained,
        overrides=overrides,
        merged=merged,
        base=base,
        rank=rank,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )
    return plan.run(progress)


class FusionPlan:
    """A fusion that was checked, as far as configurations and headers tell, and can be run; see `fuse`.

    Attributes:
        inputs: what is fused.
        rules: tensor name -> its rule.
        bytes_to_read: what both readings of every tensor come to; the second mostly comes from the system's cache.
        bytes_to_write: the size of the result's tensors.
        peak_bytes: how much memory is needed at most, about, beyond that of the libraries.
    """

    def __init__(
        self,
        tasks: Mapping[str, Folder],
        cores: Mapping[str, CoreRegion | Folder],
        rule: Rule,
        *,
        start: Folder,
        output: Folder,
        pretrained: Folder | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        merged: bool = False,
        base: Folder | None = None,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ):
        self.output, self._overwrite, self._max_shard_bytes = Path(output), overwrite, max_shard_bytes
        check_free(self.output, overwrite=overwrite)
        files = [core for core in cores.values() if not isinstance(core, CoreRegion)]
        given = [path for path in (start, *tasks.values(), *files, pretrained, base) if path is not None]
        check_overwritten(self.output, given, REPORT)
        if not tasks:
            raise CpiftError("there is no task to fuse")
        if not all(isinstance(task, str) and task.isprintable() for task in tasks):
            raise CpiftError(f"tasks must have names of printable text, got {list(tasks)!r}")
        if base is not None and not merged and rank is None:
            raise CpiftError(
                "base is the model that adapters are merged into: ask for merged=True or a rank, or omit it"
            )
        if set(cores) != set(tasks):
            raise CpiftError(f"cores are given for {sorted(cores)}, but the tasks are {sorted(tasks)}: name the same")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise CpiftError(f"rank must be a positive integer, got {rank!r}")
        if rank is not None and dtype is not None:
            raise CpiftError("a LoRA adapter is written in float32: leave dtype out")
        rule.check(tasks)  # before anything is opened
        self._rule, self._rank = rule, rank
        if merged or rank is not None:
            self.inputs = open_merged(start, tasks, pretrained, base)
        else:
            self.inputs = open_own(start, tasks, pretrained)
        regions = open_cores(self.inputs, cores)
        self._regions = list(regions.values())
        self.rules = rules_by_name(list(self.inputs.start), list(tasks), rule, overrides or {})
        check_starts_known(self.inputs, self._regions, self.rules)
        self._dtype, self._dtypes = dtype, output_dtypes(self.inputs, dtype)
        if rank is not None:
            from peft_cpift.adapters import check_linear

            self.rules = {name: self.rules[name] for name in changed_weights(self.inputs)}
            check_linear(self.rules, self.inputs.model)
            self._dtypes = dict.fromkeys(self.rules, torch.float32)
        self._settings = {
            "start": Path(start).resolve().name,
            "tasks": {task: Path(folder).resolve().name for task, folder in tasks.items()},
            **{field.name: getattr(rule, field.name) for field in fields(rule)},
            "weights": None if rule.weights is None else dict(rule.weights),
            "overrides": {pattern: dict(settings) for pattern, settings in (overrides or {}).items()},
            "merged": None if self.inputs.model is None else self.inputs.model.name,
            "rank": rank,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        }
        self.bytes_to_read = sum(self._entry_bytes(name) * self.inputs.start.size(name) for name in self.rules)
        shapes = {name: self.inputs.start.shapes[name] for name in self.rules}
        self.bytes_to_write = sum(math.prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items())
        at_work = min(torch.get_num_threads(), MAX_WORKERS) + 1
        self.peak_bytes = 2 * at_work * (len(tasks) + 4) * CHUNK * torch.float64.itemsize
        self.peak_bytes += sum(source.peak_bytes for source in self._sources)
        if rank is not None:  # factors instead of weights, and the change of one weight, whole, while it is decomposed
            self.bytes_to_write = sum(rank * sum(shape) * torch.float32.itemsize for shape in shapes.values())
            self.peak_bytes += 8 * max(map(math.prod, shapes.values()), default=0) * torch.float32.itemsize
        check_room(self.output, self.bytes_to_write)
        warn_of_other_values(self.inputs, regions)

    @property
    def _sources(self) -> list[Tensors]:
        return [self.inputs.start, *self.inputs.tasks.values()]

    def run(self, progress: Callable[[int], object] | None = None) -> FusionReport:
        """Fuse, and write the result; `progress` is called with a number of bytes after each part that was read."""
        report = FusionReport({})
        with complete_folder(self.output, overwrite=self._overwrite) as folder, workers() as in_order:

            def fused(name: str) -> Iterator[Tensor]:
                return self._fuse(name, in_order, report, progress or (lambda count: None))

            if self._rank is not None:
                report.errors = self._write_lora(folder, fused)
            else:
                self._write(folder, fused)
            write_json(folder / REPORT, {**self._settings, **report.to_dict()})
            write_card(folder, self._settings, report)
        if report.folds and report.linear_folds == report.folds:
            cure = "; space='delta' interpolates their differences from the base"
            warnings.warn(
                f"all {report.folds} interpolations fell back to linear ones, for their tensors were zero or parallel "
                f"(|cosine| above {self._rule.linear_above}), as fine-tuned weights of one base nearly are"
                f"{cure if self._rule.space == 'weights' else ''}",
                NoEffectWarning,
                stacklevel=3,
            )
        return report

    def _fuse(
        self, name: str, in_order: InOrder, report: FusionReport, progress: Callable[[int], object]
    ) -> Iterator[Tensor]:
        """The parts of one fused tensor; of the start's where they are no floating-point numbers."""
        inputs, rule = self.inputs, self.rules[name]
        report.tensors[name] = TensorFusion()
        if not inputs.start.dtypes[name].is_floating_point:
            for start, stop in chunks(inputs.start.size(name)):
                progress((stop - start) * self._entry_bytes(name))
                yield inputs.start.part(name, start, stop)
            return
        claims = sum(name in region.indices for region in self._regions)
        report.tensors[name], parts = fuse_tensor(
            TensorInputs(
                name,
                ["start", *inputs.tasks],
                self._sources,
                self._regions,
                partial(self._pretrained, name) if rule.needs_pretrained(claims) else None,
            ),
            rule,
            rule.omegas(inputs.tasks),
            self._dtypes[name],
            in_order,
            lambda entries: progress(entries * self._entry_bytes(name) // 2),
        )
        yield from parts

    def _entry_bytes(self, name: str) -> int:
        """How much is read for each entry of the result: from all sources, twice, where they are interpolated."""
        if not self.inputs.start.dtypes[name].is_floating_point:
            return self.inputs.start.dtypes[name].itemsize
        return 2 * sum(source.dtypes[name].itemsize for source in self._sources)

    def _pretrained(self, name: str, start: int, stop: int) -> Tensor:
        """Entries of theta_0, which is known without a folder for what starts at one, and for what never moves."""
        if self.inputs.pretrained is not None:
            return self.inputs.pretrained.part(name, start, stop)
        if starts_at_one(self.inputs.start, name):
            return torch.ones(stop - start)
        return self.inputs.start.part(name, start, stop)

    def _write(self, folder: Path, fused: Callable[[str], Iterator[Tensor]]) -> None:
        layout = {name: (self.inputs.start.shapes[name], dtype) for name, dtype in self._dtypes.items()}
        if self.inputs.start.adapter_config:
            write_tensors(folder, layout, fused, ADAPTER_WEIGHTS, max_shard_bytes=None)
        else:
            write_tensors(folder, layout, fused, MODEL_WEIGHTS, max_shard_bytes=self._max_shard_bytes)
        carry_over(self.inputs.files, folder, self._dtype)

    def _write_lora(self, folder: Path, fused: Callable[[str], Iterator[Tensor]]) -> dict[str, float]:
        """Write the fused change of each weight as a product of low rank; gives the share that is lost."""
        from peft_cpift.adapters import write_lora

        model = Checkpoint(self.inputs.model)
        deltas = (
            (name, torch.cat(list(fused(name))).reshape(model.shapes[name]) - model[name].float())
            for name in self.rules
        )
        return write_lora(folder, deltas, self._rank, self.inputs.merged_config, base=self.inputs.model)
