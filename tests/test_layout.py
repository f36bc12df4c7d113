"""Strategy: read every import statement of the package, also those inside functions, and compare with the arrows that
the layout allows: they all point down, the two methods do not know each other, and the maths needs torch alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peft_cpift

ROOT = Path(peft_cpift.__file__).parent
BELOW = {
    "errors": set(),
    "checkpoint": {"errors"},
    "adapters": {"checkpoint", "errors"},
    "core": {"adapters", "checkpoint", "errors"},
    "fusion": {"adapters", "core", "checkpoint", "errors"},
    "baselines": {"fusion", "checkpoint", "errors"},
    "isolation": {"core", "errors"},
    "importance": {"isolation", "checkpoint", "core", "errors"},
    "consolidation": {"isolation", "checkpoint", "core", "errors"},
    "propulsion": {"errors"},
    "report": {"checkpoint", "errors"},
    "hub": {"report", "core", "checkpoint", "errors"},
    "demo": set(),
    "recipe": {"errors"},
    "data": {"recipe", "errors"},
    "processes": {"checkpoint"},
    "evaluation": {"data", "recipe", "processes", "errors"},
    "pipeline": {
        *("recipe", "data", "evaluation", "processes", "report", "baselines", "fusion", "isolation", "core"),
        "importance",
        *("checkpoint", "propulsion", "errors"),
    },
    "cli": {"pipeline", "recipe", "processes", "report", "hub", "fusion", "core", "checkpoint", "demo", "errors"},
    "__init__": {"baselines", "consolidation", "fusion", "importance", "isolation", "core", "propulsion", "errors"},
}
# These need no library of training, whose loading takes seconds; tests/test_import.py looks at what is really loaded.
WITHOUT_TRAINING = {"errors", "checkpoint", "core", "fusion", "demo"}
TRAINING = {"peft", "transformers", "trl", "accelerate", "datasets"}


def imports(part: str) -> set[str]:
    """The full names of all modules that a part of the package imports."""
    path = ROOT / part
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} imports relatively"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_part_has_its_place():
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts == BELOW.keys()


@pytest.mark.parametrize("part", BELOW)
def test_arrows_point_down(part):
    inside = {name.split(".")[1] for name in imports(part) if name.startswith("peft_cpift.")}
    assert inside - {part} <= BELOW[part]


@pytest.mark.parametrize("part", sorted(WITHOUT_TRAINING))
def test_maths_and_files_need_no_library_of_training(part):
    assert not {name.split(".")[0] for name in imports(part)} & TRAINING
