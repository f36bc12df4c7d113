"""Strategy: one of these scripts is started per process by torchrun, and writes what it got; the test compares."""

from __future__ import annotations

import faulthandler
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cpift.data.tasks import load_tasks
from peft_cpift.evaluation.batches import map_batches
from peft_cpift.evaluation.evaluate import evaluate, measure_losses
from peft_cpift.evaluation.harness import score_harness
from peft_cpift.recipe.reading import parse_recipe


def main(folder: Path) -> None:
    """Score the model of `folder/recipe.json` in every way, and write `folder/<rank>.json`."""
    faulthandler.dump_traceback_later(60, exit=True)  # a process that waits in vain for another shows where
    PartialState(cpu=True)
    recipe = parse_recipe(json.loads((folder / "recipe.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    rank = PartialState().process_index
    data = load_tasks(recipe, tokenizer)
    found = {
        "processes": PartialState().num_processes,
        "shares": map_batches(lambda batch: [(row, rank) for row in batch], list(range(7)), 2),
        "fewer": map_batches(lambda batch: [(row, rank) for row in batch], [0], 2),
        "none": map_batches(lambda batch: batch, [], 2),
        "scores": {name: asdict(score) for name, score in evaluate(model, tokenizer, recipe, data).items()},
        "losses": measure_losses(model, tokenizer, {name: part.train for name, part in data.items()}, recipe),
    }
    if recipe.evaluation.lm_eval is not None:
        found["harness"] = score_harness(model, tokenizer, recipe.evaluation.lm_eval, 3)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
