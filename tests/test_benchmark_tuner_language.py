"""Strategy: the demonstration's small Llama and made-up rows take the place of Gemma and real ones; the table is made
of invented runs whose numbers can be told in advance."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tuner_language
from evidence.language import REAL_TASKS

from peft_cpift import demo


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in REAL_TASKS:
        for split, seed in (("train", 0), ("test", 1)):
            rows = demo.make_examples("reverse", 40, seed=seed)
            (folder / f"{task}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("method", tuner_language.METHODS)
def test_every_method_learns_and_only_final_seeds_see_test_rows(method, data, monkeypatch):
    monkeypatch.setattr(tuner_language, "SIZES", tuner_language.SIZES | {"held_out": 16, "steps": 8, "curve_rows": 4})
    ready = tuner_language.make_settings("demo", method, 1e-2, seed=0)
    if "group_size" in (ready["tuner"] or {}):
        ready["tuner"] = ready["tuner"] | {"group_size": 8}  # as many must divide the layers' widths
    run = tuner_language.make_run(ready, model=demo.MODEL, data=data)
    assert [point["step"] for point in run["curve"]] == list(range(9))
    assert run["curve"][-1]["loss"] < run["curve"][0]["loss"]
    assert run["test"]["loss"] > 0
    assert (run["z"] is not None) == ("Propulsion" in method)
    assert run["peak_bytes"] > 12 * run["parameters"]  # gradients and two moments, of four bytes each
    assert method == "full" or 4 * run["parameters"] <= run["file_bytes"] < 4 * run["parameters"] + 20_000
    sweeping = {**ready, "seed": tuner_language.SWEEP_SEED}
    swept = tuner_language.make_run(sweeping, model=demo.MODEL, data=data)
    assert (swept["test"], swept["peak_bytes"]) == (None, None)


def test_methods_are_timed_side_by_side(data):
    wanted = tuner_language.time_settings("demo", ["full", "LoRA r=1", "Propulsion all, k=1"])
    seconds = tuner_language.measure_time(wanted, model=demo.MODEL, data=data)
    assert list(seconds) == wanted["methods"]
    assert all(len(own) == wanted["rounds"] and min(own) > 0 for own in seconds.values())


def test_steps_are_read_off_between_two_scores():
    curve = [{"step": step, "loss": loss} for step, loss in ((0, 2.0), (10, 1.5), (20, 1.0))]
    assert tuner_language.steps_until(curve, 1.25) == 15
    assert tuner_language.steps_until(curve, 0.9) == math.inf


def test_the_table_of_invented_runs():
    runs = []
    for method, loss in (("full", 1.0), ("LoRA r=8", 1.5)):
        for seed in (tuner_language.SWEEP_SEED, 0, 1):
            for rate in (1e-4, 3e-4) if seed == tuner_language.SWEEP_SEED else (3e-4,):
                score = {"loss": loss + seed / 10, "exact": 0.0}
                curve = [{"step": 0, "loss": 3.0}, {"step": 20, "loss": loss}]
                result = {"curve": curve, "test": score, "validation": score, "parameters": 1234, "z": None}
                result["peak_bytes"] = 7 << 20 if seed == 0 else None
                result["file_bytes"] = None if method == "full" else 5000
                settings = {"method": method, "rate": rate, "seed": seed}
                runs.append({"settings": settings, "result": result, "machine": "M"})
    timed = [{"result": {"full": [1.0, 2.0, 4.0], "LoRA r=8": [1.5, 3.0, 40.0]}}]
    lines = tuner_language.table(runs, timed).splitlines()
    assert "| full | 0.0003* | 1,234 | 1.0500 ± 0.6353 | -0.5000 ± 0.0000 |  | 19 | 1.00 | 7 |  |" in lines
    assert "| LoRA r=8 | 0.0003* | 1,234 | 1.5500 ± 0.6353 |  | +0.5000 ± 0.0000 | 19 | 1.50 | 7 | 5 |" in lines
    assert "Before training the curve's rows have a loss of 3.000." in lines
