"""Strategy: compare a training with the same one written out by hand, in float64 and with nothing of the package; then
the cases in which the pull is to do nothing, and those that it cannot serve. Engines are in tests/isolation."""

from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from transformers import AutoModelForCausalLM

from peft_cpift import CoreRegion, CpiftError, NoEffectWarning, PropulsionConfig, consolidate, freeze_core
from peft_cpift import save_importance as save
from peft_cpift.checkpoint.tensors import InMemory
from peft_cpift.consolidation import Consolidation
from peft_cpift.consolidation import pull as module
from peft_cpift.consolidation.pull import MOST, _cut_anchor, _pull


def make_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).to(dtype)


def make_importance(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def weights_by_hand(importances: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Squares of mean 1, added up, as they are kept: in bfloat16."""
    total = {}
    for importance in importances:
        mean = torch.cat([tensor.double().flatten().square() for tensor in importance.values()]).mean()
        for name, tensor in importance.items():
            total[name] = total.get(name, 0) + (tensor.double().square() / mean)
    return {name: weight.bfloat16().double() for name, weight in total.items()}


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(steps, 8, 4, dtype=dtype, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule=None, steps: int = 6, after=None) -> None:
    for x in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
        if after:
            after()
        if schedule:
            schedule.step()


def optimizer_of(model: nn.Module, **groups) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW with two groups at different rates, and a schedule that warms up and decays."""
    flat, square = ([p for p in model.parameters() if (p.ndim == 1) is is_flat] for is_flat in (True, False))
    optimizer = torch.optim.AdamW([{"params": flat, "lr": 0.02}, {"params": square, "lr": 0.05}], weight_decay=0.1)
    return optimizer, LambdaLR(optimizer, lambda step: [0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0][step])


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
@pytest.mark.parametrize("strength", [0.01, 0.7, 1000])
def test_a_training_is_the_one_by_hand(strength, seeds):
    model, other = make_model(), make_model()
    importances = [make_importance(model, seed) for seed in seeds]
    optimizer, schedule = optimizer_of(model)
    with consolidate(model, optimizer, importances, strength=strength):
        train(model, optimizer, schedule)

    weights, anchor = weights_by_hand(importances), copy.deepcopy(other.state_dict())
    optimizer, schedule = optimizer_of(other)

    def by_hand() -> None:
        share = optimizer.param_groups[1]["lr"] / 0.05
        for name, parameter in other.named_parameters():
            away = (parameter.data - anchor[name]) / (1 + strength * share * weights[name])
            parameter.data = anchor[name] + away

    train(other, optimizer, schedule, after=by_hand)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)
        assert not torch.equal(parameter, anchor[name])


def test_a_coordinate_under_constant_push_rests_where_the_module_says():
    """1 / (strength * weight) full steps from its anchor, at any learning rate."""
    for rate in (1e-4, 0.3):
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        model = nn.ParameterDict({"weight": weight})
        optimizer = torch.optim.Adam([weight], lr=rate, eps=0)
        with consolidate(model, optimizer, {"weight": torch.tensor([1.0, 2.0, 2.0])}, strength=0.25):
            for _ in range(200):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
        steps = -weight.detach() / rate
        expected = 1 / (0.25 * torch.tensor([1.0, 4.0, 4.0]).double() / 3)
        torch.testing.assert_close(steps, expected, rtol=1e-2, atol=0)


def test_it_pulls_no_more_when_the_block_ends():
    model, other = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with consolidate(model, optimizer, make_importance(model), strength=10.0):
        pass
    train(model, optimizer)
    train(other, torch.optim.SGD(other.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_nor_when_it_ends_with_an_error():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), consolidate(model, optimizer, make_importance(model)):
        raise ZeroDivisionError
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_did_not_matter_or_did_not_move_keeps_its_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randn(1000, generator=generator).to(dtype)
    weight = torch.rand(1000, generator=generator).mul(5).bfloat16()
    anchor[::7] = -0.0
    still = anchor.clone()
    _pull(still, anchor, weight, 0.37)
    assert torch.equal(still.view(torch.uint8), anchor.view(torch.uint8))
    away = anchor + torch.randn(1000, generator=generator).to(dtype)
    moved = away.clone()
    _pull(moved, anchor, torch.zeros_like(weight), 0.37)
    assert torch.equal(moved, away)


@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(-1e4, 1e4, width=32),
    st.floats(0, 1e6, width=32),
    st.floats(1e-6, 1e6),
)
def test_no_strength_pulls_beyond_the_anchor(value, anchor, weight, strength):
    stored = torch.tensor([value])
    _pull(stored, torch.tensor([anchor]), torch.tensor([weight]).bfloat16(), strength)
    low, high = sorted((value, anchor))
    slack = 1e-6 * max(abs(low), abs(high))
    assert low - slack <= stored.item() <= high + slack


@pytest.mark.parametrize("contiguous", [True, False])
def test_large_tensors_are_pulled_in_parts(monkeypatch, contiguous):
    monkeypatch.setattr(module, "CPU_PART", 7)
    torch.manual_seed(0)
    stored, anchor, weight = torch.randn(5, 9), torch.randn(5, 9), torch.rand(5, 9).bfloat16()
    expected = anchor + (stored - anchor) / (1 + weight.float() * 0.5)
    if not contiguous:
        stored, anchor = stored.t().contiguous().t(), anchor.t().contiguous().t()
    _pull(stored, anchor, weight, 0.5)
    torch.testing.assert_close(stored, expected)


def test_values_in_bfloat16_are_pulled_as_in_float32_and_rounded_once():
    torch.manual_seed(0)
    stored, anchor, weight = torch.randn(50).bfloat16(), torch.randn(50).bfloat16(), torch.rand(50).bfloat16()
    share = weight.float() * 0.5
    expected = anchor.float() + (stored.float() - anchor.float()) / (1 + share)
    _pull(stored, anchor, weight, 0.5)
    torch.testing.assert_close(stored, expected.bfloat16(), rtol=2**-8, atol=1e-6)


def test_what_does_not_train_is_no_part_of_the_mean():
    model = make_model()
    model[0].requires_grad_(False)
    importance = make_importance(model)
    pull = Consolidation(model, importance)
    (held,) = pull._held
    assert held.name == "2.weight"
    (expected,) = weights_by_hand([{"2.weight": importance["2.weight"]}]).values()
    assert torch.equal(held.weight.double(), expected)


def test_trainable_tensors_without_importance_are_told_of():
    model = make_model()
    importance = make_importance(model)
    del importance["0.bias"]
    with pytest.warns(NoEffectWarning, match="1 trainable tensors, first '0.bias', have no importance"):
        pull = Consolidation(model, importance)
    assert [held.name for held in pull._held] == ["0.weight", "2.weight"]


def test_tied_tensors_are_pulled_once(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with warnings.catch_warnings(action="error"):
        pull = Consolidation(model, importance)
        assert sorted(held.name for held in pull._held) == sorted(names)
        twice = Consolidation(model, importance | {"lm_head.weight": torch.ones_like(model.lm_head.weight)})
    assert len(twice._held) == len(names)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=["q_proj"]), PropulsionConfig(target_modules=["q_proj"])],
    ids=["lora", "propulsion"],
)
def test_an_adapter_by_the_names_of_its_file(tiny_model, tmp_path, config):
    """What an adapter's own training left as importance pulls that adapter alone, also under another name."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x = torch.arange(8).view(2, 4)

    def step() -> None:
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    save(model, optimizer, tmp_path / "i.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, tmp_path / "adapter", adapter_name="again", is_trainable=True)
    before = {n: t.clone() for n, t in get_peft_model_state_dict(model, adapter_name="again").items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with consolidate(model, optimizer, tmp_path / "i.safetensors", strength=1e6) as pull:
        assert {held.name for held in pull._held} == before.keys()
        step()
    importance = load_file(tmp_path / "i.safetensors")
    moved = False
    for name, tensor in get_peft_model_state_dict(model, adapter_name="again").items():
        mattered = importance[name] > importance[name].max() * 0.01
        torch.testing.assert_close(tensor[mattered], before[name][mattered], rtol=1e-4, atol=1e-6)
        moved = moved or not torch.equal(tensor, before[name])
    assert moved or all((tensor > 0).all() for tensor in importance.values())


@pytest.mark.parametrize("as_file", [False, True])
def test_an_anchor_takes_the_place_of_the_present_values(tmp_path, as_file):
    model, origin = make_model(torch.float32), make_model(torch.float32)
    anchor = origin.state_dict()
    if as_file:
        save_file(anchor, tmp_path / "model.safetensors", {"format": "pt"})
        anchor = tmp_path
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, steps=3)
    importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with consolidate(model, optimizer, importance, strength=1e6, anchor=anchor):
        train(model, optimizer, steps=1)
    for a, b in zip(model.parameters(), origin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_importances_of_any_size_weigh_the_same(scale):
    model = make_model()
    importance = make_importance(model)
    scaled = {name: tensor * scale for name, tensor in importance.items()}
    for one, other in zip(Consolidation(model, importance)._held, Consolidation(model, scaled)._held, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=2**-7, atol=0)


def test_an_anchor_in_memory_is_copied():
    model = make_model()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with consolidate(model, optimizer, importance, strength=MOST, anchor=model.state_dict()):
        train(model, optimizer)
    for parameter, before in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(parameter, before, rtol=1e-4, atol=1e-5)


def test_an_anchor_is_rounded_as_a_master_copy_was():
    """DeepSpeed makes it of the model's bfloat16, and keeps it in float32."""
    whole = torch.randn(3, 4)
    place = SimpleNamespace(
        parameter=whole.bfloat16(), shape=(3, 4), stored=lambda: torch.zeros(12), cut=lambda tensor: tensor.flatten()
    )
    anchor = _cut_anchor("w", place, InMemory({"w": whole}))
    assert anchor.dtype == torch.float32
    assert torch.equal(anchor, whole.bfloat16().float().flatten())


@pytest.mark.parametrize("freeze_first", [True, False])
def test_a_core_frozen_elsewhere_than_at_the_anchor_stays_where_it_is(freeze_first):
    model = make_model(torch.float32)
    region = CoreRegion({"0.weight": torch.tensor([0, 5])}, {"0.weight": (3, 4)})
    anchor = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    blocks = [
        lambda: freeze_core(model, optimizer, region),
        lambda: consolidate(model, optimizer, make_importance(model), anchor=anchor),
    ]
    first, second = blocks if freeze_first else blocks[::-1]
    with first(), second():
        train(model, optimizer)
    assert torch.equal(model[0].weight.view(-1)[[0, 5]], before.view(-1)[[0, 5]])
    assert model[0].weight.norm() < before.norm()


def test_a_frozen_core_stays_frozen_to_the_bit():
    model = make_model(torch.float32)
    before = model[0].weight.detach().clone()
    region = CoreRegion({"0.weight": torch.tensor([0, 5])}, {"0.weight": (3, 4)})
    for freeze_first in (True, False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        blocks = [
            lambda optimizer=optimizer: freeze_core(model, optimizer, region),
            lambda optimizer=optimizer: consolidate(model, optimizer, make_importance(model)),
        ]
        first, second = blocks if freeze_first else blocks[::-1]
        with first(), second():
            train(model, optimizer)
        assert torch.equal(model[0].weight.view(-1)[[0, 5]], before.view(-1)[[0, 5]])
        assert not torch.equal(model[0].weight, before)


# Schedules


def shares(schedule_of, rate: float = 0.1, steps: int = 12) -> list[float]:
    """What a pull takes the learning rate's share of its peak to be, while a schedule goes on."""
    model = make_model()
    pull, optimizer = Consolidation(model, make_importance(model)), torch.optim.SGD(model.parameters(), lr=rate)
    schedule, found = schedule_of(optimizer), []
    for _ in range(steps):
        optimizer.step()
        found.append(pull._rate(optimizer.param_groups[0]))
        schedule.step()
    return found


def test_without_a_schedule_the_pull_is_whole_at_any_rate():
    model = make_model()
    pull = Consolidation(model, make_importance(model))
    for rate in (1e-5, 3.0):
        assert pull._rate(torch.optim.SGD(model.parameters(), lr=rate).param_groups[0]) == 1


def test_schedules_that_note_their_peak_are_followed_from_it():
    warm = shares(lambda optimizer: LambdaLR(optimizer, lambda step: min(step / 4, 1)))
    assert warm == pytest.approx([0, 0.25, 0.5, 0.75, *[1.0] * 8])
    cycle = shares(lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=13, div_factor=25))
    assert cycle[0] == pytest.approx(1 / 25)
    assert max(cycle) == pytest.approx(1, rel=1e-2)
    assert max(cycle) <= 1


def test_of_others_the_peak_is_the_highest_rate_so_far():
    cyclic = shares(lambda optimizer: CyclicLR(optimizer, 1e-4, 1e-2, step_size_up=4, cycle_momentum=False), steps=9)
    assert cyclic[:5] == [1] * 5
    assert cyclic[8] == pytest.approx(1e-2)
    model = make_model()
    pull = Consolidation(model, make_importance(model))
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 5.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    found = []
    for rate in (0.0, 0.1, 0.4, 0.2, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
        found.append([pull._rate(group) for group in optimizer.param_groups])
    assert found == [[0, 1], [1, 1], [1, 1], [0.5, 1], [0, 1]]


def test_an_optimizer_that_finds_its_own_rate():
    from transformers import Adafactor

    model = make_model(torch.float32)
    optimizer = Adafactor(model.parameters(), relative_step=True, warmup_init=True)
    with consolidate(model, optimizer, make_importance(model), strength=MOST):
        start = [parameter.detach().clone() for parameter in model.parameters()]
        train(model, optimizer, steps=2)
    for parameter, before in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(parameter, before, rtol=1e-3, atol=1e-5)


def test_groups_are_followed_each_by_its_own_schedule():
    model, other = make_model(), make_model()
    importance = make_importance(model)

    def start(model):
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return optimizer, LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1 / (1 + step)])

    optimizer, schedule = start(model)
    with consolidate(model, optimizer, importance, strength=0.5):
        train(model, optimizer, schedule)
    weights, anchor = weights_by_hand([importance]), copy.deepcopy(other.state_dict())
    optimizer, schedule = start(other)

    def by_hand() -> None:
        for name, parameter in other.named_parameters():
            share = optimizer.param_groups[name.startswith("2")]["lr"] / 0.1
            parameter.data = anchor[name] + (parameter.data - anchor[name]) / (1 + 0.5 * share * weights[name])

    train(other, optimizer, schedule, after=by_hand)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_loss_scale_skips_pulls_nothing(fused):
    model, origin = make_model(torch.float32), make_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    anchor = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with consolidate(model, optimizer, make_importance(model), anchor=anchor):
        for infinite in (True, False):
            scaler.scale(loss_of(model, batches(1, torch.float32)[0])).backward()
            if infinite:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            same = [torch.equal(a, b) for a, b in zip(model.parameters(), origin.parameters(), strict=True)]
            assert all(same) is infinite
            assert any(same) is infinite


# What changes meanwhile


def test_attached_twice_it_pulls_once():
    ends = []
    for times in (1, 2):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pull = Consolidation(model, make_importance(model))
        for _ in range(times):
            pull.attach(optimizer)
        train(model, optimizer)
        ends.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_several_optimizers_each_have_a_block():
    model, other = make_model(), make_model()
    importance = make_importance(model)
    both = torch.optim.SGD(other.parameters(), lr=0.1)
    with consolidate(other, both, importance):
        train(other, both)
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2]))
    pulls = [Consolidation(model, importance) for _ in range(2)]
    for pull, optimizer in zip(pulls, (first, second), strict=True):
        with pytest.warns(NoEffectWarning, match="are not in this optimizer"):
            pull.attach(optimizer)
    for x in batches(6):
        model.zero_grad()
        loss_of(model, x).backward()
        first.step()
        second.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_begins_to_train_is_told_of():
    model = make_model()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with consolidate(model, optimizer, make_importance(model)):
        train(model, optimizer, steps=1)
        model[2].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"'2.weight' was not trainable when the pull began, and is now"):
            train(model, optimizer, steps=1)


def test_so_is_what_is_replaced():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with consolidate(model, optimizer, make_importance(model)):
        model[0].weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(model[0].weight.detach().clone())
        with pytest.raises(RuntimeError, match="no longer in the optimizer"):
            train(model, optimizer, steps=1)


def test_a_base_that_trains_beside_an_adapter_is_told_of(tiny_model):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["q_proj"])
    )
    importance = {n: t.clone().abs() + 1 for n, t in get_peft_model_state_dict(model).items()}
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.warns(NoEffectWarning, match=r"1 trainable tensors, first '.*norm.weight'"):
        Consolidation(model, importance)


# Refusals


@pytest.mark.parametrize("strength", [0, -1, 1e7, math.nan, math.inf, "0.1", None, True])
def test_strengths_that_are_none(strength):
    model = make_model()
    with pytest.raises(CpiftError, match=r"strength must be a number above 0, at most 1e\+06, got"):
        Consolidation(model, make_importance(model), strength=strength)


def test_importances_that_do_not_fit():
    model = make_model()
    good = make_importance(model)
    for bad, message in (
        ([], "there is no importance to consolidate by"),
        (good | {"3.weight": torch.ones(2)}, "the model has not 1 tensors of .*, first '3.weight'"),
        (good | {"0.bias": torch.ones(4)}, r"tensor '0.bias' has shape \[4\] in .* and \[3\] in the model"),
        (good | {"0.bias": torch.ones(3, dtype=torch.int64)}, "tensor '0.bias' in .* is torch.int64"),
        (good | {"0.bias": torch.tensor([1.0, math.nan, 0])}, "tensor '0.bias' has a value that is not finite"),
        (good | {"0.bias": torch.tensor([1.0, -1.0, 0])}, "tensor '0.bias' has a negative value"),
        ({name: torch.zeros_like(t) for name, t in good.items()}, "no trainable coordinate has an importance above 0"),
        ("nowhere.safetensors", "no importance file nowhere.safetensors"),
        (None, "an importance is a file, or tensors by name, not a NoneType"),
        ([None], "an importance is a file, or tensors by name, not a NoneType"),
    ):
        with pytest.raises(CpiftError, match=message) as caught:
            Consolidation(model, bad)
        assert "\n" not in str(caught.value)


def test_anchors_that_do_not_fit():
    model = make_model()
    state = dict(model.state_dict())
    for bad, message in (
        ({name: t for name, t in state.items() if name != "0.bias"}, "tensor '0.bias' is missing in"),
        (state | {"0.bias": torch.ones(4)}, r"tensor '0.bias' has shape \[4\] in .* and \[3\] in the model"),
        (state | {"0.bias": torch.ones(3, dtype=torch.int8)}, "tensor '0.bias' in .* is torch.int8"),
        (state | {"0.bias": torch.tensor([0, math.nan, 0])}, "tensor '0.bias' has a value that is not finite in"),
    ):
        with pytest.raises(CpiftError, match=f"{message}.*: give the model that the training began with"):
            Consolidation(model, make_importance(model), anchor=bad)


def test_models_that_train_nothing_of_it():
    model = make_model().requires_grad_(False)
    with pytest.raises(CpiftError, match=r"the model trains no tensor of .*: there is nothing to pull back"):
        Consolidation(model, make_importance(make_model()))


def test_optimizers_that_cannot_be_followed():
    model = make_model()
    pull = Consolidation(model, make_importance(model))
    with pytest.raises(CpiftError, match=r"the optimizer trains nothing of what is to be pulled, '0.weight' for one"):
        pull.attach(torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(CpiftError, match=r"nothing can be pulled back where no core .* neither is nor wraps one"):
        pull.attach(object())


def test_second_copies_of_the_weights_are_refused_at_the_first_step():
    from schedulefree import AdamWScheduleFree

    model = make_model(torch.float32)
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    with (
        consolidate(model, optimizer, make_importance(model)),
        pytest.raises(CpiftError, match="AdamWScheduleFree keeps a second copy of the weights"),
    ):
        train(model, optimizer, steps=1)
