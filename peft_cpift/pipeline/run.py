"""The stages of a run, one after another, and the folder that they fill.

RUN/recipe.yaml              the recipe as resolved
RUN/start/                   theta_0
RUN/probes/<task>/           stage 1: fine-tuned on one task each
RUN/cores/<task>.safetensors the core regions found in them
RUN/groups.json              stage 2: overlaps, groups and their order
RUN/multi_stage/NN-<group>/  stage 3: plain fine-tuning over the groups, the fusion's start
RUN/fused/                   stage 3: the fused parameters
RUN/stages/NN-<group>/       stage 4: fine-tuned group by group, earlier cores frozen
RUN/regions/NN.safetensors   stage 4: a stage's own core region, where that is frozen too
RUN/final/                   the result
RUN/baselines/               for comparison, as many tokens each
RUN/report/                  index.html, report.md, report.json, report.png
RUN/steps/                   a note for each of these, written last: what is done
RUN/checkpoints/             the Trainer's, of a training that is not done
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from peft_cpift.checkpoint import Checkpoint, complete_file
from peft_cpift.checkpoint.writer import remove_leftovers
from peft_cpift.core.importance import FILE as IMPORTANCE
from peft_cpift.core.search import CoreSearch
from peft_cpift.data import tasks as rows
from peft_cpift.errors import CpiftError
from peft_cpift.evaluation.evaluate import check_metrics
from peft_cpift.evaluation.harness import check_harness
from peft_cpift.fusion.inputs import open_merged, open_own
from peft_cpift.pipeline import plan
from peft_cpift.pipeline.failures import explained
from peft_cpift.pipeline.make import Maker
from peft_cpift.pipeline.models import identify, identify_model, load_tokenizer
from peft_cpift.pipeline.plan import Stage, core_file
from peft_cpift.pipeline.settings import WITHOUT_EFFECT, fuses_by_coordinate, resolve_all, resolve_tuner, setting
from peft_cpift.pipeline.steps import Step, Steps
from peft_cpift.processes import on_main, say
from peft_cpift.recipe.reading import write_recipe
from peft_cpift.recipe.tree import Recipe

STAGES = ("probe", "core", "group", "fuse", "integrate", "baselines", "report")
"""The stages of the command line, in order."""


def run(recipe: Recipe, *, stop_after: str | None = None, begin: str | None = None, redo: bool = False) -> Path:
    """Do what a recipe says, or what is left of it, in its folder, `recipe.output`.

    Everything that can be checked is checked before a model is loaded: settings, data, the tokenizer, the output, and
    whether what is done there was made as the recipe says. All processes of a distributed run call this together.

    Args:
        stop_after: the last of `STAGES` to do.
        begin: the first of `STAGES` to do again, with all that follow; what is before it is done only if it is not.
        redo: do again what was made otherwise than the recipe now says.

    Returns:
        The run's folder.

    Raises:
        CpiftError: the recipe, its data or its model cannot be used, earlier steps were made otherwise, or a training
            diverged.
    """
    return Run(recipe).run(stop_after=stop_after, begin=begin, redo=redo)


def probe(recipe: Recipe, task: str) -> Path:
    """Do one task's probe alone, with its scores and its core, as one job of many; return its folder. See `run`."""
    return Run(recipe).probe(task)


class Run:
    """A recipe's steps: which there are, and what each depends on."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = recipe.output
        self.tuner = resolve_tuner(recipe)
        self.settings = resolve_all(recipe, self.tuner)
        on_main(lambda: _check_files(recipe))  # alone: it looks at the folder that it then fills
        check_metrics(recipe)
        if recipe.evaluation.lm_eval is not None:
            check_harness(recipe.evaluation.lm_eval)
        self.tokenizer = load_tokenizer(recipe)
        self.model_files = identify_model(recipe)
        self.data = rows.load_tasks(recipe, self.tokenizer)
        limits = [setting(fields, "max_length") for fields in self.settings.values()]
        shortest = min((limit for limit in limits if limit is not None), default=None)
        rows.check_tokens(recipe, self.data, self.tokenizer, shortest)
        self.steps = Steps(self.folder)
        self.maker = Maker(recipe, self.tuner, self.settings, self.tokenizer, self.data, self.steps)

    def run(self, *, stop_after: str | None = None, begin: str | None = None, redo: bool = False) -> Path:
        """See `run`."""
        last = STAGES.index(stop_after or STAGES[-1])
        if begin is not None and STAGES.index(begin) > last:
            raise CpiftError(
                f"nothing to do from '{begin}' on if the run stops after '{stop_after}': give one of them"
            )
        on_main(lambda: self._prepare(begin, redo))
        first, *others = self._before_groups()
        self._do([first])
        on_main(self._check_core)
        on_main(self._check_fusion_start)
        if not self._do(others, last):
            return self.folder
        self._do(self._after_groups(self.steps.results["groups.json"]["groups"]), last)
        return self.folder

    def probe(self, task: str) -> Path:
        """See `probe`."""
        if task not in self.recipe.tasks:
            raise CpiftError(f"the recipe has no task '{task}': it has {', '.join(self.recipe.tasks)}")
        wanted = {plan.START, f"probes/{task}", f"scores/probes/{task}", core_file(task)}
        steps = [step for step in self._before_groups() if step.path in wanted]

        def prepare() -> None:
            self._check_stale(self.steps.stale(steps))
            self._write_recipe()

        on_main(prepare)
        self._do(steps[:1])
        on_main(self._check_core)
        self._do(steps[1:])
        return self.folder / "probes" / task

    def known_steps(self) -> list[Step]:
        """The steps of the run, as far as they are known: those after the groups only once these are."""
        steps = self._before_groups()
        groups = self.steps.read("groups.json")
        if groups is None or "groups.json" in self.steps.stale(steps):
            return steps
        return steps + self._after_groups(groups["result"]["groups"])

    def stale(self) -> dict[str, str]:
        """What is done in the run's folder, but otherwise than the recipe now says, and why."""
        steps = self.known_steps()
        stale, known = self.steps.stale(steps), {step.path for step in steps}
        open_stages = () if "report" in known else STAGES[STAGES.index("group") + 1 :]
        for path, note in self.steps.notes().items():
            if path not in known:
                later = note["stage"] in open_stages
                stale[path] = "after groups.json" if later else "the recipe has it no longer"
        return stale

    def _do(self, steps: Sequence[Step], last: int = len(STAGES)) -> bool:
        """Do steps up to a stage; whether these were all."""
        for step in steps:
            if STAGES.index(step.stage) > last:
                return False
            known = self.steps.read(step.path)
            with explained(step.path):
                result = self.steps.run(step)
            for text in result.get("warnings", []) if known is None else ():
                say(f"warning: {text}")
        return True

    def _prepare(self, begin: str | None, redo: bool) -> None:
        """Find what was made otherwise, remove what is to be done again, and keep the recipe."""
        again: list[str] = []
        if begin is not None:
            stages = STAGES[STAGES.index(begin) :]
            done = [path for path, note in self.steps.notes().items() if note["stage"] in stages]
            begun = [step.path for step in self.known_steps() if step.stage in stages]
            again = list(dict.fromkeys([*done, *begun]))
        stale = {path: reason for path, reason in self.stale().items() if path not in again}
        if not redo:
            self._check_stale(stale)
        for path, reason in stale.items():
            say(f"to do again: {path} ({reason})")
        self.steps.forget([*again, *stale])
        self._write_recipe()

    def _check_stale(self, stale: dict[str, str]) -> None:
        if stale:
            raise CpiftError(
                f"{self.folder} was made otherwise than the recipe now says: {summarise(stale)}; add --redo to make "
                "these steps again, or choose another output"
            )

    def _check_core(self) -> None:
        """Raise CpiftError if no core can come of the recipe: before the probes in which it would be looked for."""
        core, start = self.recipe.core, self.folder / plan.START
        if not fuses_by_coordinate(self.recipe):
            return  # what an adapter of another kind adds to the weights is known only once it is trained
        try:
            search = CoreSearch(start, start, percent=core.percent, scope=core.scope, exclude=core.exclude)
        except CpiftError as error:
            raise CpiftError(f"'core.exclude': {error}") from error
        if not search.wanted:
            raise CpiftError(
                f"'core.percent' is {core.percent:g}, which of {search.total:,} coordinates is less than one: raise it"
            )

    def _check_fusion_start(self) -> None:
        """Raise CpiftError if the user's own start of the fusion has other tensors than theta_0."""
        start = self.recipe.fusion.start
        if start in plan.OWN_STARTS:
            return
        opened = open_own if fuses_by_coordinate(self.recipe) else partial(open_merged, base=None)
        try:
            opened(start, {}, self.folder / plan.START)
        except CpiftError as error:
            raise CpiftError(f"'fusion.start' {start} does not fit: {error}") from error

    def _write_recipe(self) -> None:
        # One job at a time; the lock is in `steps`, which tells a run's folder from others, so it is there first.
        with self.steps.lock("recipe.yaml"):
            remove_leftovers(self.folder / "recipe.yaml")
            with complete_file(self.folder / "recipe.yaml") as file:
                file.write_text(write_recipe(self.recipe), encoding="utf-8")

    def _before_groups(self) -> list[Step]:
        recipe, maker = self.recipe, self.maker
        keys = ("model", "revision", "dtype", "tuner", "seed")
        settings = {key: getattr(recipe, key) for key in keys} | {"model_files": self.model_files}
        settings["chat_template"] = (
            recipe.chat_template and self.tokenizer.chat_template
        )  # that of a file as it is now
        steps = [
            Step(plan.START, "probe", maker.start, settings),
            Step("tasks", "probe", maker.tasks, self._tasks_settings(), leaves_file=False),
            self._scored("base", plan.START, "probe", harness=True),
        ]
        probes = plan.probes(recipe)
        for stage in probes:
            steps += self._trained(stage, "probe")
        for task, stage in zip(recipe.tasks, probes, strict=True):
            make = partial(maker.core, task)
            steps.append(Step(core_file(task), "core", make, self._core_settings(), (stage.path, plan.START)))
        after = tuple(core_file(task) for task in recipe.tasks)
        if recipe.grouping.order == "difficulty":
            after += tuple(stage.path for stage in probes)
        if recipe.grouping.helps == "measured":
            settings = {"rows": self._rows(recipe.tasks), "evaluation": dataclasses.asdict(recipe.evaluation)}
            settings["calibration_fraction"] = recipe.integration.calibration_fraction
            paths = (plan.START, *(stage.path for stage in probes))
            steps.append(Step("transfer.json", "group", maker.transfer, settings, paths))
            after += ("transfer.json",)
        settings = {**dataclasses.asdict(recipe.grouping), "seed": recipe.seed, "tasks": list(recipe.tasks)}
        return [*steps, Step("groups.json", "group", maker.groups, settings, after)]

    def _after_groups(self, groups: list[list[str]]) -> list[Step]:
        recipe, maker = self.recipe, self.maker
        trainings = plan.probes(recipe)
        steps = []
        if recipe.fusion.start == "multi_stage":
            for stage in plan.multi_stage(groups):
                steps += self._trained(stage, "fuse", ("groups.json",))
                trainings.append(stage)
        steps += self._fused(groups)
        result = plan.result(recipe, groups)
        for stage in plan.integration(recipe, groups):
            steps += self._trained(stage, "integrate", ("groups.json",), harness=stage.path == result)
            trainings.append(stage)
            if stage.region:
                make, after = partial(maker.region, stage), (stage.path, stage.start)
                steps.append(Step(stage.region, "integrate", make, self._core_settings(), after))
        steps.append(Step("final", "integrate", partial(maker.copy, result), {}, (result,)))
        budget = tuple(stage.path for stage in trainings)
        for method in plan.baselines(recipe):
            for stage in method.stages:
                steps += self._trained(stage, "baselines", budget, harness=stage is method.stages[-1])
        for name in recipe.baselines.merge:
            path, settings = plan.merge_folder(name), {"density": recipe.baselines.density, "seed": recipe.seed}
            settings["tasks"] = list(recipe.tasks)
            after = (plan.START, *(f"probes/{task}" for task in recipe.tasks))
            steps.append(Step(path, "baselines", partial(maker.merge, name, path), settings, after))
            steps.append(self._scored(f"merge {name}", path, "baselines", harness=True))
        after = tuple(step.path for step in [*self._before_groups(), *steps])
        return [*steps, Step("report", "report", maker.report, dataclasses.asdict(recipe.report), after)]

    def _fused(self, groups: list[list[str]]) -> list[Step]:
        recipe, start = self.recipe, plan.fusion_start(self.recipe, groups)
        order = [task for group in groups for task in group]
        settings = {key: value for key, value in dataclasses.asdict(recipe.fusion).items() if key != "training"}
        settings["start_digest"] = identify(start) if os.path.isabs(start) else None
        settings["weights"] = {task: recipe.tasks[task].weight for task in order}
        inputs = [plan.START, *(f"probes/{task}" for task in order), *map(core_file, order)]
        own = () if os.path.isabs(start) else (start,)
        after = tuple(dict.fromkeys(["groups.json", *inputs, *own]))
        make = partial(self.maker.fused, groups, start)
        result = plan.result(recipe, groups) == "fused"
        return [Step("fused", "fuse", make, settings, after), self._scored("fused", "fused", "fuse", harness=result)]

    def _trained(self, stage: Stage, part: str, others: tuple[str, ...] = (), *, harness: bool = False) -> list[Step]:
        """A training, and its model's scores."""
        fields = {key: value for key, value in self.settings[stage.settings].items() if key not in WITHOUT_EFFECT}
        settings = {"training": fields, "rows": self._rows(stage.tasks), "seed": self.recipe.seed}
        settings["tasks"] = list(stage.tasks)  # their order is that of the rows before they are shuffled
        if stage.calibration:
            settings["calibration_rows"] = [len(self.maker.calibration[task]) for task in stage.tasks]
        after = tuple(dict.fromkeys((stage.start, *stage.frozen, *others)))

        def make() -> dict[str, Any]:
            made_from = {"settings": settings, "after": {path: self.steps.read(path)["id"] for path in after}}
            return self.maker.training(stage, made_from)

        scores = self._scored(stage.name, stage.path, part, harness=harness)
        holds = (IMPORTANCE,) if stage.importance else ()
        return [Step(stage.path, part, make, settings, after, holds=holds), scores]

    def _scored(self, name: str, path: str, part: str, *, harness: bool = False) -> Step:
        keys = ("metric", "answer", "choices", "language")
        tasks = {name: {key: getattr(task, key) for key in keys} for name, task in self.recipe.tasks.items()}
        rows = {name: data.test_digest for name, data in self.data.items()}
        evaluation = dataclasses.asdict(self.recipe.evaluation)
        if not harness:
            del evaluation["lm_eval"]
        settings = {"evaluation": evaluation, "tasks": tasks, "rows": rows}
        make = partial(self.maker.scores, name, path, harness=harness)
        return Step(f"scores/{path}", part, make, settings, (path,), leaves_file=False)

    def _tasks_settings(self) -> dict[str, Any]:
        test_rows = {task: data.test_digest for task, data in self.data.items()}
        rows = {"train_rows": self._rows(self.recipe.tasks), "test_rows": test_rows}
        return {**rows, "max_length": self.maker.max_length("probe"), "tasks": list(self.recipe.tasks)}

    def _rows(self, tasks: Sequence[str]) -> dict[str, str]:
        return {task: self.data[task].train_digest for task in tasks}

    def _core_settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.recipe.core)
        if not plan.by_second_moment(self.recipe):
            del settings["importance"]  # notes from before there was a choice say nothing of it
        return settings


def summarise(stale: Mapping[str, str]) -> str:
    """Steps that are to be made again: those that differ by themselves with the reason, and how many follow."""
    own = {path: reason for path, reason in stale.items() if not reason.startswith("after ")} or stale
    listed = [f"{path} ({reason})" for path, reason in list(own.items())[:6]]
    more = f", and {len(stale) - len(listed)} that follow" if len(stale) > len(listed) else ""
    return ", ".join(listed) + more


def _check_files(recipe: Recipe) -> None:
    """Raise CpiftError if the output is something else than a run, or what is needed beside the model is missing."""
    folder = recipe.output
    if folder.exists() and not folder.is_dir():
        raise CpiftError(f"{folder} is not a folder: choose another output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "steps").is_dir():
        raise CpiftError(f"{folder} holds something else than a run: choose another output")
    if recipe.report.picture and importlib.util.find_spec("matplotlib") is None:
        raise CpiftError(
            "the report's picture needs matplotlib: pip install 'peft-cpift[report]', or set report.picture=false"
        )
    if recipe.push is not None and get_token() is None:
        raise CpiftError(f"pushing to '{recipe.push.repository}' needs a login: run `hf auth login`, or take push out")
    if (
        recipe.push is not None
        and recipe.tuner != "full"
        and fuses_by_coordinate(recipe)  # else the adapters are fused into the model's own weights
        and Path(recipe.model).is_dir()
        and not recipe.push.base_model
    ):
        raise CpiftError(
            f"an adapter on the Hub must name its model there, and {recipe.model} is a folder: give push.base_model"
        )
    start = recipe.fusion.start
    if start not in plan.OWN_STARTS:
        if not Path(start).is_dir():
            raise CpiftError(f"fusion.start is '{start}': use {', '.join(plan.OWN_STARTS)}, or an existing folder")
        Checkpoint(start)
