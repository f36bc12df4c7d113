"""Reading a recipe from YAML, with one-line messages that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import reprlib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from peft_cpift.errors import CpiftError
from peft_cpift.recipe.tree import Recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which makes nothing but plain values, with two traps of YAML 1.1 taken away."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse a key that is given twice, where YAML would keep the last in silence."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes a number as common as 5e-3 for a string, because it has no point.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def read_recipe(file: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML.

    Args:
        file: the recipe.
        overrides: `key=value` each; the key's parts are joined by dots (`core.percent=0.5`), the value is YAML.

    Raises:
        CpiftError: the file cannot be read, or a key is unknown, missing, of the wrong kind or contradicts another;
            the message names every such key by its path.
    """
    try:
        tree = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise CpiftError(f"cannot read recipe {file}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise CpiftError(f"recipe {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise CpiftError(f"recipe {file} is not a mapping of keys to values: see recipes/ for examples")
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain values; see `read_recipe`."""
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise CpiftError("; ".join(_explain(problem) for problem in error.errors())) from None


def _override(tree: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    if not found or not path:
        raise CpiftError(f"'{override}' is not of the form key=value, for instance core.percent=0.5")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise CpiftError(f"the value of '{path}' is not YAML: {' '.join(str(error).split())}") from error
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise CpiftError(f"'{override}': '{key}' has no keys below it")
    tree[last] = value


def _explain(problem: dict[str, Any]) -> str:
    # pydantic also names the branch of a union, and marks a mapping's key, which are no part of the user's path.
    path = [str(part) for part in problem["loc"] if not re.match(r"(literal|dict|list)\[|\[key\]", str(part))]
    where = ".".join(path) or "recipe"
    if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        near = _nearest(path)
        return f"unknown key '{where}'" + (f": did you mean '{near}'?" if near else ": remove it")
    if problem["type"] in {"missing", "missing_argument"}:
        return f"missing key '{where}'"
    message = problem["msg"].removeprefix("Value error, ")
    if where == "recipe" or problem["type"] == "value_error":
        return message if where == "recipe" else f"'{where}': {message}"
    return f"'{where}': {message}, got {reprlib.repr(problem['input'])}"


def sections(tree: type = Recipe, path: str = "") -> Iterator[tuple[str, type]]:
    """The tree's dataclasses by their paths, the tree itself first; a task's own name is `<task>`."""
    yield path, tree
    for name, kind in typing.get_type_hints(tree).items():
        inner = next((part for part in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(part)), None)
        if inner is not None:
            yield from sections(inner, ".".join(filter(None, [path, name, "<task>" if name == "tasks" else ""])))


def _nearest(path: list[str]) -> str | None:
    """The key most like the last of a path: one of the same section, or else of any, with its path."""
    known = {where: [field.name for field in dataclasses.fields(tree)] for where, tree in sections()}
    section = ".".join(path[:-1] if path[0] != "tasks" else ["tasks", "<task>", *path[2:-1]])
    if near := difflib.get_close_matches(path[-1], known.get(section, []), n=1):
        return near[0]
    paths = {name: f"{where}.{name}".lstrip(".") for where, names in reversed(known.items()) for name in names}
    near = difflib.get_close_matches(path[-1], paths, n=1)
    return paths[near[0]] if near else None
