"""The stages of a run, one after another, and the folder that they fill.

RUN/recipe.yaml              the recipe as resolved
RUN/start/                   theta_0
RUN/probes/<task>/           stage 1: fine-tuned on one task each
RUN/cores/<task>.safetensors the core regions found in them
RUN/groups.json              stage 2: overlaps, groups and their order
RUN/multi_stage/NN-<group>/  stage 3: plain fine-tuning over the groups, the fusion's start
RUN/fused/                   stage 3: the fused parameters
RUN/stages/NN-<group>/       stage 4: fine-tuned group by group, earlier cores frozen
RUN/final/                   the result
RUN/multi_task/              for comparison: all tasks mixed, as many tokens
RUN/report/                  report.md, report.json, report.png
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from trl import SFTConfig

from peft_cpift.checkpoint import complete_file
from peft_cpift.checkpoint.writer import write_json
from peft_cpift.core import CoreRegion, find_core_region, group_tasks, jaccard_matrix, order_groups
from peft_cpift.errors import CpiftError
from peft_cpift.fusion import fuse
from peft_cpift.pipeline import data as rows
from peft_cpift.pipeline.evaluate import evaluate, normalised_average
from peft_cpift.pipeline.recipe import Recipe
from peft_cpift.pipeline.train import (
    Training,
    load_model,
    load_tokenizer,
    make_start,
    resolve_settings,
    resolve_tuner,
    train,
)
from peft_cpift.report.page import versions, write_report


def run(recipe: Recipe) -> Path:
    """Run the whole method and write its folder, `recipe.output`.

    Everything that can be checked is checked before a model is loaded: settings, data, the tokenizer, the output.

    Returns:
        The folder of the report.

    Raises:
        CpiftError: the recipe, its data or its model cannot be used, or a training diverged.
    """
    return _Run(recipe).run()


class _Run:
    """What the stages share: the recipe, its data, and the record that the report is made of."""

    def __init__(self, recipe: Recipe):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CpiftError("a run works on one process: start it without torchrun or accelerate launch")
        if recipe.output.exists() and (not recipe.output.is_dir() or any(recipe.output.iterdir())):
            raise CpiftError(f"{recipe.output} exists and is not an empty folder: choose another output")
        if recipe.report.picture and importlib.util.find_spec("matplotlib") is None:
            raise CpiftError(
                "the report's picture needs matplotlib: pip install 'peft-cpift[report]', or set report.picture=false"
            )
        self.recipe = recipe
        self.folder = recipe.output
        self.tuner = resolve_tuner(recipe)
        self.settings = {
            stage: resolve_settings(recipe, self.tuner, own)
            for stage, own in {
                "probe": recipe.probe.training,
                "multi_stage": recipe.fusion.training,
                "integration": recipe.integration.training,
                "multi_task": {},
            }.items()
        }
        self.tokenizer = load_tokenizer(recipe)
        self.data = rows.load_tasks(recipe)
        rows.check_tokens(recipe, self.data, self.tokenizer, self._max_length("probe"))
        self.models: list[dict[str, Any]] = []
        self.trainings: list[Training] = []

    def run(self) -> Path:
        for name, task in self.data.items():
            kept = len(rows.training_lengths(task.train, self.tokenizer, self._max_length("probe")))
            cut = f" ({len(task.train) - kept} more are cut by max_length before their completion)"
            more = cut if kept < len(task.train) else ""
            print(f"task {name}: {kept} rows to train on{more}, {len(task.test)} to score on")
        start = self.folder / "start"
        make_start(self.recipe, self.tuner, self.tokenizer, start)
        with complete_file(self.folder / "recipe.yaml") as file:
            file.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False), encoding="utf-8")
        self._record("base", load_model(self.recipe, start))
        probes = self._probe(start)
        cores = self._find_cores(start, probes)
        groups = self._group(cores, probes)
        base = self._fusion_start(groups, start, probes)
        fusion = self._fuse(groups, start, base, probes, cores)
        final = self._integrate(groups, cores)
        shutil.copytree(final, self.folder / "final.part")
        (self.folder / "final.part").rename(self.folder / "final")
        if self.recipe.baselines.multi_task:
            self._multi_task(start)
        return write_report(
            {
                "recipe": self.recipe.to_dict(),
                "versions": versions(),
                "settings": self.settings,
                "cores": {task: {"size": len(core), "total": core.total} for task, core in cores.items()},
                "jaccard": jaccard_matrix(cores),
                "groups": groups,
                "fusion": {key: value for key, value in fusion.items() if key != "tensors"},
                "models": self.models,
            },
            self.folder / "report",
            picture=self.recipe.report.picture,
        )

    def _probe(self, start: Path) -> dict[str, Training]:
        """Stage 1: fine-tune on each task alone, from the same start."""
        return {
            task: self._train(f"probe {task}", "probe", start, data.train, self.folder / "probes" / task)
            for task, data in self.data.items()
        }

    def _find_cores(self, start: Path, probes: Mapping[str, Training]) -> dict[str, CoreRegion]:
        cores = {}
        for task in probes:
            core = find_core_region(self.folder / "probes" / task, start, percent=self.recipe.core.percent)
            core.save(self.folder / "cores" / f"{task}.safetensors")
            cores[task] = core
            print(f"core of {task}: {len(core)} of {core.total} coordinates")
        return cores

    def _group(self, cores: dict[str, CoreRegion], probes: Mapping[str, Training]) -> list[list[str]]:
        """Stage 2: join tasks whose cores overlap, and order the groups."""
        recipe = self.recipe.grouping
        if isinstance(recipe.order, list):
            groups = recipe.order
        else:
            groups = group_tasks(cores, recipe.threshold)
            losses = {task: training.loss for task, training in probes.items()}
            groups = order_groups(groups, recipe.order, seed=self.recipe.seed, losses=losses)
        write_json(
            self.folder / "groups.json",
            {"tasks": list(cores), "jaccard": jaccard_matrix(cores), "threshold": recipe.threshold, "groups": groups},
        )
        print(f"groups in order: {', '.join(' + '.join(group) for group in groups)}")
        return groups

    def _fusion_start(self, groups: list[list[str]], start: Path, probes: Mapping[str, Training]) -> Path:
        """Stage 3: theta_base, from which coordinates outside all cores start."""
        if self.recipe.fusion.start == "pretrained":
            return start
        if self.recipe.fusion.start == "last_probe":
            return self.folder / "probes" / groups[-1][-1]
        folder = start
        for number, group in enumerate(groups, 1):
            mixed = rows.mixture([self.data[task].train for task in group], self.recipe.seed)
            target = self.folder / "multi_stage" / _stage_name(number, group)
            name = f"multi-stage {number}/{len(groups)}"
            self._train(name, "multi_stage", folder, mixed, target)
            folder = target
        return folder

    def _fuse(
        self,
        groups: list[list[str]],
        start: Path,
        base: Path,
        probes: Mapping[str, Training],
        cores: dict[str, CoreRegion],
    ) -> dict[str, Any]:
        recipe = self.recipe.fusion
        order = [task for group in groups for task in group]
        report = fuse(
            {task: self.folder / "probes" / task for task in order},
            {task: cores[task] for task in order},
            start=base,
            pretrained=start,
            output=self.folder / "fused",
            omega=recipe.omega,
            conflict=recipe.conflict,
            space=recipe.space,
        ).to_dict()
        print(
            f"fused: {report['core']} coordinates transplanted ({report['conflicts']} in several cores), "
            f"{report['linear_folds']} of {report['folds']} interpolations linear"
        )
        self._record("fused", load_model(self.recipe, self.folder / "fused"))
        return report

    def _integrate(self, groups: list[list[str]], cores: dict[str, CoreRegion]) -> Path:
        """Stage 4: fine-tune the fused parameters on a small balanced set, with cores frozen."""
        recipe = self.recipe.integration
        calibration = rows.calibration_sets(self.data, recipe.calibration_fraction, self.recipe.seed)
        if recipe.schedule == "mixed":
            stages = [([task for group in groups for task in group], list(cores.values()))]
        else:
            stages = [
                (group, [cores[task] for earlier in groups[:number] for task in earlier])
                for number, group in enumerate(groups)
            ]
        folder = self.folder / "fused"
        for number, (group, frozen) in enumerate(stages, 1):
            mixed = rows.mixture([calibration[task] for task in group], self.recipe.seed)
            target = self.folder / "stages" / _stage_name(number, group)
            name = "final" if number == len(stages) else f"stage {number}/{len(stages)}"
            self._train(name, "integration", folder, mixed, target, frozen)
            folder = target
        return folder

    def _multi_task(self, start: Path) -> None:
        """For comparison: plain fine-tuning on all tasks mixed, for as many tokens as all stages together saw."""
        settings = self.settings["multi_task"]
        mixed = rows.mixture([data.train for data in self.data.values()], self.recipe.seed)
        lengths = rows.training_lengths(mixed, self.tokenizer, self._max_length("multi_task"))
        batch = settings.get("per_device_train_batch_size", SFTConfig.per_device_train_batch_size)
        batches = math.ceil(len(lengths) / batch)
        steps = math.ceil(batches / settings.get("gradient_accumulation_steps", SFTConfig.gradient_accumulation_steps))
        epochs = sum(training.tokens for training in self.trainings) / sum(lengths)
        settings["max_steps"] = max(1, round(epochs * steps))
        self._train("multi-task", "multi_task", start, mixed, self.folder / "multi_task")

    def _max_length(self, stage: str) -> int | None:
        return self.settings[stage].get("max_length", SFTConfig.max_length)

    def _train(
        self,
        name: str,
        stage: str,
        start: Path,
        data: Dataset,
        output: Path,
        frozen: list[CoreRegion] | None = None,
    ) -> Training:
        settings = self.settings[stage]
        print(f"\n{name}: {len(data)} rows{f', {len(frozen)} cores frozen' if frozen else ''}", flush=True)
        model, training = train(self.recipe, self.tokenizer, start, data, settings, output, frozen=frozen)
        self.trainings.append(training)
        self._record(name, model, training)
        return training

    def _record(self, name: str, model: torch.nn.Module, training: Training | None = None) -> None:
        """Score a model on every task, and keep the result on disk at once."""
        if torch.accelerator.is_available() and not self.settings["probe"].get("use_cpu"):
            model = model.to(torch.accelerator.current_accelerator())
        scores = evaluate(model, self.tokenizer, self.recipe, self.data)
        average = normalised_average(scores)
        self.models.append(
            {
                "name": name,
                "average": average,
                "scores": {task: asdict(score) for task, score in scores.items()},
                "training": asdict(training) if training else None,
            }
        )
        write_json(self.folder / "scores.json", self.models)
        if training:
            print(
                f"{name}: {training.steps} steps at learning rate {training.learning_rate:g}, "
                f"{training.tokens} tokens, {training.seconds:.1f} s, loss {training.loss:.3f}"
            )
        print(f"{name}: average {average:.2f} | " + "  ".join(f"{t} {10 * s.score:.2f}" for t, s in scores.items()))


def _stage_name(number: int, group: list[str]) -> str:
    """A folder's name, of bounded length however many tasks are in the group."""
    return f"{number:02d}-{'+'.join(group)[:80]}"
