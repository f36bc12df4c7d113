"""Strategy: train small modules in a plain loop under many optimizers, and compare frozen coordinates as bytes.

Every case also checks that the other coordinates moved, so that a test cannot pass because nothing trained. The
optimizers are those that move entries without a gradient: by weight decay, momentum, or from a stale state.
"""

from __future__ import annotations

import copy
import gc
import weakref

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_cpift import CoreRegion, CpiftError, NoEffectWarning, freeze_core
from peft_cpift.isolation.freeze import FrozenCore

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
}


def make_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def make_region(model: nn.Module) -> CoreRegion:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return CoreRegion({"0.weight": torch.tensor([0, 7, 29]), "2.bias": torch.tensor([1])}, shapes)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int = 1) -> torch.Tensor:
    optimizer.zero_grad()
    for _ in range(micro_batches):
        x = torch.randn(4, 6).to(next(model.parameters()).dtype)
        model(x).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().contiguous().view(torch.uint8).tolist()


def check_isolated(before: dict[str, torch.Tensor], model: nn.Module, region: CoreRegion) -> None:
    for name, parameter in model.named_parameters():
        frozen = torch.zeros(parameter.numel(), dtype=torch.bool)
        frozen[region.indices.get(name, torch.empty(0, dtype=torch.long))] = True
        old, new = before[name].reshape(-1), parameter.detach().reshape(-1)
        assert bits(old[frozen]) == bits(new[frozen]), f"a frozen coordinate of {name} moved"
        assert (old[~frozen] != new[~frozen]).all(), f"a free coordinate of {name} did not move"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_coordinates_keep_their_bits_and_others_move(name, micro_batches, dtype):
    model = make_model(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    region = make_region(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with freeze_core(model, optimizer, region):
        for _ in range(5):
            step(model, optimizer, micro_batches)
    check_isolated(before, model, region)


def test_bfloat16_keeps_the_bits_too():
    model = make_model(torch.bfloat16)
    region = make_region(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with freeze_core(model, optimizer, region):
        for _ in range(10):
            step(model, optimizer)
    for name, index in region.indices.items():
        now = dict(model.named_parameters())[name].reshape(-1)[index]
        assert bits(now) == bits(before[name].reshape(-1)[index])
    assert (model[0].weight != before["0.weight"]).any()


def test_stale_momentum_does_not_move_what_is_frozen_later():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        step(model, optimizer)
    region = make_region(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with freeze_core(model, optimizer, region):
        for _ in range(3):
            step(model, optimizer)
    check_isolated(before, model, region)


def test_frozen_gradients_add_nothing_to_the_clipped_norm_or_the_optimizer_state():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    region = make_region(model)
    torch.manual_seed(1)
    with freeze_core(model, optimizer, region):
        norm = step(model, optimizer)
    moment = optimizer.state[model[0].weight]["exp_avg"].reshape(-1)
    assert moment[region.indices["0.weight"]].tolist() == [0.0, 0.0, 0.0]
    assert moment.count_nonzero() == moment.numel() - 3

    reference = make_model()
    torch.manual_seed(1)
    reference(torch.randn(4, 6)).square().sum().backward()
    gradients = {n: p.grad.reshape(-1).clone() for n, p in reference.named_parameters()}
    for name, index in region.indices.items():
        gradients[name][index] = 0
    torch.testing.assert_close(norm, torch.cat(list(gradients.values())).norm())


def test_infinite_gradient_of_a_frozen_coordinate_becomes_zero_not_nan():
    parameter = nn.Parameter(torch.ones(3))
    model = nn.Module()
    model.w = parameter
    frozen = FrozenCore(model, CoreRegion({"w": torch.tensor([1])}, {"w": (3,)}))
    frozen.attach(torch.optim.SGD([parameter]))
    (parameter * torch.tensor([2.0, float("inf"), 3.0])).sum().backward()
    assert parameter.grad.tolist() == [2.0, 0.0, 3.0]


def test_parameter_and_gradient_that_are_not_contiguous():
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(torch.randn(4, 3).t())
    assert not model.weight.is_contiguous()
    before = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with freeze_core(model, optimizer, CoreRegion({"weight": torch.tensor([1, 10])}, {"weight": (3, 4)})):
        model(torch.randn(2, 4)).sum().backward()
        assert model.weight.grad.flatten()[[1, 10]].tolist() == [0.0, 0.0]
        optimizer.step()
    moved = (model.weight != before).flatten()
    assert moved.nonzero().flatten().tolist() == [i for i in range(12) if i not in (1, 10)]


def test_nothing_is_frozen_after_the_block():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with freeze_core(model, optimizer, make_region(model)):
        step(model, optimizer)
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert (model[0].weight != before).all()


def test_a_write_behind_the_optimizers_back_is_noticed():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def tamper() -> None:
        with freeze_core(model, optimizer, make_region(model)):
            step(model, optimizer)
            model[0].weight.data.view(-1)[7] += 1

    with pytest.raises(RuntimeError, match=r"1 of 3 frozen coordinates of '0\.weight' changed"):
        tamper()


def test_minus_zero_is_another_bit_pattern_than_zero():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    frozen = FrozenCore(model, CoreRegion({"weight": torch.tensor([0])}, {"weight": (1, 2)}))
    model.weight.data[0, 0] = -0.0
    with pytest.raises(RuntimeError, match="changed"):
        frozen.verify()


def test_several_regions_and_files_are_united(tmp_path):
    model = make_model()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    CoreRegion({"0.weight": torch.tensor([1, 2])}, shapes).save(tmp_path / "a.safetensors")
    frozen = FrozenCore(model, [tmp_path / "a.safetensors", CoreRegion({"0.weight": torch.tensor([2, 3])}, shapes)])
    assert len(frozen) == 3


def test_unknown_names_and_wrong_shapes_are_refused_by_name():
    model = make_model()
    with pytest.raises(CpiftError, match=r"first layer\.w; the model's are named like 0\.weight"):
        FrozenCore(model, CoreRegion({"layer.w": torch.tensor([0])}, {"layer.w": (2,)}))
    with pytest.raises(CpiftError, match=r"first '0\.weight' \(\[5, 6\] in the model, \[6, 5\] in the region\)"):
        FrozenCore(model, CoreRegion({"0.weight": torch.tensor([0])}, {"0.weight": (6, 5)}))


def test_a_region_that_freezes_nothing_trainable_warns():
    model = make_model()
    model.requires_grad_(False)
    with pytest.warns(NoEffectWarning, match="none of the 4 frozen coordinates"):
        FrozenCore(model, make_region(model))


def test_a_sparse_gradient_is_refused():
    model = nn.Embedding(4, 2, sparse=True)
    frozen = FrozenCore(model, CoreRegion({"weight": torch.tensor([0])}, {"weight": (4, 2)}))
    frozen.attach(torch.optim.SparseAdam(model.parameters()))
    with pytest.raises(CpiftError, match="sparse gradient"):
        model(torch.tensor([1])).sum().backward()


def test_accelerates_optimizer_is_taken_too():
    Accelerator(cpu=True)
    model = make_model()
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    region = make_region(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with freeze_core(model, optimizer, region):
        for _ in range(3):
            step(model, optimizer)
    check_isolated(before, model, region)


def test_no_hook_stays_when_the_optimizer_is_none():
    model = make_model()
    with pytest.raises(CpiftError, match="NoneType"), freeze_core(model, None, make_region(model)):
        raise AssertionError("not reached")
    model(torch.randn(4, 6)).sum().backward()
    assert model[0].weight.grad.flatten()[[0, 7, 29]].all()


def test_either_name_of_a_tied_tensor_freezes_it():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    for name in ("a.weight", "b.weight"):
        assert len(FrozenCore(model, CoreRegion({name: torch.tensor([0, 4])}, {name: (3, 3)}))) == 2


def test_more_may_be_frozen_later_at_the_values_of_then():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with freeze_core(model, optimizer, CoreRegion({"0.weight": torch.tensor([2, 7])}, shapes)) as frozen:
        first = model[0].weight.detach().flatten().clone()
        step(model, optimizer)
        second = model[0].weight.detach().flatten().clone()
        frozen.extend(CoreRegion({"0.weight": torch.tensor([7, 9])}, shapes))
        assert len(frozen) == 3
        assert frozen.fraction == 3 / sum(p.numel() for p in model.parameters())
        for _ in range(2):
            step(model, optimizer)
    now = model[0].weight.detach().flatten()
    assert first[9] != second[9]
    assert bits(now[[2, 7, 9]]) == bits(torch.stack([first[2], first[7], second[9]]))
    assert (now != second).sum() == now.numel() - 3


class Operators(TorchDispatchMode):
    """Remembers the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, bitsandbytes.optim.AdamW8bit])
def test_a_step_never_waits_for_a_gpu(kind):
    """The operators that fetch a value or a size from the device are absent, except in a parameter's first step."""
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
    model = nn.Linear(64, 64)  # as many as bitsandbytes wants before it quantizes
    region = CoreRegion(
        {"weight": torch.arange(0, 4096, 5), "bias": torch.tensor([3])}, {"weight": (64, 64), "bias": (64,)}
    )
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    with freeze_core(model, optimizer, region) as frozen:
        for _ in range(2):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
        with Operators() as free:
            model(torch.randn(4, 64)).sum().backward()
            frozen._after_step(optimizer, (), {})
        with Operators() as asked:
            frozen.masked_grad_norm()
    assert {"index_select", "index_fill_", "index_copy_"} <= free.names  # it did see the masking and restoring
    assert not free.names & waiting
    assert asked.names & waiting  # and it does see a fetched value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_is_at_most_5_percent_of_the_parameters_at_1_percent(dtype):
    model = nn.Linear(400, 500, bias=False).to(dtype)
    region = CoreRegion({"weight": torch.arange(0, 200_000, 100)}, {"weight": (500, 400)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    frozen = FrozenCore(model, region)
    del region
    frozen.attach(optimizer)
    model(torch.randn(2, 400, dtype=dtype)).sum().backward()
    optimizer.step()
    gc.collect()
    mine = {id(model.weight), id(model.weight.grad)}
    alive = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() == 2000 and id(x) not in mine]
    kept = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())
    assert len(alive) >= 3
    assert kept <= 0.05 * 200_000 * model.weight.element_size()


def test_a_model_that_is_still_frozen_can_be_freed():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    FrozenCore(model, make_region(model)).attach(optimizer)
    step(model, optimizer)
    alive = weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_both_names_of_a_tied_tensor_freeze_what_each_of_them_names():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    region = CoreRegion(
        {"a.weight": torch.tensor([0, 4]), "b.weight": torch.tensor([4, 7])}, {"a.weight": (3, 3), "b.weight": (3, 3)}
    )
    before = model["a"].weight.detach().flatten().clone()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    with freeze_core(model, optimizer, region) as frozen:
        assert len(frozen) == 3
        model["a"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert (model["a"].weight.detach().flatten() == before).nonzero().flatten().tolist() == [0, 4, 7]


def test_a_parameter_that_begins_to_train_later_is_noticed_in_its_first_step():
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def unfreeze_gradually() -> None:
        with freeze_core(model, optimizer, make_region(model)):
            step(model, optimizer)
            model[0].weight.requires_grad_(True)
            step(model, optimizer)

    with pytest.raises(RuntimeError, match=r"'0\.weight' was not trainable"):
        unfreeze_gradually()


def test_a_parameter_without_gradient_that_momentum_still_moves_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    model[0].weight.requires_grad_(False)
    with (
        pytest.raises(CpiftError, match=r"'0\.weight' requires no gradient"),
        freeze_core(model, optimizer, make_region(model)),
    ):
        raise AssertionError("not reached")


@pytest.mark.parametrize("known", [False, True], ids=["model", "model-and-optimizer"])
def test_a_parameter_that_is_replaced_is_noticed(known):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def replace() -> None:
        with freeze_core(model, optimizer, make_region(model)):
            model[0].weight = nn.Parameter(model[0].weight.detach().clone())
            if known:  # as engines do that prepare both
                optimizer.param_groups[0]["params"][0] = model[0].weight
                step(model, optimizer)
                raise AssertionError("the step itself should have told")

    with pytest.raises(RuntimeError, match=r"(in place of|another parameter).*'0\.weight'|'0\.weight' is another"):
        replace()


def test_a_step_that_is_cut_off_leaves_the_frozen_values():
    model = make_model()
    region = make_region(model)
    before = model[0].weight.detach().flatten()[region.indices["0.weight"]].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)

    def interrupt() -> None:
        with freeze_core(model, optimizer, region):
            model[0].weight.data.mul_(2)  # what a step does before its hooks run
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert bits(model[0].weight.flatten()[region.indices["0.weight"]]) == bits(before)


def test_no_region_at_all_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CpiftError, match="no region"), freeze_core(model, optimizer, []):
        raise AssertionError("not reached")


def test_the_optimizer_must_be_that_of_the_model():
    model, other = make_model(), make_model()
    frozen = FrozenCore(model, make_region(model))
    with pytest.raises(CpiftError, match=r"trains none of the frozen parameters, '0\.weight'"):
        frozen.attach(torch.optim.SGD(other.parameters()))
    with pytest.warns(NoEffectWarning, match=r"1 frozen parameters, first '2\.bias', are not in this optimizer"):
        frozen.attach(torch.optim.SGD(model[0].parameters()))


def test_a_gradient_from_before_the_freezing_is_masked():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 6)).square().sum().backward()
    pull = model[0].weight.grad.flatten()[[0, 7, 29]].norm()
    with freeze_core(model, optimizer, make_region(model)) as frozen:
        assert model[0].weight.grad.flatten()[[0, 7, 29]].tolist() == [0.0, 0.0, 0.0]
        assert frozen.masked_grad_norm() >= pull > 0
        optimizer.step()


def test_state_of_a_parameter_without_gradient_is_cleaned_when_it_has_one_again():
    """Like an expert that gets no token in the first frozen step: its old moments must not pass for a clean step."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    region = CoreRegion(
        {"a.weight": torch.tensor([0]), "b.weight": torch.tensor([1])}, {"a.weight": (2, 2), "b.weight": (2, 2)}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)

    def train(*names: str) -> None:
        optimizer.zero_grad()
        sum(model[name](torch.ones(1, 2)).sum() for name in names).backward()
        optimizer.step()

    train("a", "b")
    with freeze_core(model, optimizer, region):
        train("a")
        train("a", "b")
        train("a", "b")
    assert optimizer.state[model["b"].weight]["exp_avg"].flatten()[1] == 0


def test_state_that_is_loaded_meanwhile_is_cleaned():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer)
    old = copy.deepcopy(optimizer.state_dict())
    with freeze_core(model, optimizer, make_region(model)):
        step(model, optimizer)
        optimizer.load_state_dict(old)
        step(model, optimizer)
    assert not optimizer.state[model[0].weight]["exp_avg"].flatten()[[0, 7, 29]].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_masked_norm_in_other_precisions(dtype):
    model = nn.Linear(2, 1, bias=False).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    region = CoreRegion({"weight": torch.tensor([0, 1])}, {"weight": (1, 2)})
    with freeze_core(model, optimizer, region) as frozen:
        model(torch.tensor([[3.0, 4.0]], dtype=dtype)).sum().backward()
        optimizer.step()
        assert frozen.masked_grad_norm() == 5.0


def test_a_model_that_is_cast_meanwhile_is_noticed():
    model = make_model()
    frozen = FrozenCore(model, make_region(model))
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="changed"):
        frozen.verify()


def test_what_was_not_trainable_is_not_forgotten_when_more_is_frozen():
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def unfreeze_after_extending() -> None:
        with freeze_core(model, optimizer, make_region(model)) as frozen:
            frozen.extend(CoreRegion({"2.bias": torch.tensor([0])}, shapes))
            model[0].weight.requires_grad_(True)
            step(model, optimizer)

    with pytest.raises(RuntimeError, match=r"'0\.weight' was not trainable"):
        unfreeze_after_extending()
