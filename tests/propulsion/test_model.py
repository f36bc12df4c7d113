"""Stock PEFT and TRL calls on whole models: what users do between `get_peft_model` and the merged export.

Outputs are compared with the base model's and with each other's; files by their exact keys; a checkpoint is also
opened by a fresh process. What is not supported is refused in one line, and leaves the model as it was.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_cpift.propulsion import Embedding, PropulsionConfig, PropulsionLayer

QKV = ["q_proj", "k_proj", "v_proj"]
RANDOM = {"init_weights": False}  # so that the adapter has an effect
# relative to the largest logit; a merged model rounds its weights once more
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[expected.dtype] * scale)


def z_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "propulsion_z" in name}


def randomize(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for z in z_of(model).values():
            z.copy_(0.96 + 0.08 * torch.rand(z.shape, generator=generator))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_starts_as_the_base_model_bit_for_bit(make_llama, input_ids, dtype):
    base_model = make_llama(dtype)
    expected = logits(base_model, input_ids)
    targets = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(base_model, PropulsionConfig(target_modules=targets))
    assert len(z_of(model)) == 2 * 7 + 2
    assert all(z.dtype == torch.float32 for z in z_of(model).values())
    assert torch.equal(logits(model, input_ids), expected)


def test_only_z_is_trained_and_the_loss_falls(make_llama, input_ids):
    model = get_peft_model(make_llama(torch.bfloat16), PropulsionConfig(target_modules="all-linear"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(z_of(model))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(z_of(model).values(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all((z != 1).any() for z in z_of(model).values())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_gradients_are_the_same_with_gradient_checkpointing(make_llama, input_ids):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        calls = []
        model = get_peft_model(make_llama(), PropulsionConfig()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()  # transformers 5.23 renamed it, and keeps this name until 6
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").register_forward_hook(
            lambda *_: calls.append(1)
        )
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        assert len(calls) == (2 if checkpointing else 1)  # computed again in the backward pass
        return [z.grad for z in z_of(model).values()]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == 14
    assert all(g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b)


def test_a_move_of_1e_4_shows_in_a_bfloat16_model(make_llama, input_ids):
    model = get_peft_model(make_llama(torch.bfloat16), PropulsionConfig(target_modules="all-linear"))
    randomize(model)
    before = logits(model, input_ids)
    with torch.no_grad():
        for z in z_of(model).values():
            z.add_(1e-4)
    assert not torch.equal(logits(model, input_ids), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(make_llama, input_ids, tmp_path, dtype, low_cpu_mem_usage):
    model = get_peft_model(make_llama(dtype), PropulsionConfig(target_modules="attention", degree=7))
    randomize(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {
        f"base_model.model.model.layers.{i}.self_attn.{name}.propulsion_z" for i in range(2) for name in QKV
    }
    assert {t.dtype for t in saved.values()} == {torch.float32}

    loaded = PeftModel.from_pretrained(make_llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert loaded.peft_config["default"].degree == 7
    assert all(torch.equal(z, z_of(model)[name]) for name, z in z_of(loaded).items())
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))


def test_a_fresh_process_loads_what_was_saved(make_llama, input_ids, tmp_path):
    base_model = make_llama()
    base_model.save_pretrained(tmp_path / "base")
    model = get_peft_model(base_model, PropulsionConfig(task_type="CAUSAL_LM"))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    code = (
        "import torch, peft_cpift.propulsion\n"
        "from peft import AutoPeftModelForCausalLM, PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained('base')\n"
        "model = PeftModel.from_pretrained(base, 'adapter')\n"
        "torch.save(model(input_ids=torch.load('input.pt')).logits.detach(), 'output.pt')\n"
    )
    torch.save(input_ids, tmp_path / "input.pt")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {root!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "output.pt"), logits(model, input_ids))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["degree"]) == ("PROPULSION", 15)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merging_and_unmerging(make_llama, input_ids, dtype):
    targets = [*QKV, "up_proj", "down_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(make_llama(dtype), PropulsionConfig(target_modules=targets))
    before = {n: p.clone() for n, p in model.named_parameters() if "propulsion_z" not in n}
    base_logits = logits(model, input_ids)
    randomize(model)
    adapted = logits(model, input_ids)
    assert (adapted - base_logits).abs().max() > 2 * TOLERANCE[dtype] * adapted.abs().max()

    model.merge_adapter(safe_merge=True)
    assert_near(logits(model, input_ids), adapted)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert torch.equal(logits(model, input_ids), adapted)

    merged = copy.deepcopy(model).merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, PropulsionLayer)]
    assert_near(logits(merged, input_ids), adapted)
    assert torch.equal(logits(model.unload(), input_ids), base_logits)


def test_disable_adapter_gives_the_base_model(make_llama, input_ids):
    base_model = make_llama()
    expected = logits(base_model, input_ids)
    model = get_peft_model(base_model, PropulsionConfig(**RANDOM))
    adapted = logits(model, input_ids)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids), expected)
    assert torch.equal(logits(model, input_ids), adapted)


def test_several_adapters(make_llama, input_ids):
    model = get_peft_model(make_llama(), PropulsionConfig(target_modules=["q_proj"], **RANDOM))
    first = logits(model, input_ids)
    model.add_adapter("other", PropulsionConfig(target_modules=["q_proj", "up_proj"], degree=3, **RANDOM))
    assert not any(z.requires_grad for n, z in z_of(model).items() if n.endswith("other"))
    assert torch.equal(logits(model, input_ids), first)
    model.set_adapter("other")
    second = logits(model, input_ids)
    assert not torch.equal(first, second)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}

    model.base_model.set_adapter(["default", "other"])
    both = logits(model, input_ids)
    assert not torch.equal(both, first)
    assert not torch.equal(both, second)
    model.merge_adapter()
    assert_near(logits(model, input_ids), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not [n for n in z_of(model) if n.endswith("other")]
    assert torch.equal(logits(model, input_ids), first)


def test_modules_to_save_blocks_and_exclusions(make_llama):
    config = PropulsionConfig(
        target_modules="attention",
        layers_to_transform=[1],
        exclude_modules=["k_proj"],
        modules_to_save=["lm_head"],
    )
    model = get_peft_model(make_llama(), config)
    assert {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad} == {
        "model.layers.1.self_attn.q_proj.propulsion_z.default",
        "model.layers.1.self_attn.v_proj.propulsion_z.default",
        "lm_head.modules_to_save.default.weight",
    }


def test_conv1d_model_merges(input_ids):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    base_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    model = get_peft_model(base_model, PropulsionConfig(target_modules=["c_attn", "c_fc", "wpe"]))
    randomize(model)
    adapted = logits(model, input_ids)
    assert not torch.equal(logits(copy.deepcopy(model).unload(), input_ids), adapted)
    assert_near(logits(model.merge_and_unload(), input_ids), adapted)


def test_scaled_embedding_merges(input_ids):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    base_model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads)).eval()
    embedding = base_model.get_input_embeddings()
    assert embedding.embed_scale == 4
    model = get_peft_model(base_model, PropulsionConfig(target_modules=["embed_tokens"]))
    randomize(model)
    adapted_layer = model.get_input_embeddings()
    assert isinstance(adapted_layer, Embedding)
    scale = adapted_layer.propulsion_z["default"] ** 15
    torch.testing.assert_close(
        adapted_layer(input_ids), nn.functional.embedding(input_ids, embedding.weight) * 4 * scale
    )
    adapted = logits(model, input_ids)
    assert_near(logits(model.merge_and_unload(), input_ids), adapted)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_tied_embeddings_are_not_merged(make_llama, input_ids, target, merge):
    model = get_peft_model(make_llama(tie_word_embeddings=True), PropulsionConfig(target_modules=["q_proj", target]))
    randomize(model)
    before = logits(model, input_ids)
    with pytest.raises(ValueError, match=f"{target} cannot be merged.*tie_word_embeddings=False") as error:
        getattr(model, merge)()
    assert "model.embed_tokens and lm_head share one parameter" in str(error.value)
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model, input_ids), before)


def test_the_rest_of_a_tied_model_merges(make_llama, input_ids):
    model = get_peft_model(make_llama(tie_word_embeddings=True), PropulsionConfig())
    randomize(model)
    adapted = logits(model, input_ids)
    merged = model.merge_and_unload()
    assert_near(logits(merged, input_ids), adapted)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["__base__", "a.b", "keys", "pop"])
def test_adapter_names_with_a_meaning_of_their_own_are_refused(make_llama, name):
    model = get_peft_model(make_llama(), PropulsionConfig(), "first")
    with pytest.raises(
        ValueError, match="cannot name an adapter, because it has a meaning of its own; choose another"
    ):
        model.add_adapter(name, PropulsionConfig())
    assert list(model.peft_config) == ["first"]
    with pytest.raises(ValueError, match="cannot name an adapter"):
        get_peft_model(make_llama(), PropulsionConfig(), name)


def test_modules_that_peft_would_take_for_an_adapter_are_refused():
    model = nn.Sequential()
    model.propulsion_z = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="module propulsion_z, which PEFT would take for a part of an adapter"):
        get_peft_model(model, PropulsionConfig(target_modules=["propulsion_z"]))


def test_a_layer_with_two_names_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.Linear(4, 4)

        def forward(self, x):
            return self.two(self.one(x))

    with pytest.raises(ValueError, match=r"^one is one module under several names"):
        get_peft_model(Net(), PropulsionConfig(target_modules=["one"], **RANDOM))


def test_a_weight_that_two_layers_share_is_not_merged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model = get_peft_model(model, PropulsionConfig(target_modules=["0"], **RANDOM))
    with pytest.raises(ValueError, match="0 cannot be merged, because 0 and 1 share one parameter"):
        model.merge_adapter()


def test_max_norm_stops_a_merge_before_any_layer_is_touched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.embed = nn.Embedding(8, 4, max_norm=1.0)

    model = get_peft_model(Net(), PropulsionConfig(target_modules=["linear", "embed"], **RANDOM))
    with pytest.raises(ValueError, match=r"^embed cannot be merged"):
        model.merge_adapter()
    assert not any(m.merged for m in model.modules() if isinstance(m, PropulsionLayer))


class QuantizedParameter(nn.Parameter):
    """Stands for the parameter classes of quantization libraries, which may claim a floating dtype."""


def quantized_linear() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = QuantizedParameter(torch.zeros(4, 4), requires_grad=False)
    return layer


def float8_linear() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("build", "target", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Bilinear(3, 3, 1)), "1", "^1 is a Bilinear, and .*exclude_modules"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(3, 3, 1)), "1", "^1 is a ConvTranspose1d, and"),
        (lambda: nn.Sequential(nn.Linear(4, 4), quantized_linear()), "1", "^1 stores .* as QuantizedParameter of"),
        (lambda: nn.Sequential(nn.Linear(4, 4), float8_linear()), "1", "torch.float8_e4m3fn.*unquantized"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1)), "out_proj", "^1.out_proj cannot be"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1)), "1", "^1 is a MultiheadAttention"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1)), "linear2", "^1.linear2 cannot be"),
    ],
)
def test_unsupported_layers_are_refused_and_the_model_stays_as_it_was(build, target, message):
    model = build()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(model, PropulsionConfig(target_modules=["0", target]))
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == before


def test_layers_that_fused_kernels_bypass_are_refused():
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match=r"out_proj cannot be adapted, because \w+ reads its weight"):
        get_peft_model(transformers.MambaModel(config), PropulsionConfig(target_modules=["out_proj"]))


def test_all_linear_names_the_cure_and_the_cure_works():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))

    refused = build()
    with pytest.raises(ValueError, match=r"exclude_modules=\['1.out_proj'\]"):
        get_peft_model(refused, PropulsionConfig(target_modules="all-linear"))
    assert not [m for m in refused.modules() if isinstance(m, PropulsionLayer)]
    model = get_peft_model(build(), PropulsionConfig(target_modules="all-linear", exclude_modules=["1.out_proj"]))
    assert len(z_of(model)) == 1


def test_a_layer_of_another_method_is_refused(make_llama):
    lora = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj is already adapted by another PEFT method"):
        get_peft_model(lora.base_model.model, PropulsionConfig())


def test_conversion_to_lora_is_claimed_for_linear_layers_without_bias(make_llama):
    model = get_peft_model(make_llama(attention_bias=True), PropulsionConfig(target_modules=["q_proj"]))
    assert not model.supports_lora_conversion()
    assert get_peft_model(make_llama(), PropulsionConfig()).supports_lora_conversion()
    assert not get_peft_model(
        make_llama(), PropulsionConfig(target_modules=["q_proj", "embed_tokens"])
    ).supports_lora_conversion()


def test_generation(make_llama, input_ids):
    model = get_peft_model(make_llama(), PropulsionConfig(task_type="CAUSAL_LM", **RANDOM))
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    adapted = model.generate(input_ids=input_ids, **settings)
    assert adapted.shape == (2, 12)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=input_ids, **settings), adapted)


def test_injection_without_a_peft_model(make_llama, input_ids):
    model = make_llama()
    expected = logits(model, input_ids)
    peft.inject_adapter_in_model(PropulsionConfig(target_modules=QKV), model)
    assert torch.equal(logits(model, input_ids), expected)
    randomize(model)
    assert not torch.equal(logits(model, input_ids), expected)


def test_trl_trains_saves_and_reloads(make_llama, input_ids, tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(62)} | {"<pad>": 62, "<eos>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=make_llama(),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7 w8"] * 4}),
        processing_class=fast,
        peft_config=PropulsionConfig(),
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    trained = z_of(trainer.model)
    assert all((z != 1).any() and z.dtype == torch.float32 for z in trained.values())
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    assert all(torch.equal(z, trained[name]) for name, z in z_of(loaded).items())


@pytest.mark.parametrize("how", ["beside", "deleted"])
def test_an_adapter_on_tied_weights_does_not_keep_another_from_merging(make_llama, input_ids, how):
    model = get_peft_model(make_llama(tie_word_embeddings=True), PropulsionConfig(target_modules=["q_proj"]), "a")
    model.add_adapter("b", PropulsionConfig(target_modules=["embed_tokens"]))
    randomize(model)
    expected = logits(model, input_ids)
    if how == "deleted":
        model.delete_adapter("b")
    model.merge_adapter(["a"])
    assert_near(logits(model, input_ids), expected)
    if how == "beside":
        with pytest.raises(ValueError, match="embed_tokens cannot be merged"):
            model.merge_adapter(["b"])


def test_a_preset_means_other_names_in_another_model(make_llama):
    config = PropulsionConfig(target_modules="all")
    get_peft_model(make_llama(), config)
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(word_embed_proj_dim=16, **sizes))
    fresh = get_peft_model(copy.deepcopy(opt), PropulsionConfig(target_modules="all"))
    assert set(z_of(get_peft_model(opt, config))) == set(z_of(fresh))


def test_a_combination_with_a_bad_name_leaves_no_trace(make_llama):
    model = get_peft_model(make_llama(), PropulsionConfig(**RANDOM), "a")
    with pytest.raises(ValueError, match="cannot name an adapter"):
        model.add_weighted_adapter(["a"], [1.0], "x.y")
    for adapters, weights, message in (("a", [1.0], "is one name"), (["a"], ["1"], "not all numbers")):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, weights, "b")
    assert list(model.peft_config) == ["a"]


def test_scaled_embeddings_and_trained_tokens_exclude_each_other(make_llama):
    with pytest.raises(ValueError, match=r"model\.embed_tokens cannot be scaled while trainable_token_indices"):
        get_peft_model(make_llama(), PropulsionConfig(target_modules="all", trainable_token_indices=[1]))


def test_layers_answer_what_models_ask_of_them_and_take_their_arguments_by_name():
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(2, 3, 5, stride=2), nn.Embedding(7, 4)), PropulsionConfig(target_modules=["0", "1"])
    )
    conv, embedding = model.base_model.model
    assert (conv.stride, conv.kernel_size, embedding.num_embeddings) == ((2,), (5,), 7)
    x = torch.randn(1, 2, 9)
    assert torch.equal(conv(input=x), conv(x))
    with pytest.raises(AttributeError):
        _ = conv.nothing_of_the_kind
