"""Tasks trained one after another by methods that the pipeline does not have, with its settings and its trainer.

Each task is a stage that starts from the one before, with a fresh optimizer and schedule. All stages together see as
many tokens as they are given epochs for.

- sequence: nothing else
- replay: every stage's rows contain a share of rows of the earlier tasks, drawn evenly from all of them
- ewc: elastic weight consolidation (Kirkpatrick et al., 2017), a quadratic pull to where each earlier task ended,
  weighted by that task's diagonal Fisher information. The information is the empirical one, mean squared gradients of
  single rows, and is scaled to a mean of 1 for each task: so the strength means the same for all models and tasks.
- freeze_update, freeze_moment: after every stage its core region, found by how far it moved coordinates or by the
  optimizer's second moment, is frozen for good. This is what anyone can do with our two callbacks, without probes.
- consolidation: what mattered to earlier stages, by their second moments, pulls the coordinates back. This is what
  `ConsolidationCallback` does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from peft_cpift import ConsolidationCallback, ImportanceCallback, find_core_region
from peft_cpift.data import tasks as rows
from peft_cpift.evaluation.likelihood import completion_losses
from peft_cpift.importance.callback import FILE as IMPORTANCE
from peft_cpift.pipeline.engine import KeepsDtypes
from peft_cpift.pipeline.models import load_model, save_model
from peft_cpift.pipeline.run import Run
from peft_cpift.pipeline.settings import machine_settings
from peft_cpift.pipeline.train import _Record, _Trainer, train

FISHER_ROWS = 200


class Elastic:
    """The pull of all earlier tasks together: the sum over them of F * (theta - theta_task)."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.weight: dict[str, Tensor] = {}
        """The sum of all F, by parameter."""
        self.anchor: dict[str, Tensor] = {}
        """The sum of all F * theta_task."""

    def remember(self, values: Mapping[str, Tensor], information: Mapping[str, Tensor]) -> None:
        """Pull, from now on, to these values as well."""
        for name, weight in information.items():
            self.weight[name] = self.weight.get(name, 0) + weight
            self.anchor[name] = self.anchor.get(name, 0) + weight * values[name]

    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> None:
        """Add to the gradients that of strength / 2 * the sum over tasks of F * (theta - theta_task)**2."""
        for name, parameter in trained(model).items():
            if name in self.weight and parameter.grad is not None:
                pull = self.weight[name] * parameter - self.anchor[name]
                parameter.grad.add_(pull.to(parameter.grad.dtype), alpha=self.strength)


class ElasticTrainer(_Trainer):
    """The pipeline's trainer; the pull is in the gradient before that is clipped, as if it were part of the loss."""

    elastic: Elastic

    def training_step(self, model, inputs, *args, **kwargs) -> Tensor:
        """As ever, and the pull once a step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self.elastic.add_gradient(self.accelerator.unwrap_model(model))
        return loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fisher(model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """The mean squared gradient of losses, each of one row, scaled to a mean of 1 over all coordinates."""
    parameters = trained(model)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
    mean = sum(part.double().sum().item() for part in total.values()) / sum(part.numel() for part in total.values())
    if mean == 0:
        raise ValueError("no row has a gradient: its Fisher information is zero")
    return {name: part / mean for name, part in total.items()}


def with_replay(current: Dataset, earlier: Sequence[Dataset], share: float, seed: int) -> Dataset:
    """All rows of a task, and so many of the earlier ones that they are a share of the whole; shuffled."""
    count = round(len(current) * share / (1 - share)) if earlier else 0
    drawn, rng = [], random.Random(seed)
    for number, part in enumerate(earlier):
        wanted = count // len(earlier) + (number < count % len(earlier))
        numbers = [at for _ in range(-(-wanted // len(part))) for at in rng.sample(range(len(part)), len(part))]
        drawn.append(part.select(numbers[:wanted]))
    return concatenate_datasets([current, *drawn]).shuffle(seed=seed)


def train_chain(run: Run, order: Sequence[str], peer: Mapping[str, Any], tokens: int, folder: Path) -> dict[str, Any]:
    """Train the tasks of a run in an order, from its start, for so many tokens in all.

    Args:
        run: its recipe, data and settings of the baselines, and its folder with the start.
        peer: `share` of replayed rows, 0 for none, the pull's `strength`, 0 for none, and `freeze`, if at all: which
            cores `by` (an importance of `find_core_region`) and how many `percent`; or `pull`, the strength of
            `ConsolidationCallback`.
        folder: an empty one; what the last task leaves is in `<the last task>`.

    Returns:
        `tokens` and `seconds` of all stages and of the Fisher information, `steps`, and the last `path`.
    """
    data, seed, limit = run.data, run.recipe.seed, run.maker.max_length("baselines")
    stages = [
        with_replay(data[task].train, [data[other].train for other in order[:number]], peer["share"], seed + number)
        for number, task in enumerate(order)
    ]
    planned = sum(sum(rows.training_lengths(stage, run.tokenizer, limit)) for stage in stages)
    fields = run.settings["baselines"] | {"max_steps": -1, "num_train_epochs": tokens / planned}
    elastic, freeze, frozen = Elastic(peer["strength"]), peer.get("freeze"), []
    start, total = run.folder / "start", {"tokens": 0, "seconds": 0.0, "steps": 0}
    for number, (task, stage) in enumerate(zip(order, stages, strict=True)):
        output = folder / task
        output.mkdir(parents=True)
        work = folder / "checkpoints" / task
        if peer["strength"] and number:
            done = _train_elastic(run, start, stage, fields, output, work, elastic=elastic)
        elif "pull" in peer:
            callbacks = [ImportanceCallback(output / IMPORTANCE)]
            if number:
                files = [folder / earlier / IMPORTANCE for earlier in order[:number]]
                callbacks.append(ConsolidationCallback(files, strength=peer["pull"]))
            done = _train_elastic(run, start, stage, fields, output, work, callbacks=callbacks)
        else:
            moment = output / IMPORTANCE if freeze and freeze["by"] == "second_moment" else None
            training = train(
                run.recipe, run.tokenizer, start, stage, fields, output, work, frozen=frozen, importance=moment
            )
            if freeze and task != order[-1]:
                region = find_core_region(output, start, importance=moment, percent=freeze["percent"])
                frozen.append(folder / f"{task}.core")
                region.save(frozen[-1])
            done = {key: getattr(training, key) for key in total}
        total = {key: total[key] + done[key] for key in total}
        if peer["strength"] and task != order[-1]:
            _remember(run, output, data[task].train, elastic)
        start = output
    return {**total, "path": start}


def _train_elastic(
    run: Run, start: Path, stage: Dataset, fields, output: Path, work: Path, *, callbacks=(), elastic=None
) -> dict:
    """As `pipeline.train.train`, with a pull of either kind."""
    args = SFTConfig(output_dir=work, seed=run.recipe.seed, **machine_settings() | fields | {"save_strategy": "no"})
    model, record = load_model(run.recipe, start, to_train=True), _Record()
    trainer = ElasticTrainer(
        model=model,
        args=args,
        train_dataset=stage,
        processing_class=run.tokenizer,
        callbacks=[record, KeepsDtypes(model), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.record, trainer.elastic = record, elastic or Elastic(0.0)
    result = trainer.train()
    save_model(model, run.tokenizer, output)
    trainer.accelerator.free_memory()
    return {"tokens": record.tokens, "seconds": record.seconds, "steps": result.global_step}


def _remember(run: Run, folder: Path, stage: Dataset, elastic: Elastic) -> None:
    model = load_model(run.recipe, folder).to(run.maker._device()).eval()
    sample = stage.select(random.Random(run.recipe.seed).sample(range(len(stage)), min(FISHER_ROWS, len(stage))))
    limit = run.maker.max_length("baselines")

    def loss_of(row: dict[str, str]) -> Callable[[], Tensor]:
        return lambda: completion_losses(model, run.tokenizer, [row["prompt"]], [row["completion"]], max_length=limit)[
            0
        ].sum()

    information = fisher(model, [loss_of(row) for row in sample])
    elastic.remember({name: parameter.detach() for name, parameter in trained(model).items()}, information)
