"""Shared by the pipeline's tests: three small tasks as JSON lines, and a recipe that runs in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Files of three tasks: sums scored by exact match, letters by loss, and yes-or-no questions by choice."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    digit = lambda: generator.randrange(10)  # noqa: E731
    makers = {
        "sums": lambda a, b: (f"{a}+{b}=", f"={a + b}"),
        "letters": lambda a, b: (f"{'abcdefghij'[a]}-", "abcdefghij"[b]),
        "larger": lambda a, b: (f"{a}-{b}?", "a" if a > b else "b"),
    }
    for name, make in makers.items():
        for split, count in (("train", 24), ("test", 8)):
            rows = [make(digit(), digit()) for _ in range(count)]
            lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
            (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tree(tiny_model, task_folder, tmp_path) -> dict:
    """A recipe as plain values."""
    return {
        "model": str(tiny_model),
        "output": str(tmp_path / "run"),
        "data": str(task_folder),
        "tasks": {
            "sums": {"metric": "exact_match", "answer": "=(.*)"},
            "letters": {"train_samples": 16},
            "larger": {"metric": "choice", "choices": ["a", "b"], "test_samples": 5},
        },
        "tuner": {"peft_type": "PROPULSION", "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.01},
        "core": {"percent": 10.0},
        "evaluation": {"max_new_tokens": 4},
        "report": {"picture": False},
    }
