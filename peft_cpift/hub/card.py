"""The model card of a run: what was trained on what, how well it does, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_cpift.report.markdown import code, escape
from peft_cpift.report.scores import method_tokens

METRICS = {
    "exact_match": ("exact_match", "exact match"),
    "choice": ("accuracy", "likeliest choice"),
    "codebleu": ("codebleu", "CodeBLEU"),
}
"""A recipe's metric -> the Hub's id of it, and a reader's name. `loss` has no id of its own beside the loss itself."""
INTEGRATION = {
    "staged": "Then the groups are trained one after another, while the cores of earlier groups are frozen.",
    "mixed": "Then all groups are trained together, while every core is frozen.",
    "none": "Nothing was trained after that.",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    repository: str
    """As `user/name`."""
    report: Mapping[str, Any]
    """What `report.json` holds."""
    peft_type: str | None
    """The method of the adapter that is uploaded, such as `PROPULSION`; None where that is a whole model."""
    base: str | None
    """The base model's name on the Hub, if it is there."""
    datasets: frozenset[str] = frozenset()
    """Names of data sets that are on the Hub."""
    picture: str | None = None
    """The picture's path in the repository."""


def model_card(subject: Subject) -> ModelCard:
    """The card, with the scores as the Hub's `model-index` in its front matter.

    Scores are those of the run's own result; none is marked as verified. Where a task is scored by `loss`, its
    held-out loss is given, in nats per token, not the probability that the report makes of it.

    Source: ours.
    """
    report = subject.report
    tasks = list(report["cores"])
    data = ModelCardData(
        model_name=subject.repository.split("/")[-1],
        base_model=subject.base,
        base_model_relation=subject.base and ("adapter" if subject.peft_type else "finetune"),
        library_name="peft" if subject.peft_type else "transformers",
        pipeline_tag="text-generation",
        tags=_tags(subject.peft_type),
        datasets=_datasets(subject) or None,
        eval_results=[result for task in tasks for result in _results(subject, task)],
    )
    picture = f"\n![Overlap of the cores, and scores]({subject.picture})\n" if subject.picture else ""
    versions = ", ".join(escape(f"{name} {version}") for name, version in report["versions"].items())
    text = f"""# {escape(subject.repository.split("/")[-1])}

{_what(subject)} on {len(tasks)} tasks: {", ".join(map(code, tasks))}. Made with CPI-FT, core parameter isolation,
by the package `peft-cpift`.

## How to load it

    pip install peft-cpift

```python
{_snippet(subject)}
```

## Scores

On held-out rows, from 0 to 10. This repository holds the run's `{result_name(report)}`.

{_scores(report)}
{picture}
The whole report is `report/index.html`, its numbers `report/report.json`.

## Method

CPI-FT ([arXiv 2508.21741](https://arxiv.org/abs/2508.21741)) fine-tunes on each task alone, and calls the coordinates
{_chosen(report)} the task's core. Tasks whose cores overlap form a group. Cores are transplanted into one model, and
all else is interpolated{_how(report["fusion"])}. {INTEGRATION[report["recipe"]["integration"]["schedule"]]}
Propulsion ([arXiv 2409.10927](https://arxiv.org/abs/2409.10927)) multiplies the outputs of frozen layers by trained
vectors, `y * z**k`{"; this adapter is one" if subject.peft_type == "PROPULSION" else ", and was not used here"}.

## Settings

{_settings(subject)}

`recipe.yaml` has them all. Versions: {versions}.
{_warnings(report)}"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _chosen(report: Mapping[str, Any]) -> str:
    """What is said of the coordinates that are core."""
    if _by_gradient(report["recipe"]):
        return "with the largest gradients (the optimizer's second moment; the paper takes those that moved most)"
    return "that moved most"


def _by_gradient(recipe: Mapping[str, Any]) -> bool:
    return recipe["core"].get("importance") == "second_moment"  # of which earlier recipes say nothing


def _how(fusion: Mapping[str, Any]) -> str:
    """Along what the rest was interpolated; nearly parallel tensors go along a line."""
    folds, linear = fusion["folds"], fusion["linear_folds"]
    if not folds:
        return ""
    if not linear:
        return " along the sphere"
    return (
        ", here all of it linearly" if linear == folds else f" along the sphere ({linear} of {folds} times linearly)"
    )


def _warnings(report: Mapping[str, Any]) -> str:
    """What the run warned of, as a section of its own."""
    if not report["warnings"]:
        return ""
    return "\n".join(["", "## Warnings", "", *(f"- {escape(text)}" for text in report["warnings"]), ""])


def result_name(report: Mapping[str, Any]) -> str:
    """The name of the model in the report that the method ended with."""
    return next(entry["model"] for entry in report["methods"] if entry["method"] == "CPI-FT")


def _what(subject: Subject) -> str:
    """What was made, up to the tasks."""
    base = code(subject.base or subject.report["recipe"]["model"])
    if subject.peft_type:
        adapter = "A Propulsion adapter" if subject.peft_type == "PROPULSION" else f"An adapter ({subject.peft_type})"
        return f"{adapter} for {base}, trained"
    tuner = _tuner(subject.report)
    if tuner == "full":
        return f"{base}, fine-tuned as a whole"
    return f"{base} with the changes of {escape(tuner)} adapters fused into its weights: a whole model, trained"


def _tuner(report: Mapping[str, Any]) -> str:
    """What was trained: `full`, or adapters of this method, of which the result need not be one itself."""
    tuner = report["recipe"]["tuner"]
    return tuner if isinstance(tuner, str) else tuner["peft_type"]


def _tags(peft_type: str | None) -> list[str]:
    tags = ["cpi-ft", "peft-cpift", "trl"]
    if peft_type:
        tags.insert(0, "peft")
    if peft_type == "PROPULSION":
        tags.insert(1, "propulsion")
    return tags


def _datasets(subject: Subject) -> list[str]:
    return sorted({source["name"] for task in subject.report["cores"] if (source := _source(subject, task))})


def _source(subject: Subject, task: str) -> dict[str, Any] | None:
    """Where a task's rows are on the Hub, if they are there."""
    recipe = subject.report["recipe"]
    source = recipe["tasks"][task].get("hub")
    if recipe.get("data") is not None or source is None or source["name"] not in subject.datasets:
        return None
    return source


def _results(subject: Subject, task: str) -> list[EvalResult]:
    report = subject.report
    scores = _models(report)[result_name(report)]["scores"][task]
    source = _source(subject, task)
    measured = [("loss", "held-out loss in nats per token", scores["loss"])]
    if (metric := report["recipe"]["tasks"][task]["metric"]) in METRICS:
        measured.insert(0, (*METRICS[metric], scores["score"]))
    return [
        EvalResult(
            task_type="text-generation",
            task_name=task,
            dataset_type=source["name"] if source else task,
            dataset_name=source["name"] if source else task,
            dataset_config=source and source.get("subset"),
            dataset_split=source and source.get("test"),
            dataset_revision=source and source.get("revision"),
            metric_type=kind,
            metric_name=f"{task}: {name}",  # the Hub joins what tasks of one data set have
            metric_value=value,
            verified=False,
        )
        for kind, name, value in measured
    ]


def _models(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in report["models"]}


def _scores(report: Mapping[str, Any]) -> str:
    """A row for the base model and for each method."""
    tasks, models = list(report["cores"]), _models(report)
    metrics = {task: report["recipe"]["tasks"][task]["metric"] for task in tasks}
    heads = [f"{task} ({METRICS[kind][1] if kind in METRICS else 'exp(-loss)'})" for task, kind in metrics.items()]
    rows = [("base model", "base"), *((entry["method"], entry["model"]) for entry in report["methods"])]
    tokens = {"base model": 0} | method_tokens(report)
    head = ["method", "model of the run", "average", *heads, "tokens of its trainings"]
    lines = [head, ["---", "---", *["---:"] * (len(tasks) + 2)]]
    for method, name in rows:
        scores = models[name]["scores"]
        cells = [f"{10 * scores[task]['score']:.2f}" for task in tasks]
        lines.append([method, name, f"{models[name]['average']:.2f}", *cells, f"{tokens[method]:,}"])
    return _table(lines)


def _settings(subject: Subject) -> str:
    report, recipe = subject.report, subject.report["recipe"]
    order = recipe["grouping"]["order"]
    # Earlier reports have only what their recipes gave.
    rates = {stage: given["learning_rate"] for stage, given in report["settings"].items() if "learning_rate" in given}
    sizes = {task: core["size"] for task, core in report["cores"].items()}
    rows = {
        "tuner": _tuner(report),
        "core, p": f"{recipe['core']['percent']:g}% ({recipe['core']['scope']})",
        "core by": "second moment of the gradients" if _by_gradient(recipe) else "update",
        "core coordinates": ", ".join(f"{task} {size:,}" for task, size in sizes.items()),
        "grouping, tau": f"{recipe['grouping']['threshold']:g}",
        "order of groups": order if isinstance(order, str) else "as given",
        "groups": ", then ".join(" + ".join(group) for group in report["groups"]),
        "fusion starts from": recipe["fusion"]["start"],
        "integration": recipe["integration"]["schedule"],
        "learning rates": ", ".join(f"{stage} {rate:g}" for stage, rate in rates.items()),
        "seed": str(recipe["seed"]),
    }
    return _table([["setting", "value"], ["---", "---"], *([key, value] for key, value in rows.items() if value)])


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)


def _snippet(subject: Subject) -> str:
    recipe, name = subject.report["recipe"], repr(subject.repository)
    task = next(iter(subject.report["cores"]))
    trust = ", trust_remote_code=True" if recipe.get("trust_remote_code") else ""
    lines = ["import peft_cpift"]
    if subject.peft_type:
        given = {"revision": recipe.get("revision"), "dtype": recipe.get("dtype")}
        how = "".join(f", {key}={value!r}" for key, value in given.items() if value not in (None, "auto")) + trust
        lines[0] += "  # registers PROPULSION with PEFT" if subject.peft_type == "PROPULSION" else ""
        lines += [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({subject.base!r}{how})",
            f"model = PeftModel.from_pretrained(base, {name})",
        ]
    else:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name}{trust})",
        ]
    which = "matter most to this task" if _by_gradient(recipe) else "this task moved most"
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})",
        f"core = peft_cpift.CoreRegion.from_pretrained({name}, {task!r})  # the coordinates that {which}",
    ]
    return "\n".join(lines)
