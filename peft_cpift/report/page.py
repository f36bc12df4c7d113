"""The report of a run: `index.html`, `report.md`, `report.json` and, if asked for, `report.png`.

All are made from one dictionary of plain values, which `report.json` holds and `read_report` reads back:

    format      1
    recipe      the recipe's plain values
    versions    {package or machine: text}: what the run began with
    settings    {stage: {field of SFTConfig: value}}
    tasks       {task: {train_rows, test_rows, train_tokens}}
    parameters  {total, trainable}: numbers of the model's parameters
    tensors     {tensor: number of entries}: all that can be core
    cores       {task: {size, total, tensors: {tensor: core coordinates in it}}}
    jaccard     rows and columns in the order of `cores`
    groups      [[task]], in the order trained
    fusion      what `FusionReport.to_dict` gives; tasks are folded in the order of the groups
    transfer    {helping task: {task: decrease of its loss in nats}}, or None
    models      [{name, average: 0-10, scores: {task: {loss: nats, score: 0-1}},
                  lm_eval: {its task: {metric: value}} or None,
                  training: None or {steps, examples, tokens, loss, learning_rate, seconds, frozen,
                                     peak_memory: bytes or None, processes, versions as above if recorded,
                                     logs: [{step, and loss, learning_rate, grad_norm, cpift/masked_grad_norm,
                                             cpift/frozen_fraction where logged}]}}]
    sequences   [{method, start: model, stages: [{model, tasks: [task]}]}]: models trained one from another
    methods     [{method, model}]: the results that are compared; one of them is CPI-FT
    warnings    [text]

The model before any training is named `base`. Names and texts may come from users and are escaped wherever shown.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from peft_cpift.checkpoint import complete_file, complete_folder
from peft_cpift.checkpoint.writer import write_json
from peft_cpift.errors import CpiftError
from peft_cpift.report import cores, forgetting, fusion, markdown, record, scores, training
from peft_cpift.report.blocks import Section
from peft_cpift.report.html import to_html
from peft_cpift.report.paths import last_part, without_paths

FORMAT = 1
PACKAGES = ("peft-cpift", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """The machine and the versions that a result depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    system = f"{platform.system()} {platform.machine()}"
    return {"device": device, "system": system, "python": platform.python_version(), **packages}


def write_report(report: dict[str, Any], folder: Path, *, picture: bool, overwrite: bool = False) -> Path:
    """Write `index.html`, `report.md`, `report.json` and, if asked for, `report.png`; all of it or nothing.

    Args:
        report: of the form that this module describes. Local paths in its recipe, settings and warnings are shortened
            to their last part, and numbers that are not finite, such as the gradient's norm in a step that overflowed,
            become None.
        folder: the folder to make.
        picture: draw the picture too, which needs matplotlib.
        overwrite: replace an earlier report.

    Raises:
        CpiftError: `folder` exists and `overwrite` is false.
    """
    report = _finite(_without_paths(report))
    with complete_folder(folder, overwrite=overwrite) as temporary:
        write_json(temporary / "report.json", report)
        if picture:
            from peft_cpift.report.figures import draw  # deferred: matplotlib is optional

            draw(report, temporary / "report.png")
        for name, text in (("report.md", page(report, picture=picture)), ("index.html", html_page(report))):
            with complete_file(temporary / name) as file:
                file.write_text(text, encoding="utf-8")
    return folder


def read_report(folder: str | os.PathLike) -> dict[str, Any]:
    """Read the report of a run.

    Args:
        folder: the run's folder, which holds `report/report.json`.

    Raises:
        CpiftError: there is no report, it is not JSON, or it is of another format.
    """
    file = Path(folder) / "report" / "report.json"
    if not file.is_file():
        raise CpiftError(f"{file} does not exist: name the folder of a run that is complete")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CpiftError(f"{file} is not JSON ({error}): make the report again") from error
    found = report.get("format") if isinstance(report, dict) else None
    if found != FORMAT:
        raise CpiftError(f"{file} is of format {found}, and this version reads format {FORMAT}: make the report again")
    return report


def page(report: dict[str, Any], *, picture: bool) -> str:
    """The report as Markdown."""
    facts = "; ".join(f"{name} {value}" for name, value in record.facts(report)[1:])
    text = markdown.to_markdown(
        _title(report), [Section("", "", [f"{facts}.", scores.verdict(report)]), *_sections(report)]
    )
    if picture:
        image = "![Overlap of the cores, and scores after every stage](report.png)"
        text = text.replace("\n\n## ", f"\n\n{image}\n\n## ", 1)
    return text


def html_page(report: dict[str, Any]) -> str:
    """The report as one self-contained HTML page."""
    return to_html(
        _title(report),
        _sections(report),
        facts=record.facts(report),
        figures=scores.figures(report),
        lead=scores.verdict(report),
    )


def score_table(report: dict[str, Any]) -> str:
    """The scores of every model on every task, 0-10, as a Markdown table."""
    return markdown.table(scores.score_table(report))


def _title(report: dict[str, Any]) -> str:
    return f"CPI-FT on {report['recipe']['model']}"


def _sections(report: dict[str, Any]) -> list[Section]:
    parts = [module.section(report) for module in (scores, forgetting, cores, fusion, training, record)]
    return [record.warnings_section(report), *parts] if report["warnings"] else parts


def _without_paths(report: dict[str, Any]) -> dict[str, Any]:
    """A report that tells others nothing of the machine's folders."""
    own = [report["recipe"][key] for key in ("output", "model")]  # what warnings may name
    texts = list(report["warnings"])
    for path in sorted(own, key=len, reverse=True):
        texts = [text.replace(path, last_part(path)) for text in texts]
    shown = {key: without_paths(report[key]) for key in ("recipe", "settings")}
    return {**report, **shown, "warnings": texts}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
