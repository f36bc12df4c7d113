"""One matrix for all of PEFT's life cycle: rows are models with a task and a configuration, columns are operations.

Every row goes through every operation. The reference is the naive formula in float64, `y * (z * z * ...)`, put on an
untouched copy of the base model by forward hooks, or for parameters of experts by multiplying the parameter; it takes
names and values of z from the adapted model and nothing else from the package. The models are tiny and random; z is
drawn such that scales lie in [0.6, 1.4], so that an adapter that does nothing is far outside every tolerance. "Bit for
bit" is `torch.equal`.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_cpift.errors import NoEffectWarning
from peft_cpift.propulsion import PropulsionConfig, PropulsionLayer
from peft_cpift.propulsion.targets import PRESETS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]

DECODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"} | {"num_labels": 3}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0}
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
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}


class ConvNet(nn.Module):
    """Convolutions of each dimension, one of them grouped, with writes in place after two of them."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 4, 2, padding=1)
        self.image = nn.Conv2d(4, 6, 3, groups=2, bias=False, padding=1)
        self.line = nn.Conv1d(6, 4, 3, stride=2)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.volume(x)
        x = x.tanh().mean(2)
        x = nn.functional.relu(self.image(x), inplace=True)
        x = self.line(x.mean(-1))
        x += 1
        return self.head(self.norm(x).mean(-1))


class BagNet(nn.Module):
    """Modules with awkward names, and an embedding behind which nothing but a sum follows."""

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.my_propulsion = nn.ModuleDict({"base_layer_like": nn.Linear(4, 4), "default": nn.Linear(4, 4)})
        self.weight = nn.Embedding(32, 4)
        self.merged = nn.ModuleList([nn.Linear(4, 3, bias=False)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.weight(input_ids).sum(1)
        return self.merged[0](self.my_propulsion["default"](self.my_propulsion["base_layer_like"](x).tanh()))


def pretrained(architecture: str, config_class: str, settings: dict, **more: Any) -> nn.Module:
    config = getattr(transformers, config_class)(**settings | more)
    return getattr(transformers, architecture)(config)


IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 3, 5, 30, 2]])
TOKENS = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3].contiguous()}
CLASSES = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
NEXT_TOKENS = {"input_ids": IDS, "labels": IDS}
ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Row:
    """A model, its input, and how it is adapted."""

    build: Callable[..., nn.Module]
    inputs: dict[str, torch.Tensor]
    config: dict[str, Any]
    head: str | None = None  # what is trained besides z, by name pattern
    steps: dict[str, torch.Tensor] = field(default_factory=dict)  # inputs for a training step, with labels
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)

    @property
    def degree(self) -> int:
        return self.config.get("degree", 15)


LLAMA = partial(pretrained, "LlamaForCausalLM", "LlamaConfig", DECODER)
LLAMA_BIASED = partial(LLAMA, attention_bias=True, mlp_bias=True)
BERT = partial(pretrained, "BertForSequenceClassification", "BertConfig", ENCODER)
MIXTRAL = partial(
    pretrained, "MixtralForCausalLM", "MixtralConfig", DECODER, num_local_experts=3, num_experts_per_tok=2
)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**config: Any) -> Row:
    return Row(LLAMA, TOKENS, {"target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | config, steps=NEXT_TOKENS)


ROWS: dict[str, Row] = {
    "Llama, causal": Row(
        LLAMA,
        TOKENS,
        {"target_modules": [*ATTENTION, "down_proj", "embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"},
        steps=NEXT_TOKENS,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    "Llama, all-linear": llama(target_modules="all-linear", degree=3),
    "Llama, preset": llama(target_modules="all"),
    "Llama, sequences": Row(
        partial(pretrained, "LlamaForSequenceClassification", "LlamaConfig", DECODER, num_labels=3),
        TOKENS,
        {"target_modules": ATTENTION, "task_type": "SEQ_CLS"},
        head="*.score.*",
        steps=CLASSES,
    ),
    "GPT-2, causal": Row(
        partial(pretrained, "GPT2LMHeadModel", "GPT2Config", GPT2),
        TOKENS,
        {"target_modules": ["c_attn", "mlp.c_proj", "wpe"], "task_type": "CAUSAL_LM"},
        steps=NEXT_TOKENS,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    ),
    "BERT, sequences": Row(
        BERT,
        TOKENS,
        {"target_modules": ["query", "output.dense", "position_embeddings"], "task_type": "SEQ_CLS"},
        head="*.classifier.*",
        steps=CLASSES,
    ),
    "BERT, tokens": Row(
        partial(pretrained, "BertForTokenClassification", "BertConfig", ENCODER),
        TOKENS,
        {"target_modules": ["value", "word_embeddings"], "task_type": "TOKEN_CLS"},
        head="*.classifier.*",
        steps={"input_ids": IDS, "labels": IDS % 3},
    ),
    "BERT, questions": Row(
        partial(pretrained, "BertForQuestionAnswering", "BertConfig", ENCODER | {"num_labels": 2}),
        TOKENS,
        {"target_modules": "attention", "task_type": "QUESTION_ANS", "degree": 55},
        head="*.qa_outputs.*",
        steps=TOKENS | {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])},
    ),
    "BERT, features": Row(
        partial(pretrained, "BertModel", "BertConfig", ENCODER, hidden_act="relu"),
        TOKENS,
        {"target_modules": ["key", "value"], "task_type": "FEATURE_EXTRACTION"},
    ),
    "T5, to sequences": Row(
        partial(pretrained, "T5ForConditionalGeneration", "T5Config", T5),
        PAIR,
        {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"},
        steps={"input_ids": IDS, "labels": PAIR["decoder_input_ids"]},
    ),
    "BART, to sequences": Row(
        partial(pretrained, "BartForConditionalGeneration", "BartConfig", BART),
        PAIR,
        {"target_modules": [*ATTENTION, "fc1", "embed_positions"], "task_type": "SEQ_2_SEQ_LM"},
        steps={"input_ids": IDS, "labels": PAIR["decoder_input_ids"]},
    ),
    "ViT, images": Row(
        partial(pretrained, "ViTForImageClassification", "ViTConfig", VIT),
        {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)},
        {"target_modules": "all", "modules_to_save": ["classifier"]},
        head="*.classifier.*",
        steps={"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8), "labels": torch.tensor([0, 2])},
    ),
    "convolutions": Row(
        ConvNet,
        {"x": torch.linspace(-1, 1, 256).sin().reshape(2, 1, 2, 8, 8)},
        {"target_modules": ["volume", "image", "line"]},
        dtypes=(torch.float32, torch.bfloat16, torch.float64),
    ),
    "awkward names": Row(
        BagNet, TOKENS, {"target_modules": ["weight", "base_layer_like", "default", "merged.0"], "degree": 4}
    ),
    "Mixtral, experts": Row(
        MIXTRAL,
        TOKENS,
        {"target_modules": ATTENTION, "target_parameters": EXPERTS, "task_type": "CAUSAL_LM"},
        steps=NEXT_TOKENS,
    ),
    "Mixtral, one tensor": Row(
        MIXTRAL, TOKENS, {"target_parameters": EXPERTS[1:], "num_vectors": 2, "pooling": "l2"}, steps=NEXT_TOKENS
    ),
    "degree 1": llama(degree=1),
    "degree pattern": llama(
        target_modules=[*ATTENTION, "up_proj"],
        degree_pattern={"v_proj": 2, r".*\.1\.mlp\.up_proj": 1, "layers.0.self_attn.q_proj": 40},
    ),
    "mean of 3": llama(num_vectors=3, pooling="mean"),
    "max of 2": llama(num_vectors=2, pooling="max", degree=5),
    "min of 4": llama(num_vectors=4, pooling="min"),
    "root mean square of 2": llama(num_vectors=2, pooling="l2", target_modules=[*ATTENTION, "embed_tokens"]),
    "all biases": Row(
        LLAMA_BIASED,
        TOKENS,
        {"target_modules": ATTENTION, "bias": "all", "task_type": "CAUSAL_LM"},
        head="*.bias",
        steps=NEXT_TOKENS,
    ),
    "biases of scaled layers": Row(
        LLAMA_BIASED,
        TOKENS,
        {"target_modules": ATTENTION, "bias": "propulsion_only", "task_type": "CAUSAL_LM"},
        head="*_proj.base_layer.bias",
        steps=NEXT_TOKENS,
    ),
    "a saved module": llama(modules_to_save=["lm_head"]),
    "trained tokens": llama(trainable_token_indices=[5, 30]),
    "block 1 only": llama(layers_to_transform=[1], layers_pattern="layers"),
    "block 0 of a preset": llama(target_modules="all", layers_to_transform=0),
    "exclusions": llama(target_modules="all", exclude_modules=r".*layers\.0\..*|.*embed_tokens|.*\.k_proj"),
}
HEADS = {"a saved module": "*.lm_head.modules_to_save.*", "trained tokens": "*.trainable_tokens_delta.*"}
FLAT = [(name, dtype) for name, row in ROWS.items() for dtype in row.dtypes]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

every_row = pytest.mark.parametrize("name", ROWS)
every_dtype = pytest.mark.parametrize(("name", "dtype"), FLAT, ids=[f"{n}-{str(d)[6:]}" for n, d in FLAT])


def base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = ROWS[name].build().to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # larger than transformers' own, so that every layer has its say
                parameter.normal_(0, 1 if "embed" in parameter_name else 0.3)
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3)
    return model


def config(name: str, **settings: Any) -> PropulsionConfig:
    return PropulsionConfig(**ROWS[name].config | settings)


def adapted(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    model = get_peft_model(base(name, dtype), config(name, **settings)).eval()
    randomize(model)
    return model


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Move everything that is trained away from its start; scales into [0.6, 1.4]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(f"propulsion_z.{adapter}"):
                layer = model.get_submodule(name.partition(".propulsion_z")[0])
                p.copy_((0.6 + 0.8 * torch.rand(p.shape, generator=generator)) ** (1 / layer.degree[adapter]))
            elif p.requires_grad and "propulsion_z" not in name and saved_for(name, adapter):
                p.add_(0.1 * torch.rand(p.shape, generator=generator))


def saved_for(name: str, adapter: str) -> bool:
    return adapter in name.split(".") if "modules_to_save" in name or "delta" in name else name.endswith("bias")


def z_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    ending = f".propulsion_z.{adapter}"
    return {n.removesuffix(ending): p for n, p in model.named_parameters() if n.endswith(ending)}


def run(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    inputs = {k: v.to(dtype or v.dtype) if v.is_floating_point() else v for k, v in ROWS[name].inputs.items()}
    with torch.no_grad():
        output = model(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if "end_logits" not in output else torch.stack([output.start_logits, output.end_logits])


def pooled(z: torch.Tensor, degree: int, pooling: str | None) -> torch.Tensor:
    z = z.detach().double()
    power = torch.ones_like(z)
    for _ in range(degree):
        power = power * z
    return {
        None: lambda: power,
        "mean": lambda: power.mean(0),
        "max": lambda: power.max(0).values,
        "min": lambda: power.min(0).values,
        "l2": lambda: power.square().mean(0).sqrt(),
    }[pooling]()


def degree_of(name: str, module: str) -> int:
    if name == "degree pattern":
        special = {"v_proj": 2, "1.mlp.up_proj": 1, "layers.0.self_attn.q_proj": 40}
        return next((degree for ending, degree in special.items() if module.endswith(ending)), 15)
    return ROWS[name].degree


def reference(name: str, model: nn.Module, dtype: torch.dtype, adapters: tuple[str, ...] = ("default",)):
    """Return the output of the naive formula in float64, from the base model in `dtype` and the z of `model`."""
    plain = base(name, dtype).double()
    if ROWS[name].build is MIXTRAL:
        plain.set_experts_implementation("eager")  # others have no float64
    state = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    for parameter_name, parameter in plain.named_parameters():
        saved = [state[n] for a in adapters for n in saved_names(parameter_name, a) if n in state]
        if saved:
            parameter.data = saved[-1].detach().double()
    for adapter in adapters:
        delta = next((p for n, p in state.items() if n.endswith(f"trainable_tokens_delta.{adapter}")), None)
        if delta is not None:
            plain.get_input_embeddings().weight.data[ROWS[name].config["trainable_token_indices"]] = delta.double()
    for adapter in adapters:
        for full, z in z_of(model, adapter).items():
            module = full.removeprefix("base_model.model.")
            wrapper = model.get_submodule(full)
            pooling = ROWS[name].config.get("pooling", "mean") if ROWS[name].config.get("num_vectors") else None
            parameter = getattr(wrapper, "parameter_name", None)
            scale = pooled(z, degree_of(name, module), pooling)
            if parameter is not None:
                target = getattr(plain.get_submodule(module.replace(".base_layer", "")), parameter)
                target.data = target * scale.unsqueeze(-1)
                continue
            spatial = {"volume": 3, "image": 2, "line": 1, "projection": 2}.get(module.rpartition(".")[2], 0)
            scale = scale.view(-1, *[1] * spatial)
            plain.get_submodule(module).register_forward_hook(lambda m, x, y, s=scale: y * s)
    return run(plain, name, torch.float64)


def saved_names(parameter_name: str, adapter: str) -> list[str]:
    module, _, leaf = parameter_name.rpartition(".")
    return [parameter_name] * (leaf == "bias") + [f"{module}.modules_to_save.{adapter}.{leaf}"]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    size = expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * size)


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "propulsion_z" not in n}


def assert_same_tensors(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert not [n for n, t in before.items() if not torch.equal(t, state[n])]


def head_pattern(name: str) -> str | None:
    return HEADS.get(name, ROWS[name].head)


# -- operations -------------------------------------------------------------------------------------------------------


@every_dtype
def test_the_start_is_the_base_model_bit_for_bit(name, dtype):
    expected = run(base(name, dtype), name, dtype)
    model = get_peft_model(base(name, dtype), config(name)).eval()
    assert {z.dtype for z in z_of(model).values()} == {torch.float32}
    assert torch.equal(run(model, name, dtype), expected)
    assert expected.isfinite().all()


@every_dtype
def test_forward_matches_the_reference(name, dtype):
    model = adapted(name, dtype)
    expected, actual = reference(name, model, dtype), run(model, name, dtype)
    effect = (expected - run(base(name, dtype), name, dtype)).norm()
    assert_near(actual, expected, dtype)
    assert (actual - expected).norm() < 5 * TOLERANCE[dtype] * effect


@every_row
def test_training_moves_what_it_should_and_lowers_the_loss(name):
    torch.manual_seed(0)
    model = get_peft_model(base(name), config(name)).train()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.BatchNorm1d)):
            module.eval()
    names = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    pattern = head_pattern(name)
    assert trained == {
        n
        for n in names
        if "propulsion_z" in n or (pattern and fnmatch.fnmatch(n, pattern) and ("original_module" not in n))
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(6):
        output = model(**(ROWS[name].steps or ROWS[name].inputs))
        loss = output.loss if ROWS[name].steps else (output if torch.is_tensor(output) else output[0]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, names[n])}
    assert moved <= trained
    assert {n for n in trained if "propulsion_z" in n} <= moved


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_row
def test_saving_and_loading_gives_the_same_bits(name, low_cpu_mem_usage, tmp_path):
    model = adapted(name)
    expected = run(model, name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.removesuffix(".propulsion_z") for n in saved if "propulsion_z" in n} == set(z_of(model))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["written_by"]) == ("PROPULSION", "peft_cpift")
    loaded = PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert z_of(loaded).keys() == z_of(model).keys()
    assert all(torch.equal(z, z_of(model)[n]) and z.dtype == torch.float32 for n, z in z_of(loaded).items())
    assert torch.equal(run(loaded, name), expected)
    assert not any(p.is_meta for p in loaded.parameters())


@every_dtype
def test_merging_changes_nothing_and_unmerging_restores_every_bit(name, dtype):
    model = adapted(name, dtype)
    with torch.no_grad():
        for z in z_of(model).values():
            z[..., 0] = 0  # dividing would not bring this back
    before, expected = base_tensors(model), run(model, name, dtype)
    model.merge_adapter(safe_merge=True)
    assert_near(run(model, name, dtype), expected, dtype)
    model.unmerge_adapter()
    assert_same_tensors(model, before)
    assert torch.equal(run(model, name, dtype), expected)


@every_dtype
def test_the_merged_export_is_a_plain_model(name, dtype):
    model = adapted(name, dtype)
    expected = reference(name, model, dtype)
    exported = model.merge_and_unload(safe_merge=True)
    assert [type(m) for m in exported.modules()] == [type(m) for m in base(name).modules()]
    assert exported.state_dict().keys() == base(name).state_dict().keys()
    assert_near(run(exported, name, dtype), expected, dtype)


@every_row
def test_unloading_gives_the_base_model_back(name):
    model = get_peft_model(base(name), config(name)).eval()
    with torch.no_grad():
        for z in z_of(model).values():
            z.mul_(1.02)
    unloaded = model.unload()
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in base(name).modules()]
    assert torch.equal(run(unloaded, name), run(base(name), name))


@every_row
def test_disabling_gives_the_base_model(name):
    model = adapted(name)
    expected = run(model, name)
    plain = run(base(name), name)
    with model.disable_adapter():
        inside = run(model, name)
    if ROWS[name].config.get("bias", "none") == "none":  # trained biases stay in the base layers, as in all of PEFT
        assert torch.equal(inside, plain)
    else:
        assert not torch.equal(inside, expected)
    assert torch.equal(run(model, name), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, name), inside)
    assert_near(run(model, name), expected, torch.float32)


@every_row
def test_several_adapters_switch_multiply_and_go(name):
    if ROWS[name].config.get("bias", "none") != "none":
        model = adapted(name)
        with pytest.raises(ValueError, match="bias"):
            model.add_adapter("other", config(name))
        return
    model = adapted(name)
    first = run(model, name)
    model.add_adapter("other", config(name))
    randomize(model, "other", seed=2)
    assert torch.equal(run(model, name), first)
    model.set_adapter("other")
    assert_near(run(model, name), reference(name, model, torch.float32, ("other",)), torch.float32)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if "propulsion_z" in n and p.requires_grad} == {
        "other"
    }
    if head_pattern(name) is None:
        model.base_model.set_adapter(["default", "other"])
        both = reference(name, model, torch.float32, ("default", "other"))
        assert_near(run(model, name), both, torch.float32)
        before = base_tensors(model)
        model.merge_adapter()
        assert_near(run(model, name), both, torch.float32)
        model.unmerge_adapter()
        assert_same_tensors(model, before)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not [n for n, _ in model.named_parameters() if n.endswith(".other")]
    assert torch.equal(run(model, name), first)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "bias" not in row.config])  # one adapter only
def test_deleting_the_active_adapter_leaves_the_other(name):
    model = adapted(name)
    model.add_adapter("other", config(name))
    randomize(model, "other", seed=2)
    model.set_adapter("other")
    other = run(model, name)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="[Aa]ctive|was active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(run(model, name), other)


@every_row
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickle"])
def test_copies_are_independent_and_equal(name, duplicate):
    model = adapted(name)
    expected = run(model, name)
    twin = duplicate(model)
    assert torch.equal(run(twin, name), expected)
    assert {n: (type(p), p.requires_grad) for n, p in twin.named_parameters()} == {
        n: (type(p), p.requires_grad) for n, p in model.named_parameters()
    }
    with torch.no_grad():
        for z in z_of(twin).values():
            z.zero_()
    assert not torch.equal(run(twin, name), expected)
    assert torch.equal(run(model, name), expected)


def gradients(model: nn.Module, name: str, with_loss: bool = True) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with_loss = with_loss and bool(ROWS[name].steps)
    output = model(**(ROWS[name].steps if with_loss else ROWS[name].inputs))
    loss = output.loss if with_loss else (output if torch.is_tensor(output) else output[0]).sin().sum()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_row
def test_keeping_outputs_in_place_gives_the_gradients_of_keeping_inputs(name):
    model = adapted(name)
    actual = gradients(model, name)
    assert actual.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for layer in model.modules():
        if isinstance(layer, PropulsionLayer):
            layer.keep_output = False
    expected = gradients(model, name)
    for n, gradient in expected.items():
        torch.testing.assert_close(actual[n], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if isinstance(row.build, partial)])
def test_gradients_are_the_same_with_gradient_checkpointing(name, reentrant):
    plain, model = adapted(name).train(), adapted(name).train()
    for module in (*plain.modules(), *model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    expected = gradients(plain, name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads() if hasattr(model, "enable_input_require_grads") else None
    calls = []
    layer = next(m for n, m in model.named_modules() if isinstance(m, PropulsionLayer) and ".embed" not in n)
    layer.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model, name)
    assert actual.keys() == expected.keys()
    for n, gradient in expected.items():
        torch.testing.assert_close(actual[n], gradient, rtol=1e-4, atol=1e-6)


@every_row
def test_autocast_works_with_float32_scales(name):
    model = adapted(name)
    expected = run(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(model, name)
        found = gradients(model, name)
    assert_near(actual, expected, torch.bfloat16)
    assert {g.dtype for n, g in found.items() if "propulsion_z" in n} == {torch.float32}
    assert not torch.equal(actual.to(expected.dtype), expected)


EXPERTS_COMPILE = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="transformers before 5.23 cannot compile the backward pass of experts on a CPU, adapted or not",
)


@pytest.mark.parametrize(
    "name",
    [
        "Llama, causal",
        "GPT-2, causal",
        "convolutions",
        pytest.param("Mixtral, experts", marks=EXPERTS_COMPILE),
        "mean of 3",
        "degree pattern",
    ],
)
def test_compiled_in_one_graph_forward_and_backward_are_the_same(name):
    torch._dynamo.reset()
    model = adapted(name)
    expected, wanted = run(model, name), gradients(model, name, with_loss=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = ROWS[name].inputs
    output = compiled(**inputs)
    output = output if torch.is_tensor(output) else output.logits
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    found = gradients(compiled, name, with_loss=False)
    for n, gradient in wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{n}"], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama, causal", "convolutions"])
def test_the_compiler_that_fuses_gives_the_same(name):
    torch._dynamo.reset()
    model = adapted(name)
    wanted = gradients(model, name)
    found = gradients(torch.compile(model, fullgraph=True), name)
    for n, gradient in wanted.items():
        torch.testing.assert_close(found[f"_orig_mod.{n}"], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["awkward names", "convolutions", "degree 1", "mean of 3"])
def test_function_transforms_over_a_functional_call(name):
    model = adapted(name)
    if isinstance(ROWS[name].build, partial):
        model.base_model.model.set_attn_implementation("eager")  # others have no forward-mode derivative
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    inputs = ROWS[name].inputs

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        output = torch.func.functional_call(model, values, (), inputs)
        return (output if torch.is_tensor(output) else output.logits).pow(2).sum()

    wanted = {
        n: g
        for n, g in zip(
            trained,
            torch.autograd.grad(
                loss(dict(model.named_parameters())), [p for p in model.parameters() if p.requires_grad]
            ),
            strict=True,
        )
    }
    for n, gradient in torch.func.grad(loss)(trained).items():
        torch.testing.assert_close(gradient, wanted[n], rtol=1e-4, atol=1e-6)
    tangents = {n: torch.randn_like(p) for n, p in trained.items()}
    _, slope = torch.func.jvp(loss, (trained,), (tangents,))
    expected = sum((wanted[n] * t).sum() for n, t in tangents.items())
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)
    stacked = {n: torch.stack([p, p * 1.01]) for n, p in trained.items()}
    losses = torch.func.vmap(loss)(stacked)
    one_by_one = [loss({n: p[i] for n, p in stacked.items()}) for i in range(2)]
    torch.testing.assert_close(losses, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "adapter", ["propulsion", "propulsion_z", "default.", "a.b", "q_proj", "base_layer", "weight"]
)
def test_awkward_adapter_names_either_work_or_are_refused_with_the_reason(adapter, tmp_path):
    name = "Llama, causal"
    try:
        model = get_peft_model(base(name), config(name), adapter_name=adapter).eval()
    except (KeyError, ValueError) as error:
        assert re.search(r"name|dot|contain", str(error))  # noqa: PT017
        return
    randomize(model, adapter)
    expected = reference(name, model, torch.float32, (adapter,))
    assert_near(run(model, name), expected, torch.float32)
    model.save_pretrained(tmp_path)
    folder = tmp_path / adapter
    assert len(load_file(folder / "adapter_model.safetensors")) >= len(z_of(model, adapter))
    for loaded_name in (adapter, "default"):
        loaded = PeftModel.from_pretrained(base(name), folder, adapter_name=loaded_name).eval()
        assert_near(run(loaded, name), expected, torch.float32)
    model.add_adapter("other", config(name))
    model.delete_adapter("other")
    assert_near(run(model.merge_and_unload(), name), expected, torch.float32)


def test_reading_names_from_an_adapter_that_was_saved_beside_another(tmp_path):
    name = "Llama, all-linear"
    model = adapted(name)
    model.add_adapter("second", config(name, degree=5))
    randomize(model, "second", seed=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path).eval()
    loaded.load_adapter(tmp_path / "second", "renamed")
    assert loaded.peft_config["renamed"].degree == 5
    assert all(torch.equal(z, z_of(model, "second")[n]) for n, z in z_of(loaded, "renamed").items())
    model.set_adapter("second")
    loaded.set_adapter("renamed")
    assert torch.equal(run(loaded, name), run(model, name))


def test_a_checkpoint_of_half_precision_is_loaded_into_float32(tmp_path):
    name = "Llama, causal"
    model = adapted(name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(base(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert all(z.dtype == torch.float32 and torch.equal(z, z.bfloat16().float()) for z in z_of(loaded).values())


def test_weights_are_merged_from_what_bias_training_left():
    name = "all biases"
    model = adapted(name)
    expected = run(model, name)
    bias = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias, bias)
    assert torch.equal(run(model, name), expected)


@pytest.mark.parametrize("bias", ["all", "propulsion_only"])
def test_exactly_the_trained_biases_are_saved(bias, tmp_path):
    name = "all biases"
    model = adapted(name, bias=bias)
    model.save_pretrained(tmp_path)
    saved = {n for n in load_file(tmp_path / "adapter_model.safetensors") if n.endswith("bias")}
    names = {"q_proj", "v_proj"} | (
        {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} if bias == "all" else set()
    )
    assert {n.split(".")[-2 if n.split(".")[-2] != "base_layer" else -3] for n in saved} == names
    assert len(saved) == 2 * len(names)


def test_a_pattern_that_matches_nothing_says_so():
    with pytest.warns(NoEffectWarning, match=r"degree_pattern has 'k_proj', which matches none"):
        get_peft_model(base("degree 1"), config("degree 1", degree_pattern={"k_proj": 3}))


def test_layers_that_were_left_out_are_left_out():
    expected = {
        "block 1 only": {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"},
        "exclusions": {
            f"model.layers.1.{n}"
            for n in (
                "self_attn.q_proj",
                "self_attn.v_proj",
                "self_attn.o_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            )
        },
    }
    for name, modules in expected.items():
        assert {n.removeprefix("base_model.model.") for n in z_of(adapted(name))} == modules
    blocks = {n.split("layers.")[1][0] for n in z_of(adapted("block 0 of a preset"))}
    assert blocks == {"0"}


# -- every architecture that has a preset -----------------------------------------------------------------------------

HEAD_DIM = {"head_dim": 8}
ENCODER_ONLY = {k: v for k, v in ENCODER.items() if k != "num_labels"}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": True}
VISION = {k: v for k, v in VIT.items() if k != "num_labels"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bart": BART,
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "deberta": ENCODER_ONLY | RELATIVE,
    "deberta-v2": ENCODER_ONLY | RELATIVE | {"position_buckets": 4},
    "distilbert": {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2},
    "electra": ENCODER_ONLY | {"embedding_size": 16},
    "falcon": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gemma": DECODER | HEAD_DIM,
    "gemma2": DECODER | HEAD_DIM,
    "gemma3": {"text_config": DECODER | HEAD_DIM, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gemma3_text": DECODER | HEAD_DIM,
    "gpt2": GPT2 | {"eos_token_id": 1},
    "mt5": T5,
    "opt": ENCODER_ONLY | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "qwen3": DECODER | HEAD_DIM,
    "t5": T5,
    "vit": VISION,
}
ARCHITECTURES |= dict.fromkeys(("bert", "gpt_neox", "roberta", "xlm-roberta"), ENCODER_ONLY)
ARCHITECTURES |= dict.fromkeys(("llama", "mistral", "phi", "phi3", "qwen2"), DECODER)
ARCHITECTURES |= {"mixtral": DECODER | {"num_local_experts": 2}}


def test_every_preset_is_trained_here():
    assert set(ARCHITECTURES) == set(PRESETS)


def one_step(model_type: str, dropout: float, checkpointing: bool, keep_output: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(ARCHITECTURES[model_type]))
    for part in (settings, getattr(settings, "text_config", None), getattr(settings, "vision_config", None)):
        for name, value in list(vars(part).items()) if part is not None else ():
            if "drop" in name and isinstance(value, float) and "layerdrop" not in name:
                setattr(part, name, dropout)
    base = transformers.AutoModel.from_config(settings)
    model = get_peft_model(base, PropulsionConfig(target_modules="all", degree=2)).train()
    randomize(model)
    for layer in model.modules():
        if isinstance(layer, PropulsionLayer) and not keep_output:
            layer.keep_output = False
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if model_type == "vit":
        output = model(pixel_values=ROWS["ViT, images"].inputs["pixel_values"])
    else:
        output = model(**(PAIR if settings.is_encoder_decoder else TOKENS))
    output.last_hidden_state.sin().sum().backward()
    return {n: z.grad for n, z in z_of(model).items()}


@pytest.mark.parametrize("mode", ["plain", "dropout", "checkpointing"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_no_architecture_writes_to_what_the_backward_pass_needs(model_type, mode):
    settings = {"dropout": 0.0 if mode == "plain" else 0.2, "checkpointing": mode == "checkpointing"}
    expected = one_step(model_type, **settings, keep_output=False)
    actual = one_step(model_type, **settings, keep_output=True)
    for name, gradient in expected.items():
        if gradient is None:  # without an image, the vision tower of Gemma 3 does not run
            assert "vision" in name
            continue
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item() + 1e-7)
