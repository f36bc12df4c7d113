"""Strategy: compare the help and the starter with the tree: every key with its text, once, in its section. Then take
the starter's comments away, one key at a time, and see that what stands there was the default."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from peft_cpift import CpiftError
from peft_cpift.cli import app
from peft_cpift.recipe.keys import EXAMPLES, describe, list_keys, make_starter
from peft_cpift.recipe.reading import parse_recipe, read_recipe, sections
from peft_cpift.recipe.tree import Recipe

SECTIONS = dict(sections())
FIELDS = [(path, one.name) for path, section in SECTIONS.items() for one in dataclasses.fields(section)]
STARTER = make_starter("some/model")


def is_section(path: str, name: str) -> bool:
    key = f"{path}.{name}".lstrip(".")
    return key in SECTIONS or f"{key}.<task>" in SECTIONS


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_every_key_is_described_in_one_paragraph(path, name):
    text = describe(SECTIONS[path], name)
    assert len(text) > 10
    assert text[0].isupper() or text[0] == "`" or text.startswith(("p: ", "tau: ", "theta_base: "))
    assert text.endswith(".")
    assert text == squeezed(text)


@pytest.mark.parametrize(("path", "name"), FIELDS)
def test_every_choice_is_in_the_description(path, name):
    kinds = [typing.get_type_hints(SECTIONS[path])[name]]
    while any(typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is not typing.Literal):
        kinds = [
            inner
            for kind in kinds
            for inner in ((kind,) if typing.get_origin(kind) is typing.Literal else typing.get_args(kind))
        ]
    for kind in kinds:
        for choice in typing.get_args(kind):
            assert f"`{choice}`" in describe(SECTIONS[path], name)


def test_a_section_without_text_of_its_own_is_described_by_its_headline():
    assert describe(Recipe, "core") == "Stage 1: what is core."
    assert describe(Recipe, "push") == "Where the result goes on the Hub when the run is done."


def test_help_has_every_key_with_its_text_once_in_its_section():
    blocks = re.split(r"\n\n(?=\S)", list_keys().strip())[1:]
    found = {}
    top, *rest = re.split(r"\n\n", list_keys().strip().partition("\n\n")[2])
    for block in (":\n" + top, *rest):
        head, _, keys = block.partition("\n  ") if not block.startswith(":") else ("", "", block[4:])
        while keys and not re.match(r"[a-z_]+ {2,}|[a-z_]{20} ", keys):  # a headline of two lines
            keys = keys.partition("\n  ")[2]
        found[head.partition(":")[0]] = [
            squeezed(entry.strip()) for entry in re.split(r"\n  (?=[a-z_]+ )", keys.rstrip())
        ]
    assert blocks
    assert found == {
        path: [
            f"{one.name} {describe(section, one.name)}"
            for one in dataclasses.fields(section)
            if not is_section(path, one.name)
        ]
        for path, section in SECTIONS.items()
    }


def test_help_is_narrow_and_breaks_no_command():
    assert max(map(len, list_keys().splitlines())) <= 110
    assert max(map(len, STARTER.splitlines())) <= 110
    assert not [line for line in (list_keys() + STARTER).splitlines() if line.endswith("-")]
    for text in (list_keys(), re.sub(r"\n *# ", " ", STARTER)):
        assert "pip install 'peft-cpift[code]'" in squeezed(text)


@pytest.mark.parametrize("command", ["run", "validate"])
def test_help_of_the_commands_ends_with_the_keys(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert result.stdout.count(list_keys()) == 1
    assert result.stdout.endswith(list_keys())
    assert "Usage" in result.stdout


def read(text: str, folder: Path) -> Recipe:
    (folder / "starter.yaml").write_text(text)
    return read_recipe(folder / "starter.yaml")


def test_the_starter_is_a_recipe_as_it_stands(tmp_path):
    recipe = read(STARTER, tmp_path)
    assert recipe.model == "some/model"
    assert set(recipe.tasks) == {"maths", "code"}
    assert recipe.tasks["maths"].metric == "exact_match"
    assert recipe.training == EXAMPLES["training"]
    assert recipe.integration.training == EXAMPLES["integration.training"]
    assert recipe.prompt == EXAMPLES["prompt"]
    assert recipe.push is None
    assert recipe.evaluation.max_new_tokens == 400  # the answer is the last line of a solution
    recipe.evaluation.max_new_tokens = 64
    plain = parse_recipe({"model": "m", "output": "o", "tasks": recipe.to_dict()["tasks"]})
    for key in ("core", "grouping", "fusion", "baselines", "evaluation", "report", "seed", "dtype", "probe"):
        assert getattr(recipe, key) == getattr(plain, key)


@pytest.mark.parametrize(
    "model", ["true", "null", "1e3", "12", "a b: c", "#x", "é", "{x}", 'a"b', "folder/x.y", "no", "-", "x\\n", "..."]
)
def test_any_name_of_a_model_is_written_as_text(model, tmp_path):
    assert read(make_starter(model), tmp_path).model == model


def entries(text: str) -> list[tuple[str, int]]:
    """The keys of a starter, with the number of their line: by their paths, `maths` being the task."""
    found, open_sections = [], []
    for number, line in enumerate(text.splitlines()):
        if match := re.match(r"( *)#?([a-z_]+):", line):
            depth = len(match[1]) // 2
            open_sections[depth:] = [match[2]]
            found.append((".".join(open_sections), number))
    return found


def test_the_starter_has_every_key_under_its_text():
    lines = STARTER.splitlines()
    places = dict(entries(STARTER))
    assert len(places) == len(entries(STARTER))
    for path, name in FIELDS:
        number = places[f"{path}.{name}".lstrip(".").replace("<task>", "maths")]
        comment = []
        while re.match(r" *# ", lines[number - 1 - len(comment)]):
            comment.insert(0, lines[number - 1 - len(comment)].strip().removeprefix("# "))
        assert " ".join(comment) == describe(SECTIONS[path], name)


def switched_on(path: str) -> str:
    """The starter with one key more, its section, and what that needs."""
    section = path.rpartition(".")[0]
    needed = {path, section}
    for parent, kind in SECTIONS.items():
        if parent.replace("<task>", "maths") in (path, section):
            required = [one for one in dataclasses.fields(kind) if one.default is one.default_factory]
            needed |= {f"{parent.replace('<task>', 'maths')}.{one.name}" for one in required}
    lines = STARTER.splitlines()
    for key, number in entries(STARTER):
        if key in needed:
            lines[number] = lines[number].replace("#", "", 1) if re.match(" *#", lines[number]) else lines[number]
        if key.startswith("tasks.maths.hub") and "tasks.maths.files" in path:  # it is the one or the other
            lines[number] = "#" + lines[number]
    return "\n".join(lines) + "\n"


COMMENTED = [path for path, number in entries(STARTER) if STARTER.splitlines()[number].lstrip().startswith("#")]


@pytest.mark.parametrize("path", COMMENTED)
def test_a_key_taken_out_of_its_comment_has_the_value_that_it_has_in_it(path, tmp_path):
    recipe = read(switched_on(path), tmp_path)
    without = read(STARTER, tmp_path).to_dict()
    if path.startswith(("push", "evaluation.lm_eval", "tasks.maths.files")):  # without them there is no such section
        section = path if path.endswith(("files", "lm_eval")) else path.rpartition(".")[0] or path
        for part in section.split("."):
            without, recipe = without[part], recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
        assert without is None
        assert dataclasses.is_dataclass(recipe)
    else:
        assert recipe.to_dict() == without


def test_every_comment_without_a_space_is_a_key_and_every_default_is_behind_one():
    assert len(COMMENTED) > 40
    for line in STARTER.splitlines():
        if re.match(r" *#[^ ]", line):
            assert yaml.safe_load(line.strip()[1:]), line
    commented = {path.replace("maths", "<task>") for path in COMMENTED}
    assert not commented & (
        EXAMPLES.keys() - {key for key in EXAMPLES if "files" in key or "lm_eval" in key or "push" in key}
    )


def test_init_writes_the_starter_and_says_what_to_do(tmp_path):
    file = tmp_path / "new" / "recipe.yaml"
    result = CliRunner().invoke(app, ["init", str(file), "--model", "some/model"])
    assert result.exit_code == 0, result.output
    assert file.read_text() == STARTER
    assert f"cpift validate {file}" in result.stdout
    assert os.listdir(file.parent) == ["recipe.yaml"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_init_overwrites_nothing(tmp_path, kind):
    file = tmp_path / "recipe.yaml"
    if kind == "file":
        file.write_text("mine")
    else:
        file.mkdir()
    result = CliRunner().invoke(app, ["init", str(file)])
    assert isinstance(result.exception, CpiftError)
    assert str(result.exception) == f"{file} exists: choose another file"
    assert file.is_dir() or file.read_text() == "mine"
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_init_that_is_cut_off_leaves_no_recipe(tmp_path, monkeypatch):
    def cut_off(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    result = CliRunner().invoke(app, ["init", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, OSError)
    assert os.listdir(tmp_path) == []


def test_help_needs_no_torch():
    code = (
        "import sys; from peft_cpift.recipe.keys import list_keys, make_starter; list_keys(); make_starter('m');"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules) or 'none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
