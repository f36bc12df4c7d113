"""Combining adapters: the two formulas against their definitions in float64, and what they do to whole models.

Properties that a user relies on are checked directly: weights of 1 equal all adapters active at once, a weight of 0
leaves an adapter out, weights that do not sum to one leave untouched outputs untouched, and a combination that has no
z says so and leaves the model as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_cpift.propulsion import PropulsionConfig
from peft_cpift.propulsion.combine import COMBINATIONS, combine_scales, scale_to_z


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [2.0, -1.5], [0.0, 0.0]])
def test_scales_are_combined_by_definition(weights):
    scales = torch.tensor([[1.2, 0.7, 1.0], [0.9, 3.0, 1.0]])
    logs = combine_scales(scales, weights)
    torch.testing.assert_close(logs, scales[0] ** weights[0] * scales[1] ** weights[1])
    lines = combine_scales(scales, weights, "linear")
    torch.testing.assert_close(lines, 1 + weights[0] * (scales[0] - 1) + weights[1] * (scales[1] - 1))
    assert logs[2] == lines[2] == 1
    assert logs.dtype == lines.dtype == torch.float32


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_experts_and_many_adapters_keep_their_shape(combination):
    scales = torch.rand(3, 2, 4) + 0.5
    combined = combine_scales(scales, [0.5, 0.25, 0.25], combination)
    assert combined.shape == (2, 4)
    alone = combine_scales(scales[:, 1], [0.5, 0.25, 0.25], combination)
    torch.testing.assert_close(combined[1], alone)


def test_linear_takes_scales_of_any_sign_and_log_does_not():
    scales = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    assert combine_scales(scales, [0.5, 1.0], "linear").tolist() == [0.0, 0.5, 1.5]
    for column in (0, 1):
        with pytest.raises(ValueError, match="a scale <= 0 has no logarithm; use combination_type='linear'"):
            combine_scales(scales[:, [column]], [0.5, 1.0])


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_large_weights_do_not_magnify_rounding(combination):
    scales, weights = torch.tensor([[1.37], [1.36], [0.72]]), [30.0, -30.1, 0.7]
    wide = scales.double()[:, 0]
    logs = (wide ** torch.tensor(weights, dtype=torch.float64)).prod()
    expected = logs if combination == "log" else 1 + (torch.tensor(weights, dtype=torch.float64) * (wide - 1)).sum()
    combined = combine_scales(scales, weights, combination)[0]
    torch.testing.assert_close(combined.double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weights_must_be_finite(weight, combination):
    with pytest.raises(ValueError, match=r"weights=.* are not all finite"):
        combine_scales(torch.ones(2, 3), [1.0, weight], combination)


@pytest.mark.parametrize("combination", ["svd", "", None, "LOG"])
def test_unknown_combinations_name_the_known_ones(combination):
    with pytest.raises(ValueError, match=r"combination_type=.* is unknown; choose one of 'log', 'linear'"):
        combine_scales(torch.ones(2, 3), [1.0, 1.0], combination)


@pytest.mark.parametrize("degree", [1, 2, 3, 15, 55])
def test_roots_undo_powers(degree):
    scale = torch.tensor([1.0, 0.25, 3.0, 1e-6, 0.0, *([-0.5] if degree % 2 else [])])
    z = scale_to_z(scale, degree)
    torch.testing.assert_close(z.double() ** degree, scale.double(), rtol=1e-5, atol=1e-12)
    assert z[0] == 1
    assert (z.sign() == scale.sign()).all()


@pytest.mark.parametrize("degree", [2, 20])
def test_negative_scales_have_no_even_root(degree):
    with pytest.raises(ValueError, match=rf"no power of the even degree {degree}; use smaller weights"):
        scale_to_z(torch.tensor([1.0, -0.1]), degree)


# -- whole models -----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(8, 4), nn.Linear(4, 3), nn.Conv1d(3, 2, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(self.linear(self.embed(ids)).transpose(1, 2))


IDS = torch.arange(8).reshape(2, 4)
ALL = ["embed", "linear", "conv"]


def adapted(*settings: dict[str, Any]) -> PeftModel:
    """Return a model with the adapters a, b, ..., whose scales lie in [0.5, 1.5]."""
    torch.manual_seed(0)
    model = None
    for adapter, extra in zip("abc", settings, strict=False):
        config = PropulsionConfig(**{"target_modules": ALL, "degree": 5} | extra)
        if model is None:
            model = get_peft_model(Net(), config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    for name, p in model.named_parameters():
        if "propulsion_z" in name:
            degree = model.get_submodule(name.partition(".propulsion_z")[0]).degree[name[-1]]
            p.data.uniform_(0.5, 1.5).pow_(1 / degree)
    return model.eval()


def output(model: PeftModel, *adapters: str) -> torch.Tensor:
    if adapters:
        model.base_model.set_adapter(list(adapters))
    with torch.no_grad():
        return model(IDS)


def scale(model: PeftModel, layer: str, adapter: str) -> torch.Tensor:
    return model.base_model.model.get_submodule(layer).get_scale([adapter]).detach()


def test_weights_of_one_are_the_same_as_all_active():
    model = adapted({}, {"degree": 2}, {"num_vectors": 3})
    expected = output(model, "a", "b", "c")
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 1.0, 1.0], "all")
    torch.testing.assert_close(output(model, "all"), expected, rtol=1e-4, atol=1e-5)


def test_several_vectors_become_one():
    model = adapted({"num_vectors": 3}, {})
    expected = output(model, "a", "b")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert model.base_model.model.linear.propulsion_z["c"].shape == (3,)
    assert (model.peft_config["c"].num_vectors, model.peft_config["c"].inference_mode) == (1, True)
    torch.testing.assert_close(output(model, "c"), expected, rtol=1e-4, atol=1e-5)


def test_linear_combines_the_changes_of_merged_weights():
    model = adapted({}, {})
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", combination_type="linear")
    for layer in ALL:
        expected = 1 + 0.5 * (scale(model, layer, "a") - 1) + 2 * (scale(model, layer, "b") - 1)
        torch.testing.assert_close(scale(model, layer, "sum"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_weight_of_zero_leaves_an_adapter_out(combination):
    model = adapted({}, {})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "only_a", combination_type=combination)
    torch.testing.assert_close(output(model, "only_a"), output(model, "a"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("weights", [[5.0, 5.0], [0.1, 0.2], [-1.0, 3.0]])
def test_untouched_outputs_stay_untouched_whatever_the_weights_sum_to(combination, weights):
    model = adapted({}, {})
    for name, p in model.named_parameters():
        if "propulsion_z" in name:
            p.data.fill_(1)
    model.add_weighted_adapter(["a", "b"], weights, "c", combination_type=combination)
    with model.disable_adapter():
        expected = output(model)
    assert torch.equal(output(model, "c"), expected)


def test_the_sources_and_the_active_adapter_stay_as_they_were():
    model = adapted({}, {})
    before = {n: p.clone() for n, p in model.named_parameters()}
    expected = output(model, "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert torch.equal(output(model), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".c"))


def test_a_combination_is_saved_loaded_and_merged(tmp_path):
    model = adapted({}, {})
    model.add_weighted_adapter(["a", "b"], [0.5, 0.7], "c")
    expected = output(model, "c")
    model.save_pretrained(tmp_path, selected_adapters=["c"])
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "c").eval()
    assert torch.equal(output(loaded), expected)
    torch.testing.assert_close(output(loaded.merge_and_unload()), expected)


def test_degrees_of_single_layers_are_kept():
    settings = {"degree_pattern": {"linear": 2}}
    model = adapted(settings, settings)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert model.base_model.model.linear.degree["c"] == 2
    torch.testing.assert_close(output(model, "c"), output(model, "a", "b"), rtol=1e-4, atol=1e-5)


REFUSED = {
    "one weight too few": (({}, {}), (["a", "b"], [1.0], "c"), "2 adapters cannot be combined with 1 weights"),
    "nothing to combine": (({}, {}), ([], [], "c"), "0 adapters cannot be combined with 0 weights"),
    "a name that is taken": (({}, {}), (["a", "b"], [1.0, 1.0], "a"), "has an adapter a already"),
    "a missing adapter": (({}, {}), (["a", "x"], [1.0, 1.0], "c"), "the model has no adapter x; it has a, b"),
    "other layers": (
        ({}, {"target_modules": ["linear"]}),
        (["a", "b"], [1.0, 1.0], "c"),
        "embed is scaled by some of a, b, but not by b; combine adapters of the same layers",
    ),
    "saved modules": (
        ({"target_modules": ["embed"]}, {"target_modules": ["embed"], "modules_to_save": ["conv"]}),
        (["a", "b"], [1.0, 1.0], "c"),
        "b has modules_to_save, which cannot be combined",
    ),
    "trained tokens": (
        ({"target_modules": ["linear"], "trainable_token_indices": {"embed": [1]}}, {"target_modules": ["linear"]}),
        (["a", "b"], [1.0, 1.0], "c"),
        "a has trainable_token_indices, which cannot be combined",
    ),
    "biases": (({"bias": "all"}, {}), (["a", "b"], [1.0, 1.0], "c"), "a has trained biases, which cannot be combined"),
    "infinite weights": (({}, {}), (["a", "b"], [1.0, float("inf")], "c"), "embed: weights=.* not all finite"),
    "unknown combination": (({}, {}), (["a", "b"], [1.0, 1.0], "c", "ties"), "combination_type='ties' is unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_and_the_model_stays(case):
    settings, arguments, message = REFUSED[case]
    model = adapted(*settings)
    expected, names = output(model), [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message) as error:
        model.add_weighted_adapter(*arguments)
    assert "\n" not in str(error.value)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["a", "b"][: len(settings)]
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("degree", [4, 5])
def test_a_negative_combination_needs_an_odd_degree(degree):
    model = adapted({"degree": degree}, {"degree": degree})
    for layer in ALL:
        model.base_model.model.get_submodule(layer).propulsion_z["a"].data.fill_(layer != "conv")
    arguments = (["a", "b"], [3.0, 0.0], "c", "linear")
    if degree == 4:
        with pytest.raises(ValueError, match="conv: a negative scale is no power of the even degree 4"):
            model.add_weighted_adapter(*arguments)
        assert "c" not in model.peft_config
        return
    model.add_weighted_adapter(*arguments)
    torch.testing.assert_close(scale(model, "conv", "c"), torch.full((2,), -2.0))


def test_the_logarithm_of_zero_is_refused_with_the_cure():
    model = adapted({}, {})
    model.base_model.model.linear.propulsion_z["b"].data[1] = 0
    with pytest.raises(ValueError, match=r"^linear: a scale <= 0 has no logarithm; use combination_type='linear'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")


@pytest.mark.parametrize(("weight", "combination"), [(1e6, "log"), (1e300, "linear")])
def test_a_combination_that_is_not_finite_is_refused(weight, combination):
    with pytest.raises(ValueError, match="the combined scale is NaN or infinite; use smaller weights"):
        combine_scales(torch.full((1, 2), 1.5), [weight], combination)
