"""What a run trains, in order: which tasks, from which start, around which frozen cores. Pure: no files, no models."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_cpift.recipe.tree import Recipe

START = "start"
TRAINED = ("probes/", "multi_stage/", "stages/")
"""Where the trainings of the method itself are; those of the baselines are elsewhere."""
OWN_STARTS = ("multi_stage", "last_probe", "pretrained")
"""Starts of the fusion that the run makes by itself."""


@dataclass(frozen=True)
class Stage:
    """One training."""

    path: str
    """The folder that it makes, in the run's."""
    name: str
    """What the report calls its model."""
    settings: str
    """Whose SFTConfig fields it takes: one of `settings.STAGES`."""
    tasks: tuple[str, ...]
    start: str
    """The folder that it starts from, in the run's or elsewhere."""
    frozen: tuple[str, ...] = ()
    """Files of core regions, in the run's folder."""
    calibration: bool = False
    """Whether it sees the small balanced set of each task rather than all rows."""
    region: str | None = None
    """Where its own core region is kept, if later stages freeze that."""
    importance: bool = False
    """Whether its core region is found by the optimizer's second moment, which is then kept beside its model."""


@dataclass(frozen=True)
class Method:
    """Stages that are trained one after another, and what their method is called."""

    name: str
    start: str
    """Name of the model that they start from."""
    stages: tuple[Stage, ...]


def core_file(task: str) -> str:
    """A task's core region, in the run's folder."""
    return f"cores/{task}.safetensors"


def by_second_moment(recipe: Recipe) -> bool:
    """Whether cores are found by the optimizer's second moment rather than the update."""
    return recipe.core.importance == "second_moment"


def probes(recipe: Recipe) -> list[Stage]:
    """Stage 1 of the method: every task alone, from the same start."""
    return [
        Stage(f"probes/{task}", f"probe {task}", "probe", (task,), START, importance=by_second_moment(recipe))
        for task in recipe.tasks
    ]


def multi_stage(groups: Sequence[Sequence[str]]) -> list[Stage]:
    """Stage 3, the paper's start of the fusion: plain fine-tuning over the groups in their order."""
    return _chain(groups, "multi_stage", "multi-stage", "multi_stage", START)


def integration(recipe: Recipe, groups: Sequence[Sequence[str]]) -> list[Stage]:
    """Stage 4: fine-tuning of the fused parameters, with cores frozen."""
    settings = recipe.integration
    if settings.schedule == "none":
        return []
    if settings.schedule == "mixed":
        tasks = tuple(task for group in groups for task in group)
        cores = tuple(core_file(task) for task in tasks)
        path = f"stages/{_folder(1, tasks)}"
        return [Stage(path, "final", "integration", tasks, "fused", cores, calibration=True)]
    stages: list[Stage] = []
    frozen: tuple[str, ...] = ()
    for number, stage in enumerate(_chain(groups, "stages", "stage", "integration", "fused"), 1):
        last = number == len(groups)
        name = "final" if last else stage.name
        region = f"regions/{number:02d}.safetensors" if settings.dynamic_regions and not last else None
        importance = region is not None and by_second_moment(recipe)
        stages.append(replace(stage, name=name, frozen=frozen, calibration=True, region=region, importance=importance))
        frozen += (*map(core_file, stage.tasks), *([region] if region else []))
    return stages


def fusion_start(recipe: Recipe, groups: Sequence[Sequence[str]]) -> str:
    """The folder of theta_base: in the run's, or the user's own as an absolute path."""
    start = recipe.fusion.start
    named = {"multi_stage": lambda: multi_stage(groups)[-1].path, "pretrained": lambda: START}
    named["last_probe"] = lambda: f"probes/{groups[-1][-1]}"
    return named[start]() if start in named else os.path.abspath(start)


def result(recipe: Recipe, groups: Sequence[Sequence[str]]) -> str:
    """The folder whose parameters are the method's result."""
    return integration(recipe, groups)[-1].path if recipe.integration.schedule != "none" else "fused"


def baselines(recipe: Recipe) -> list[Method]:
    """The fine-tunings to compare with."""
    settings, tasks = recipe.baselines, list(recipe.tasks)
    found = []
    if settings.multi_task:
        stage = Stage("baselines/multi_task", "multi-task", "baselines", tuple(tasks), START)
        found.append(Method("multi-task", "base", (stage,)))
    for kind, groups in (
        ("random", settings.random_stages and deal(tasks, settings.random_stages, recipe.seed)),
        ("heuristic", settings.heuristic_stages),
    ):
        if groups:
            stages = _chain(groups, f"baselines/{kind}", f"{kind} stage", "baselines", START)
            found.append(Method(f"multi-stage {kind}", "base", tuple(stages)))
    return found


def merge_folder(method: str) -> str:
    """The folder of the probes merged by an ordinary method."""
    return f"baselines/merge_{method}"


def deal(tasks: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Tasks in random order, dealt into so many stages of sizes as equal as can be.

    Example:
        >>> [len(stage) for stage in deal(["a", "b", "c", "d", "e"], 3, seed=0)]
        [2, 2, 1]
    """
    shuffled = list(tasks)
    random.Random(seed).shuffle(shuffled)
    return [shuffled[number::count] for number in range(count)]


def _chain(groups: Sequence[Sequence[str]], folder: str, name: str, settings: str, start: str) -> list[Stage]:
    stages = []
    for number, group in enumerate(groups, 1):
        path = f"{folder}/{_folder(number, group)}"
        stages.append(Stage(path, f"{name} {number}/{len(groups)}", settings, tuple(group), start))
        start = path
    return stages


def _folder(number: int, group: Sequence[str]) -> str:
    """A folder's name, of bounded length however many tasks are in the group."""
    return f"{number:02d}-{'+'.join(group)[:80]}"
