"""Strategy: intervals against scipy's own t-interval; runs are stored, interrupted, joined and asked for again; peaks
of memory against sizes counted by hand."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from evidence.intervals import difference, interval
from evidence.memory import peak_bytes
from evidence.runs import commit, compute, load


def double(settings):
    if settings["x"] == 13:
        raise ValueError("13 is refused")
    return {"y": 2 * settings["x"]}


def test_an_interval_is_scipys():
    values = [3.0, 4.5, 1.25, 7.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


def test_one_seed_proves_nothing():
    found = interval([2.0])
    assert found.half == math.inf
    assert found.sign == 0
    assert found.show() == "2.000 (1 seed)"


def test_a_difference_pairs_seeds():
    one, other = {0: 1.0, 1: 102.0, 2: 53.0}, {2: 52.0, 1: 101.0, 0: 0.0, 7: 9.0}
    assert difference(one, other).show(1, signed=True) == "+1.0 ± 0.0"
    assert difference(one, other).sign == 1
    assert difference(other, one).sign == -1


def test_runs_are_made_once(tmp_path):
    file = tmp_path / "runs.jsonl"
    compute(file, [{"x": 1}, {"x": 2, "seed": 0}], double, workers=0)
    made = []
    wanted = [{"seed": 0, "x": 2}, {"x": 3}, {"x": 3}]  # the order of keys means nothing
    compute(file, wanted, lambda settings: made.append(settings) or double(settings), workers=0)
    assert made == [{"x": 3}]
    assert [run["result"]["y"] for run in load(file)] == [4, 2, 6]


def test_what_was_complete_survives_an_error_in_another_process(tmp_path, monkeypatch):
    file = tmp_path / "runs.jsonl"
    (tmp_path / "doubling.py").write_text(inspect.getsource(double))  # where the other process finds it
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("doubling").double
    with pytest.raises(ValueError, match="13 is refused"):
        compute(file, [{"x": 1}, {"x": 13}], work, workers=1)
    assert [run["result"] for run in load(file)] == [{"y": 2}]
    assert "torch" in load(file)[0]["machine"]


def test_files_of_two_machines_are_joined_by_concatenation(tmp_path):
    file = tmp_path / "runs.jsonl"
    lines = [{"settings": {"x": 1}, "result": {"y": y}, "seconds": 0, "machine": ""} for y in (1, 2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    compute(file, [{"x": 1}, {"x": 5}], double, workers=0)
    assert [run["result"]["y"] for run in load(file)] == [2, 10]
    assert len(file.read_text().splitlines()) == 2


def test_the_commit_is_marked_when_code_differs_but_not_for_results(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit.__wrapped__(tmp_path) is None

    def git(*arguments):
        name = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "First")
    head = git("log", "-1", "--format=%h").stdout.strip()
    (tmp_path / "runs.jsonl").write_text("{}")
    assert commit.__wrapped__(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert commit.__wrapped__(tmp_path) == f"{head}+"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator rounds")
def test_a_peak_is_what_is_alive_at_a_time():
    weight = torch.ones(1000, requires_grad=True)

    def one_after_another():
        for _ in range(5):
            made = weight.detach() * 2
        return made.view(10, 100).t()  # views are the same memory, and so is the weight's own

    assert peak_bytes(one_after_another, [weight]) == 2 * 4000  # the next is made before the last is freed
    assert peak_bytes(lambda: weight.detach().view(10, 100).t(), [weight]) == 0
    assert peak_bytes(lambda: [weight.detach() * n for n in range(5)], [weight]) == 5 * 4000


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's allocator rounds")
def test_a_peak_has_gradients_and_the_optimizers_state():
    weight = torch.ones(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], fused=True)

    def train():
        (weight * 3).sum().backward()
        optimizer.step()

    peak = peak_bytes(train, [weight])
    assert 3 * 4000 <= peak < 3 * 4000 + 100  # the step's count is a scalar
