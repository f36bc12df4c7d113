"""Propulsion adapters as LoRA adapters: loaded by stock PEFT, they come as near to the original as their rank allows.

At full rank the outputs agree; at a lower one the loss is that of the best approximation there is, computed here from
the singular values of the merged change (Eckart-Young), and it is the loss that is reported.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_cpift.propulsion import PropulsionConfig, convert_to_lora

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANDOM = {"init_weights": False}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=["without biases", "with biases", "some biases", "conv1d"])
def base(request, make_llama) -> nn.Module:
    if request.param == "conv1d":
        model = gpt2()
    else:
        model = make_llama(attention_bias=request.param != "without biases", mlp_bias=request.param == "with biases")
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias, std=0.5)
    return model


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def adapt(base: nn.Module) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(copy.deepcopy(base), PropulsionConfig(target_modules="all-linear", **RANDOM)).eval()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:fan_in_fan_out", "ignore:the LoRA adapter")
def test_at_full_rank_stock_peft_computes_the_same(base, input_ids, tmp_path):
    model = adapt(base)
    conversion = convert_to_lora(model, rank=1.0)
    conversion.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    assert max(conversion.errors.values()) < 1e-5
    difference = (logits(model, input_ids) - logits(base, input_ids)).abs().max()
    torch.testing.assert_close(logits(lora, input_ids), logits(model, input_ids), rtol=0, atol=1e-3 * difference)


def test_the_reported_error_is_that_of_the_best_low_rank_approximation(make_llama):
    model = get_peft_model(make_llama(), PropulsionConfig(target_modules=LINEAR, **RANDOM))
    with pytest.warns(UserWarning, match=r"loses \d+% of the change of the weights; raise the rank, or merge"):
        conversion = convert_to_lora(model, rank=3)
    before = {name: p.detach().clone() for name, p in model.get_base_model().named_parameters()}
    model.merge_adapter()
    after = dict(model.get_base_model().named_parameters())
    assert len(conversion.errors) == 14
    for name, error in conversion.errors.items():
        change = (after[f"{name}.base_layer.weight"] - before[f"{name}.base_layer.weight"]).double()
        values = torch.linalg.svdvals(change)
        assert error == pytest.approx((values[3:].norm() / values.norm()).item(), rel=1e-3)
        down = conversion.state_dict[f"base_model.model.{name}.lora_A.weight"]
        up = conversion.state_dict[f"base_model.model.{name}.lora_B.weight"]
        assert down.shape == (3, change.shape[1])
        assert up.shape == (change.shape[0], 3)
        assert error == pytest.approx(((change - up @ down).norm() / change.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:the LoRA adapter")
def test_a_share_of_the_energy_takes_the_smallest_rank_that_keeps_it(make_llama, share, input_ids, tmp_path):
    model = get_peft_model(make_llama(), PropulsionConfig(target_modules=LINEAR, **RANDOM)).eval()
    conversion = convert_to_lora(model, rank=share)
    for name, layer in model.base_model.model.named_modules():
        if name not in conversion.errors:
            continue
        energy = torch.linalg.svdvals(layer.get_delta_weight("default").double()).square()
        kept = len(conversion.state_dict[f"base_model.model.{name}.lora_A.weight"])
        assert energy[:kept].sum() >= share * energy.sum() * (1 - 1e-6)
        assert energy[: kept - 1].sum() < share * energy.sum() * (1 + 1e-6)
    conversion.save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    for name, layer in lora.base_model.model.named_modules():
        if name in conversion.errors:
            assert layer.scaling["default"] == 1
            assert layer.r["default"] == len(conversion.state_dict[f"base_model.model.{name}.lora_A.weight"])
    if share == 1.0:
        torch.testing.assert_close(logits(lora, input_ids), logits(model, input_ids), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the LoRA adapter")
def test_stock_peft_converts_the_same_where_there_are_no_biases(make_llama):
    model = get_peft_model(make_llama(), PropulsionConfig(target_modules=LINEAR, **RANDOM))
    assert model.supports_lora_conversion()
    _, theirs = peft.convert_to_lora(model, rank=2)
    ours = convert_to_lora(model, rank=2).state_dict
    assert set(theirs) == set(ours)
    for name in ours:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(ours[other] @ ours[name], theirs[other] @ theirs[name], rtol=0, atol=1e-5)


def test_stock_peft_does_not_drop_the_change_of_a_bias(make_llama):
    model = get_peft_model(make_llama(attention_bias=True), PropulsionConfig(**RANDOM))
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=2)


def test_an_adapter_that_changes_nothing_has_no_error(make_llama):
    conversion = convert_to_lora(get_peft_model(make_llama(), PropulsionConfig()), rank=2)
    assert set(conversion.errors.values()) == {0.0}


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "8", float("nan")])
def test_ranks_out_of_range_are_refused(make_llama, rank):
    with pytest.raises(ValueError, match=r"rank=.* is neither an integer >= 1 nor a share"):
        convert_to_lora(get_peft_model(make_llama(), PropulsionConfig()), rank=rank)


def test_a_rank_above_the_smaller_side_is_refused(make_llama):
    with pytest.raises(ValueError, match=r"rank=9 is more than model\.layers\.0\.self_attn\.k_proj has, 8"):
        convert_to_lora(get_peft_model(make_llama(), PropulsionConfig()), rank=9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is a scaled Embedding, and only linear"),
        ({"modules_to_save": ["lm_head"]}, "default has modules_to_save"),
        ({"trainable_token_indices": [3]}, "default has trainable_token_indices"),
        ({"bias": "all"}, "default has trained biases"),
    ],
)
def test_what_lora_cannot_hold_is_refused(make_llama, settings, message):
    model = get_peft_model(make_llama(tie_word_embeddings=False, attention_bias=True), PropulsionConfig(**settings))
    with pytest.raises(ValueError, match=message) as error:
        convert_to_lora(model, rank=2)
    assert "\n" not in str(error.value)


def test_merged_unknown_and_foreign_adapters_are_refused(make_llama):
    model = get_peft_model(make_llama(), PropulsionConfig(**RANDOM))
    with pytest.raises(ValueError, match="no adapter other; it has default"):
        convert_to_lora(model, 2, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj is merged; call unmerge_adapter\(\) first"):
        convert_to_lora(model, 2)
    with pytest.raises(ValueError, match="default is no Propulsion adapter"):
        convert_to_lora(get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])), 2)
