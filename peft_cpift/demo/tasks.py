"""Five small tasks that compete for one tiny model.

Every task is one operator call on digits, and its answer is one to five characters long:

    add(47,85)=        132      the sum of two numbers of two digits
    reverse(48213)=    31284    the digits from last to first
    sort(48213)=       12348    the digits in ascending order
    parity(48213)=     00010    for each digit, whether the sum up to and including it is odd (1) or even (0)
    compare(482,479)=  =><      for each position, how the left digit compares with the right one

The tasks share their form, their digits and, nearly all, their answers' alphabet; only the operator's name says
which of them is meant. A model fine-tuned on one task alone has no reason to read that name, which is why the
others suffer. Two of the tasks are arithmetic (add, parity), two work on strings (reverse, sort), one is logic
(compare).

>>> make_examples("reverse", 1, seed=0)
[{'prompt': 'reverse(52049)=', 'completion': '94025'}]
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection
from pathlib import Path

DIGITS = "0123456789"


def add(left: str, right: str) -> str:
    """The decimal sum of two numbers.

    >>> add("47", "85")
    '132'
    """
    return str(int(left) + int(right))


def reverse(digits: str) -> str:
    """The characters of `digits` from last to first.

    >>> reverse("48213")
    '31284'
    """
    return digits[::-1]


def sort(digits: str) -> str:
    """The characters of `digits` in ascending order.

    >>> sort("48213")
    '12348'
    """
    return "".join(sorted(digits))


def parity(digits: str) -> str:
    """One bit for each digit: 1 where the sum of the digits up to and including it is odd.

    >>> parity("48213")
    '00010'
    """
    total, bits = 0, ""
    for digit in digits:
        total += int(digit)
        bits += str(total % 2)
    return bits


def compare(left: str, right: str) -> str:
    """One of `<`, `=`, `>` for each position of two equally long strings of digits.

    >>> compare("482", "479")
    '=><'
    """
    return "".join("<=>"[(a > b) - (a < b) + 1] for a, b in zip(left, right, strict=True))


def call(operator: Callable[..., str], *arguments: str) -> tuple[str, str]:
    """The (prompt, completion) pair of one operator call.

    >>> call(reverse, "48213")
    ('reverse(48213)=', '31284')
    """
    return f"{operator.__name__}({','.join(arguments)})=", operator(*arguments)


def draw_digits(rng: random.Random, length: int) -> str:
    """`length` independent digits, each uniform in 0 to 9; the first may be 0."""
    return "".join(rng.choices(DIGITS, k=length))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": lambda rng: call(add, str(rng.randint(10, 99)), str(rng.randint(10, 99))),
    "reverse": lambda rng: call(reverse, draw_digits(rng, 5)),
    "sort": lambda rng: call(sort, draw_digits(rng, 5)),
    "parity": lambda rng: call(parity, draw_digits(rng, 5)),
    "compare": lambda rng: call(compare, draw_digits(rng, 3), draw_digits(rng, 3)),
}
"""Each task's generator: it draws one (prompt, completion) pair from the random state it is given."""

PROMPTS: dict[str, int] = {"add": 8_100, "reverse": 100_000, "sort": 100_000, "parity": 100_000, "compare": 1_000_000}
"""How many different prompts each task has."""


def make_examples(task: str, count: int, *, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """`count` examples of one task, each with a prompt of its own.

    Args:
        task: a key of `TASKS`.
        count: how many, from 0 up to the task's number of prompts less those in `exclude`.
        seed: fixes the outcome; the same seed draws different examples for different tasks.
        exclude: prompts that must not occur, such as those of the training set when the test set is made.

    >>> train = make_examples("add", 3, seed=0)
    >>> test = make_examples("add", 3, seed=0, exclude={row["prompt"] for row in train})
    >>> len({row["prompt"] for row in train + test})
    6
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    seen = set(exclude)
    if not 0 <= count <= PROMPTS[task] - len(seen):
        raise ValueError(
            f"cannot make {count} examples of {task!r}: it has {PROMPTS[task]} prompts, {len(seen)} of them excluded"
        )
    rng = random.Random(f"{task}/{seed}")
    examples = []
    while len(examples) < count:
        prompt, completion = TASKS[task](rng)
        if prompt not in seen:
            seen.add(prompt)
            examples.append({"prompt": prompt, "completion": completion})
    return examples


def write_tasks(folder: str | Path, *, train: int, test: int, seed: int = 0) -> None:
    """Write `<task>_train.jsonl` and `<task>_test.jsonl` for every task; no test prompt occurs in training.

    The test sets depend on `test` and `seed` alone, so models trained on more or less data are tested alike.

    Args:
        folder: made if absent; files of the same names are replaced.
        train: training examples of each task.
        test: test examples of each task.
        seed: fixes the outcome.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        held_out = make_examples(task, test, seed=seed)
        prompts = {row["prompt"] for row in held_out}
        splits = {"train": make_examples(task, train, seed=seed, exclude=prompts), "test": held_out}
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{task}_{split}.jsonl").write_text(text, encoding="utf-8")
