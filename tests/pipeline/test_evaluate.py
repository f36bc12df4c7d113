"""Strategy: recompute every loss row by row, unpadded, in float64 with a softmax written out, and every generation by
taking the likeliest token one at a time; then compare with the batched, padded functions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cpift import CpiftError
from peft_cpift.pipeline.data import load_tasks
from peft_cpift.pipeline.evaluate import Score, completion_losses, evaluate, generate, normalised_average
from peft_cpift.pipeline.reading import parse_recipe

PROMPTS = ["1+2=", "abcdef-", "9"]
COMPLETIONS = ["3", "ab", "0123"]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


def reference_loss(model, tokenizer, prompt: str, completion: str, *, end: bool = True) -> tuple[float, int]:
    head = tokenizer.convert_tokens_to_ids(list(prompt))
    tail = tokenizer.convert_tokens_to_ids(list(completion)) + ([tokenizer.eos_token_id] if end else [])
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0].double()
    total = 0.0
    for i, token in enumerate(tail):
        row = logits[len(head) + i - 1]
        total -= math.log(math.exp(row[token]) / sum(math.exp(value) for value in row.tolist()))
    return total, len(tail)


@pytest.mark.parametrize("end", [True, False])
def test_losses_of_a_padded_batch(loaded, end):
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, PROMPTS, COMPLETIONS, end=end)
    expected = [reference_loss(*loaded, p, c, end=end) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert counts.tolist() == [n for _, n in expected]
    assert losses.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-5)


def test_max_length_leaves_out_what_is_beyond(loaded):
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, ["9"], ["0123"], max_length=3)
    assert counts.tolist() == [2]
    assert losses.item() == pytest.approx(reference_loss(*loaded, "9", "01", end=False)[0], rel=1e-5)


def test_generation_is_greedy_in_any_batch(loaded):
    model, tokenizer = loaded
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.convert_tokens_to_ids(list(prompt))
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 5 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    for size in (1, 2, 3):
        assert generate(model, tokenizer, PROMPTS, size, 5) == expected


def test_scores_of_every_metric(loaded, tree):
    model, tokenizer = loaded
    recipe = parse_recipe({**tree, "evaluation": {"batch_size": 3, "max_new_tokens": 4}})
    data = load_tasks(recipe)
    scores = evaluate(model, tokenizer, recipe, data)
    for name, task in data.items():
        pairs = list(zip(task.test["prompt"], task.test["completion"], strict=True))
        losses = [reference_loss(model, tokenizer, *pair) for pair in pairs]
        loss = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
        assert scores[name].loss == pytest.approx(loss, rel=1e-5)
        if name == "letters":
            assert scores[name].score == pytest.approx(math.exp(-loss), rel=1e-5)
        if name == "larger":
            hits = 0
            for prompt, gold in pairs:
                a, b = (reference_loss(model, tokenizer, prompt, choice, end=False)[0] for choice in "ab")
                hits += (gold == "a") == (a < b)
            assert scores[name].score == hits / len(pairs)


def test_exact_match_counts_generations_whose_answer_equals_the_gold_one(loaded, tree, monkeypatch):
    model, tokenizer = loaded
    recipe = parse_recipe(tree)
    data = load_tasks(recipe)
    gold = data["sums"].test["completion"]
    fake = [gold[0], f"  {gold[1]} ", "no mark", "=wrong", *gold[4:]]
    monkeypatch.setattr("peft_cpift.pipeline.evaluate.generate", lambda *args: fake)
    assert evaluate(model, tokenizer, recipe, data)["sums"].score == 6 / 8


def test_average_is_on_the_papers_scale():
    assert normalised_average({"a": Score(1.0, 0.5), "b": Score(2.0, 1.0)}) == 7.5


def test_a_model_that_diverged_is_an_error(tiny_model, tree):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.model.norm.weight.data.fill_(float("inf"))
    recipe = parse_recipe(tree)
    with pytest.raises(CpiftError, match="held-out loss became nan"):
        evaluate(model, tokenizer, recipe, load_tasks(recipe))
