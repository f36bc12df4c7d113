"""Strategy: average the squared gradients by hand, step after step, from gradients that are worked out without the
optimizer under test, and compare with the file to bfloat16's precision; torch.topk is the reference for the core that
is found with it. Trainings on several processes are in tests/isolation/test_engines.py, beside those of the isolation.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Adafactor, AutoModelForCausalLM

from peft_cpift import CoreRegion, CpiftError, PropulsionConfig, find_core_region, freeze_core, save_importance
from peft_cpift.importance import moment

ADAPTERS = {
    "propulsion": PropulsionConfig(target_modules=["q_proj", "down_proj"]),
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
}


def toy(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator).to(dtype) for _ in range(count)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor]) -> None:
    for x in inputs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def averaged(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: list[Tensor], beta2: float) -> dict:
    """The root of the running mean of squared gradients, in float64 and from torch.autograd.grad, while it trains."""
    means = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for x in inputs:
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(model(x).square().mean(), list(named.values()))
        for name, gradient in zip(named, gradients, strict=True):
            means[name] = beta2 * means[name] + (1 - beta2) * gradient.double() ** 2
        train(model, optimizer, [x])
    return {name: mean.sqrt() for name, mean in means.items()}


def written(model: nn.Module, optimizer: object, file: Path) -> dict[str, Tensor]:
    save_importance(model, optimizer, file)
    return load_file(file)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("beta2", [0.999, 0.5])
def test_it_is_the_root_of_the_mean_squared_gradient(tmp_path, kind, beta2):
    model = toy()
    optimizer = kind(model.parameters(), lr=0.05, betas=(0.9, beta2))
    expected = averaged(model, optimizer, batches(7), beta2)
    found = written(model, optimizer, tmp_path / "deep" / "importance.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == expected[name].shape
        torch.testing.assert_close(tensor.double(), expected[name], rtol=2**-8, atol=0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["importance.safetensors"]


def test_the_core_found_with_it_is_the_largest_roots(tmp_path):
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.7), weight_decay=0.5)
    expected = averaged(model, optimizer, batches(5), 0.7)
    save_importance(model, optimizer, tmp_path / "i.safetensors")
    tuned = {name: p.detach() for name, p in model.named_parameters()}
    region = find_core_region(tuned, importance=tmp_path / "i.safetensors", percent=20)
    names = sorted(expected)
    ranked = torch.cat([expected[name].flatten() for name in names])
    top = ranked.topk(len(region)).indices
    starts = dict(
        zip(names, torch.tensor([0, *(expected[n].numel() for n in names)]).cumsum(0).tolist(), strict=False)
    )
    chosen = torch.cat([index + starts[name] for name, index in region.indices.items()])
    assert len(region) == 39 * 20 // 100
    assert set(chosen.tolist()) == set(top.tolist())


def test_what_the_file_says_of_itself(tmp_path):
    model = toy()
    model[0].bias.requires_grad_(False)
    model.register_buffer("table", torch.ones(2))
    groups = [{"params": model[2].parameters(), "betas": (0.9, 0.99)}, {"params": [model[0].weight]}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.99))
    train(model, optimizer, batches(1))
    save_importance(model, optimizer, str(tmp_path / "i.safetensors"))
    with safe_open(tmp_path / "i.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == {"0.weight", "2.weight", "2.bias"}
    assert json.loads(metadata.pop("beta2")) == 0.99
    assert json.loads(metadata.pop("untrained")) == ["0.bias", "table"]
    assert metadata == {
        "format": "peft_cpift.importance",
        "version": "1",
        "measure": "second_moment",
        "optimizer": "AdamW",
    }


def test_an_earlier_file_is_replaced_and_a_failure_keeps_it(tmp_path, monkeypatch):
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    file = tmp_path / "i.safetensors"
    file.write_text("old")
    train(model, optimizer, batches(1))
    with monkeypatch.context() as broken:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        broken.setattr(moment, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            save_importance(model, optimizer, file)
    assert file.read_text() == "old"
    assert written(model, optimizer, file).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_small_becomes_zero_or_subnormal(tmp_path, dtype):
    """The smallest numbers that the optimizer can hold, whose squares' roots bfloat16 must keep apart from zero."""
    model = toy(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1, dtype))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for name, parameter in model.named_parameters():
        held = optimizer.state[parameter]["exp_avg_sq"]
        held.fill_(smallest)
        assert held.max() > 0, name
        held.view(-1)[0] = 0
    for tensor in written(model, optimizer, tmp_path / "i.safetensors").values():
        assert tensor.view(-1)[0] == 0
        assert (tensor.view(-1)[1:] >= torch.finfo(torch.bfloat16).smallest_normal).all()
        if dtype == torch.float32:
            assert tensor.view(-1)[1].item() == pytest.approx(math.sqrt(2**-149), rel=2**-8)


def test_a_parameter_without_a_gradient_has_importance_zero(tmp_path):
    model = toy()
    model.unused = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(2))
    found = written(model, optimizer, tmp_path / "i.safetensors")
    assert found["unused"].shape == (3, 2)
    assert not found["unused"].any()
    assert found["0.weight"].all()


def test_frozen_coordinates_have_importance_zero(tmp_path):
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    with freeze_core(model, optimizer, CoreRegion({"0.weight": torch.tensor([0, 7])}, {"0.weight": (4, 5)})):
        train(model, optimizer, batches(2))
        found = written(model, optimizer, tmp_path / "i.safetensors")["0.weight"].flatten()
    assert (found == 0).nonzero().flatten().tolist() == [0, 7]


def test_tied_weights_are_there_once_under_the_name_of_the_checkpoint(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(12).view(2, 6)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    found = written(model, optimizer, tmp_path / "i.safetensors")
    model.save_pretrained(tmp_path / "model")
    assert found.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    region = find_core_region(tmp_path / "model", importance=tmp_path / "i.safetensors")
    assert region.total == sum(p.numel() for p in model.parameters())
    assert len(region) == region.total // 100


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapters_own_tensors_by_their_saved_names(tiny_model, tmp_path, adapter):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), ADAPTERS[adapter], adapter_name="mine")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.5))
    tokens = torch.arange(12).view(2, 6)
    model(tokens, labels=tokens).loss.backward()
    expected = {name.replace(".mine", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    found = written(model, optimizer, tmp_path / "i.safetensors")
    model.save_pretrained(tmp_path)
    assert found.keys() == load_file(tmp_path / "mine" / "adapter_model.safetensors").keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].abs() * 0.5**0.5, rtol=2**-8, atol=0)
    region = find_core_region(tmp_path / "mine", importance=tmp_path / "i.safetensors", percent=10)
    assert (region.importance, len(region)) == ("second_moment", region.total // 10)


class Muddled(torch.optim.AdamW):
    """Keeps a second moment that is none of each coordinate, as a quantized or projected one."""

    how = "other shape"

    def step(self, closure=None):
        result = super().step(closure)
        for state in self.state.values():
            moment = state["exp_avg_sq"]
            state["exp_avg_sq"] = {
                "other shape": moment.flatten()[:1],
                "codes": moment.to(torch.uint8),
                "subclass": nn.Parameter(moment, requires_grad=False),
            }[self.how]
        return result


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "Adamax": torch.optim.Adamax,
    "Adafactor": lambda parameters: Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_without_a_second_moment_are_refused(tmp_path, name):
    model = toy()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, batches(1))
    with pytest.raises(
        CpiftError, match=rf"^(torch|transformers)\.{name.split()[0]} (keeps|has) no second moment"
    ) as caught:
        save_importance(model, optimizer, tmp_path / "i.safetensors")
    assert "train with optim='adamw_torch', or find the core by importance 'update'" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["other shape", "codes", "subclass"])
def test_a_second_moment_of_another_form_is_refused(tmp_path, how, monkeypatch):
    monkeypatch.setattr(Muddled, "how", how)
    model = toy()
    optimizer = Muddled(model.parameters())
    train(model, optimizer, batches(1))
    with pytest.raises(CpiftError, match=r"Muddled keeps no second moment of each coordinate of '0.weight'"):
        save_importance(model, optimizer, tmp_path / "i.safetensors")


def test_quantized_states_are_refused(tmp_path):
    optim = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = nn.Linear(64, 128, bias=False)  # smaller ones are not quantized
    optimizer = optim.AdamW8bit(model.parameters())
    model(torch.randn(2, 64)).square().mean().backward()
    optimizer.step()
    with pytest.raises(CpiftError, match=r"AdamW8bit keeps no second moment of each coordinate of 'weight'"):
        save_importance(model, optimizer, tmp_path / "i.safetensors")


def test_schedule_free_adamw_has_one(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    model = toy()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), betas=(0.9, 0.7))
    optimizer.train()
    expected = averaged(model, optimizer, batches(3), 0.7)
    for name, tensor in written(model, optimizer, tmp_path / "i.safetensors").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=2**-7, atol=0)


def test_what_cannot_be_saved_yet_or_at_all(tmp_path):
    model, file = toy(), tmp_path / "i.safetensors"
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CpiftError, match=r"^torch.AdamW has no second moment .* or has made no step yet"):
        save_importance(model, optimizer, file)
    with pytest.raises(CpiftError, match=r"parameter '2.weight' is trainable, and torch.AdamW does not train it"):
        save_importance(model, torch.optim.AdamW(model[0].parameters()), file)
    with pytest.raises(
        CpiftError, match=r"no importance can be saved where no core can be frozen: .* list neither is"
    ):
        save_importance(model, [], file)
    with pytest.raises(CpiftError, match="no trainable parameter"):
        save_importance(toy().requires_grad_(False), optimizer, file)
    assert not list(tmp_path.iterdir())


def test_second_moments_that_cannot_be_compared_are_refused(tmp_path):
    model = toy()
    groups = [{"params": model[0].parameters(), "betas": (0.9, 0.9)}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, batches(1))
    with pytest.raises(CpiftError, match=r"torch.AdamW has parameter groups with different beta2"):
        save_importance(model, optimizer, tmp_path / "i.safetensors")


class ThreeBetas(torch.optim.AdamW):
    """As optimizers whose second decay is not that of the second moment."""

    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            group["betas"] = (0.9, 0.99, 0.999)
        return result


def test_another_number_of_betas_is_refused(tmp_path):
    model = toy()
    optimizer = ThreeBetas(model.parameters())
    train(model, optimizer, batches(1))
    with pytest.raises(CpiftError, match=r"ThreeBetas keeps no second moment of each coordinate"):
        save_importance(model, optimizer, tmp_path / "i.safetensors")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_weight_decay_in_the_gradient_is_refused(tmp_path, kind):
    for settings in ({"weight_decay": 0.1, "decoupled_weight_decay": True}, {}):
        model = toy()
        optimizer = kind(model.parameters(), **settings)
        train(model, optimizer, batches(1))
        save_importance(model, optimizer, tmp_path / "i.safetensors")
    optimizer = kind(model.parameters(), weight_decay=0.1)
    train(model, optimizer, batches(1))
    with pytest.raises(CpiftError, match=rf"torch.{kind.__name__} adds weight decay to the gradient.*use AdamW"):
        save_importance(model, optimizer, tmp_path / "i.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_moment_in_half_precision_is_told_at_once(dtype, recwarn):
    model = toy(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-4)
    train(model, optimizer, batches(1, dtype))
    moment.check_second_moment(model, optimizer)
    told = [str(warning.message) for warning in recwarn if "second moment" in str(warning.message)]
    assert told == [] if dtype == torch.float32 else f"second moment in {dtype}" in told[0]


def test_a_diverged_training_is_told(tmp_path):
    model = toy()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, [torch.full((8, 5), math.inf)])
    with pytest.warns(UserWarning, match=r"4 tensors is not finite, first '0.bias': the training diverged"):
        save_importance(model, optimizer, tmp_path / "i.safetensors")


def test_tied_weights_that_live_in_another_order_have_the_name_of_the_checkpoint(tmp_path):
    model, shared = nn.Module(), nn.Linear(5, 5)
    model.z, model.a = shared, shared
    optimizer = torch.optim.AdamW(model.parameters())
    model.z(batches(1)[0]).square().mean().backward()
    optimizer.step()
    assert written(model, optimizer, tmp_path / "i.safetensors").keys() == {"a.weight", "a.bias"}
    region = find_core_region(dict(model.state_dict()), importance=tmp_path / "i.safetensors", percent=10)
    assert region.total == 30


def test_what_peft_saves_of_a_resized_vocabulary_is_not_missed(tiny_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(base.config.vocab_size + 8)
    model = get_peft_model(base, ADAPTERS["lora"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.arange(12).view(2, 6)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    save_importance(model, optimizer, tmp_path / "i.safetensors")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in name for name in saved)
    region = find_core_region(tmp_path / "adapter", importance=tmp_path / "i.safetensors", percent=10)
    assert all("lora" in name for name in region.indices)
