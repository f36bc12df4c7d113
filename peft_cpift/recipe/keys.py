"""The keys of a recipe in words: the command line's help, and the file to start from. Both are made from the tree."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from peft_cpift.recipe.reading import sections
from peft_cpift.recipe.tree import Recipe

WIDTH = 110
# What a starter says where there is no default to show; the rest of its tasks is left to whoever fills it in.
EXAMPLES = {
    "output": "runs/first",
    "tasks.<task>.hub.name": "openai/gsm8k",
    "tasks.<task>.hub.subset": "main",
    "tasks.<task>.files.train": "maths_train.jsonl",
    "tasks.<task>.files.test": "maths_test.jsonl",
    "tasks.<task>.prompt": "{{ question }}",
    "tasks.<task>.completion": "{{ answer }}",
    "tasks.<task>.train_samples": 1000,
    "tasks.<task>.test_samples": 200,
    "tasks.<task>.metric": "exact_match",
    "tasks.<task>.answer": "#### (.*)",
    "prompt": "Question: {{ prompt }}\nAnswer:\n",
    "tuner": {"peft_type": "PROPULSION", "target_modules": "all-linear"},
    "training": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": 512},
    "integration.training": {"learning_rate": 3e-4},
    "evaluation.max_new_tokens": 400,  # a worked solution of gsm8k ends in its answer
    "evaluation.lm_eval.tasks": ["arc_easy"],
    "push.repository": "user/name",
}
SECOND_TASK = """\
  code:
    hub: {name: sahil2801/CodeAlpaca-20k, train: "train[:-500]", test: "train[-500:]"}
    prompt: "{{ instruction }}\\n{{ input }}"
    completion: "{{ output }}"
    train_samples: 1000
    test_samples: 200
"""


def describe(section: type, name: str) -> str:
    """What a key does, in one paragraph."""
    return " ".join((section.__pydantic_fields__[name].description or _headline(section, name)).split())


def list_keys() -> str:
    """Every key of a recipe and what it does, a section after the other."""
    lines = ["", "Keys of a recipe, which key=value changes:", ""]
    for path, section in sections():
        if path:
            lines += ["", *_wrap(f"{path}: {_lower(section.__doc__)}", subsequent_indent="  ")]
        for field in dataclasses.fields(section):
            if not _is_section(field.type, f"{path}.{field.name}".lstrip(".")):
                text = f"{field.name.ljust(20)} {describe(section, field.name)}"
                lines += _wrap(text, initial_indent="  ", subsequent_indent=" " * 23)
    return "\n".join(lines) + "\n"


def make_starter(model: str) -> str:
    """A recipe with two tasks, every other key standing in it as a comment with its default.

    Comments that can be switched on begin with `#` and no space.
    """
    head = "# A recipe of peft-cpift. Check it with `cpift validate`, then `cpift run` it.\n"
    head += "# A key behind a # has the value that stands there, unless it is taken out of the comment.\n"
    return head + "".join(_write(Recipe, "", {**EXAMPLES, "model": model}))


def _write(section: type, path: str, given: Mapping[str, Any], *, active: bool = True) -> list[str]:
    """The lines of a section, indented by its depth."""
    depth = len(path.split(".")) if path else 0
    indent = "  " * depth
    known = {where: kind for where, kind in sections()}
    lines = []
    for field in dataclasses.fields(section):
        key = f"{path}.{field.name}".lstrip(".")
        inner = next((where for where in (key, f"{key}.<task>") if where in known), None)
        text = describe(section, field.name)
        lines.append("\n" if not path else "")
        lines += [f"{line}\n" for line in _wrap(text, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        # An empty section is as if it were not there, so that each of its keys can be switched on by itself.
        on = required or key in given or (inner is not None and field.default is not None) or key == "tasks.<task>.hub"
        on = active and on and not key.startswith("tasks.<task>.files")
        mark = "" if on else "#"
        if inner == "tasks.<task>":
            lines += [f"{indent}tasks:\n", "  maths:\n", *_write(known[inner], inner, given), SECOND_TASK]
        elif inner is not None:
            lines += [f"{indent}{mark}{field.name}:\n", *_write(known[inner], inner, given, active=on)]
        else:
            value = given[key] if key in given else _default(field)
            lines.append(f"{indent}{mark}{field.name}: {_as_yaml(value)}\n")
    return lines


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _as_yaml(value: Any) -> str:
    """In one line, as YAML has it."""
    style = '"' if isinstance(value, str) and not value.isidentifier() else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=1000, sort_keys=False).strip()
    return text.removesuffix("...").strip()


def _is_section(kind: Any, path: str) -> bool:
    return any(where in (path, f"{path}.<task>") for where, _ in sections())


def _headline(section: type, name: str) -> str:
    """Where a key has no text of its own: what its section is."""
    kinds = [kind for where, kind in sections() if where.rpartition(".")[2] == name]
    return kinds[0].__doc__ if kinds else ""


def _wrap(text: str, **indents: str) -> list[str]:
    """Lines, in which a command such as `pip install 'peft-cpift[code]'` is not broken at its hyphen."""
    return textwrap.wrap(text, WIDTH, break_on_hyphens=False, **indents)


def _lower(text: str) -> str:
    """The first sentence, to go on with after a colon."""
    text = re.split(r"(?<=\.)\s", " ".join(text.split()))[0].rstrip(".")
    return text[0].lower() + text[1:]
