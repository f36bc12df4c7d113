"""Swapping an adapter's values: the outputs become those of the other adapter, in the same memory.

The reference is the other adapter loaded the usual way. Whatever differs in more than values is refused, and then
nothing has changed.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_cpift.propulsion import PropulsionConfig, hotswap_adapter

RANDOM = {"target_modules": "attention", "init_weights": False}


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def addresses(model):
    return {name: p.data_ptr() for name, p in model.named_parameters() if "propulsion_z" in name}


@pytest.fixture
def other(make_llama, tmp_path):
    """The folder of a saved adapter."""
    model = get_peft_model(make_llama(), PropulsionConfig(target_modules="attention"))
    with torch.no_grad():
        for name, z in model.named_parameters():
            if "propulsion_z" in name:
                z.uniform_(0.9, 1.1)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_outputs_become_those_of_the_other_adapter_in_the_same_memory(make_llama, input_ids, other, dtype):
    model = get_peft_model(make_llama(dtype), PropulsionConfig(**RANDOM))
    expected = logits(PeftModel.from_pretrained(make_llama(dtype), other), input_ids)
    before = addresses(model)
    assert not torch.equal(logits(model, input_ids), expected)
    hotswap_adapter(model, other)
    assert torch.equal(logits(model, input_ids), expected)
    assert addresses(model) == before


def test_a_compiled_model_is_not_compiled_again(make_llama, input_ids, other):
    torch._dynamo.reset()
    model = get_peft_model(make_llama(), PropulsionConfig(**RANDOM))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, input_ids)
    expected = logits(PeftModel.from_pretrained(make_llama(), other), input_ids)
    hotswap_adapter(compiled, other)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(logits(compiled, input_ids), expected)
    assert torch.equal(logits(model, input_ids), expected)


def test_one_of_several_adapters_is_swapped(make_llama, input_ids, other):
    model = get_peft_model(make_llama(), PropulsionConfig(**RANDOM), "first")
    model.add_adapter("second", PropulsionConfig(**RANDOM))
    first = logits(model, input_ids)
    hotswap_adapter(model, other, "second")
    assert torch.equal(logits(model, input_ids), first)
    model.set_adapter("second")
    expected = logits(PeftModel.from_pretrained(make_llama(), other), input_ids)
    assert torch.equal(logits(model, input_ids), expected)


def test_a_model_that_transformers_put_the_adapter_on(make_llama, input_ids, other):
    model = make_llama()
    model.add_adapter(PropulsionConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_weights=False))
    hotswap_adapter(model, other)
    expected = logits(PeftModel.from_pretrained(make_llama(), other), input_ids)
    assert torch.equal(logits(model, input_ids), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degree": 7}, r"has degree=15 and default has 7"),
        ({"degree_pattern": {"q_proj": 3}}, r"has degree_pattern=\{\}"),
        ({"num_vectors": 2}, r"has num_vectors=1 and default has 2"),
        ({"pooling": "max"}, r"has pooling='mean' and default has 'max'"),
        ({"trainable_token_indices": [1, 2]}, r"has trainable_token_indices=None and default has \[1, 2\]"),
        ({"target_modules": ["q_proj"]}, r"k_proj.propulsion_z has shape \(8,\) in .* and none in the model"),
        ({"target_modules": None}, r"down_proj.propulsion_z has shape none in .* and \(16,\) in the model"),
    ],
)
def test_adapters_that_differ_in_more_than_values_are_refused(make_llama, input_ids, other, settings, message):
    model = get_peft_model(make_llama(), PropulsionConfig(**(RANDOM | settings)))
    before = logits(model, input_ids)
    with pytest.raises(ValueError, match=message) as error:
        hotswap_adapter(model, other)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model, input_ids), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_before_anything_is_replaced(make_llama, input_ids, other, value):
    tensors = load_file(other / "adapter_model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name][0] = value
    save_file(tensors, other / "adapter_model.safetensors")
    model = get_peft_model(make_llama(), PropulsionConfig(**RANDOM))
    before = logits(model, input_ids)
    with pytest.raises(ValueError, match=rf"{name} of .*other is NaN or infinite"):
        hotswap_adapter(model, other)
    assert torch.equal(logits(model, input_ids), before)
    with pytest.raises(ValueError, match="is NaN or infinite; the training diverged, or the file is damaged"):
        PeftModel.from_pretrained(make_llama(), other)


def test_another_width_is_refused(make_llama, other):
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: torch.ones(3) for name in tensors}, other / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has shape \(3,\) in .* and \(8,\) in the model"):
        hotswap_adapter(get_peft_model(make_llama(), PropulsionConfig(target_modules="attention")), other)


def test_an_unknown_name_a_merged_adapter_and_another_method_are_refused(make_llama, other, tmp_path):
    model = get_peft_model(make_llama(), PropulsionConfig(**RANDOM))
    with pytest.raises(ValueError, match="no adapter production; it has default"):
        hotswap_adapter(model, other, "production")
    with pytest.raises(ValueError, match="no adapter default; it has none"):
        hotswap_adapter(make_llama(), other)
    model.merge_adapter()
    with pytest.raises(ValueError, match="default is merged"):
        hotswap_adapter(model, other)
    lora = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA adapter cannot be swapped"):
        hotswap_adapter(lora, tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA adapter cannot be swapped"):
        hotswap_adapter(get_peft_model(make_llama(), PropulsionConfig()), tmp_path / "lora")
