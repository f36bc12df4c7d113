"""The pipeline's run for a study of many variants: what two of them train or score alike is made once.

Trainings and scores are kept under a digest of all that they depend on: rows, settings, the start's weights and the
frozen cores. A variant whose stages 1 and 2 are those of another then costs its stages 3 and 4 alone. Two processes
that want the same wait for each other.

Two parts of the method can be switched off that no key of a recipe switches off alone: the transplant of the cores and
their freezing. The cores are found and group the tasks as ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_cpift.checkpoint import complete_file, complete_folder
from peft_cpift.checkpoint.writer import write_json
from peft_cpift.core import CoreRegion
from peft_cpift.fusion import fuse
from peft_cpift.importance.callback import FILE as IMPORTANCE
from peft_cpift.pipeline import plan
from peft_cpift.pipeline.gather import gather
from peft_cpift.pipeline.make import Maker
from peft_cpift.pipeline.plan import Stage, core_file
from peft_cpift.pipeline.run import Run
from peft_cpift.pipeline.settings import WITHOUT_EFFECT
from peft_cpift.recipe.tree import Recipe


class Remembering(Maker):
    """The pipeline's maker, with a memory.

    Args:
        memory: a folder that several runs share, of one model and one data set.
        every: whether to score every model; else only the start, what is fused and what ends a method.
        transplant, freeze: whether to do these parts of the method.
    """

    def __init__(self, run: Run, memory: Path, *, every: bool, transplant: bool, freeze: bool) -> None:
        super().__init__(run.recipe, run.tuner, run.settings, run.tokenizer, run.data, run.steps)
        self.memory, self.every, self.transplant, self.freeze = memory, every, transplant, freeze

    def training(self, stage: Stage, made_from: Mapping[str, Any]) -> dict[str, Any]:
        """A fine-tuned model, trained unless another run has trained the very same."""
        if not self.freeze:
            stage = dataclasses.replace(stage, frozen=())
        fields = {key: value for key, value in self.settings[stage.settings].items() if key not in WITHOUT_EFFECT}
        source = self.calibration if stage.calibration else {task: data.train for task, data in self.data.items()}
        content = {
            "fields": fields,
            "epochs": self._epochs() if stage.settings == "baselines" else None,
            "rows": [_digest_text(json.dumps(source[task].to_list())) for task in stage.tasks],
            "alone": stage.settings == "probe",
            "start": digest_weights(self.path(stage.start)),
            "frozen": sorted(_digest_region(self.folder / file) for file in stage.frozen),
            "seed": self.recipe.seed,
        }
        if stage.importance:
            content["importance"] = True
        kept = self.memory / "trainings" / _digest_text(json.dumps(content, sort_keys=True))
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_dir():
                result = super().training(stage, made_from)
                with complete_folder(kept) as folder:
                    shutil.copytree(self.folder / stage.path, folder / "model")
                    write_json(folder / "result.json", result)
                return result
        with complete_folder(self.folder / stage.path) as folder:
            shutil.copytree(kept / "model", folder, dirs_exist_ok=True)
        return json.loads((kept / "result.json").read_text(encoding="utf-8"))

    def scores(self, name: str, path: str, *, harness: bool = False) -> dict[str, Any]:
        """A model's scores, unless another run has scored the very same; none of a model that nobody asks for."""
        number, found, count = name.rpartition(" ")[2].partition("/")
        ends = name in ("base", "fused", "final") or (found and number == count) or (not found and "baselines" in path)
        if not (self.every or ends):
            return {"scores": {}, "average": None, "lm_eval": None}
        content = {
            "weights": digest_weights(self.path(path)),
            "rows": {task: data.test_digest for task, data in self.data.items()},
            "evaluation": dataclasses.asdict(self.recipe.evaluation),
            "tasks": {task: [one.metric, one.answer, one.choices] for task, one in self.recipe.tasks.items()},
        }
        kept = self.memory / "scores" / f"{_digest_text(json.dumps(content, sort_keys=True, default=str))}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):
            if not kept.is_file():
                result = super().scores(name, path, harness=harness)
                with complete_file(kept) as file:
                    file.write_text(json.dumps(result), encoding="utf-8")
        return json.loads(kept.read_text(encoding="utf-8"))

    def fused(self, groups: Sequence[Sequence[str]], start: str) -> dict[str, Any]:
        """The fused model; without the transplant all cores are empty, and everything is interpolated."""
        if self.transplant:
            return super().fused(groups, start)
        recipe, order = self.recipe.fusion, [task for group in groups for task in group]
        report = fuse(
            {task: self.folder / "probes" / task for task in order},
            {task: dataclasses.replace(CoreRegion.load(self.folder / core_file(task)), indices={}) for task in order},
            start=self.path(start),
            pretrained=self.folder / plan.START,
            output=self.folder / "fused",
            weights=None if recipe.omega is not None else {task: self.recipe.tasks[task].weight for task in order},
            start_weight=recipe.start_weight,
            omega=recipe.omega,
            conflict=recipe.conflict,
            space=recipe.space,
        )
        return {key: value for key, value in report.to_dict().items() if key != "tensors"}


def run_remembering(
    recipe: Recipe, memory: Path, *, every: bool = False, transplant: bool = True, freeze: bool = True
) -> Run:
    """Do what a recipe says up to its baselines, in its folder. See `Remembering`."""
    run = Run(recipe)
    run.maker = Remembering(run, memory, every=every, transplant=transplant, freeze=freeze)
    run.run(stop_after="baselines")
    return run


def summarise(run: Run) -> dict[str, Any]:
    """What a run came to, in numbers that JSON takes: its groups, every scored model, and what each method cost.

    A method's cost is that of all trainings behind its model; of the merged probes, of the probes.
    """
    content = gather(run.folder)
    models, trainings = {}, {}
    for model in content["models"]:
        training = model["training"] or {}
        kept = {key: training[key] for key in ("tokens", "seconds", "steps", "loss", "frozen") if training}
        trainings[model["name"]] = kept
        if model["scores"]:
            models[model["name"]] = {"average": model["average"], "scores": model["scores"], **kept}
    groups = content["groups"]
    probes = [stage.name for stage in plan.probes(run.recipe)]
    multi_stage = (
        [stage.name for stage in plan.multi_stage(groups)] if run.recipe.fusion.start == "multi_stage" else []
    )
    behind = {"multi-stage": multi_stage, "fused": [*probes, *multi_stage]}
    behind["CPI-FT"] = [*behind["fused"], *(stage.name for stage in plan.integration(run.recipe, groups))]
    behind |= {method.name: [stage.name for stage in method.stages] for method in plan.baselines(run.recipe)}
    behind |= {f"merge {name}": probes for name in run.recipe.baselines.merge}
    ends = {method["method"]: method["model"] for method in content["methods"]} | {"fused": "fused"}
    methods = {
        method: {
            "model": end,
            **{key: sum(trainings[name][key] for name in behind[method]) for key in ("tokens", "seconds", "steps")},
        }
        for method, end in ends.items()
    }
    fusion = {
        key: value for key, value in run.steps.read("fused")["result"].items() if isinstance(value, (int, float))
    }
    return {
        "groups": groups,
        "jaccard": content["jaccard"],
        "fusion": fusion,
        "models": models,
        "methods": methods,
        "warnings": content["warnings"],
    }


def digest_weights(folder: Path) -> str:
    """Of all bytes of a model's or adapter's weights."""
    digest = hashlib.sha256()
    for file in sorted(set(folder.glob("*.safetensors")) - {folder / IMPORTANCE}):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _digest_region(file: Path) -> str:
    """Of which coordinates a region has; what its file says of where they come from does not count."""
    digest = hashlib.sha256()
    region = CoreRegion.load(file)
    for name in sorted(region.indices):
        digest.update(name.encode() + region.indices[name].long().numpy().tobytes())
    return digest.hexdigest()


def _digest_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
