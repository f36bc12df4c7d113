"""What the first optimizer step on z is said to be: each warning is provoked by a real optimizer on a real model.

The thresholds are those of float32 (6e-8 below 1) and of the documented share of an output, and a warning is expected
exactly where z was seen to stay or to leap.
"""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peft_cpift.errors import NoEffectWarning
from peft_cpift.propulsion import PropulsionConfig, learning_rate


def adapted(degree: int = 15) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(nn.Sequential(nn.Linear(4, 8)), PropulsionConfig(target_modules=["0"], degree=degree))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scale: float = 1.0) -> list[str]:
    """Take one step and return the warnings' texts."""
    optimizer.zero_grad()
    (model(torch.ones(3, 4)).sum() * scale).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("rate", [2e-5, 1e-3, 5e-3])
def test_a_rate_that_works_is_not_remarked_on(rate):
    model = adapted()
    assert step(model, torch.optim.Adam(trained(model), lr=rate)) == []
    assert (model.base_model.model[0].propulsion_z["default"] != 1).all()


def test_a_rate_whose_step_float32_loses_is_named_with_the_cure():
    model = adapted()
    [message] = step(model, torch.optim.Adam(trained(model), lr=1e-9))
    assert (model.base_model.model[0].propulsion_z["default"] == 1).all()
    assert "learning rate 1e-09 is too small for Propulsion: 8 of 8 entries" in message
    assert "learning_rate=1e-3" in message
    assert "\n" not in message


def test_the_warning_is_one_of_no_effect():
    model = adapted()
    model(torch.ones(3, 4)).sum().backward()
    with pytest.warns(NoEffectWarning, match="too small"):
        torch.optim.Adam(trained(model), lr=1e-9).step()


def test_small_gradients_of_sgd_are_noticed_too():
    model = adapted()
    [message] = step(model, torch.optim.SGD(trained(model), lr=1e-3), scale=1e-6)
    assert "too small" in message


@pytest.mark.parametrize(("rate", "degree", "remarked"), [(0.05, 15, True), (0.05, 1, False), (1e-2, 20, True)])
def test_a_rate_is_too_large_by_what_one_step_does_to_the_outputs(rate, degree, remarked):
    model = adapted(degree)
    messages = step(model, torch.optim.Adam(trained(model), lr=rate))
    assert bool(messages) == remarked
    if remarked:
        assert f"learning rate {rate:g} is too large" in messages[0]
        assert f"outputs of 0 by {degree * rate:.0%}" in messages[0]
        assert f"divide it by {degree * rate / 0.015:.0f}." in messages[0]


def test_a_large_gradient_of_sgd_is_too_large_at_a_usual_rate():
    model = adapted()
    [message] = step(model, torch.optim.SGD(trained(model), lr=1e-2), scale=100.0)
    assert "too large" in message


def test_warm_up_is_projected_to_its_peak():
    model = adapted()
    optimizer = torch.optim.Adam(trained(model), lr=0.1)
    schedule = LambdaLR(optimizer, lambda t: t / 100)
    assert step(model, optimizer) == []  # the rate is 0: nothing to judge
    schedule.step()
    [message] = step(model, optimizer)
    assert "learning rate 0.1 is too large" in message


def test_a_lost_step_of_a_warm_up_is_not_yet_too_small():
    model = adapted()
    optimizer = torch.optim.Adam(trained(model), lr=1e-3)
    schedule = LambdaLR(optimizer, lambda t: 1e-6 if t == 0 else 1.0)
    assert step(model, optimizer) == []
    schedule.step()
    assert step(model, optimizer) == []
    assert (model.base_model.model[0].propulsion_z["default"] != 1).all()


def test_weight_decay_on_z_is_named():
    model = adapted()
    [message] = step(model, torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.1))
    assert "weight_decay=0.1 pulls z towards 0" in message


def test_every_model_is_judged_once_and_by_its_own_step():
    first, second = adapted(), adapted()
    optimizer = torch.optim.Adam(trained(first), lr=1e-9)
    assert len(step(first, optimizer)) == 1
    assert step(first, optimizer) == []
    assert len(step(second, torch.optim.Adam(trained(second), lr=1e-9))) == 1


def test_other_optimizers_are_left_alone():
    model, other = adapted(), nn.Linear(4, 4)
    assert step(other, torch.optim.Adam(other.parameters(), lr=1e-12)) == []
    assert len(step(model, torch.optim.Adam(trained(model), lr=1e-12))) == 1


def test_an_adapter_that_is_trained_later_is_judged_by_its_own_step():
    config = PropulsionConfig(target_modules=["0"], inference_mode=True)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 8)), config)
    model.add_adapter("second", PropulsionConfig(target_modules=["0"]))
    for name in ("default", "second"):
        model.set_adapter(name)
        assert len(step(model, torch.optim.Adam(trained(model), lr=1e-9))) == 1
        assert step(model, torch.optim.Adam(trained(model), lr=1e-9)) == []


def test_a_step_that_loss_scaling_skips_is_not_judged():
    model = adapted()
    optimizer = torch.optim.Adam(trained(model), lr=1e-9)
    z = model.base_model.model[0].propulsion_z["default"]
    z.grad = torch.full_like(z, torch.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    with torch.no_grad():
        z.fill_(1)
    [message] = step(model, torch.optim.Adam(trained(model), lr=1e-9))
    assert "too small" in message


def test_the_peak_of_a_one_cycle_schedule_is_known():
    model = adapted()
    optimizer = torch.optim.Adam(trained(model), lr=1e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    [message] = step(model, optimizer)
    assert "learning rate 0.1 is too large" in message


@pytest.mark.parametrize(("lost", "remarked"), [(4, False), (5, True)])
def test_more_than_half_of_the_entries_must_stay(lost, remarked):
    model = adapted()
    z = model.base_model.model[0].propulsion_z["default"]
    z.grad = torch.tensor([1e-6] * lost + [1.0] * (8 - lost))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.optim.SGD([z], lr=1e-3).step()
    assert bool(caught) == remarked


def test_models_can_go_and_leave_nothing_behind():
    model = adapted()
    watch = learning_rate._watch
    step(model, torch.optim.Adam(trained(model), lr=1e-3))
    z = id(model.base_model.model[0].propulsion_z["default"])
    assert model.base_model.model in watch.models
    assert z in watch.judged
    models = len(watch.models)
    del model
    gc.collect()
    assert len(watch.models) < models
    assert z not in watch.judged


def test_a_watched_model_can_be_copied():
    model = copy.deepcopy(adapted())
    assert step(model, torch.optim.Adam(trained(model), lr=1e-3)) == []
