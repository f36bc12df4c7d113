"""Strategy: run what the documentation shows, as it stands there: the README's Python, every docstring's example and
every notebook, each in an empty folder."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import peft_cpift

ROOT = Path(__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(peft_cpift.__path__, "peft_cpift."))


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\]\(([^):#]+)\)", text)) | set(
        re.findall(r"`((?:recipes|peft_cpift|constraints)/[^`*]+)`", text)
    )
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_oldest_versions_tested_are_the_lower_bounds():
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints/oldest.txt").read_text(), flags=re.MULTILINE)
    bounds = dict(re.findall(r'"([\w.-]+)>=([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    for tool in ("setuptools", "pytest", "hypothesis", "ruff", "torchao", "schedulefree", "lm-eval", "codebleu"):
        del bounds[tool]
    assert dict(pins) == bounds


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), namespace)
    assert set(namespace["results"]) >= {"base", "fused", "final"}
