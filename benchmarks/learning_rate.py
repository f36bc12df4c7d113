"""Held-out loss of one task after a brief Propulsion tuning at several learning rates: the table in the README.

    python benchmarks/learning_rate.py recipes/gemma3-270m.yaml gsm8k --steps 40 --set model=MODEL data=DATA

Everything but the rate and the number of steps is as in the recipe: the adapter, its start, the rows, the schedule.
Prints a Markdown table whose first row is the model before training.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from peft_cpift.data import tasks as rows
from peft_cpift.evaluation.evaluate import evaluate
from peft_cpift.pipeline.train import (
    load_model,
    load_tokenizer,
    make_start,
    resolve_settings,
    resolve_tuner,
    train,
)
from peft_cpift.recipe.reading import read_recipe


def main() -> None:
    """Read the command line, train once for each rate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("task", help="one of the recipe's tasks")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe to change")
    arguments = parser.parse_args()

    by_loss = [f"tasks.{arguments.task}.{setting}" for setting in ("metric=loss", "answer=null", "choices=null")]
    recipe = read_recipe(arguments.recipe, [*arguments.set, *by_loss])
    recipe.tasks = {arguments.task: recipe.tasks[arguments.task]}
    tuner, tokenizer = resolve_tuner(recipe), load_tokenizer(recipe)
    data = rows.load_tasks(recipe, tokenizer)

    table = ["| learning rate | held-out loss | z ends within |", "| --- | ---: | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        make_start(recipe, tuner, tokenizer, start)
        loss = evaluate(load_model(recipe, start), tokenizer, recipe, data)[arguments.task].loss
        table.append(f"| before training | {loss:.3f} | |")
        for rate in arguments.rates:
            settings = resolve_settings(recipe, tuner, {"learning_rate": rate, "max_steps": arguments.steps})
            model, _ = train(
                recipe, tokenizer, start, data[arguments.task].train, settings, Path(folder) / f"{rate:g}"
            )
            loss = evaluate(model, tokenizer, recipe, data)[arguments.task].loss
            z = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "propulsion_z" in n])
            table.append(f"| {rate:g} | {loss:.3f} | {z.min():.4f}, {z.max():.4f} |")
            print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
