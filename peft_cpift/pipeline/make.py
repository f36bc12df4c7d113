"""What each step of a run does. All processes of a distributed run call these together; one of them writes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from peft_cpift.baselines import merge_baseline
from peft_cpift.checkpoint import complete_folder
from peft_cpift.checkpoint.writer import remove, write_json
from peft_cpift.core import CoreRegion, find_core_region, group_tasks, jaccard_matrix, measured_helps, order_groups
from peft_cpift.core.importance import FILE as IMPORTANCE
from peft_cpift.core.order import circles
from peft_cpift.data import tasks as rows
from peft_cpift.data.tasks import TaskData
from peft_cpift.errors import MismatchWarning, NoEffectWarning
from peft_cpift.evaluation.evaluate import check_lengths, evaluate, measure_losses, normalised_average
from peft_cpift.evaluation.harness import score_harness
from peft_cpift.fusion import fuse
from peft_cpift.pipeline import plan
from peft_cpift.pipeline.engine import engine
from peft_cpift.pipeline.gather import gather
from peft_cpift.pipeline.models import count_parameters, count_positions, load_model, make_start
from peft_cpift.pipeline.plan import Stage, core_file
from peft_cpift.pipeline.settings import fuses_by_coordinate, machine_settings, setting
from peft_cpift.pipeline.steps import Steps
from peft_cpift.pipeline.train import train
from peft_cpift.processes import on_main, output_folder, say
from peft_cpift.recipe.tree import Grouping, Recipe
from peft_cpift.report.page import versions, write_report

Result = dict[str, Any]


class Maker:
    """Makes the parts of a run's folder, each from the ones before it.

    Args:
        settings: SFTConfig fields by stage.
        data: every task's rows.
        steps: the notes of what is done.
    """

    def __init__(
        self,
        recipe: Recipe,
        tuner: PeftConfig | None,
        settings: Mapping[str, dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        data: dict[str, TaskData],
        steps: Steps,
    ):
        self.recipe, self.tuner, self.settings, self.tokenizer = recipe, tuner, settings, tokenizer
        self.data, self.steps, self.folder = data, steps, recipe.output
        self._lengths: dict[tuple[str, int | None, bool], list[int]] = {}
        self.calibration = rows.calibration_sets(
            data, recipe.integration.calibration_fraction, recipe.seed, tokenizer, self.max_length("integration")
        )

    def start(self) -> Result:
        """theta_0, and what is to be known of the model."""

        def make() -> Result:
            parameters = count_parameters(self.recipe, self.tuner)
            with complete_folder(self.folder / plan.START) as folder:
                make_start(self.recipe, self.tuner, self.tokenizer, folder)
            return {"parameters": parameters, "versions": versions()}

        return on_main(make)

    def tasks(self) -> Result:
        """How many rows and tokens each task has."""
        return on_main(lambda: {"tasks": self._describe_tasks(), "warnings": self.doubts()})

    def training(self, stage: Stage, made_from: Mapping[str, Any]) -> Result:
        """A fine-tuned model.

        Args:
            made_from: settings and the steps before it; work begun with others is thrown away.
        """
        fields = dict(self.settings[stage.settings])
        if stage.settings == "baselines":
            fields |= {"max_steps": -1, "num_train_epochs": self._epochs()}
        source = self.calibration if stage.calibration else {task: data.train for task, data in self.data.items()}
        parts = [source[task] for task in stage.tasks]
        train_rows = parts[0] if stage.settings == "probe" else rows.mixture(parts, self.recipe.seed)
        say(f"\n{stage.name}: {_announce(len(train_rows), fields, len(stage.frozen))}")
        checkpoints = self.steps.work(stage.path)
        # A checkpoint of other processes is cut up otherwise, and its steps were of another batch.
        made_from = {**made_from, "processes": PartialState().num_processes, "engine": engine()}
        made_from["machine"] = machine_settings()
        on_main(lambda: _claim(checkpoints, made_from))
        with output_folder(self.folder / stage.path) as folder:
            training = train(
                self.recipe,
                self.tokenizer,
                self.path(stage.start),
                train_rows,
                fields,
                folder,
                checkpoints,
                frozen=[self.folder / file for file in stage.frozen],
                importance=folder / IMPORTANCE if stage.importance else None,
            )
        say(
            f"{stage.name}: {training.steps} steps at learning rate {training.learning_rate:g}, "
            f"{training.tokens} tokens, {training.seconds:.1f} s, loss {training.loss:.3f}"
        )
        return {**dataclasses.asdict(training), "versions": versions()}

    def scores(self, name: str, path: str, *, harness: bool = False) -> Result:
        """A model's scores on every task.

        Args:
            harness: score it by lm-evaluation-harness too, if the recipe asks for that.
        """
        model = load_model(self.recipe, self.path(path)).to(self._device())
        scores = evaluate(model, self.tokenizer, self.recipe, self.data)
        average = normalised_average(scores)
        each = "  ".join(f"{task} {10 * score.score:.2f}" for task, score in scores.items())
        say(f"{name}: average {average:.2f} of 10 | {each}")
        lm_eval = None
        if harness and self.recipe.evaluation.lm_eval is not None:
            settings = self.recipe.evaluation
            lm_eval = score_harness(model, self.tokenizer, settings.lm_eval, settings.batch_size)
        return {
            "scores": {task: dataclasses.asdict(score) for task, score in scores.items()},
            "average": average,
            "lm_eval": lm_eval,
        }

    def core(self, task: str) -> Result:
        """The core region found in a task's probe."""
        return self._region(f"probes/{task}", plan.START, core_file(task), f"core of {task}")

    def region(self, stage: Stage) -> Result:
        """The core region found in a stage of the integration."""
        return self._region(stage.path, stage.start, stage.region, f"region of {stage.name}")

    def transfer(self) -> Result:
        """How much each task's probe lowers the loss on the others' training rows, which it has not seen."""
        losses = {}
        for name, path in ("base", plan.START), *((task, f"probes/{task}") for task in self.recipe.tasks):
            model = load_model(self.recipe, self.path(path)).to(self._device())
            losses[name] = measure_losses(model, self.tokenizer, self.calibration, self.recipe)
        base = losses.pop("base")
        transfer = {
            helper: {task: base[task] - loss for task, loss in measured.items() if task != helper}
            for helper, measured in losses.items()
        }
        on_main(lambda: write_json(self.folder / "transfer.json", transfer))
        return {"transfer": transfer}

    def groups(self) -> Result:
        """Stage 2: join tasks whose cores overlap, and order the groups."""
        return on_main(lambda: _with_warnings(self._group))

    def fused(self, groups: Sequence[Sequence[str]], start: str) -> Result:
        """Stage 3: cores transplanted, the rest interpolated."""
        return on_main(lambda: _with_warnings(lambda: self._fuse(groups, start)))

    def copy(self, path: str) -> Result:
        """The result of the method, under its own name."""

        def make() -> Result:
            with complete_folder(self.folder / "final") as folder:
                shutil.copytree(self.folder / path, folder, dirs_exist_ok=True)
            return {}

        return on_main(make)

    def merge(self, method: str, path: str) -> Result:
        """The probes merged by an ordinary method."""
        settings = {} if method == "linear" else {"density": self.recipe.baselines.density}

        def make() -> Result:
            merge_baseline(
                {task: self.folder / "probes" / task for task in self.recipe.tasks},
                method,
                pretrained=self.folder / plan.START,
                output=self.folder / path,
                seed=self.recipe.seed,
                **settings,
            )
            return {}

        return on_main(make)

    def report(self) -> Result:
        """The report of everything."""

        def make() -> Result:
            folder = self.folder / "report"
            write_report(gather(self.folder), folder, picture=self.recipe.report.picture)
            return {}

        return on_main(make)

    def doubts(self) -> list[str]:
        """What is surprising about the rows, and about what is said of them."""
        limits = (self.recipe, self.data, self.tokenizer, self.max_length("probe"))
        return [
            *rows.check_held_out(self.data),
            *rows.check_cuts(*limits),
            *rows.check_positions(*limits, count_positions(self.recipe)),
            *check_lengths(self.recipe, self.data, self.tokenizer),
            *circles(self.recipe.grouping.helps),
        ]

    def lengths(self, task: str, settings: str, *, calibration: bool = False) -> list[int]:
        """Tokens of the rows of a task that a stage of these settings trains on."""
        key = (task, self.max_length(settings), calibration)
        if key not in self._lengths:
            source = self.calibration[task] if calibration else self.data[task].train
            self._lengths[key] = rows.training_lengths(source, self.tokenizer, key[1])
        return self._lengths[key]

    def path(self, path: str) -> Path:
        """Where a step's result is; an absolute path, as of the user's own start, stays what it is."""
        return self.folder / path

    def max_length(self, stage: str) -> int | None:
        """Tokens after which a stage's training cuts a row."""
        return setting(self.settings[stage], "max_length")

    def _describe_tasks(self) -> dict[str, dict[str, int]]:
        described = {}
        for task in self.data:
            lengths, limit = self.lengths(task, "probe"), self.recipe.evaluation.max_length
            # The loss of a completion that begins beyond the limit does not count; other metrics score every row.
            by_loss = self.recipe.tasks[task].metric == "loss"
            scored = rows.count_begun(self.data[task].test, self.tokenizer, limit if by_loss else None)
            say(f"task {task}: {len(lengths)} rows to train on, {scored} to score on")
            described[task] = {"train_rows": len(lengths), "test_rows": scored, "train_tokens": sum(lengths)}
        return described

    def _epochs(self) -> float:
        """Epochs over all tasks in which a baseline sees as many tokens as all trainings of the method together."""
        method = [result for path, result in self.steps.results.items() if path.startswith(plan.TRAINED)]
        budget = sum(result["tokens"] for result in method if "tokens" in result)
        return budget / sum(sum(self.lengths(task, "baselines")) for task in self.data)

    def _region(self, tuned: str, base: str, file: str, name: str) -> Result:
        def make() -> Result:
            core = self.recipe.core
            region = find_core_region(
                self.folder / tuned,
                self.path(base),
                importance=self.folder / tuned / IMPORTANCE if plan.by_second_moment(self.recipe) else None,
                percent=core.percent,
                scope=core.scope,
                exclude=core.exclude,
                coordinates="own" if fuses_by_coordinate(self.recipe) else "delta",
            )
            region.save(self.folder / file)
            print(f"{name}: {len(region)} of {region.total} coordinates", flush=True)
            return {"size": len(region), "total": region.total}

        return on_main(lambda: _with_warnings(make))

    def _group(self) -> Result:
        recipe, tasks = self.recipe.grouping, list(self.recipe.tasks)
        cores = {task: CoreRegion.load(self.folder / core_file(task)) for task in tasks}
        matrix = jaccard_matrix(cores)
        found = group_tasks(cores, recipe.threshold)
        if isinstance(recipe.order, list):
            groups = recipe.order
        else:
            helps = recipe.helps
            if helps == "measured":
                helps = measured_helps(self.steps.results["transfer.json"]["transfer"], found)
            groups = order_groups(
                found,
                recipe.order,
                seed=self.recipe.seed,
                losses={task: self.steps.results[f"probes/{task}"]["loss"] for task in tasks},
                overlap={task: dict(zip(tasks, row, strict=True)) for task, row in zip(tasks, matrix, strict=True)},
                helps=helps,
            )
        content = {"tasks": tasks, "jaccard": matrix, "threshold": recipe.threshold, "groups": groups}
        write_json(self.folder / "groups.json", content)
        warned = _warn_of_groups(groups, matrix, recipe, self.recipe.integration.schedule)
        print(f"groups in order: {', '.join(' + '.join(group) for group in groups)}", flush=True)
        return {**content, "warnings": warned}

    def _fuse(self, groups: Sequence[Sequence[str]], start: str) -> Result:
        recipe = self.recipe.fusion
        order = [task for group in groups for task in group]
        report = fuse(
            {task: self.folder / "probes" / task for task in order},
            {task: self.folder / core_file(task) for task in order},
            start=self.path(start),
            pretrained=self.folder / plan.START,
            output=self.folder / "fused",
            weights=None if recipe.omega is not None else {task: self.recipe.tasks[task].weight for task in order},
            start_weight=recipe.start_weight,
            omega=recipe.omega,
            conflict=recipe.conflict,
            space=recipe.space,
            merged=not fuses_by_coordinate(self.recipe),
        )
        print(
            f"fused: {report.core} coordinates transplanted ({report.conflicts} in several cores), "
            f"{report.linear_folds} of {report.folds} interpolations linear",
            flush=True,
        )
        return {key: value for key, value in report.to_dict().items() if key != "tensors"}

    def _device(self) -> torch.device:
        use_cpu = (machine_settings() | self.settings["probe"]).get("use_cpu")
        return torch.device("cpu") if use_cpu else PartialState().device


def _announce(count: int, fields: Mapping[str, Any], frozen: int) -> str:
    """What a training is about to do, in words."""
    length = setting(fields, "max_steps")
    length = f"{length} steps" if length > 0 else f"{setting(fields, 'num_train_epochs'):.4g} epochs"
    batch = setting(fields, "per_device_train_batch_size") * setting(fields, "gradient_accumulation_steps")
    batch *= PartialState().num_processes
    held = f", {frozen} core region{'s' * (frozen > 1)} frozen" if frozen else ""
    return f"{count} rows, {length} of {batch} a step, learning rate {setting(fields, 'learning_rate'):g}{held}"


def _claim(checkpoints: Path, made_from: Mapping[str, Any]) -> None:
    """Keep a folder of checkpoints if they are of this very training, and empty it otherwise."""
    note = checkpoints / "made_from.json"
    made_from = json.loads(json.dumps(made_from, default=str))
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_from:
        return
    remove(checkpoints)
    write_json(note, made_from)


def _warn_of_groups(
    groups: Sequence[Sequence[str]], jaccard: Sequence[Sequence[float]], grouping: Grouping, schedule: str
) -> list[str]:
    others = [value for i, row in enumerate(jaccard) for j, value in enumerate(row) if i != j]
    if others and not any(others):
        return ["no two tasks share a single core coordinate"]
    if others and len(groups) == 1 and schedule == "staged":
        cure = f"raise grouping.threshold (the overlaps go from {min(others):.3g} to {max(others):.3g})"
        at = f" at threshold {grouping.threshold:g}"
        if isinstance(grouping.order, list):
            cure, at = "list more groups in grouping.order", ""
        return [f"all tasks are in one group{at}: a staged integration freezes nothing; {cure}"]
    return []


def _with_warnings(make: Callable[[], Result]) -> Result:
    """What a function returns, with our warnings in it, so that they are kept."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = make()
    kept = []
    for one in caught:
        if issubclass(one.category, NoEffectWarning | MismatchWarning):
            kept.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return {**result, "warnings": [*result.get("warnings", []), *kept]}
