"""The embedded demonstration: five small tasks made by code, and a tiny base model that half knows them."""

from pathlib import Path

from peft_cpift.demo.tasks import TASKS, make_examples, write_tasks

MODEL = Path(__file__).with_name("tiny-llama")
"""Folder of a causal language model of 379,488 parameters with a tokenizer of single characters."""
RECIPE = Path(__file__).with_name("recipe.yaml")
"""The recipe of `cpift demo`."""
TRAIN_ROWS, TEST_ROWS = 2560, 200
"""Rows of each task in `cpift demo`."""

__all__ = ["MODEL", "RECIPE", "TASKS", "TEST_ROWS", "TRAIN_ROWS", "make_examples", "write_tasks"]
