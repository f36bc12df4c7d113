"""Strategy: count the bytes of graphs small enough to count by hand, and let the methods of the benchmark be compared
with each other on its tiny model; the whole script runs only among the slow tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tuner.py"


@pytest.fixture(scope="module")
def tuner():
    spec = importlib.util.spec_from_file_location("benchmark_tuner", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph(weight, function):
    """What the counters need of a `Method`, around one function."""
    own = {weight.untyped_storage().data_ptr()}
    return SimpleNamespace(own=own, ids=torch.zeros(1), call=None, model=None, forward=lambda: (function(), None))


def test_a_storage_counts_once_and_the_model_does_not(tuner):
    weight = nn.Parameter(torch.ones(4))

    def function():
        x = torch.ones(10, 4) + 0  # 160 bytes
        y = x * weight  # keeps x and weight
        z = y.exp()  # keeps z, 160 bytes
        return (z[:2] * x[2:4] * weight.view(2, 2).view(4)).sum()  # views of x and z; one product of 32 bytes

    assert tuner.saved_bytes(graph(weight, function)) == 160 + 160 + 32
    assert tuner.held_bytes(graph(weight, function)) == 160 + 160 + 32 + 4  # and the loss itself


def test_what_hooks_do_not_see_is_still_held(tuner):
    class Hoard(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x + 1  # 400 bytes
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(100)

    weight = nn.Parameter(torch.ones(100))
    hoard = graph(weight, lambda: Hoard.apply(weight))
    assert tuner.saved_bytes(hoard) == 0
    assert tuner.held_bytes(hoard) == 400 + 4


def test_ratios_are_formed_by_round(tuner):
    assert tuner.ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == [2.0, 1.5, 2.5]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_script_runs(tuner, monkeypatch, tmp_path, dtype):
    arguments = ["--quick", "--parts", "--rounds", "2", "--dtype", dtype, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tuner.py", *arguments])
    tuner.main()
    assert {path.name for path in tmp_path.iterdir()} == {f"tiny-cpu-{dtype}.json", f"tiny-cpu-{dtype}.md"}
    assert str(tmp_path) not in (tmp_path / f"tiny-cpu-{dtype}.json").read_text()
