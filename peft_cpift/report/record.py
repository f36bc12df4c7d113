"""What one needs to do a run again: warnings, the settings of every stage, the recipe, versions and seed."""

from __future__ import annotations

import json
from typing import Any

import yaml

from peft_cpift.report.blocks import Block, Cell, Folded, Section, Table


def facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, in pairs of a name and a value."""
    recipe = report["recipe"]
    tuner = recipe["tuner"] if isinstance(recipe["tuner"], str) else recipe["tuner"]["peft_type"]
    return [
        ("model", recipe["model"]),
        ("tuner", tuner),
        ("tasks", str(len(report["cores"]))),
        ("p", f"{recipe['core']['percent']:g} %"),
        ("τ", f"{recipe['grouping']['threshold']:g}"),
        ("seed", str(recipe["seed"])),
    ]


def warnings_section(report: dict[str, Any]) -> Section:
    """The warnings of the run, each a paragraph."""
    return Section("warnings", "Warnings", [text[:1].upper() + text[1:] for text in report["warnings"]])


def section(report: dict[str, Any]) -> Section:
    """Data, versions, settings and recipe."""
    data = [[task, *(f"{counts[key]:,}" for key in COUNTS)] for task, counts in report["tasks"].items()]
    blocks: list[Block] = [
        Table("The data of every task.", ["task", "rows to train on", "tokens in them", "rows to score on"], data),
        Table(
            "The machine, versions and seed.",
            ["", "value"],
            [
                *([name, version] for name, version in report["versions"].items()),
                ["seed", str(report["recipe"]["seed"])],
            ],
        ),
    ]
    if others := _other_versions(report):
        blocks.append(f"Stages made with other versions: {others}.")
    if report["settings"]:
        blocks.append(Folded("Settings of every stage, as resolved", _settings(report["settings"])))
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True, width=100)
    blocks.append(Folded("The recipe, with everything that it left to defaults", recipe))
    return Section("record", "To do it again", blocks)


COUNTS = ("train_rows", "train_tokens", "test_rows")


def _other_versions(report: dict[str, Any]) -> str:
    """The trainings of a run that went on after an update or on another machine, with what differs there."""
    made: dict[str, list[str]] = {}
    for model in report["models"]:
        found = (model["training"] or {}).get("versions", {})
        differing = [f"{key} {value}" for key, value in found.items() if report["versions"].get(key) != value]
        if differing:
            made.setdefault(", ".join(differing), []).append(model["name"])
    return "; ".join(f"{', '.join(names)} ({differing})" for differing, names in made.items())


def _settings(settings: dict[str, dict[str, Any]]) -> Table:
    keys = list(dict.fromkeys(key for stage in settings.values() for key in stage))
    text = {key: [plain(stage[key]) if key in stage else "" for stage in settings.values()] for key in keys}
    rows = [[key, *(Cell(value, strong=len(set(text[key])) > 1) for value in text[key])] for key in keys]
    return Table("Fields of SFTConfig. Bold: not the same in every stage.", ["field", *settings], rows)


def plain(value: Any) -> str:
    """A value of a recipe in one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
