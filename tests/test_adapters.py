"""Strategy: the reference is the ordinary way, in memory: the base loaded in float32, the adapter put on it by PEFT,
`merge_and_unload()`, `state_dict()`. Adapters of many methods, with random parameters, on tiny models whose biases are
not zero, must give the same values, bit for bit where nothing is computed. What cannot be exact must be refused.

Memory is looked at through what is read: the model itself must stay hollow, and a tensor must cost no more than the
tensors of its own module.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import peft_types
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_cpift import CpiftError, PropulsionConfig, find_core_region
from peft_cpift.adapters import MergedWeights, WeightDeltas, open_deltas, write_lora
from peft_cpift.adapters.lora import low_rank
from peft_cpift.adapters.skeleton import Target, hollow_model
from peft_cpift.adapters.weights import _starts_at_zero
from peft_cpift.checkpoint.reader import Checkpoint

LLAMA = dict(
    vocab_size=28,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    attention_bias=True,
)
SOME = ["q_proj", "down_proj"]


def save_model(model, folder: Path, dtype: torch.dtype = torch.float32, **kwargs) -> Path:
    """Save a model with random values everywhere, also where models start at 0 or 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    gpt2 = GPT2Config(vocab_size=28, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False)
    bert = BertConfig(
        vocab_size=28,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        is_decoder=False,
    )
    mixtral = MixtralConfig(**{**LLAMA, "num_local_experts": 2, "tie_word_embeddings": False})
    untied = LlamaConfig(**LLAMA, tie_word_embeddings=False)
    return {
        "llama": save_model(LlamaForCausalLM(untied), folder / "llama"),
        "bfloat16": save_model(LlamaForCausalLM(untied), folder / "bf16", torch.bfloat16, max_shard_size="4KB"),
        "float64": save_model(LlamaForCausalLM(untied), folder / "float64", torch.float64),
        "tied": save_model(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), folder / "tied"),
        "gpt2": save_model(GPT2LMHeadModel(gpt2), folder / "gpt2"),
        "bert": save_model(BertForMaskedLM(bert), folder / "bert"),
        "mixtral": save_model(MixtralForCausalLM(mixtral), folder / "mixtral"),
    }


def load(base: Path):
    model_class = BertForMaskedLM if json.loads((base / "config.json").read_text())["model_type"] == "bert" else None
    return (model_class or AutoModelForCausalLM).from_pretrained(base, dtype=torch.float32)


def make_adapter(base: Path, config, folder: Path, *, seed: int | None = 2, dtype: torch.dtype | None = None) -> Path:
    """Save an adapter with random trainable parameters, or as it starts if `seed` is None."""
    torch.manual_seed(0)
    model = get_peft_model(load(base), copy.deepcopy(config))
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    if dtype is not None:
        file = folder / "adapter_model.safetensors"
        save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def ordinary(base: Path, adapter: Path | None = None) -> dict[str, torch.Tensor]:
    model = load(base)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter).merge_and_unload()).state_dict()


def check(base: Path, adapter: Path) -> tuple[MergedWeights, WeightDeltas]:
    """Compare merged weights and deltas with the ordinary way."""
    merged, deltas, checkpoint = MergedWeights(base, adapter), WeightDeltas(base, adapter), Checkpoint(base)
    expected, before = ordinary(base, adapter), ordinary(base)
    assert list(merged) == list(checkpoint)
    assert merged.shapes == checkpoint.shapes
    for name in merged:
        value = merged[name]
        assert value.dtype == merged.dtypes[name]
        torch.testing.assert_close(value.float(), expected[name], rtol=0, atol=2e-7)
        half = merged.size(name) // 2
        assert torch.equal(merged.part(name, 1, half), value.reshape(-1)[1:half])
        if name in deltas:
            assert merged.dtypes[name] == deltas.dtypes[name] == torch.float32
            assert deltas.shapes[name] == checkpoint.shapes[name]
            torch.testing.assert_close(deltas[name], expected[name] - before[name], rtol=1e-5, atol=1e-6)
        else:
            assert merged.dtypes[name] == checkpoint.dtypes[name]
            assert torch.equal(value, checkpoint[name])
            assert torch.equal(expected[name], before[name])
    assert list(deltas) == sorted(deltas)
    assert {name for name in merged if not torch.equal(expected[name], before[name])} == set(deltas)
    return merged, deltas


def of(kind: str, **settings):
    config = PropulsionConfig if kind == "PROPULSION" else peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_types.PeftType(kind)]
    return config(**({"target_modules": SOME} | settings))


METHODS = {
    "lora": of("LORA"),
    "lora on all": of("LORA", target_modules="all-linear", r=3, lora_alpha=5),
    "lora patterns": of("LORA", rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.mlp.down_proj": 9}),
    "lora layers": of("LORA", layers_to_transform=[1], exclude_modules=["mlp.down_proj"]),
    "rslora": of("LORA", use_rslora=True),
    "dora": of("LORA", use_dora=True),
    "lora embeddings": of("LORA", target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "lora bias": of("LORA", bias="lora_only"),
    "lora all biases": of("LORA", bias="all"),
    "lora with bias": of("LORA", target_modules=["q_proj"], lora_bias=True),
    "lora modules to save": of("LORA", modules_to_save=["lm_head", "norm"]),
    "lora and a saved block": of("LORA", target_modules="all-linear", modules_to_save=["layers.0.mlp"]),
    "lora tokens": of("LORA", trainable_token_indices=[1, 5]),
    "kasa": of("LORA", kasa_config=peft.KasaConfig()),
    "lora gaussian": of("LORA", init_lora_weights="gaussian"),
    "tokens": of("TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=[0, 7]),
    "adalora": of("ADALORA", total_step=10),
    "ia3": of("IA3", feedforward_modules=["down_proj"]),
    "loha": of("LOHA"),
    "lokr": of("LOKR"),
    "vera": of("VERA"),
    "vera without projections": of("VERA", save_projection=False),
    "oft": of("OFT", oft_block_size=4),
    "boft": of("BOFT", boft_block_size=4),
    "hra": of("HRA"),
    "hira": of("HIRA"),
    "miss": of("MISS", r=4),
    "randlora": of("RANDLORA"),
    "fourierft": of("FOURIERFT", n_frequency=20),
    "vblora": of("VBLORA", vector_length=4, num_vectors=8),
    "shira": of("SHIRA", r=2),
    "layer norms": of("LN_TUNING", target_modules=["input_layernorm"]),
    "propulsion": of("PROPULSION"),
    "propulsion degree": of("PROPULSION", degree=3, degree_pattern={"q_proj": 5}),
    "propulsion bias": of("PROPULSION", bias="propulsion_only", num_vectors=2),
    "propulsion embeddings": of("PROPULSION", target_modules=["embed_tokens", "k_proj"], bias="all"),
}
ADDITIVE = {"lora", "lora on all", "lora patterns", "lora layers", "rslora", "lora with bias", "lora gaussian"}
ADDITIVE |= {"adalora", "loha", "lokr", "vera", "vera without projections", "miss", "randlora", "fourierft"}
ADDITIVE |= {"vblora", "shira", "lora embeddings"}


@pytest.mark.parametrize("method", METHODS)
def test_is_what_the_ordinary_way_gives(models, tmp_path, method):
    adapter = make_adapter(models["llama"], METHODS[method], tmp_path / "adapter")
    _, deltas = check(models["llama"], adapter)
    (tmp_path / "config").mkdir()
    shutil.copy(models["llama"] / "config.json", tmp_path / "config")
    if method not in ADDITIVE:
        with pytest.raises(CpiftError, match="depends on the model's weights"):
            WeightDeltas(tmp_path / "config", adapter)
        return
    without = WeightDeltas(tmp_path / "config", adapter)
    assert list(without) == list(deltas)
    assert all(torch.equal(without[name], deltas[name]) for name in deltas)


@pytest.mark.parametrize(
    "method", ["lora", "dora", "lora all biases", "lora modules to save", "propulsion", "ia3", "oft"]
)
def test_of_a_sharded_bfloat16_base(models, tmp_path, method):
    assert (models["bfloat16"] / "model.safetensors.index.json").is_file()
    check(models["bfloat16"], make_adapter(models["bfloat16"], METHODS[method], tmp_path, dtype=torch.bfloat16))


def test_of_a_float64_base_is_float64(models, tmp_path):
    base, name = models["float64"], "model.layers.1.self_attn.q_proj.weight"
    adapter = make_adapter(base, METHODS["lora"], tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter)
    merged, deltas = MergedWeights(base, adapter), WeightDeltas(base, adapter)
    assert merged.dtypes[name] == deltas.dtypes[name] == merged[name].dtype == deltas[name].dtype == torch.float64
    torch.testing.assert_close(merged[name], model.merge_and_unload().state_dict()[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "config",
    [
        of("LORA", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        of("LORA", target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
        of("IA3", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        of("PROPULSION", target_modules=["c_attn", "wpe"], bias="all"),
    ],
)
def test_of_gpt2_whose_weights_are_transposed(models, tmp_path, config):
    base = models["gpt2"]
    adapter = make_adapter(base, config, tmp_path / "adapter")
    _, deltas = check(base, adapter)
    # The Hub's gpt2 was saved without its prefix.
    inner = tmp_path / "inner"
    shutil.copytree(base, inner)
    tensors = load_file(inner / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, inner / "model.safetensors", metadata={"format": "pt"})
    short = WeightDeltas(inner, adapter)
    assert {f"transformer.{name}" for name in short} == set(deltas)
    assert all(torch.equal(short[name], deltas[f"transformer.{name}"]) for name in short)
    merged, expected = MergedWeights(inner, adapter), ordinary(base, adapter)
    assert all(torch.equal(merged[name], expected[f"transformer.{name}"]) for name in short)


def test_of_bert_whose_bias_is_tied(models, tmp_path):
    check(models["bert"], make_adapter(models["bert"], of("LORA", target_modules=["query"], bias="all"), tmp_path))


def test_reads_no_more_than_the_module_that_is_wanted(models, tmp_path, monkeypatch):
    base = models["llama"]
    merged = MergedWeights(base, make_adapter(base, METHODS["propulsion"], tmp_path / "adapter"))
    reads = []
    part = Checkpoint.part
    monkeypatch.setattr(Checkpoint, "part", lambda self, name, *span: reads.append(name) or part(self, name, *span))
    for start in range(0, 250, 50):
        merged.part("model.layers.1.self_attn.q_proj.weight", start, start + 50)
    merged["model.layers.1.self_attn.q_proj.bias"]
    assert sorted(reads) == [f"model.layers.1.self_attn.q_proj.{kind}" for kind in ("bias", "weight")]
    assert set(merged._last) == set(reads)
    for name in merged:
        merged[name]
    hollow = [p for target in merged._skeleton.targets for p in target.hollow.values()]
    assert len(hollow) == 6
    assert all(p.untyped_storage().nbytes() == 4 and bool(p.isnan().all()) for p in hollow)
    for target in merged._skeleton.targets:
        assert not target.module.merged


def test_nothing_of_a_large_model_is_in_memory(models, tmp_path):
    """A model of 100 billion parameters."""
    config = LlamaConfig(hidden_size=65536, intermediate_size=65536, num_hidden_layers=4, vocab_size=32000)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    model = hollow_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) > 10**11
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) < 10**4


def test_parts_may_be_read_from_several_threads_and_changed(models, tmp_path):
    merged = MergedWeights(models["llama"], make_adapter(models["llama"], METHODS["lora on all"], tmp_path))
    whole = {name: merged[name] for name in merged}
    jobs = [(name, start) for start in range(0, 200, 50) for name in merged if merged.size(name) > 200]
    with ThreadPoolExecutor(8) as pool:
        for (name, start), part in zip(jobs, pool.map(lambda job: merged.part(*job, job[1] + 50), jobs), strict=True):
            assert torch.equal(part, whole[name].reshape(-1)[start : start + 50])
    name = "model.layers.0.self_attn.q_proj.weight"
    for _ in range(2):
        part = merged.part(name, 0, 50)
        assert torch.equal(part, whole[name].reshape(-1)[:50])
        part.zero_()
    assert all(torch.equal(merged[name], whole[name]) for name in merged)


def test_threads_that_want_one_tensor_wait_for_one_merge(models, tmp_path, monkeypatch):
    merged = MergedWeights(models["llama"], make_adapter(models["llama"], METHODS["lora"], tmp_path))
    merges, merge = [], Target.merge

    def slow_merge(target, values):
        merges.append(target.name)
        time.sleep(0.1)
        return merge(target, values)

    monkeypatch.setattr(Target, "merge", slow_merge)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: merged.part("model.layers.0.self_attn.q_proj.weight", start, 256), range(4)))
    assert merges == ["model.layers.0.self_attn.q_proj"]


def test_random_numbers_are_left_alone(models, tmp_path):
    adapter = make_adapter(models["llama"], METHODS["vera without projections"], tmp_path)
    torch.manual_seed(5)
    MergedWeights(models["llama"], adapter)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_digest_tells_bases_adapters_and_settings_apart_and_nothing_else(models, tmp_path):
    one = make_adapter(models["llama"], METHODS["lora"], tmp_path / "one")
    other = make_adapter(models["llama"], METHODS["lora"], tmp_path / "other", seed=3)
    shutil.copytree(one, tmp_path / "same")
    shutil.copytree(one, tmp_path / "scaled")
    edit(tmp_path / "scaled", "adapter_config.json", lora_alpha=9)
    reordered = Checkpoint(one).adapter_config["target_modules"][::-1]
    elsewhere = {"inference_mode": False, "base_model_name_or_path": "elsewhere"}
    edit(tmp_path / "same", "adapter_config.json", target_modules=reordered, **elsewhere)
    for kind in (MergedWeights, WeightDeltas):
        digest = kind(models["llama"], one).digest
        assert digest == kind(models["llama"], tmp_path / "same").digest
        for adapter in (other, tmp_path / "scaled"):
            assert digest != kind(models["llama"], adapter).digest
        # What LoRA adds is the same on every base.
        assert (digest == kind(models["bfloat16"], one).digest) == (kind is WeightDeltas)
    dora = make_adapter(models["llama"], METHODS["dora"], tmp_path / "dora")
    assert WeightDeltas(models["llama"], dora).digest != WeightDeltas(models["bfloat16"], dora).digest
    assert MergedWeights(models["llama"], one).digest != WeightDeltas(models["llama"], one).digest


# Tied weights


@pytest.mark.parametrize("method", ["lora", "lora tokens", "tokens", "propulsion"])
def test_of_a_tied_base_where_both_uses_change_alike_or_none(models, tmp_path, method):
    adapter = make_adapter(models["tied"], METHODS[method], tmp_path)
    merged = MergedWeights(models["tied"], adapter)
    expected = ordinary(models["tied"], adapter)
    assert all(torch.equal(merged[name].float(), expected[name]) for name in merged)


@pytest.mark.parametrize(
    "config",
    [
        of("LORA", target_modules=["embed_tokens"]),
        of("LORA", target_modules=["lm_head"]),
        of("LORA", target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        of("LORA", modules_to_save=["embed_tokens"]),
        of("LORA", modules_to_save=["lm_head"]),
        of("LORA", modules_to_save=["embed_tokens", "lm_head"]),
        of("PROPULSION", target_modules=["embed_tokens"]),
    ],
)
@pytest.mark.parametrize("kind", [MergedWeights, WeightDeltas])
def test_change_of_one_use_of_a_tied_weight_is_refused(models, tmp_path, config, kind):
    adapter = make_adapter(models["tied"], config, tmp_path)
    with pytest.raises(CpiftError, match=r"which the model ties to .*: save the base with tie_word_embeddings=False"):
        kind(models["tied"], adapter)


def test_saved_modules_that_stay_tied(models, tmp_path):
    config = of("LORA", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapter = make_adapter(models["tied"], config, tmp_path)
    merged, expected = MergedWeights(models["tied"], adapter), ordinary(models["tied"], adapter)
    assert torch.equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"])
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


# What is refused


def edit(folder: Path, file: str, **settings) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | settings))


def refused(base, adapter, match: str) -> None:
    for kind in (MergedWeights, WeightDeltas):
        with pytest.raises(CpiftError, match=match) as caught:
            kind(base, adapter)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_adapters_that_changed_the_base_are_refused(models, tmp_path, start):
    adapter = make_adapter(models["llama"], METHODS["lora"], tmp_path)
    edit(adapter, "adapter_config.json", init_lora_weights=start)
    refused(models["llama"], adapter, f"init_lora_weights='{start}', which changes the base's weights")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "NO_SUCH"])
def test_adapters_that_change_no_weights_are_refused(models, tmp_path, kind):
    adapter = make_adapter(models["llama"], METHODS["lora"], tmp_path)
    edit(adapter, "adapter_config.json", peft_type=kind)
    refused(models["llama"], adapter, f"is a {kind} adapter, which changes no weights")


@pytest.mark.parametrize(
    "config",
    [of("POLY"), of("LILY"), of("LORA", target_modules=["down_proj"], lora_bias=True)],
)
def test_adapters_that_peft_cannot_merge_are_refused(models, tmp_path, config):
    refused(models["llama"], make_adapter(models["llama"], config, tmp_path), "cannot be merged into 'model.layers.0")


@pytest.mark.parametrize("config", [of("OSF"), of("TINYLORA")])
def test_adapters_that_need_the_base_to_be_loaded_are_refused(models, tmp_path, config):
    refused(models["llama"], make_adapter(models["llama"], config, tmp_path), "cannot be put on the model|not save")


def test_quantized_and_custom_models_and_folders_that_are_none_are_refused(models, tmp_path):
    adapter = make_adapter(models["llama"], METHODS["lora"], tmp_path / "adapter")
    for number, (settings, match) in enumerate(
        [
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantized"),
            ({"architectures": ["MyModel"]}, "architecture MyModel, which transformers does not have"),
            ({"architectures": None}, "architecture None"),
            ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "cannot build the model"),
        ]
    ):
        base = tmp_path / str(number)
        shutil.copytree(models["llama"], base)
        edit(base, "config.json", **settings)
        refused(base, adapter, match)
    refused(adapter, adapter, "is an adapter itself")
    refused(models["llama"], models["llama"], "is a whole model, not an adapter")
    (models["llama"] / "empty").mkdir()
    refused(models["llama"] / "empty", adapter, "cannot read|no adapter_model")


def test_adapters_of_other_models_are_refused(models, tmp_path):
    lora = make_adapter(models["llama"], METHODS["lora"], tmp_path / "lora")
    refused(models["gpt2"], lora, "cannot be put on the model")
    small = save_model(LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 8})), tmp_path / "small")
    refused(small, lora, "cannot be put on the model")
    head = make_adapter(models["llama"], METHODS["lora"], tmp_path / "head")
    tensors = load_file(head / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.score.weight": torch.ones(2, 16)}, head / "adapter_model.safetensors")
    refused(models["llama"], head, "'base_model.model.score.weight' of .* fits nothing in the model")
    tensors.popitem()
    save_file(tensors, head / "adapter_model.safetensors")
    refused(models["llama"], head, "has no 'base_model.model.*which its configuration asks for")
    saved = make_adapter(models["llama"], METHODS["lora modules to save"], tmp_path / "saved")
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.ones(30, 16)
    save_file(tensors, saved / "adapter_model.safetensors")
    refused(models["llama"], saved, "vocabulary was resized")


def test_values_that_are_not_finite_are_refused(models, tmp_path):
    adapter = make_adapter(models["llama"], METHODS["lora"], tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: t * float("inf") for k, t in tensors.items()}, adapter / "adapter_model.safetensors")
    refused(models["llama"], adapter, "not finite")


def test_tensors_that_the_checkpoint_lacks_or_names_otherwise_are_refused(models, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(models["llama"], base)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, make_adapter(models["llama"], METHODS["lora"], tmp_path / "a"), r"'model.layers.1.mlp.down_proj.wei")
    config = of("LORA", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    adapter = make_adapter(models["mixtral"], config, tmp_path / "b")
    refused(models["mixtral"], adapter, r"is for 'model.layers.\d.mlp.experts.* saved under another name")
    attention = make_adapter(models["mixtral"], of("LORA", target_modules=["q_proj"]), tmp_path / "c")
    merged, expected = MergedWeights(models["mixtral"], attention), ordinary(models["mixtral"], attention)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in merged
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], expected["model.layers.0.self_attn.q_proj.weight"]
    )


# open_deltas


def test_deltas_before_training_are_zero_or_those_of_the_adapter_that_is_given(models, tmp_path):
    tuned = make_adapter(models["llama"], METHODS["lora"], tmp_path / "tuned")
    start = make_adapter(models["llama"], METHODS["lora"], tmp_path / "start", seed=4)
    after, before = open_deltas(str(tuned))
    assert all(torch.equal(after[name], WeightDeltas(models["llama"], tuned)[name]) for name in after)
    assert before.shapes == after.shapes
    assert before.dtypes == after.dtypes
    assert not any(before[name].any() for name in before)
    assert after.adapter_config == before.adapter_config == {}
    _, before = open_deltas(tuned, start)
    assert all(torch.equal(before[name], WeightDeltas(models["llama"], start)[name]) for name in after)
    edit(tuned, "adapter_config.json", base_model_name_or_path="gone")
    after, _ = open_deltas(tuned, models["bfloat16"])
    assert str(models["bfloat16"]) in after.label
    region = find_core_region(tuned, models["llama"], percent=10, coordinates="delta")
    assert region.shapes == after.shapes
    assert len(region) == sum(after.size(name) for name in after) // 10


def test_deltas_find_the_model_in_the_local_cache_and_fetch_nothing(models, tmp_path, monkeypatch):
    adapter = make_adapter(models["llama"], METHODS["dora"], tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("me/tiny", "no/such/name", None, ""):
        edit(adapter, "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(CpiftError, match="neither a folder nor in the Hub's local cache: give the model's folder"):
            open_deltas(adapter)
    repository = tmp_path / "cache" / "models--me--tiny"
    shutil.copytree(models["llama"], repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    edit(adapter, "adapter_config.json", base_model_name_or_path="me/tiny")
    assert "snapshots" in open_deltas(adapter)[0].label


def test_deltas_refuse_what_has_none_and_starts_that_are_not_zero(models, tmp_path):
    lora = make_adapter(models["llama"], METHODS["lora"], tmp_path / "lora")
    for arguments in (({"w": torch.ones(1)},), (lora, {"w": torch.ones(1)}), (models["llama"],)):
        with pytest.raises(CpiftError, match="adapter"):
            open_deltas(*arguments)
    fourier = make_adapter(models["llama"], METHODS["fourierft"], tmp_path / "fourier")
    with pytest.raises(CpiftError, match="did not start at a change of zero"):
        open_deltas(fourier)
    open_deltas(fourier, fourier)


@pytest.mark.parametrize("method", [*METHODS, "c3a", "unilora"])
def test_it_is_known_which_methods_start_at_zero(models, tmp_path, method):
    more = {"c3a": of("C3A", block_size=4), "unilora": of("UNILORA")}
    adapter = make_adapter(models["llama"], (METHODS | more)[method], tmp_path, seed=None)
    deltas = WeightDeltas(models["llama"], adapter)
    at_zero = all(float(deltas[name].abs().max()) < 1e-6 for name in deltas)
    assert at_zero == _starts_at_zero(Checkpoint(adapter).adapter_config)


# write_lora


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("llama", of("LORA", target_modules="all-linear", r=3)),
        ("llama", of("LOHA", r=4)),
        ("gpt2", of("LORA", target_modules=["c_attn", "c_proj"], r=3, fan_in_fan_out=True)),
    ],
)
@pytest.mark.parametrize("rank", [2, 3, 20])
def test_written_lora_is_the_change_within_its_error(models, tmp_path, model, config, rank):
    base = models[model]
    deltas = WeightDeltas(base, make_adapter(base, config, tmp_path / "adapter"))
    errors = write_lora(tmp_path / "lora", deltas.items(), rank, Checkpoint(tmp_path / "adapter").adapter_config)
    merged, before = ordinary(base, tmp_path / "lora"), ordinary(base)
    assert errors.keys() == deltas.keys()
    for name, delta in deltas.items():
        left = merged[name] - before[name] - delta
        assert float(left.norm() / delta.norm()) == pytest.approx(errors[name], abs=2e-5)
        exact = torch.linalg.svdvals(delta)
        best = float(exact[rank:].norm() / exact.norm())
        assert errors[name] == pytest.approx(best, abs=1e-5)
    again = WeightDeltas(base, tmp_path / "lora")
    assert again.keys() == deltas.keys()
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == set(deltas)


def test_low_rank_of_a_large_change_is_near_the_best_and_repeatable():
    torch.manual_seed(0)
    decaying = torch.randn(700, 600) @ torch.diag(0.97 ** torch.arange(600.0)) @ torch.randn(600, 700)
    torch.manual_seed(3)
    down, up = low_rank(decaying, 8)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(a, b) for a, b in zip((down, up), low_rank(decaying, 8), strict=True))
    best = torch.linalg.svdvals(decaying)[8:].norm()
    assert float((decaying - up @ down).norm()) < 1.001 * float(best)
    assert float(down.norm()) == pytest.approx(float(up.norm()), rel=1e-4)
    exact = torch.randn(700, 20) @ torch.randn(20, 800)
    down, up = low_rank(exact, 20)
    assert float((exact - up @ down).norm() / exact.norm()) < 1e-5


def test_write_lora_refuses_what_lora_cannot_hold(models, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    for deltas, rank, match in [
        (
            [("model.embed_tokens.weight", torch.ones(28, 16))],
            2,
            "'model.embed_tokens.weight' is not the weight of a l",
        ),
        ([("model.norm.weight", torch.ones(16))], 2, "not the weight of a linear layer"),
        ([("model.layers.0.self_attn.q_proj.bias", torch.ones(16))], 2, "not the weight of a linear layer"),
        ([("nothing.weight", torch.ones(16, 16))], 2, "not the weight of a linear layer"),
        ([(name, torch.ones(16, 15))], 2, r"\[16, 15\], the weight \[16, 16\]"),
        ([(name, torch.full((16, 16), torch.nan))], 2, "not finite"),
        ([], 2, "there is no change"),
        *[([(name, torch.ones(16, 16))], rank, "is no integer >= 1") for rank in (0, -1, 1.5, True, "2")],
    ]:
        with pytest.raises(CpiftError, match=match):
            write_lora(tmp_path / "lora", deltas, rank, {}, base=models["llama"])
        assert not (tmp_path / "lora").exists()
    with pytest.raises(CpiftError, match="give the model's folder as base"):
        write_lora(tmp_path / "lora", [], 2, {})
    assert write_lora(tmp_path / "lora", [(name, torch.zeros(16, 16))], 2, {}, base=models["llama"]) == {name: 0}
