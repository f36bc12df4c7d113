"""What a run would do: its trainings with their rows, tokens and steps, without loading a model."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from peft_cpift.pipeline import plan
from peft_cpift.pipeline.models import count_parameters
from peft_cpift.pipeline.plan import Stage
from peft_cpift.pipeline.run import Run, summarise
from peft_cpift.pipeline.settings import setting


def describe(run: Run) -> dict[str, Any]:
    """The plan of a run as plain values.

    As long as the groups are not known, the tasks stand in one stage of what goes group by group: all groups together
    see as many rows.

    Raises:
        CpiftError: the tuner does not fit the model.
    """
    recipe = run.recipe
    parameters = count_parameters(recipe, run.tuner)
    stale = run.stale()
    found = None if "groups.json" in stale else run.steps.read("groups.json")
    order = recipe.grouping.order
    groups = order if isinstance(order, list) else found["result"]["groups"] if found else None
    trainings = _trainings(run, groups or [list(recipe.tasks)])
    alone = trainings if groups else _trainings(run, [[task] for task in recipe.tasks])
    return {
        "output": str(run.folder),
        "parameters": parameters,
        "core": math.floor(recipe.core.percent * parameters["trainable"] / 100),
        "groups": groups,
        "trainings": trainings,
        "tokens": sum(training["tokens"] for training in trainings),
        "most_tokens": sum(training["tokens"] for training in alone),
        "done": list(run.steps.notes()),
        "stale": stale,
        "warnings": run.maker.doubts(),
    }


def in_words(content: dict[str, Any]) -> str:
    """The plan as a table."""
    trained, total = content["parameters"]["trainable"], content["parameters"]["total"]
    lines = [
        f"{trained:,} of {total:,} parameters are trained; a core has at most {content['core']:,}",
        f"{'training':28} {'rows':>8} {'tokens':>12} {'steps':>8} {'rows a step':>12} {'learning rate':>14}",
    ]
    for one in content["trainings"]:
        if "rows" in one:
            cells = f"{one['rows']:>8,} {one['tokens']:>12,} {one['steps']:>8,} {one['batch']:>12} {one['rate']:>14g}"
        else:
            cells = f"{'':>8} {one['tokens']:>12,}"
        lines.append(f"{one['name']:28} {cells}")
    lines.append(f"{'together':28} {'':>8} {content['tokens']:>12,}")
    if content["groups"] is None:
        lines.append(
            "the groups follow from the probes; until then all tasks stand in one stage: with a group for every task "
            f"it would be {content['most_tokens']:,} tokens"
        )
    if content["done"]:
        lines.append(f"{len(content['done'])} steps are done in {content['output']}")
    if content["stale"]:
        lines.append(f"made otherwise than the recipe says: {summarise(content['stale'])}")
    lines += [f"warning: {text}" for text in content["warnings"]]
    return "\n".join(lines)


def _trainings(run: Run, groups: list[list[str]]) -> list[dict[str, Any]]:
    recipe = run.recipe
    stages = plan.probes(recipe)
    if recipe.fusion.start == "multi_stage":
        stages += plan.multi_stage(groups)
    stages += plan.integration(recipe, groups)
    trainings = [_describe(run, stage) for stage in stages]
    budget = sum(training["tokens"] for training in trainings)
    for method in plan.baselines(recipe):
        trainings.append({"name": method.name, "tokens": budget, "tasks": list(recipe.tasks)})
    return trainings


def _describe(run: Run, stage: Stage) -> dict[str, Any]:
    fields = run.settings[stage.settings]
    found = (run.maker.lengths(task, stage.settings, calibration=stage.calibration) for task in stage.tasks)
    lengths = list(chain.from_iterable(found))
    batch = setting(fields, "per_device_train_batch_size") * setting(fields, "gradient_accumulation_steps")
    sequences = len(lengths)
    if setting(fields, "packing"):
        sequences = math.ceil(sum(lengths) / setting(fields, "max_length"))
    in_epoch = math.ceil(sequences / batch)
    steps = setting(fields, "max_steps")
    if steps <= 0:
        steps = math.ceil(setting(fields, "num_train_epochs") * in_epoch)
    epochs, rest = divmod(steps, in_epoch)
    seen = epochs * sequences + rest * batch  # only the last step of an epoch may be a small one
    return {
        "name": stage.name,
        "tasks": list(stage.tasks),
        "rows": len(lengths),
        "tokens": round(sum(lengths) * seen / sequences),
        "steps": steps,
        "batch": batch,
        "rate": setting(fields, "learning_rate"),
    }
