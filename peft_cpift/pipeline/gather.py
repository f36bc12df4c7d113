"""The content of a run's report, gathered from the notes of its steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from peft_cpift.core import CoreRegion
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.fuse import REPORT
from peft_cpift.pipeline import plan
from peft_cpift.pipeline.plan import Method, Stage, core_file
from peft_cpift.pipeline.steps import Steps
from peft_cpift.recipe.reading import read_recipe
from peft_cpift.recipe.tree import Recipe
from peft_cpift.report.page import FORMAT


def gather(folder: Path) -> dict[str, Any]:
    """What `report.write_report` takes, from a run whose steps before the report are all done.

    Raises:
        CpiftError: the folder is not a run's, or a step is missing.
    """
    if not (folder / "recipe.yaml").is_file():
        raise CpiftError(f"{folder} is not the folder of a run: it has no recipe.yaml")
    recipe = read_recipe(folder / "recipe.yaml")
    notes = _Notes(folder)
    start = notes[plan.START]["result"]
    found = notes["groups.json"]["result"]
    groups = found["groups"]
    chains = _chains(recipe, groups)
    trained = [*plan.probes(recipe), *(stage for method in chains for stage in method.stages)]
    merged = [(f"merge {name}", plan.merge_folder(name)) for name in recipe.baselines.merge]
    # As they were made: what is fused comes after its start, and before what is made from it.
    models = {"base": plan.START} | {stage.name: stage.path for stage in trained if not _is_later(stage.path)}
    models |= (
        {"fused": "fused"} | {stage.name: stage.path for stage in trained if _is_later(stage.path)} | dict(merged)
    )
    trainings = {stage.path: notes[stage.path]["result"] for stage in trained}
    cores = {task: CoreRegion.load(folder / core_file(task)) for task in recipe.tasks}
    return {
        "format": FORMAT,
        "recipe": recipe.to_dict(),
        "versions": start["versions"],
        "settings": {stage.settings: _settings(stage, notes) for stage in trained},
        "tasks": notes["tasks"]["result"]["tasks"],
        "parameters": start["parameters"],
        "tensors": {name: math.prod(shape) for name, shape in next(iter(cores.values())).shapes.items()},
        "cores": {
            task: {
                "size": len(core),
                "total": core.total,
                "tensors": {name: core.indices.count(name) for name in core.indices},
            }
            for task, core in cores.items()
        },
        "jaccard": found["jaccard"],
        "groups": groups,
        "fusion": json.loads((folder / "fused" / REPORT).read_text(encoding="utf-8")),
        "transfer": notes["transfer.json"]["result"]["transfer"] if recipe.grouping.helps == "measured" else None,
        "models": [
            {"name": name, **notes[f"scores/{path}"]["result"], "training": trainings.get(path)}
            for name, path in models.items()
        ],
        "sequences": [
            {
                "method": method.name,
                "start": method.start,
                "stages": [{"model": stage.name, "tasks": list(stage.tasks)} for stage in method.stages],
            }
            for method in chains
            if len(method.stages) > 1
        ],
        "methods": [
            {"method": method.name, "model": method.stages[-1].name if method.stages else method.start}
            for method in chains
        ]
        + [{"method": name, "model": name} for name, _ in merged],
        "warnings": notes.warnings(),
    }


class _Notes:
    """The notes of a run; one that is missing is an error."""

    def __init__(self, folder: Path):
        self.folder, self.found = folder, Steps(folder).notes()

    def __getitem__(self, path: str) -> dict[str, Any]:
        if path not in self.found:
            raise CpiftError(f"the run in {self.folder} is not finished, {path} is missing: start cpift run again")
        return self.found[path]

    def warnings(self) -> list[str]:
        return [text for note in self.found.values() for text in note["result"].get("warnings", [])]


def _settings(stage: Stage, notes: _Notes) -> dict[str, Any]:
    """What it was trained with: all that was given, and what counts in any case, as it came to."""
    note = notes[stage.path]
    return {**note["settings"]["training"], **note["result"]["settings"]}


def _chains(recipe: Recipe, groups: list[list[str]]) -> list[Method]:
    """What is compared: the method, the plain fine-tuning that its fusion starts from, and the baselines."""
    own = Method("CPI-FT", "fused", tuple(plan.integration(recipe, groups)))
    plain = [Method("multi-stage", "base", tuple(plan.multi_stage(groups)))]
    return [*(plain if recipe.fusion.start == "multi_stage" else []), own, *plan.baselines(recipe)]


def _is_later(path: str) -> bool:
    """Whether a training comes after the fusion."""
    return path.startswith(("stages/", "baselines/"))
