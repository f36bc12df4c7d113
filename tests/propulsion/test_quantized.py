"""Propulsion on quantized layers, and SFTTrainer on quantized models.

The reference is the naive formula in float64: the weight is decoded here, from the stored integers and factors, and
not by the libraries under test; then `y = (W x + b) * z**k`, with gradients by autograd. Merging rounds, so its error
is held against a bound for each scheme; unmerging does not, so that every byte and attribute of the layer, the
quantized integers and their factors included, is compared with a snapshot. Trainers must leave z in float32 and
unrounded. Tiny models with random weights, quantized while transformers loads them.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from trl import SFTConfig, SFTTrainer

from peft_cpift import CpiftError
from peft_cpift.propulsion import PropulsionConfig, PropulsionLayer

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_  # noqa: E402

FLOAT32 = {"bnb_4bit_compute_dtype": torch.float32}
SCHEMES = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **FLOAT32),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", **FLOAT32),
    "nf4 double": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **FLOAT32
    ),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}
BITSANDBYTES = [scheme for scheme in SCHEMES if "torchao" not in scheme]
# of a merged layer's outputs relative to the largest, about twice what was seen: the factors are scaled, the integers
# stay as they are
MERGE_ERROR = dict.fromkeys(SCHEMES, 2e-6)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WITH_BIAS, WITHOUT_BIAS = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
IDS = torch.arange(16).reshape(2, 8) * 3 % 28


@pytest.fixture(autouse=True)
def one_kernel_on_every_processor(monkeypatch):
    """Keep bitsandbytes from packing 4-bit weights for bfloat16 where the processor has the instructions."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(logging.getLogger("bitsandbytes.autograd._functions"), "disabled", True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model) -> Path:
    """A folder with an unquantized two-block Llama, the attention with biases, and a tokenizer of 28 characters."""
    folder = tmp_path_factory.mktemp("unquantized")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "proj" in name:
                parameter.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def load(checkpoint):
    """Return a function that loads the model quantized by one of the schemes, or by a configuration."""

    def load(scheme: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
        quantization = SCHEMES[scheme]() if isinstance(scheme, str) else scheme
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=dtype).train()

    return load


def adapt(model: nn.Module, seed: int | None = 1, name: str = "default", **settings: Any) -> PeftModel:
    """Add an adapter to all linear layers, with z drawn from [0.96, 1.04]."""
    config = PropulsionConfig(**{"target_modules": LINEAR, "degree": 5} | settings)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, name)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for z in z_of(model, name).values():
                z.copy_(0.96 + 0.08 * torch.rand(z.shape, generator=generator))
    return model


def z_of(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if key.endswith(f"propulsion_z.{name}")}


def layers(model: nn.Module) -> list[PropulsionLayer]:
    return [module for module in model.modules() if isinstance(module, PropulsionLayer)]


def logits(model: nn.Module, **settings: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **settings).logits


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def decoded(layer: nn.Module) -> Tensor:
    """Return the weight of a quantized layer in float64, from the stored integers and factors."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Int8Params):
        codes = layer.state.CB if weight.CB is None else weight.CB
        factors = layer.state.SCB if weight.SCB is None else weight.SCB
        return codes.double() * factors.double()[:, None] / 127
    if isinstance(weight, bnb.nn.Params4bit):
        state = weight.quant_state
        packed = weight.data.view(torch.uint8).flatten().long()
        values = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
        factors = state.absmax.double()
        if state.nested:
            outer = state.state2.absmax.double().repeat_interleave(state.state2.blocksize)[: len(factors)]
            factors = state.state2.code.double()[state.absmax.long()] * outer + state.offset.double()
        return (values * factors.repeat_interleave(state.blocksize)).view(state.shape)
    groups = weight.qdata.shape[1] // weight.scale.shape[1]
    zero, scale = (part.double().repeat_interleave(groups, dim=1) for part in (weight.zero_point, weight.scale))
    return (weight.qdata.double() - zero) * scale


def naive(layer: PropulsionLayer, x: Tensor, z: Tensor) -> Tensor:
    """`(W x + b) * z**k` in float64."""
    base = layer.get_base_layer()
    bias = 0 if base.bias is None else base.bias.double()
    return (x @ decoded(base).T + bias) * z**5


def contents(thing: Any) -> Any:
    """Copy all tensors and plain values that a layer, a weight or a quantization state holds, to compare them."""
    if isinstance(thing, nn.Module):
        parts = {key: value for key, value in vars(thing).items() if not (key.startswith("_") or callable(value))}
        parameters = {key: contents(p) for key, p in thing._parameters.items()}
        return {key: contents(value) for key, value in parts.items()} | parameters
    if type(thing) in (Tensor, nn.Parameter):
        return (thing.dtype, thing.detach().clone())
    if isinstance(thing, Tensor):  # a quantized weight
        attributes = {k: contents(v) for k, v in vars(thing).items() if k != "module" and not k.startswith("_")}
        data = {} if hasattr(thing, "qdata") else {"data": contents(thing.detach().as_subclass(Tensor))}
        return attributes | data | {"class": type(thing), "requires_grad": thing.requires_grad}
    if type(thing).__module__.startswith("bitsandbytes."):
        return {key: contents(value) for key, value in vars(thing).items()}
    return thing


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def keys_of(model: nn.Module) -> list[str]:
    """The keys of a checkpoint; the factors of merged weights may, or may not, be quantized themselves."""
    return sorted(key for key in model.state_dict() if "weight.nested_" not in key)


def single(kind: str, bias: bool) -> PeftModel:
    """A single quantized layer of bitsandbytes, made by hand, with a trained adapter."""
    torch.manual_seed(0)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False)
    else:
        nested = kind == "nf4 double"
        layer = bnb.nn.Linear4bit(64, 32, bias, torch.float32, compress_statistics=nested, quant_type=kind[:3])
    return adapt(nn.Sequential(layer.to("cpu")), target_modules=["0"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_starts_as_its_base_model_bit_for_bit(load, scheme):
    base = load(scheme)
    expected = logits(base), logits(base.eval())
    model = adapt(base, seed=None)
    assert len(z_of(model)) == 2 * len(LINEAR)
    assert {z.dtype for z in z_of(model).values()} == {torch.float32}
    assert torch.equal(logits(model.train()), expected[0])
    assert torch.equal(logits(model.eval()), expected[1])


@pytest.mark.parametrize("name", [WITH_BIAS, WITHOUT_BIAS])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_and_gradients_are_those_of_the_decoded_weight_in_float64(load, scheme, name):
    layer = adapt(load(scheme)).get_submodule(f"base_model.model.{name}")
    assert_naive(layer)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", BITSANDBYTES)
def test_a_layer_quantized_by_hand_computes_the_naive_formula(scheme, bias):
    assert_naive(single(scheme, bias).base_model.model[0])


def assert_naive(layer: PropulsionLayer) -> None:
    torch.manual_seed(1)
    x, weights = torch.randn(3, 5, layer.in_features), torch.randn(3, 5, layer.out_features)
    z = layer.propulsion_z["default"]
    x64, z64 = x.double().requires_grad_(), z.detach().double().requires_grad_()
    expected = naive(layer, x64, z64)
    (expected * weights).sum().backward()
    x.requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    assert y.dtype == z.grad.dtype == torch.float32
    assert error(y, expected) < 1e-6
    assert error(x.grad, x64.grad) < 1e-6
    assert error(z.grad, z64.grad) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "torchao int8", "torchao int4"])
def test_a_16_bit_model_rounds_its_outputs_once_and_keeps_z_in_float32(load, scheme, dtype):
    layer = adapt(load(scheme, dtype)).get_submodule(f"base_model.model.{WITH_BIAS}")
    x = torch.randn(3, 64, dtype=dtype)
    y, unscaled = layer(x), layer.base_layer(x)
    z = layer.propulsion_z["default"]
    assert y.dtype == dtype
    assert z.dtype == torch.float32
    assert torch.equal(y, (unscaled.float() * z**5).to(dtype))
    assert error(y, naive(layer, x.double(), z.double())) < 4 * torch.finfo(dtype).eps
    y.float().square().sum().backward()
    assert z.grad.dtype == torch.float32
    assert z.grad.abs().min() > 0


@pytest.mark.parametrize("compute", [torch.float16, torch.bfloat16, torch.float32])
def test_the_compute_dtype_of_4_bit_layers_bounds_the_error_alone(load, compute):
    layer = adapt(
        load(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute))
    ).get_submodule(f"base_model.model.{WITH_BIAS}")
    x = torch.randn(3, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    assert error(y, naive(layer, x.double(), layer.propulsion_z["default"].double())) < 4 * torch.finfo(compute).eps


def test_outliers_kept_apart_by_the_int8_threshold_are_scaled_too(load):
    layer = adapt(load(BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0))).get_submodule(
        f"base_model.model.{WITH_BIAS}"
    )
    layer.eval()  # the inputs are quantized to 8 bits, but for the columns above the threshold
    x = torch.randn(3, 64)
    x[:, 7] = 40.0
    y = layer(x)
    z = layer.propulsion_z["default"]
    assert layer.base_layer.state.threshold == 6.0
    assert torch.equal(y, layer.base_layer(x) * z**5)
    assert error(y, naive(layer, x.double(), z.double())) < 2e-2
    layer.merge()
    assert error(layer(x), y) < 1e-2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_lowers_the_loss_by_moving_z_alone(load, scheme):
    model = adapt(load(scheme), seed=None)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == set(z_of(model))
    before = [decoded(layer.base_layer) for layer in layers(model)]
    optimizer = torch.optim.AdamW(z_of(model).values(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(z.dtype == torch.float32 and (z != 1).all() for z in z_of(model).values())
    assert same([decoded(layer.base_layer) for layer in layers(model)], before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_save_and_load_on_a_quantized_base(load, scheme, tmp_path):
    model = adapt(load(scheme))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {key.removesuffix(".default") for key in z_of(model)}
    assert {t.dtype for t in saved.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(load(scheme), tmp_path)
    assert all(torch.equal(z, z_of(model)[key]) for key, z in z_of(loaded).items())
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_on_a_quantized_base_are_switched_multiplied_and_disabled(load, scheme):
    base = load(scheme)
    plain = logits(base)
    model = adapt(adapt(base, seed=1), seed=2, name="other")
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), both)
    layer = layers(model)[0]
    x = torch.randn(3, 64)
    z = layer.propulsion_z["default"] * layer.propulsion_z["other"].double()
    assert error(layer(x), naive(layer, x.double(), z)) < 1e-6
    assert len({t.sum().item() for t in (plain, first, second, both)}) == 4


@pytest.mark.parametrize("scheme", ["int8", "nf4", "torchao int4"])
def test_rows_of_a_batch_have_their_own_adapters_on_a_quantized_base(load, scheme):
    base = load(scheme).eval()
    plain = logits(base)
    model = adapt(adapt(base, seed=1), seed=2, name="other").eval()
    model.set_adapter("other")
    other = logits(model)
    mixed = logits(model, adapter_names=["other", "__base__"])
    assert error(mixed[0], other[0]) < 1e-6
    assert error(mixed[1], plain[1]) < 1e-6
    assert error(mixed[1], other[1]) > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_layers_compute_what_unmerged_ones_do(load, scheme):
    model = adapt(load(scheme))
    whole = logits(model)
    for layer in layers(model):
        x = torch.randn(8, layer.in_features)
        with torch.no_grad():
            expected = layer(x)
            layer.merge(safe_merge=True)
            assert layer.merged
            assert error(layer(x), expected) < MERGE_ERROR[scheme]
            assert torch.equal(layer(x), layer.base_layer(x))
        assert type(layer.base_layer.weight) is type(layer._original_layer[-1].weight)
        if layer.base_layer.bias is not None:
            bias = layer._original_layer[-1].bias
            torch.testing.assert_close(layer.base_layer.bias.data, bias * layer.propulsion_z["default"] ** 5)
    assert error(logits(model), whole) < 3 * MERGE_ERROR[scheme]


@pytest.mark.parametrize("passes_first", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_unmerging_puts_every_byte_and_attribute_back(load, scheme, passes_first):
    model = adapt(load(scheme))
    if passes_first:
        logits(model)
    weights = [layer.base_layer.weight for layer in layers(model)]
    for layer in layers(model):  # PEFT reads the factors of 8-bit layers into the state
        if scheme == "int8" and layer.base_layer.state.SCB is None:
            layer.base_layer.state.SCB = layer.base_layer.weight.SCB
    before, keys = [contents(layer.base_layer) for layer in layers(model)], keys_of(model)
    model.merge_adapter()
    assert not any(same(contents(layer.base_layer), old) for layer, old in zip(layers(model), before, strict=True))
    merged = [decoded(layer.base_layer) for layer in layers(model)]
    assert keys_of(model) == keys
    model.unmerge_adapter()
    assert same([contents(layer.base_layer) for layer in layers(model)], before)
    assert all(layer.base_layer.weight is weight for layer, weight in zip(layers(model), weights, strict=True))
    model.merge_adapter()
    assert all(torch.equal(decoded(layer.base_layer), w) for layer, w in zip(layers(model), merged, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_adapter_is_merged_into_the_original_weight_and_not_into_the_merged_one(load, scheme):
    one_by_one, at_once = (adapt(adapt(load(scheme), seed=1), seed=2, name="other") for _ in range(2))
    before = [decoded(layer.base_layer) for layer in layers(one_by_one)]
    one_by_one.merge_adapter(["default"])
    one_by_one.merge_adapter(["other"])
    at_once.merge_adapter(["default", "other"])
    for a, b in zip(layers(one_by_one), layers(at_once), strict=True):
        assert a.merged_adapters == ["default", "other"]
        assert torch.equal(decoded(a.base_layer), decoded(b.base_layer))
    one_by_one.unmerge_adapter()
    assert same([decoded(layer.base_layer) for layer in layers(one_by_one)], before)
    assert torch.equal(logits(one_by_one), logits(adapt(load(scheme), seed=1)))


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_safe_merge_refuses_nan_and_leaves_the_layer_as_it_was(load, scheme, merged_before):
    model = adapt(adapt(load(scheme), seed=1), seed=2, name="broken")
    layer = layers(model)[0]
    if merged_before:
        layer.merge(adapter_names=["default"])
    with torch.no_grad():
        layer.propulsion_z["broken"][3] = float("nan")
    layer.base_layer(torch.randn(2, 64))  # 8-bit layers move their factors in their first pass
    base, before = layer.base_layer, contents(layer.base_layer)
    with pytest.raises(CpiftError, match=r"broken into the weight of .*q_proj gives NaN"):
        layer.merge(safe_merge=True, adapter_names=["broken"])
    assert layer.merged_adapters == ["default"] * merged_before
    assert layer.base_layer is base
    assert same(contents(base), before)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_and_negative_scales_are_merged_and_undone(load, scheme):
    model = adapt(load(scheme))
    layer = layers(model)[0]
    x = torch.randn(4, 64)
    with torch.no_grad():
        plain = layer.base_layer(x)
        layer.propulsion_z["default"].copy_(torch.tensor([0.0, -1.0, 1.0, 1.01]).repeat(16))
        expected = layer(x)
        layer.merge(safe_merge=True)
        assert error(layer(x), expected) < MERGE_ERROR[scheme]  # nf4 has no mirror image of each code: no matter here
        assert (decoded(layer.base_layer)[::4] == 0).all()
        assert (layer(x)[:, ::4] == 0).all()
        layer.unmerge()
        assert torch.equal(layer.base_layer(x), plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merge_and_unload_gives_a_quantized_model_without_adapters(load, scheme):
    model = adapt(load(scheme))
    expected, kinds = logits(model), {type(layer.base_layer) for layer in layers(model)}
    merged = model.merge_and_unload(safe_merge=True)
    assert not layers(merged)
    assert {type(merged.get_submodule(name)) for name in (WITH_BIAS, WITHOUT_BIAS)} == kinds
    assert error(logits(merged), expected) < 3 * MERGE_ERROR[scheme]
    base = load(scheme)
    assert keys_of(merged) == keys_of(base)


@pytest.mark.parametrize("scheme", ["int8", "nf4 double"])
def test_a_merged_quantized_model_is_saved_and_loaded_by_transformers_alone(load, scheme, tmp_path):
    merged = adapt(load(scheme)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(logits(loaded), logits(merged))


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4 double", "torchao int8", "torchao int4"])
def test_a_model_saved_quantized_is_adapted_merged_and_unmerged(load, scheme, tmp_path):
    load(scheme).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    model, reference = adapt(loaded), adapt(load(scheme))
    expected = logits(model)
    assert torch.equal(expected, logits(reference))
    model.merge_adapter()
    reference.merge_adapter()
    assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), logits(load(scheme)))
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unload_gives_the_quantized_base_model_back(load, scheme):
    base = load(scheme)
    expected, keys = logits(base), keys_of(base)
    model = adapt(base)
    model.merge_adapter()
    model.unmerge_adapter()
    unloaded = model.unload()
    assert not layers(unloaded)
    assert torch.equal(logits(unloaded), expected)
    assert keys_of(unloaded) == keys


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_deep_copy_is_independent(load, scheme, merged):
    model = adapt(load(scheme))
    unmerged = logits(model)
    if merged:
        model.merge_adapter()
    before = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), before)
    if merged:
        other.unmerge_adapter()
        assert torch.equal(logits(other), unmerged)
    with torch.no_grad():
        for z in z_of(other).values():
            z.fill_(1.1)
    other.merge_adapter()
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(model), before)


def test_all_linear_and_the_presets_leave_out_what_is_not_quantized(load):
    for scheme in SCHEMES:
        model = adapt(load(scheme), target_modules="all-linear")
        assert len(layers(model)) == 2 * len(LINEAR)
        assert type(model.base_model.model.lm_head) is nn.Linear
        assert len(layers(adapt(load(scheme), target_modules="attention"))) == 2 * 3
        assert len(layers(adapt(load(scheme), target_modules="all"))) == 2 * len(LINEAR) + 1


def test_an_unquantized_head_beside_quantized_layers_is_merged_as_any_other(load):
    model = adapt(load("nf4"), target_modules=["lm_head", "q_proj"])
    expected = logits(model)
    head = model.base_model.model.lm_head
    weight = head.base_layer.weight.clone()
    model.merge_adapter()
    assert error(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(head.base_layer.weight, weight)
    assert torch.equal(logits(model), expected)


def test_a_quantized_conv1d_of_gpt2_is_a_linear_layer_like_others(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=28, n_embd=64, n_layer=1, n_head=2, n_positions=16)).save_pretrained(
        tmp_path
    )
    quantization = SCHEMES["nf4"]()
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32
    ).train()
    model = adapt(base, target_modules=["c_attn", "c_fc"])
    assert [z.shape for z in z_of(model).values()] == [(192,), (256,)]
    assert_naive(layers(model)[1])
    model.eval()
    expected = logits(model)
    model.merge_adapter()
    assert error(logits(model), expected) < 1e-5


def test_layers_quantized_by_torchao_after_loading_are_refused_and_left_alone(checkpoint):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    quantize_(base, Int8WeightOnlyConfig())
    expected = logits(base)
    with pytest.raises(CpiftError, match=r"q_proj was quantized by torchao after .* exclude_modules"):
        adapt(base)
    with pytest.raises(CpiftError, match=r"^0 was quantized by torchao after"):
        adapt(quantized_sequence(), target_modules=["0"])
    assert not layers(base)
    assert torch.equal(logits(base), expected)


def quantized_sequence() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8WeightOnlyConfig())
    return model


def test_gradients_pass_gradient_checkpointing_and_autocast(load):
    def gradients(scheme: str, checkpointing: bool = False, autocast: bool = False) -> Tensor:
        model = adapt(load(scheme))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert {z.grad.dtype for z in z_of(model).values()} == {torch.float32}
        return torch.cat([z.grad for z in z_of(model).values()])

    for scheme in SCHEMES:
        plain = gradients(scheme)
        assert error(gradients(scheme, checkpointing=True), plain) < 1e-5
        autocast = gradients(scheme, autocast=True)
        assert torch.cosine_similarity(autocast, plain, dim=0) > 0.99
        assert not torch.equal(autocast, plain)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cast_of_the_model_rounds_no_z_and_can_be_merged_and_unmerged(load, scheme, merged):
    model = adapt(load(scheme))
    expected = logits(model)
    values = [z.detach().clone() for z in z_of(model).values()]
    if merged:
        model.merge_adapter()
    nn.Module.to(model, torch.bfloat16)
    assert all(torch.equal(z, old) for z, old in zip(z_of(model).values(), values, strict=True))
    assert error(logits(model), expected) < MERGE_ERROR[scheme] + 5e-2
    if merged:
        model.unmerge_adapter()
        assert error(logits(model), expected) < 5e-2
    else:
        model.merge_adapter()
        assert error(logits(model), expected) < 3 * MERGE_ERROR[scheme] + 5e-2


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4 double"])
def test_a_model_dequantized_after_adapting_is_merged_as_an_unquantized_one(load, scheme):
    model = adapt(load(scheme))
    expected = logits(model)
    model.base_model.model.dequantize()
    assert type(layers(model)[0].base_layer) is nn.Linear
    assert error(logits(model), expected) < 1e-5
    model.merge_adapter()
    assert error(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert error(logits(model), expected) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_reaches_layers_that_accelerate_has_put_hooks_on(load, scheme):
    base = load(scheme)
    add_hook_to_module(base.get_submodule(WITH_BIAS), AlignDevicesHook(execution_device="cpu"))
    layer = adapt(base).get_submodule(f"base_model.model.{WITH_BIAS}")
    x = torch.randn(8, 64)
    with torch.no_grad():
        plain, expected = layer.base_layer(x), layer(x)
        layer.merge()
        assert error(layer(x), expected) < MERGE_ERROR[scheme]
        assert error(layer(x), plain) > 0.05
        layer.unmerge()
        assert torch.equal(layer.base_layer(x), plain)


def test_an_evaluation_leaves_4_bit_weights_readable_and_gradients_whole(load, monkeypatch):
    # with the instructions for bfloat16, bitsandbytes packs a weight for good in its first pass without gradients;
    # no gradient gets through a packed layer, and what decodes its weight finds it in the wrong order
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def gradients(model: nn.Module) -> Tensor:
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([z.grad for z in z_of(model).values()])

    model = adapt(load("nf4"), target_modules="attention")
    before = gradients(model), [contents(layer.base_layer.weight) for layer in layers(model)]
    logits(model.eval())
    assert same([contents(layer.base_layer.weight) for layer in layers(model)], before[1])
    assert torch.equal(gradients(model), before[0])
    expected = logits(model.eval())
    model.merge_adapter()
    assert error(logits(model), expected) < 1e-5


def test_a_base_model_packed_for_inference_is_refused(load):
    base = load("nf4").eval()
    state = base.get_submodule(WITHOUT_BIAS).weight.quant_state
    state.packing_format_for_cpu = True  # what bitsandbytes sets after it has packed a weight
    with pytest.raises(CpiftError, match=r"up_proj .* packed .* load the base model again"):
        adapt(base)
    assert not layers(base)


def test_8_bit_layers_with_float_weights_are_scaled_but_not_merged(load):
    model = adapt(load(BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)))
    layer = layers(model)[0]
    x = torch.randn(4, 64)
    assert torch.equal(layer(x), layer.base_layer(x) * layer.propulsion_z["default"] ** 5)
    with pytest.raises(CpiftError, match=r"q_proj cannot be merged"):
        model.merge_adapter()
    with pytest.raises(CpiftError, match=r"q_proj cannot be merged"):
        layer.merge()
    assert not any(layer.merged for layer in layers(model))


def trainer(
    model: Any, folder: Path, data: Any, checkpoint: Path, peft_config: Any = None, **settings: Any
) -> SFTTrainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    arguments = SFTConfig(str(folder), use_cpu=True, bf16=False, **(defaults | settings))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "sgd"])
@pytest.mark.parametrize("scheme", ["int8", "nf4 double"])
def test_sfttrainer_moves_a_float32_z_on_a_quantized_model(load, checkpoint, sums, tmp_path, scheme, optimizer):
    config = PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    # TRL casts all that is trained to bfloat16, where the next numbers beside 1 are 1/256 below and 1/128 above
    sft = trainer(load(scheme), tmp_path, sums, checkpoint, config, optim=optimizer, learning_rate=1e-4)
    trained = z_of(sft.model)
    assert {key for key, p in sft.model.named_parameters() if p.requires_grad} == set(trained)
    assert all(z.dtype == torch.float32 and (z == 1).all() for z in trained.values())
    sft.train()
    after = z_of(sft.model)
    assert all(z.dtype == torch.float32 and torch.isfinite(z).all() for z in after.values())
    assert all((z != 1).any() for z in after.values())
    assert all((z - 1).abs().max() < 1 / 512 for z in after.values())  # bfloat16 would have rounded them all to 1
    sft.save_model(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {key.removesuffix(".default") for key in after}
    assert all(torch.equal(saved[key.removesuffix(".default")], z) for key, z in after.items())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_sfttrainer_leaves_a_loaded_adapter_unrounded_and_trains_on(load, checkpoint, sums, tmp_path, scheme):
    adapt(load(scheme)).save_pretrained(tmp_path / "before")
    model = PeftModel.from_pretrained(load(scheme), tmp_path / "before", is_trainable=True)
    values = {key: z.detach().clone() for key, z in z_of(model).items()}
    assert not any(torch.equal(z, z.bfloat16().float()) for z in values.values())
    sft = trainer(model, tmp_path, sums, checkpoint, learning_rate=1e-4)
    assert all(torch.equal(z, values[key]) and z.requires_grad for key, z in z_of(sft.model).items())
    sft.train()
    moved = {key: (z - values[key]).abs().max().item() for key, z in z_of(sft.model).items()}
    assert all(0 < distance < 1e-3 for distance in moved.values())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_model_prepared_for_k_bit_training_is_trained_under_gradient_checkpointing(
    load, checkpoint, sums, tmp_path, scheme
):
    model = prepare_model_for_kbit_training(load(scheme, torch.bfloat16))
    assert model.lm_head.weight.dtype == torch.float32
    config = PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    sft = trainer(model, tmp_path, sums, checkpoint, config, gradient_checkpointing=True, max_steps=8)
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(z.dtype == torch.float32 and (z != 1).all() for z in z_of(sft.model).values())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_accumulated_gradients_are_those_of_the_whole_batch(load, checkpoint, sums, tmp_path, scheme):
    config = PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    moves = []
    for batch, accumulation in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        sft = trainer(
            load(scheme), tmp_path, sums, checkpoint, config, optim="sgd", max_grad_norm=0, max_steps=2, **settings
        )
        sft.train()
        moves.append(torch.cat([z.detach() - 1 for z in z_of(sft.model).values()]))
    assert moves[0].abs().max() > 1e-5
    assert error(moves[1], moves[0]) < 1e-3


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(load, checkpoint, sums, tmp_path, scheme):
    config = PropulsionConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer(load(scheme), tmp_path, sums, checkpoint, config, **settings)
    whole.train()
    resumed = trainer(load(scheme), tmp_path, sums, checkpoint, config, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert all(torch.equal(z, z_of(whole.model)[key]) for key, z in z_of(resumed.model).items())
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert not any(torch.equal(saved[key.removesuffix(".default")], z) for key, z in z_of(resumed.model).items())


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
def test_trainable_tokens_are_trained_beside_z_and_saved(load, checkpoint, sums, tmp_path, scheme):
    base = load(scheme) if scheme else AutoModelForCausalLM.from_pretrained(checkpoint)
    before = base.model.embed_tokens.weight.detach().clone()
    config = PropulsionConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]}, task_type="CAUSAL_LM"
    )
    sft = trainer(base, tmp_path, sums, checkpoint, config, learning_rate=1e-1)
    names = {key.rsplit(".", 2)[-2] for key, p in sft.model.named_parameters() if p.requires_grad}
    assert names == {"propulsion_z", "trainable_tokens_delta"}
    sft.train()
    assert all(z.dtype == torch.float32 and (z != 1).any() for z in z_of(sft.model).values())
    sft.save_model(tmp_path / "adapter")
    fresh = load(scheme) if scheme else AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    embedded = loaded.get_input_embeddings()(torch.arange(28))
    changed = (embedded != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= {3, 7}
    assert changed
    assert error(logits(loaded), logits(sft.model.eval())) < 1e-2


@pytest.mark.parametrize("scheme", [None, "nf4"])
def test_sfttrainer_trains_the_tokens_that_a_chat_template_adds(load, checkpoint, tmp_path, scheme):
    source = AutoTokenizer.from_pretrained(checkpoint)
    source.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    source.chat_template = "{% for m in messages %}<|a|>{{ m['content'] }}<|b|>{% endfor %}"
    source.save_pretrained(tmp_path / "template")
    config = PropulsionConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert config.trainable_token_indices is None
    base = load(scheme) if scheme else AutoModelForCausalLM.from_pretrained(checkpoint)
    base.config.tie_word_embeddings = False
    data = [{"messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]}] * 4
    sft = trainer(
        base, tmp_path, Dataset.from_list(data), checkpoint, config, chat_template_path=str(tmp_path / "template")
    )
    added = sft.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert added[:2] == [28, 29]  # and those that fill the vocabulary up to a multiple of 64
    sft.train()
    assert all(z.dtype == torch.float32 and (z != 1).any() for z in z_of(sft.model).values())
    sft.save_model(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert {key.rsplit(".", 1)[-1] for key in keys} >= {"propulsion_z", "trainable_tokens_delta", "weight"}


def test_a_merge_that_quantizes_anew_says_how_much_that_changes():
    # blocks of 64 values span rows of 96, so that a row's factors are not its own
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model = get_peft_model(torch.nn.Sequential(base), PropulsionConfig(target_modules=["0"], init_weights=False))
    with pytest.warns(UserWarning, match=r"merging default into 0 quantized its weight anew, which changed it by \d"):
        model.merge_adapter()
