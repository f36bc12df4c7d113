"""Reading a recipe from YAML, with one-line messages that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import reprlib
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from peft_cpift.errors import CpiftError
from peft_cpift.recipe.tree import Recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which makes nothing but plain values, with the traps of YAML 1.1 taken away."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}  # which plain words are not text; filled below

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Refuse tags, such as `!!set`: a recipe needs none of what they make."""
        event = self.peek_event()
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"'{event.tag}' is a tag: remove it", event.start_mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuse a key that is given twice, where YAML would keep the last in silence."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key '{key.value}' is given twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Depth first, whatever is asked for: so what contains itself is an error."""
        return super().construct_object(node, deep=True)


# As YAML 1.2 has it. In YAML 1.1 `yes` is true, 5e-3 a text, 010 eight, 1:30 ninety, and 2024-01-01 a date.
for _kind, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), list(_first))


def read_recipe(file: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML.

    Args:
        file: the recipe.
        overrides: `key=value` each; the key's parts are joined by dots (`core.percent=0.5`), the value is YAML.

    Raises:
        CpiftError: the file cannot be read, or a key is unknown, missing, of the wrong kind or contradicts another;
            the message names every such key by its path, and of contradictions the first.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CpiftError(f"cannot read recipe {file}: {error}") from error
    tree = _load(text, f"recipe {file}")
    if not isinstance(tree, dict):
        raise CpiftError(
            f"recipe {file} is {'empty' if tree is None else 'not a mapping of keys to values'}: write one by "
            "cpift init; one in a run's folder is written again by cpift run"
        )
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree)


class _Dumper(yaml.SafeDumper):
    """YAML's safe writer, which puts quotes around what another reader of YAML, or ours, would not take for text."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Of the line breaks of Unicode, PyYAML writes one between single quotes, from which it reads a space.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _write_text)


def write_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that `read_recipe` reads back as it is."""
    return yaml.dump(recipe.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain values; see `read_recipe`."""
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        problems = _of_one_branch(error.errors())
        raise CpiftError(_one_line("; ".join(map(_explain, problems)))) from None


def _load(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CpiftError(_one_line(f"{what} is not YAML: {error.problem}{place}")) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last is a number of thousands of digits
        raise CpiftError(_one_line(f"{what} is not YAML: {error}")) from error


def _override(tree: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    if not found or not path:
        raise CpiftError(_one_line(f"'{override}' is not of the form key=value, for instance core.percent=0.5"))
    try:
        value = _load(text, f"the value of '{path}'")
    except CpiftError as error:
        quoted = shlex.quote(f"{path}={json.dumps(text, ensure_ascii=False)}")
        cure = "put a text in quotes of its own" + (f": {quoted}" if len(quoted) < 100 else "")
        raise CpiftError(_one_line(f"{error}; {cure}")) from error
    while "." in path and path not in tree:
        # A task's name may have dots of its own.
        known = [key for key in tree if isinstance(key, str) and path.startswith(f"{key}.")]
        key = max(known, key=len, default=path.partition(".")[0])
        path = path.removeprefix(f"{key}.")
        if not isinstance(tree.get(key) or {}, dict):
            raise CpiftError(_one_line(f"'{override}': '{key}' has no keys below it"))
        tree[key] = dict(tree.get(key) or {})  # a copy, for YAML's aliases make one mapping stand in several places
        tree = tree[key]
    tree[path] = value


BRANCH = re.compile(r"(literal|dict|list)(\[|$)")


def _of_one_branch(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a choice or something else, what the given value was meant to be: a text a choice, and all else no choice."""
    meant = {}
    for problem in problems:
        *where, last = problem["loc"] or ("",)
        if str(last).startswith("literal["):
            meant[tuple(where)] = isinstance(problem["input"], str)

    def fits(location: tuple) -> bool:
        for depth, part in enumerate(location):
            if location[:depth] in meant and BRANCH.match(str(part)):
                return meant[location[:depth]] == str(part).startswith("literal[")
        return True

    return [problem for problem in problems if fits(problem["loc"])]


def _explain(problem: dict[str, Any]) -> str:
    *parents, last = problem["loc"] or ("",)
    if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        path = [*_path(parents), str(last)]
        near = _nearest(path)
        return f"unknown key '{'.'.join(path)}'" + (f": did you mean '{near}'?" if near else ": remove it")
    where = ".".join(_path(problem["loc"])) or "recipe"
    if problem["type"] in {"missing", "missing_argument"}:
        return f"missing key '{where}'"
    message = problem["msg"].removeprefix("Value error, ")
    if where == "recipe" or problem["type"] == "value_error":
        return message if where == "recipe" else f"'{where}': {message}"
    value = problem["input"]
    if problem["loc"][-1] == "[key]":
        return f"'{where}': a key is a text: quote it, as in '{value}':"
    if problem["type"] == "dataclass_type":
        kinds = {kind.__name__: kind for _, kind in sections()}
        keys = ", ".join(field.name for field in dataclasses.fields(kinds[problem["ctx"]["class_name"]]))
        message = f"is a section with the keys {keys}"
    near = []
    if problem["type"] == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value.lower(), re.findall(r"'(\w+)'", problem["ctx"]["expected"]), n=1)
    cure = f": did you mean '{near[0]}'?" if near else ""
    return f"'{where}': {message}, got {reprlib.repr(value)}{cure}"


def _path(location: Sequence[str | int]) -> list[str]:
    """The user's path: pydantic also names the branch of a union, and marks a mapping's key."""
    return [str(part) for part in location if not BRANCH.match(str(part)) and part != "[key]"]


def _one_line(text: str) -> str:
    """Whatever keys and values contain."""
    return " ".join(text.split())


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
    section, name = ".".join(path[:-1] if path[0] != "tasks" else ["tasks", "<task>", *path[2:-1]]), path[-1].lower()
    if near := difflib.get_close_matches(name, known.get(section, []), n=1):
        return near[0]
    paths = {name: f"{where}.{name}".lstrip(".") for where, names in reversed(known.items()) for name in names}
    near = difflib.get_close_matches(name, paths, n=1)
    return paths[near[0]] if near else None
