"""Batches whose rows have different adapters, against the same rows run one adapter at a time.

Running one row under one adapter is the reference, for logits as well as for generated tokens; rows of `__base__` are
those of an untouched base model. What cannot be told apart by row must be refused in one line.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_cpift.propulsion import PropulsionConfig

DECODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "eos_token_id": None}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "eos_token_id": None}
T5 |= {"decoder_start_token_id": 0, "tie_word_embeddings": False}
BART = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 0,
}
IDS = torch.tensor([[5, 6, 7, 8], [11, 3, 5, 30], [5, 6, 7, 8], [1, 2, 30, 4]])
NAMES = ["second", "__base__", "first", "second"]


def build(architecture: str, config_class: str, settings: dict, **more: Any) -> nn.Module:
    torch.manual_seed(3)
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**settings | more)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                if architecture.startswith("T5"):
                    p.normal_(0, 0.1 if "shared" in name else 1)
                else:
                    p.normal_(0, 1 if "embed" in name else 0.4)
    return model


LLAMA = partial(build, "LlamaForCausalLM", "LlamaConfig", DECODER)
MODELS: dict[str, tuple[partial, dict[str, Any]]] = {
    "Llama": (LLAMA, {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}),
    "Llama, tied": (partial(LLAMA, tie_word_embeddings=True), {"target_modules": "all", "task_type": "CAUSAL_LM"}),
    "GPT-2": (
        partial(build, "GPT2LMHeadModel", "GPT2Config", GPT2),
        {"target_modules": ["c_attn", "wpe", "wte"], "task_type": "CAUSAL_LM"},
    ),
    "OPT": (
        partial(build, "OPTForCausalLM", "OPTConfig", DECODER | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
        {"target_modules": ["q_proj", "out_proj", "embed_positions"], "task_type": "CAUSAL_LM"},
    ),
    "T5": (
        partial(build, "T5ForConditionalGeneration", "T5Config", T5),
        {"target_modules": ["q", "k", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"},
    ),
    "BART": (
        partial(build, "BartForConditionalGeneration", "BartConfig", BART),
        {"target_modules": "all", "task_type": "SEQ_2_SEQ_LM"},
    ),
}
CLASSIFIERS: dict[str, tuple[partial, dict[str, Any]]] = {
    "BERT": (
        partial(build, "BertForSequenceClassification", "BertConfig", DECODER),
        {"target_modules": "all", "task_type": "SEQ_CLS"},
    ),
    "Llama": (
        partial(build, "LlamaForSequenceClassification", "LlamaConfig", DECODER),
        {"target_modules": ["v_proj"], "task_type": "SEQ_CLS"},
    ),
    "DeBERTa": (
        partial(build, "DebertaForTokenClassification", "DebertaConfig", DECODER, relative_attention=False),
        {"target_modules": "attention", "task_type": "TOKEN_CLS"},
    ),
}


def adapted(entry: tuple[partial, dict[str, Any]], first: dict | None = None, second: dict | None = None) -> PeftModel:
    """Return the model with adapters `first` and `second`, whose scales lie in [0.3, 1.7]; `first` is active."""
    base, config = entry
    model = get_peft_model(base(), PropulsionConfig(**config | {"degree": 3} | (first or {})), adapter_name="first")
    model.add_adapter("second", PropulsionConfig(**config | {"degree": 3} | (second or {})))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "propulsion_z" in name:
                p.copy_((0.3 + 1.4 * torch.rand(p.shape, generator=generator)) ** (1 / 3))
            elif "modules_to_save" in name:
                p.add_(0.5 * torch.rand(p.shape, generator=generator))
    return model.eval()


def inputs(model: PeftModel, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    found = {"input_ids": IDS[rows]}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = IDS[rows, :3].contiguous()
    return found


def row_by_row(model: PeftModel, call, names: list[str] = NAMES) -> list[torch.Tensor]:
    """Return the result of `call(rows)` for each row alone, under its adapter."""
    results = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(slice(i, i + 1))[0])
        else:
            model.set_adapter(name)
            results.append(call(slice(i, i + 1))[0])
    model.set_adapter("first")
    return results


def logits(model: PeftModel, rows: slice = slice(None), **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model, rows), **arguments).logits


def assert_rows_differ(rows: list[torch.Tensor]) -> None:
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])


VARIANTS: dict[str, tuple[dict | None, dict | None]] = {
    "alike": (None, None),
    "of other degrees": (None, {"degree": 6}),
    "of other numbers of vectors": ({"num_vectors": 2}, {"num_vectors": 3, "pooling": "max"}),
    "of two vectors each": ({"num_vectors": 2, "pooling": "l2"}, {"num_vectors": 2, "pooling": "l2"}),
    "of other poolings": ({"num_vectors": 2, "pooling": "min"}, {"num_vectors": 2, "pooling": "max"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_row_has_its_own_adapter(name):
    model = adapted(MODELS[name])
    expected = row_by_row(model, lambda rows: logits(model, rows))
    assert_rows_differ(expected)
    before = logits(model)
    actual = logits(model, adapter_names=NAMES)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before)  # nothing stays behind


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_may_differ(variant):
    model = adapted(MODELS["Llama"], *VARIANTS[variant])
    expected = row_by_row(model, lambda rows: logits(model, rows))
    assert_rows_differ(expected)
    torch.testing.assert_close(logits(model, adapter_names=NAMES), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rows_have_their_own_heads(name):
    model = adapted(CLASSIFIERS[name])
    expected = row_by_row(model, lambda rows: logits(model, rows))
    assert_rows_differ(expected)
    torch.testing.assert_close(logits(model, adapter_names=NAMES), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_adapters_may_be_on_different_layers():
    model = adapted(MODELS["Llama"], {"target_modules": ["q_proj"]}, {"target_modules": ["up_proj"]})
    expected = row_by_row(model, lambda rows: logits(model, rows))
    torch.testing.assert_close(logits(model, adapter_names=NAMES), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_convolutions_tell_rows_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.volume, self.image, self.line = nn.Conv3d(1, 4, 2), nn.Conv2d(4, 4, 2, groups=2), nn.Conv1d(4, 2, 2)

        def forward(self, x):
            return self.line(self.image(self.volume(x).mean(2)).mean(2))

    def base() -> nn.Module:
        torch.manual_seed(0)
        return Net().eval()

    model = adapted((base, {"target_modules": ["volume", "image", "line"]}))
    x = torch.randn(4, 1, 3, 5, 5)
    expected = row_by_row(model, lambda rows: model(x[rows]))
    torch.testing.assert_close(model(x, adapter_names=NAMES), torch.stack(expected))


def test_all_rows_of_the_base_model_give_the_base_model_bit_for_bit():
    model = adapted(MODELS["Llama"])
    assert torch.equal(logits(model, adapter_names=["__base__"] * 4), MODELS["Llama"][0]()(IDS).logits)


def test_several_active_adapters_do_not_leak_into_named_rows():
    model = adapted(MODELS["Llama"])
    expected = row_by_row(model, lambda rows: logits(model, rows))
    model.base_model.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(model, adapter_names=NAMES), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_disabled_adapters_stay_disabled():
    model = adapted(MODELS["Llama"])
    with model.disable_adapter():
        assert torch.equal(logits(model, adapter_names=NAMES), MODELS["Llama"][0]()(IDS).logits)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_those_of_each_adapter(name, beams):
    model = adapted(MODELS[name])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}

    def generate(rows: slice, **arguments: Any) -> torch.Tensor:
        return model.generate(input_ids=IDS[rows], attention_mask=torch.ones_like(IDS[rows]), **settings, **arguments)

    expected = row_by_row(model, generate)
    assert len({tuple(row[-6:].tolist()) for row in expected}) > 2
    actual = generate(slice(None), adapter_names=NAMES)
    assert [row.tolist() for row in actual] == [row.tolist() for row in expected]


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_several_sequences_of_a_row_have_its_adapter(name, where):
    model = adapted(MODELS[name])
    asked = {"num_beams": 3, "num_return_sequences": 2}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if where == "argument":
        settings |= asked
    elif where == "generation_config":
        settings["generation_config"] = transformers.GenerationConfig(decoder_start_token_id=0, **settings, **asked)
    else:
        model.get_base_model().generation_config.update(**asked)

    def generate(rows: slice, **arguments: Any) -> torch.Tensor:
        return model.generate(input_ids=IDS[rows], attention_mask=torch.ones_like(IDS[rows]), **settings, **arguments)

    expected = []
    for row, adapter in enumerate(NAMES):
        expected += generate(slice(row, row + 1), adapter_names=[adapter]).tolist()
    assert len(expected) == 2 * len(NAMES)
    assert generate(slice(None), adapter_names=NAMES).tolist() == expected
    # one row with one adapter is what that adapter alone generates
    adapter = NAMES[0]
    model.set_adapter(adapter)
    assert generate(slice(0, 1)).tolist() == expected[:2]


def test_gradients_are_those_of_each_row():
    model = adapted(MODELS["Llama"])
    x = model.get_input_embeddings().base_layer(IDS).detach()

    def gradient(rows: slice, **arguments: Any) -> torch.Tensor:
        embedded = x[rows].clone().requires_grad_()
        model(inputs_embeds=embedded, **arguments).logits.sin().sum().backward()
        return embedded.grad

    expected = row_by_row(model, gradient)
    torch.testing.assert_close(gradient(slice(None), adapter_names=NAMES), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "missing", "__base__", "other"], "adapter_names has missing, other, .* it has first, second"),
        (["first", "second"], "rows and not one for each of the 2 adapter_names"),
        (["first"] * 5, "rows and not one for each of the 5 adapter_names"),
        ("first", "adapter_names='first' is not a list"),
        (["first", None, "first", "first"], "is not a list of names"),
    ],
)
def test_wrong_names_are_refused_in_one_line(names, message, call):
    model = adapted(MODELS["Llama"])
    with pytest.raises(ValueError, match=message) as error:
        getattr(model, call)(input_ids=IDS, adapter_names=names)
    assert "\n" not in str(error.value)
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_training_is_refused():
    model = adapted(MODELS["Llama"]).train()
    with pytest.raises(ValueError, match=r"evaluation only; call model\.eval\(\)"):
        model(input_ids=IDS, adapter_names=NAMES)


def test_merged_adapters_are_refused():
    model = adapted(MODELS["Llama"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"has first merged.*call unmerge_adapter\(\) first"):
        model(input_ids=IDS, adapter_names=NAMES)
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_trained_biases_are_refused():
    model = adapted((partial(LLAMA, attention_bias=True), MODELS["Llama"][1]), {"bias": "all"})
    with pytest.raises(ValueError, match="cannot mix first, which has trained biases"):
        model(input_ids=IDS, adapter_names=NAMES)
    model.set_adapter("first")
    torch.testing.assert_close(logits(model, adapter_names=["first"] * 4), logits(model))


def test_rows_of_the_base_model_have_no_trained_biases():
    model = get_peft_model(MODELS["Llama"][0](), PropulsionConfig(bias="propulsion_only")).eval()
    with pytest.raises(ValueError, match="cannot mix default, which has trained biases"):
        model(IDS, adapter_names=["default", "default", "default", "__base__"])


def test_models_that_see_the_sequence_first_are_refused():
    config = transformers.XLNetConfig(vocab_size=32, d_model=8, n_layer=1, n_head=2, d_inner=8)
    model = get_peft_model(transformers.XLNetModel(config), PropulsionConfig(target_modules=["layer_1"])).eval()
    with pytest.raises(ValueError, match="xlnet see the sequence before the batch"):
        model(input_ids=torch.ones(3, 3, dtype=torch.long), adapter_names=["default"] * 3)


def test_layers_of_single_experts_are_refused():
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

        def forward(self, x):
            return torch.cat([self.experts[0](x[::2]), self.experts[1](x[1::2])])

    model = get_peft_model(Routed(), PropulsionConfig(target_modules=["0", "1"], init_weights=False)).eval()
    with pytest.raises(ValueError, match=r"experts\.0 sees only the tokens that are sent to it"):
        model(torch.ones(4, 4), adapter_names=["default", "__base__"])


def test_a_plain_forward_pass_does_not_expand_rows_as_beams():
    model = adapted(MODELS["Llama"])
    model.get_base_model().generation_config.update(num_beams=2)
    with pytest.raises(ValueError, match="rows and not one for each of the 2 adapter_names"):
        logits(model, adapter_names=NAMES[:2])


def test_experts_cannot_be_told_apart():
    base = partial(build, "MixtralForCausalLM", "MixtralConfig", DECODER, num_local_experts=2, num_key_value_heads=2)
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = adapted((base, config), {"target_parameters": ["experts.down_proj"]})
    with pytest.raises(
        ValueError, match=r"experts\S* is a parameter scaled by an adapter.*one batch for each adapter"
    ):
        model(input_ids=IDS, adapter_names=NAMES)
    names = ["second", "__base__", "__base__", "second"]  # neither is on the experts
    expected = row_by_row(model, lambda rows: logits(model, rows), names)
    torch.testing.assert_close(logits(model, adapter_names=names), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_layers_that_see_tokens_without_rows_are_refused():
    base, config = MODELS["OPT"]
    model = adapted((base, config | {"target_modules": ["q_proj", "fc1"]}))  # OPT flattens batches there
    with pytest.raises(ValueError, match=r"fc1 has 16 rows and not one for each of the 4 adapter_names"):
        logits(model, adapter_names=NAMES)
