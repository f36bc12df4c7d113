"""Strategy: run what the documentation shows, as it stands there: the README's Python, every docstring's example and
every notebook, each in an empty folder."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import types
import warnings
from base64 import b64decode
from pathlib import Path

import datasets
import matplotlib

matplotlib.use("Agg")

import accelerate.optimizer  # noqa: F401  (it loads DeepSpeed, which prints a line that is no example's)
import matplotlib.pyplot as plt
import pytest
import torch
from trl import SFTConfig

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
    for tool in (
        "setuptools",
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "torchao",
        "schedulefree",
        "lm-eval",
        "codebleu",
        "scipy",
    ):
        del bounds[tool]
    assert dict(pins) == bounds


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


# Notebook -> a line, or a part of one, that only a run that went well leaves in its saved output.
NOTEBOOKS = {
    "propulsion_in_five_minutes": "the same z, to the bit: True",
    "cpift_step_by_step": ": unchanged. Other coordinates that moved: ",
    "fusing_adapters_from_the_hub": " coordinates transplanted, ",
}
SETTINGS = "## Settings"
every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS)


def read_notebook(name: str) -> dict:
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))


def code_of(cell: dict) -> types.CodeType:
    return compile("".join(cell["source"]), "notebook", "exec")


def kinds(lines: list[str]) -> set[str]:
    """The lines' first words without their numbers, which differ from machine to machine."""
    return {re.sub(r"\d+", "#", line.split()[0]) for line in lines if line.strip()}


def test_every_notebook_is_tested():
    assert {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)


@every_notebook
def test_notebook_runs(notebook, tmp_path, monkeypatch, capsys):
    """Every cell runs as it stands, prints lines like those saved with it, and draws as many figures."""
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    style = dict(plt.rcParams)
    namespace: dict = {}
    with warnings.catch_warnings():  # notebooks set filters
        for cell in read_notebook(notebook)["cells"]:
            if cell["cell_type"] != "code":
                continue
            drawn.clear()
            exec(code_of(cell), namespace)
            saved = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
            assert len(drawn) == len(saved), cell["id"]
            for axes in (axes for figure in drawn for axes in figure.axes):
                # One thing alone would be a line to compare with, and nothing to compare.
                assert axes.images or len([*axes.lines, *axes.patches, *axes.collections]) > 1, cell["id"]
            for figure in drawn:
                figure.canvas.draw()
            printed = [line for o in cell["outputs"] if o["output_type"] == "stream" for line in o["text"]]
            assert kinds(printed) <= kinds(capsys.readouterr().out.splitlines()), cell["id"]
    plt.close("all")
    plt.rcParams.update(style)
    if notebook == "propulsion_in_five_minutes":
        assert namespace["after"] < namespace["before"] / 2
        assert namespace["difference"] < 1e-4
        return
    results = namespace["results"]
    assert (
        set(results)
        >= {
            "cpift_step_by_step": {"base", "multi-stage", "fused", "final"},
            "fusing_adapters_from_the_hub": {
                f"{k}: {m}" for k in ("propulsion", "lora") for m in ("average", "fused")
            },
        }[notebook]
    )
    # What was trained or merged is better than the base model, on the mean of the tasks.
    mean = {name: sum(row.values()) / len(row) for name, row in results.items()}
    assert all(mean[name] < mean["base"] for name in results if name.split(": ")[-1] in ("final", "fused", "average"))


@every_notebook
def test_saved_notebook_is_that_of_one_clean_run(notebook):
    """As Jupyter's format wants it; run once, from the top, with figures and without errors, noise or paths."""
    file, content = ROOT / f"notebooks/{notebook}.ipynb", read_notebook(notebook)
    assert file.stat().st_size < 300_000
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "display_data", "execute_result") for output in outputs)
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    text = "".join("".join(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)
    assert NOTEBOOKS[notebook] in text
    assert not re.search(r"(^|[\s'\"])/\w+/|Warning|%\|", text)


@every_notebook
def test_settings_for_colab_fit_the_notebook(notebook, monkeypatch):
    """The cell that stands beside the settings sets the same names, and makes rows of prompts and completions."""
    columns = {
        "openai/gsm8k": {"question", "answer"},
        "sahil2801/CodeAlpaca-20k": {"instruction", "input", "output"},
        "tatsu-lab/alpaca": {"instruction", "input", "output", "text"},
    }

    def load_dataset(path, config=None, *, split=None):
        assert config == ("main" if path == "openai/gsm8k" else None)
        rows = datasets.Dataset.from_list([{name: f"{name} {i}" for name in columns[path]} for i in range(2100)])
        return rows if split == "train" else datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cells = read_notebook(notebook)["cells"]
    number = next(i for i, cell in enumerate(cells) if "".join(cell["source"]).startswith(SETTINGS))
    colab = re.search(r"```python\n(.*?)```", "".join(cells[number + 2]["source"]), flags=re.DOTALL)[1]
    here, there = {"torch": torch}, {}
    exec(code_of(cells[number + 1]), here)
    exec(compile(colab, "colab", "exec"), there)
    assert {name for name in here if name.isupper()} <= there.keys()
    for part in ("train", "test"):
        parts = there[part] if isinstance(there[part], dict) else {None: there[part]}
        assert list(parts) == there.get("TASKS", [None])
        for rows in parts.values():
            assert set(rows.column_names) == {"prompt", "completion"}
            assert len(rows) >= 200
            assert all(isinstance(value, str) and value for value in rows[0].values())
    assert {there.get("FIRST"), there.get("SECOND")} <= {None, *there.get("TASKS", ())}
    settings = {key: value for key, value in there["SETTINGS"].items() if key != "fp16"}  # which a CPU refuses
    SFTConfig("training", use_cpu=True, bf16=False, **settings)
