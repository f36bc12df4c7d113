"""Strategy: take the likeliest token one at a time, unpadded and without a cache, and compare with the batched
function; then make tokens that it generates the ends that a model or a tokenizer names, and give the model
settings of its own that are not greedy."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cpift import PropulsionConfig
from peft_cpift.evaluation.generation import end_tokens, generate

PROMPTS = ["1+2=", "abcdef-", "9"]


@pytest.fixture
def loaded(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)


def greedy(model, tokenizer, prompt: str, count: int, ends: set[int]) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(list(prompt))
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and (len(ids) == start or ids[-1] not in ends):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def texts(model, tokenizer, count: int, ends: set[int]) -> list[str]:
    return [tokenizer.decode(greedy(model, tokenizer, p, count, ends), skip_special_tokens=True) for p in PROMPTS]


def test_generation_is_greedy_in_any_batch(loaded):
    expected = texts(*loaded, 5, {1})
    for size in (1, 2, 3):
        batches = [PROMPTS[start : start + size] for start in range(0, 3, size)]
        assert [text for batch in batches for text in generate(*loaded, batch, 5)] == expected


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("whose", ["model", "model's list", "tokenizer"])
def test_any_end_token_ends_a_generation(loaded, whose, adapted):
    model, tokenizer = loaded
    # The second token that follows the first prompt, so that an end there shows.
    end = greedy(model, tokenizer, PROMPTS[0], 6, set())[1]
    if whose == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = [2, end] if "list" in whose else end
    ends = {1, 2, end} if "list" in whose else {1, end}
    expected = texts(model, tokenizer, 6, ends)
    assert expected != texts(model, tokenizer, 6, {1})
    if adapted:
        model = get_peft_model(model, PropulsionConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert generate(model, tokenizer, PROMPTS, 6) == expected
    assert end_tokens(model, tokenizer) == sorted(ends)


def test_a_model_without_an_end_token_uses_the_tokenizers(loaded):
    loaded[0].generation_config.eos_token_id = None
    assert end_tokens(*loaded) == [1]


SETTINGS = [
    {"num_beams": 4},
    {"num_return_sequences": 3, "num_beams": 3},
    {"do_sample": True, "temperature": 5.0},
    {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 6},
    {"min_length": 20},
    {"forced_eos_token_id": 7},
    {"suppress_tokens": [*range(3, 12)]},
    {"begin_suppress_tokens": [*range(3, 20)]},
    {"bad_words_ids": [[number] for number in range(3, 12)]},
    {"exponential_decay_length_penalty": (0, 50.0)},
    {"sequence_bias": [[[5], 90.0]]},
    {"max_length": 2},
    {"num_beams": 4, "repetition_penalty": 9.0, "min_new_tokens": 6, "num_return_sequences": 2},
]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_no_setting_of_the_model_but_its_ends_changes_what_is_greedy(loaded, settings, adapted):
    model, tokenizer = loaded
    end = greedy(model, tokenizer, PROMPTS[0], 6, set())[1]
    expected = texts(model, tokenizer, 6, {1, 2, end})
    own = model.generation_config
    own.update(**settings, eos_token_id=[2, end])
    before = own.to_dict()
    whole = model
    if adapted:
        whole = get_peft_model(model, PropulsionConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
        names = set(vars(whole))
    assert generate(whole, tokenizer, PROMPTS, 6) == expected
    assert model.generation_config is whole.generation_config is own
    assert own.to_dict() == before
    assert not adapted or set(vars(whole)) == names


def test_the_models_settings_come_back_after_an_error(loaded):
    own = loaded[0].generation_config
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(*loaded, PROMPTS, 0)
    assert loaded[0].generation_config is own


def test_generation_leaves_the_models_settings_alone(loaded):
    before = loaded[0].generation_config.to_dict()
    generate(*loaded, PROMPTS, 2)
    assert loaded[0].generation_config.to_dict() == before
