"""Strategy: put the scores together from losses and generations of single rows, whose functions have tests of their
own, and compare two processes with one, bit by bit."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_cpift
from peft_cpift import CpiftError
from peft_cpift.data.tasks import TaskData, load_tasks
from peft_cpift.evaluation.evaluate import (
    Score,
    check_lengths,
    check_metrics,
    evaluate,
    measure_losses,
    normalised_average,
)
from peft_cpift.evaluation.generation import generate
from peft_cpift.evaluation.likelihood import completion_losses
from peft_cpift.recipe.reading import parse_recipe

WORKER = Path(__file__).with_name("processes_worker.py")


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


def row_loss(loaded, prompt: str, completion: str, **options) -> tuple[float, int]:
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, [prompt], [completion], **options)
    return losses.item(), counts.item()


def mean_loss(loaded, rows: Dataset, **options) -> float:
    losses = [row_loss(loaded, row["prompt"], row["completion"], **options) for row in rows]
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def test_scores_of_every_metric(loaded, tree):
    tree["tasks"]["letters"] |= {"metric": "exact_match", "answer": "(.)$"}
    tree["tasks"]["sums"] = {}
    recipe = parse_recipe({**tree, "evaluation": {"batch_size": 3, "max_new_tokens": 4}})
    data = load_tasks(recipe, loaded[1])
    scores = evaluate(*loaded, recipe, data)
    assert list(scores) == list(data)
    for name, task in data.items():
        assert scores[name].loss == pytest.approx(mean_loss(loaded, task.test), rel=1e-5)
    assert scores["sums"].score == pytest.approx(math.exp(-scores["sums"].loss))
    hits = [generate(*loaded, [row["prompt"]], 4)[0].strip()[-1:] == row["completion"] for row in data["letters"].test]
    assert scores["letters"].score == sum(hits) / len(hits)
    hits = []
    for row in data["larger"].test:
        a, b = (row_loss(loaded, row["prompt"], choice, end=False)[0] for choice in "ab")
        hits.append((row["completion"] == "a") == (a < b))
    assert scores["larger"].score == sum(hits) / len(hits)


def test_the_likeliest_of_three_choices(loaded, tree):
    data = load_tasks(parse_recipe(tree), loaded[1])
    tree["tasks"]["larger"]["choices"] = ["0", "11", "b"]  # none begins another
    recipe = parse_recipe({**tree, "evaluation": {"batch_size": 2, "max_new_tokens": 1}})
    prompts, choices = ["1-", "ab", "9=", "cc?", "0"], ["0", "11", "b"]
    losses = [[row_loss(loaded, p, choice, end=False)[0] for choice in choices] for p in prompts]
    likeliest = [choices[row.index(min(row))] for row in losses]
    for wrong in range(len(prompts) + 1):
        gold = [{"0": "11", "11": "b", "b": "0"}[c] if i < wrong else c for i, c in enumerate(likeliest)]
        data["larger"] = rows(prompts, gold, choices)
        assert evaluate(*loaded, recipe, data)["larger"].score == (5 - wrong) / 5


def test_a_choice_is_scored_without_its_end(loaded, tree):
    """Some prompts are looked for whose likeliest choice is another one when the end counts as well."""
    data = load_tasks(parse_recipe(tree), loaded[1])
    tree["tasks"]["larger"]["choices"] = choices = list("0123456789")
    prompts, gold = [], []
    for prompt in "abcdefghij":
        plain, ended = ([row_loss(loaded, prompt, choice, end=end)[0] for choice in choices] for end in (False, True))
        if (best := plain.index(min(plain))) != ended.index(min(ended)):
            prompts.append(prompt)
            gold.append(choices[best])
    assert prompts
    assert evaluate(*loaded, parse_recipe(tree), data | {"larger": rows(prompts, gold, choices)})["larger"].score == 1


@pytest.mark.parametrize("end", ["", "-?"])
@pytest.mark.parametrize("choices", [["1", "10", "7"], ["10", "7", "1"], ["ab", "abc", "a", "b"]])
def test_choices_of_which_one_begins_another_are_scored_with_their_ends(loaded, tree, choices, end):
    """`end` is a chat template's, before that of the sequence."""
    data = load_tasks(parse_recipe(tree), loaded[1])
    tree["tasks"]["larger"]["choices"] = choices
    prompts = [a + b for a in "0123456789" for b in "ab="]
    gold = []
    for prompt in prompts:
        losses = [row_loss(loaded, prompt, choice + end)[0] for choice in choices]
        gold.append(choices[losses.index(min(losses))])
    data["larger"] = rows(prompts, gold, choices, end)
    assert evaluate(*loaded, parse_recipe(tree), data)["larger"].score == 1


def test_the_longer_of_two_choices_can_be_the_likelier_one(tiny_model, tree):
    """A model that goes on from 1 with 0, and from 0 with the end."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    one, zero = tokenizer.convert_tokens_to_ids(["1", "0"])
    follows = torch.zeros(len(tokenizer), len(tokenizer))
    follows[one, zero] = follows[zero, tokenizer.eos_token_id] = 9
    model.forward = lambda input_ids, attention_mask: SimpleNamespace(logits=follows[input_ids])
    data = load_tasks(parse_recipe(tree), tokenizer)
    data["larger"] = rows(["a", "b"], ["10", "10"], ["1", "10"])
    tree["tasks"] = {"larger": tree["tasks"]["larger"] | {"choices": ["1", "10"]}, "letters": {}}
    assert evaluate(model, tokenizer, parse_recipe(tree), data)["larger"].score == 1


def rows(prompts: list[str], completions: list[str], choices: list[str] | None = None, end: str = "") -> TaskData:
    part = Dataset.from_dict({"prompt": prompts, "completion": completions, "answer": completions})
    return TaskData(train=part, test=part, choices=choices, end=end)


def test_exact_match_counts_generations_whose_answer_equals_the_gold_one(loaded, tree, monkeypatch):
    recipe = parse_recipe(tree)
    data = load_tasks(recipe, loaded[1])
    gold = data["sums"].test["completion"]
    fake = [gold[0], f"  {gold[1]} ", "no mark", "=wrong", *gold[4:]]
    monkeypatch.setattr("peft_cpift.evaluation.evaluate.generate", lambda *args: fake)
    assert evaluate(*loaded, recipe, data)["sums"].score == 6 / 8


def test_codebleu_gets_all_generations_and_completions(loaded, tree, monkeypatch):
    tree["tasks"]["letters"] |= {"metric": "codebleu", "language": "ruby"}
    recipe = parse_recipe({**tree, "evaluation": {"batch_size": 3, "max_new_tokens": 4}})
    data = load_tasks(recipe, loaded[1])
    seen = []
    monkeypatch.setattr("peft_cpift.evaluation.evaluate.code_bleu", lambda *args: seen.append(args) or 0.625)
    assert evaluate(*loaded, recipe, data)["letters"].score == 0.625
    test = data["letters"].test
    generated = [generate(*loaded, [prompt], 4)[0] for prompt in test["prompt"]]
    assert seen == [(generated, list(test["completion"]), "ruby")]


def test_metrics_are_checked_by_task(tree, monkeypatch):
    seen = []
    monkeypatch.setattr("peft_cpift.evaluation.evaluate.check_codebleu", lambda *args: seen.append(args))
    check_metrics(parse_recipe(tree))
    assert seen == []
    tree["tasks"]["letters"] |= {"metric": "codebleu", "language": "ruby"}
    check_metrics(parse_recipe(tree))
    assert seen == [("letters", "ruby")]


def lengths_tree(tree: dict, metric: dict) -> dict:
    return tree | {"tasks": {"letters": metric, "larger": {}}, "evaluation": {"max_new_tokens": 4}}


@pytest.mark.parametrize(
    ("metric", "missed"),
    [
        ({"metric": "exact_match", "answer": "=(.*)"}, "exact_match misses their answers"),
        ({"metric": "exact_match"}, "exact_match misses their answers"),
        ({"metric": "codebleu", "language": "ruby"}, "codebleu misses their ends"),
    ],
)
def test_generations_too_short_for_more_than_a_tenth_of_the_rows_are_named(loaded, tree, metric, missed):
    recipe = parse_recipe(lengths_tree(tree, metric))
    short = rows(["a"] * 8, ["23=4"] * 8)  # as long as a generation can be
    for long in (["abcd=1", "abc=12"], ["abcd=1"]):
        # One row of ten can be lost, two cannot.
        data = {"letters": rows(["a?"] * 10, [*short.test["answer"], "b=1", *long][-10:])}
        expected = (
            f"task 'letters': {len(long)} of 10 held-out completions are longer than evaluation.max_new_tokens (4): "
            f"raise it to 6, or {missed}"
        )
        assert check_lengths(recipe, data | {"larger": short}, loaded[1]) == [expected][: len(long) - 1]


@pytest.mark.parametrize(
    ("metric", "completion"),
    [
        ({"metric": "exact_match", "answer": "(.*?)="}, "1=abcdefgh"),  # the answer is there before the end
        ({"metric": "exact_match"}, "1234<eos><eos>"),  # no part of the answer
        ({"metric": "choice", "choices": ["abcdefgh"]}, "abcdefgh"),
        ({"metric": "loss"}, "abcdefgh"),
    ],
)
def test_long_completions_that_lose_no_answer_are_not_named(loaded, tree, metric, completion):
    part = rows(["a"] * 3, [completion] * 3).test
    part = part.remove_columns("answer").add_column("answer", [completion.replace("<eos>", "")] * 3)
    data = dict.fromkeys(("letters", "larger"), TaskData(part, part))
    assert check_lengths(parse_recipe(lengths_tree(tree, metric)), data, loaded[1]) == []


def test_plain_text_and_its_limit(loaded, tree):
    tree |= {"tasks": {"letters": {}, "sums": {}}, "evaluation": {"batch_size": 2, "max_length": 4}}
    recipe = parse_recipe(tree)
    data = rows(["", "", ""], ["a", "abcdefg", "0-1"])
    expected = mean_loss(loaded, data.test, max_length=4)
    score = evaluate(*loaded, recipe, dict.fromkeys(recipe.tasks, data))["letters"]
    assert score == Score(pytest.approx(expected, rel=1e-5), pytest.approx(math.exp(-expected), rel=1e-5))


def test_losses_of_given_rows(loaded, tree):
    recipe = parse_recipe({**tree, "evaluation": {"batch_size": 5, "max_length": 5}})
    parts = {name: data.train for name, data in load_tasks(recipe, loaded[1]).items()}
    losses = measure_losses(*loaded, {"larger": parts["larger"], "sums": parts["sums"]}, recipe)
    assert list(losses) == ["larger", "sums"]
    for name, loss in losses.items():
        assert loss == pytest.approx(mean_loss(loaded, parts[name], max_length=5), rel=1e-5)


@pytest.mark.parametrize("score", [evaluate, measure_losses])
def test_no_dropout_no_gradient_and_no_trace_but_the_mode(tiny_model, tree, score):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attention_dropout=0.5).train()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    recipe = parse_recipe(tree)
    before = {name: p.clone() for name, p in model.named_parameters()}, model.config.to_dict()
    data = load_tasks(recipe, tokenizer)
    found = []
    for _ in range(2):
        model.train()
        if score is evaluate:
            found.append(evaluate(model, tokenizer, recipe, data))
        else:
            found.append(measure_losses(model, tokenizer, {"sums": data["sums"].test}, recipe))
    assert found[0] == found[1]
    assert not model.training
    assert all(torch.equal(p, before[0][name]) and p.grad is None for name, p in model.named_parameters())
    assert model.config.to_dict() == before[1]


def test_average_is_on_the_papers_scale():
    assert normalised_average({"a": Score(1.0, 0.5), "b": Score(2.0, 1.0)}) == 7.5


def test_a_model_that_diverged_is_an_error(tiny_model, tree):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.model.norm.weight.data.fill_(float("inf"))
    recipe = parse_recipe(tree)
    data = load_tasks(recipe, tokenizer)
    with pytest.raises(CpiftError, match="loss on task 'sums' became nan"):
        evaluate(model, tokenizer, recipe, data)
    with pytest.raises(CpiftError, match="loss on task 'larger' became nan"):
        measure_losses(model, tokenizer, {"larger": data["larger"].train}, recipe)


def test_a_limit_that_leaves_no_completion_is_an_error(loaded, tree):
    recipe = parse_recipe({**tree, "evaluation": {"max_length": 4}})
    with pytest.raises(CpiftError, match=r"no completion of task 'sums' begins within evaluation\.max_length=4"):
        measure_losses(*loaded, {"sums": load_tasks(recipe, loaded[1])["sums"].train}, recipe)


def test_two_processes_share_the_work_and_get_the_scores_of_one(loaded, tree, tmp_path):
    tree["evaluation"] = {"batch_size": 3, "max_new_tokens": 4}
    (tmp_path / "recipe.json").write_text(json.dumps(tree))
    launch(tmp_path, 2)
    recipe = parse_recipe(tree)
    data = load_tasks(recipe, loaded[1])
    scores = {name: asdict(score) for name, score in evaluate(*loaded, recipe, data).items()}
    losses = measure_losses(*loaded, {name: part.train for name, part in data.items()}, recipe)
    assert not dist.is_initialized()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["processes"] == 2
        assert found["shares"] == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 0], [5, 0], [6, 1]]
        assert found["fewer"] == [[0, 0]]
        assert found["none"] == []
        assert found["scores"] == scores
        assert found["losses"] == losses


def launch(folder: Path, processes: int) -> None:
    """Run the worker in new processes that are certain to end."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(WORKER)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")} | {
        "PYTHONPATH": os.pathsep.join([str(Path(peft_cpift.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command, str(folder)], cwd=folder, env=environment, timeout=150, **log)
    if done.returncode:
        pytest.fail(f"the processes ended with {done.returncode}:\n{done.stdout[-8000:]}", pytrace=False)
