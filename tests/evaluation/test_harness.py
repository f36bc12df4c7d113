"""Strategy: score a task of our own, whose rows lie in a local file, and recompute its metric from the log-likelihoods
of `likelihood.py`. That needs `pip install 'peft-cpift[lm-eval]'`; without it, only what is said of that is tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_cpift
from peft_cpift import CpiftError, PropulsionConfig
from peft_cpift.evaluation.harness import check_harness, score_harness
from peft_cpift.evaluation.likelihood import completion_losses
from peft_cpift.recipe.tree import LmEval

ROWS = [{"q": f"{a}+{b}=", "choices": [str(a + b), str(a * b)], "gold": a % 2} for a in range(5) for b in range(4)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a task, one whose rows are missing, and one that would execute code."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, rows, more in (
        ("tiny_sums", "rows.jsonl", ""),
        ("no_rows", "nothing.jsonl", ""),
        ("tiny_code", "rows.jsonl", "unsafe_code: true"),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=folder / rows) + more)
    return folder


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(CpiftError, match=r"'evaluation.lm_eval' needs lm-eval: pip install 'peft-cpift\[lm-eval\]'"):
        check_harness(LmEval(tasks=["arc_easy"]))


def test_what_cannot_be_run_is_said_before(folder, monkeypatch):
    # Its own tasks are thousands of files, read once here.
    manager = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=folder)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: manager)
    check_harness(LmEval(tasks=["tiny_sums"], include_path=folder))
    for task, message in (
        ("tiny_sumz", "has no task 'tiny_sumz': did you mean tiny_sums"),
        ("arc_easi", "has no task 'arc_easi': did you mean arc_easy or "),
        ("qqqqqqqqqqqq", "has no task 'qqqqqqqqqqqq': `lm-eval ls tasks` lists them"),
        ("no_rows", "the data of 'no_rows' cannot be loaded: .*nothing.jsonl.*; connect"),
        ("tiny_code", "'tiny_code' executes the code that the model writes"),
    ):
        with pytest.raises(CpiftError, match=message):
            check_harness(LmEval(tasks=["tiny_sums", task], include_path=folder))
    with pytest.raises(CpiftError, match=r"include_path' is .*/nowhere, which is not a folder"):
        check_harness(LmEval(tasks=["tiny_sums"], include_path=folder / "nowhere"))


@pytest.mark.parametrize("adapted", [False, True])
def test_scores_of_a_task_of_our_own(tiny_model, folder, adapted):
    pytest.importorskip("lm_eval")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    if adapted:
        targets = ["embed_tokens", "q_proj", "down_proj"]  # the embedding is tied to the output layer
        model = get_peft_model(model, PropulsionConfig(target_modules=targets, degree=3, task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hits = []
    with torch.no_grad():
        for row in ROWS:
            losses, _ = completion_losses(model, tokenizer, [row["q"]] * 2, row["choices"], end=False)
            hits.append(int(losses.argmin()) == row["gold"])
    scores = score_harness(model, tokenizer, LmEval(tasks=["tiny_sums"], include_path=folder), 4)
    assert 0 < sum(hits) < len(hits)
    mean = sum(hits) / len(hits)
    error = (mean * (1 - mean) / (len(hits) - 1)) ** 0.5
    assert scores == {"tiny_sums": {"acc": pytest.approx(mean), "acc_stderr": pytest.approx(error)}}
    first = LmEval(tasks=["tiny_sums"], include_path=folder, limit=1)
    assert score_harness(model, tokenizer, first, 4) == {"tiny_sums": {"acc": float(hits[0])}}
    assert not model.training
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


@pytest.mark.slow
def test_two_processes_score_as_one(tiny_model, folder, tree, tmp_path):
    pytest.importorskip("lm_eval")
    settings = {"tasks": ["tiny_sums"], "include_path": str(folder)}
    (tmp_path / "recipe.json").write_text(json.dumps(tree | {"evaluation": {"lm_eval": settings}}))
    worker = Path(__file__).with_name("processes_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(peft_cpift.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, timeout=150, check=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    expected = score_harness(model, tokenizer, LmEval(**settings), 3)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text())["harness"] == expected
