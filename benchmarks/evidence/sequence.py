"""Train on one task, then on another while something is done to protect the first: one run of such a sequence."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evidence.importance import Recorder, fisher, measure
from evidence.language import (
    DEVICE,
    Row,
    Task,
    draw,
    load_demo,
    load_real,
    loss_of,
    put,
    score,
    start,
    train,
    trained,
    values_of,
)
from evidence.runs import key
from peft_cpift import CoreRegion, consolidate, find_core_region, freeze_core
from peft_cpift.checkpoint import complete_file

FISHER_ROWS = 64
BLENDS = (0.25, 0.5, 0.75)
FIRST_KEYS = ("model", "first", "seed", "tuner", "optimizer", "steps", "batch", "rate")


@dataclass(frozen=True)
class Place:
    """Where a run finds its model and data, and keeps what several runs need; says nothing about the results."""

    model: Path | None
    """The model's folder; None for the demonstration's."""
    data: Path | None
    """The folder of its tasks."""
    cache: Path
    """A folder that may be deleted at any time."""
    max_length: int = 192
    held_out: int = 128
    """See `load_real`."""

    @property
    def name(self) -> str:
        """The model's name in settings."""
        return self.model.name if self.model else "demo"

    def load(self, seed: int) -> tuple[nn.Module, dict]:
        """Model and tasks; the demonstration's tasks are made anew for each seed."""
        if self.model is None:
            return load_demo(seed)
        return load_real(self.model, self.data, self.max_length, self.held_out)


def first_task(place: Place, settings: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Train on the first task alone: its records, as `measure` takes them, from the cache if they are there."""
    return _first_task(place, key({name: settings[name] for name in FIRST_KEYS}))


@lru_cache(maxsize=2)
def _first_task(place: Place, wanted: str) -> dict[str, dict[str, Tensor]]:
    settings = json.loads(wanted)
    place.cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(f"{wanted} {place.max_length} {place.held_out}".encode()).hexdigest()[:12]
    file = place.cache / f"{settings['model']}-{settings['first']}-{settings['seed']}-{digest}.safetensors"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            with complete_file(file) as partial:
                save_file(
                    {
                        f"{kind}/{n}": t.contiguous()
                        for kind, part in _train_first(place, settings).items()
                        for n, t in part.items()
                    },
                    partial,
                )
        records: dict[str, dict[str, Tensor]] = {}
        for full, tensor in load_file(file, device=DEVICE).items():
            kind, name = full.split("/", 1)
            records.setdefault(kind, {})[name] = tensor
    return records


def _train_first(place: Place, settings: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    base, tasks = place.load(settings["seed"])
    model = start(base, settings["tuner"], settings["seed"])
    before, recorder = values_of(model), Recorder(model)
    drawn = first_rows(tasks, settings)
    state = train(
        model,
        drawn,
        **{name: settings[name] for name in ("rate", "optimizer")},
        batch_size=settings["batch"],
        before_step=recorder.before_step,
        after_step=recorder.after_step,
    ).state
    records = {"start": before, "end": values_of(model), "fisher": fisher(model, drawn[:FISHER_ROWS]), **recorder.sums}
    if settings["optimizer"] == "adamw":
        records["second_moment"] = {n: state[p]["exp_avg_sq"] for n, p in trained(model).items() if p in state}
    return records


def first_rows(tasks: dict[str, Task], settings: dict[str, Any]) -> list[Row]:
    """The rows of the first training, in their order."""
    count = settings["steps"] * settings["batch"]
    return draw(tasks[settings["first"]].train, count, f"{settings['seed']}/{settings['first']}")


def run_first(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """How well a task is learned alone: scores on the split that the settings name, before and after."""
    base, tasks = place.load(settings["seed"])
    model = start(base, settings["tuner"], settings["seed"])
    held_out = getattr(tasks[settings["first"]], settings["split"])
    scores = {"base": score(model, held_out)}
    optimizer, rate, batch = (settings[name] for name in ("optimizer", "rate", "batch"))
    train(model, first_rows(tasks, settings), batch_size=batch, rate=rate, optimizer=optimizer)
    return scores | {"end": score(model, held_out)}


def run_sequence(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """Scores on both tasks before any training (`base`), after the first (`own`) and after the second (`end`).

    `settings` name the first and second task, the seed, the split that is scored, tuner, optimizer, steps, batch and
    rate of the first training, `second_rate`, and how the first task is protected, `protect`:

    - `none`: not at all; the result also has `blend`, scores part of the way from the first end to the second
    - `freeze`: the `percent` of all coordinates that matter most `by` a measure are frozen; `unit` is `entry`, or
      `row`, `column` or `tensor`, whose entries share their mean; `scope` as in `find_core_region`; `of` names
      another task whose measure it is; with `anywhere` each tensor's choice gives way to as many random entries of it
    - `restore`: the same coordinates are put back after the training, which is free
    - `ewc`, `l2`: elastic pull with a `strength`, weighted `by` a measure (of mean 1), or alike for all
    - `decay`: the pull of `ConsolidationCallback` with a `strength`, weighted by a `power` of a measure
    - `project`: steps are freed of their part along so many `gradients` of the first task
    - `replay`: a `share` of the rows, 0 to 1, is the first task's
    """
    records = first_task(place, settings)
    base, tasks = place.load(settings["seed"])
    model = start(base, settings["tuner"], settings["seed"])
    splits = {task: getattr(tasks[settings[task]], settings["split"]) for task in ("first", "second")}
    own = _scores(place, key({name: settings[name] for name in (*FIRST_KEYS, "second", "split")}))
    put(model, records["end"])

    protect = settings["protect"]
    drawn = draw(
        tasks[settings["second"]].train,
        settings["steps"] * settings["batch"],
        f"{settings['seed']}/{settings['second']}",
    )
    result: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    region = None
    if protect["kind"] in ("freeze", "restore"):
        whose = first_task(place, {**settings, "first": protect["of"]}) if "of" in protect else records
        region = choose(whose, protect, settings["seed"])
        result |= held_shares(region, records)
        if protect["kind"] == "freeze":
            arguments["around"] = lambda optimizer: freeze_core(model, optimizer, region)
    elif protect["kind"] in ("ewc", "l2"):
        arguments["penalty"] = _elastic(model, records, protect)
    elif protect["kind"] == "decay":
        root = {name: records[protect["by"]][name].pow(protect["power"] / 2) for name in trained(model)}
        arguments["around"] = lambda optimizer: consolidate(model, optimizer, root, strength=protect["strength"])
    elif protect["kind"] == "project":
        put(model, records["end"])
        arguments["before_step"], arguments["after_step"] = _projection(
            model, first_rows(tasks, settings), protect["gradients"]
        )
    elif protect["kind"] == "replay":
        count = round(protect["share"] * len(drawn))
        drawn = draw(
            [*drawn[count:], *draw(first_rows(tasks, settings), count, settings["seed"])], len(drawn), settings["seed"]
        )
    elif protect["kind"] != "none":
        raise ValueError(f"unknown protection {protect['kind']}")
    train(
        model,
        drawn,
        batch_size=settings["batch"],
        rate=settings["second_rate"],
        optimizer=settings["optimizer"],
        **arguments,
    )
    end = values_of(model)
    if protect["kind"] == "restore":
        for name, indices in region.indices.items():
            end[name].view(-1)[indices.long()] = records["end"][name].view(-1)[indices.long()]
        put(model, end)
    for task, rows in splits.items():
        result[task] = {**own[task], "end": score(model, rows)}
    if protect["kind"] == "none":
        result["blend"] = {}
        for share in BLENDS:
            put(model, {name: torch.lerp(records["end"][name], value, share) for name, value in end.items()})
            result["blend"][str(share)] = {task: score(model, rows) for task, rows in splits.items()}
    return result


@lru_cache(maxsize=8)
def _scores(place: Place, wanted: str) -> dict[str, dict[str, Any]]:
    """Scores before any training, and after the first task."""
    settings = json.loads(wanted)
    base, tasks = place.load(settings["seed"])
    model = start(base, settings["tuner"], settings["seed"])
    splits = {task: getattr(tasks[settings[task]], settings["split"]) for task in ("first", "second")}
    scores = {task: {"base": score(model, rows)} for task, rows in splits.items()}
    put(model, first_task(place, settings)["end"])
    return {task: scores[task] | {"own": score(model, rows)} for task, rows in splits.items()}


def choose(records: dict[str, dict[str, Tensor]], protect: dict[str, Any], seed: int) -> CoreRegion:
    """The coordinates that matter most by a measure."""
    values = {}
    for name in records["end"]:
        value = measure(protect["by"], name, records, seed).cpu()
        dimensions = {"entry": (), "row": range(1, value.ndim), "column": (0,), "tensor": range(value.ndim)}
        shared = tuple(dimensions[protect.get("unit", "entry")])
        if shared and (value.ndim > 1 or protect["unit"] == "tensor"):
            shape = value.shape
            if protect["by"] == "random":
                # one draw for a unit: means of many would be near 0.5, and the shortest units would win
                for dimension in shared:
                    value = value.narrow(dimension, 0, 1)
            else:
                value = value.mean(shared, keepdim=True)
            value = value.expand(shape).contiguous()
        values[name] = value
    region = find_core_region(
        values, importance=values, percent=protect["percent"], scope=protect.get("scope", "global")
    )
    if not protect.get("anywhere"):
        return region
    indices = {}
    for name, chosen in region.indices.items():
        lottery = measure("random", name, records, seed).flatten()
        indices[name] = lottery.topk(len(chosen)).indices.sort().values.cpu()
    return CoreRegion(indices, region.shapes)


def held_shares(region: CoreRegion, records: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """How much of the first task's squared update and of its Fisher information is in a region, each from 0 to 1."""
    shares = {}
    for kind in ("update", "fisher"):
        total = held = 0.0
        for name in records["end"]:
            value = measure(kind, name, records, 0).double().flatten()
            value = value.square() if kind == "update" else value
            total += value.sum().item()
            if name in region.indices:
                held += value[region.indices[name].long().to(value.device)].sum().item()
        shares[f"held_{kind}"] = held / total
    return shares


def _elastic(model: nn.Module, records: dict[str, dict[str, Tensor]], protect: dict[str, Any]):
    parameters = trained(model)
    weights = records[protect["by"]] if protect["kind"] == "ewc" else {}
    size = sum(tensor.numel() for tensor in weights.values())
    mean = sum(tensor.double().sum().item() for tensor in weights.values()) / max(size, 1)

    @torch.no_grad()
    def pull() -> None:
        for name, parameter in parameters.items():
            away = parameter - records["end"][name]
            if weights:
                away *= weights[name] / mean
            parameter.grad.add_(away, alpha=protect["strength"])

    return pull


def _projection(model: nn.Module, rows: list, count: int):
    """Hooks that take from every step its part in the span of gradients of so many batches of rows."""
    parameters = trained(model)
    basis: list[dict[str, Tensor]] = []
    model.train()
    for number in range(count):
        gradients = torch.autograd.grad(loss_of(model, rows[number::count][:32]), list(parameters.values()))
        direction = dict(zip(parameters, gradients, strict=True))
        for other in basis:
            _subtract(direction, other)
        norm = sum(part.double().square().sum() for part in direction.values()).sqrt()
        basis.append({name: (part / norm).float() for name, part in direction.items()})
    before = values_of(model)

    @torch.no_grad()
    def before_step() -> None:
        for name, parameter in parameters.items():
            before[name].copy_(parameter)

    @torch.no_grad()
    def after_step() -> None:
        step = {name: parameter - before[name] for name, parameter in parameters.items()}
        for direction in basis:
            _subtract(step, direction)
        for name, parameter in parameters.items():
            parameter.copy_(before[name] + step[name])

    return before_step, after_step


def _subtract(vector: dict[str, Tensor], direction: dict[str, Tensor]) -> None:
    along = sum((vector[name].double() * direction[name]).sum() for name in vector)
    for name, part in vector.items():
        part.sub_(direction[name], alpha=along.item())
