"""Strategy: recompute every loss row by row, unpadded, in float64 with a softmax written out, on tokens put together
by hand; then compare with the batched, padded function."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cpift.evaluation.likelihood import completion_losses

PROMPTS = ["1+2=", "abcdef-", "9"]
COMPLETIONS = ["3", "ab", "0123"]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


def reference_loss(model, head: list[int], tail: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([head + tail])).logits[0].double()
    total = 0.0
    for i, token in enumerate(tail):
        row = logits[len(head) + i - 1]
        total -= math.log(math.exp(row[token]) / sum(math.exp(value) for value in row.tolist()))
    return total


@pytest.mark.parametrize("end", [True, False])
def test_losses_of_a_padded_batch(loaded, end):
    model, tokenizer = loaded
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, PROMPTS, COMPLETIONS, end=end)
    ids = tokenizer.convert_tokens_to_ids
    tails = [ids(list(text)) + [tokenizer.eos_token_id] * end for text in COMPLETIONS]
    expected = [reference_loss(model, ids(list(p)), tail) for p, tail in zip(PROMPTS, tails, strict=True)]
    assert counts.tolist() == [len(tail) for tail in tails]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_max_length_leaves_out_what_is_beyond(loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, ["9", "12345"], ["0123", "0"], max_length=3)
    ids = tokenizer.convert_tokens_to_ids
    assert counts.tolist() == [2, 0]
    assert losses.tolist() == pytest.approx([reference_loss(model, ids(["9"]), ids(["0", "1"])), 0.0], rel=1e-5)


def test_plain_text_counts_from_its_second_token(loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, ["", "1+", ""], ["a-b", "2", "c"])
    ids, end = tokenizer.convert_tokens_to_ids, [tokenizer.eos_token_id]
    assert counts.tolist() == [3, 2, 1]
    expected = [
        reference_loss(model, ids(["a"]), ids(["-", "b"]) + end),
        reference_loss(model, ids(["1", "+"]), ids(["2"]) + end),
        reference_loss(model, ids(["c"]), end),
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_plain_text_counts_from_its_first_token_after_a_beginning_of_sequence(loaded, tiny_model):
    model, tokenizer = loaded[0], AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    with torch.no_grad():
        losses, counts = completion_losses(model, tokenizer, ["", "1+"], ["a-b", "2"])
    ids, end = tokenizer.convert_tokens_to_ids, [tokenizer.eos_token_id]
    assert counts.tolist() == [4, 2]
    expected = [
        reference_loss(model, [2], ids(["a", "-", "b"]) + end),
        reference_loss(model, [2, *ids(["1", "+"])], ids(["2"]) + end),
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_end_that_the_text_has_already_is_not_added(loaded):
    with torch.no_grad():
        losses, counts = completion_losses(*loaded, ["1+"], ["2<eos>"])
        plain, _ = completion_losses(*loaded, ["1+"], ["2"])
    assert counts.tolist() == [2]
    assert torch.equal(losses, plain)


def test_a_half_precision_model_is_scored_in_float32(tiny_model, loaded):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        losses, _ = completion_losses(model, loaded[1], PROMPTS, COMPLETIONS)
        exact, _ = completion_losses(*loaded, PROMPTS, COMPLETIONS)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(exact.tolist(), rel=2e-2)
