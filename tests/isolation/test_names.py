"""Strategy: save each kind of model, and read the file: the names must be those in it, and each must give the live
parameter with the values of the file. Then wrap the model in what training wraps models in: nothing may change.
"""

from __future__ import annotations

import accelerate.utils
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_cpift import CoreRegion, CpiftError, PropulsionConfig
from peft_cpift.isolation.freeze import FrozenCore
from peft_cpift.isolation.names import locate_region, saved_parameters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

QUERY_AND_VALUE = ["q_proj", "v_proj"]
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=QUERY_AND_VALUE),
    "dora": LoraConfig(r=4, target_modules=QUERY_AND_VALUE, use_dora=True),
    "propulsion": PropulsionConfig(target_modules=QUERY_AND_VALUE),
    "propulsion-and-norm": PropulsionConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
    "modules-to-save": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm", "norm"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "layer-norm": LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": LoHaConfig(r=4, target_modules=QUERY_AND_VALUE),
    "vera": VeraConfig(r=4, target_modules=QUERY_AND_VALUE),
}


def load(folder, adapter: PeftConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model if adapter is None else get_peft_model(model, adapter)


def same(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


# --- the names are those of the file ---


def test_a_plain_models_names_are_those_of_its_checkpoint(tiny_model, tmp_path):
    model = load(tiny_model)
    model.save_pretrained(tmp_path)
    saved, found = load_file(tmp_path / "model.safetensors"), saved_parameters(model)
    assert found.keys() - saved.keys() == {"lm_head.weight"}  # which a tied model's file leaves out
    assert not saved.keys() - found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)


def test_both_names_of_a_tied_tensor_give_the_same_parameter(tiny_model):
    model = load(tiny_model)
    found = saved_parameters(model)
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"] is model.lm_head.weight


def test_each_name_of_an_untied_model_has_its_own(tiny_model):
    config = load(tiny_model).config
    config.tie_word_embeddings = False
    found = saved_parameters(AutoModelForCausalLM.from_config(config))
    assert found["lm_head.weight"] is not found["model.embed_tokens.weight"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapters_names_are_those_of_its_file(tiny_model, tmp_path, adapter):
    model = load(tiny_model, ADAPTERS[adapter])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()  # so that no two are equal
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved, found = load_file(tmp_path / "adapter_model.safetensors"), saved_parameters(model)
    trained = {name for name, parameter in found.items() if parameter.requires_grad}
    assert len(trained) == sum(parameter.requires_grad for parameter in model.parameters())
    assert trained <= saved.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved.keys() & found.keys())
    buffers = {name for name, _ in model.named_buffers()}
    assert all(any(name.split(".")[-1] in buffer for buffer in buffers) for name in saved.keys() - found.keys())


def test_a_saved_module_is_the_adapters_copy_and_not_the_base_models(tiny_model):
    model = load(tiny_model, ADAPTERS["modules-to-save"])
    parameter = saved_parameters(model)["base_model.model.model.norm.weight"]
    wrapper = model.base_model.model.model.norm
    assert parameter is wrapper.modules_to_save["default"].weight
    assert parameter is not wrapper.original_module.weight


def test_the_base_model_under_an_adapter_has_no_names(tiny_model):
    region = CoreRegion({"model.norm.weight": torch.tensor([0])}, {"model.norm.weight": (16,)})
    with pytest.raises(CpiftError, match=r"named like base_model\.model.*use the region of this model or adapter"):
        FrozenCore(load(tiny_model, ADAPTERS["lora"]), region)


# --- wrappers ---


def compiled_inside(model: nn.Module) -> nn.Module:
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    inner.model.layers[0] = torch.compile(inner.model.layers[0], backend="eager")
    return model


def compiled_regions(model: nn.Module) -> nn.Module:
    if not hasattr(accelerate.utils, "compile_regions"):
        pytest.skip("this version of accelerate compiles no regions")
    return accelerate.utils.compile_regions(model, backend="eager")


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    return model


def checkpointed_and_compiled(model: nn.Module) -> nn.Module:
    return compiled_inside(checkpointed(model))


def checkpointed_with_reentry(model: nn.Module) -> nn.Module:
    layers = (model.base_model.model if hasattr(model, "peft_config") else model).model.layers
    layers[1] = checkpoint_wrapper(layers[1], checkpoint_impl=CheckpointImpl.REENTRANT)
    return model


WRAPPERS = {
    "data-parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled-data-parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "compiled-regions": compiled_regions,
    "compiled-regions-in-data-parallel": lambda model: nn.DataParallel(compiled_regions(model)),
    "compiled-inside": compiled_inside,
    "checkpointed": checkpointed,
    "checkpointed-with-reentry": checkpointed_with_reentry,
    "checkpointed-and-compiled": checkpointed_and_compiled,
    "all": lambda model: nn.DataParallel(checkpointed_and_compiled(model)),
}


@pytest.mark.parametrize("adapter", [None, "lora", "propulsion", "modules-to-save"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_change_no_name(tiny_model, wrapper, adapter):
    model = load(tiny_model, ADAPTERS.get(adapter))
    before = saved_parameters(model)
    assert same(saved_parameters(WRAPPERS[wrapper](model)), before)


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_compiled_model_inside_data_parallel(tiny_model, adapter):
    model = load(tiny_model, ADAPTERS.get(adapter))
    before = saved_parameters(model)
    assert same(saved_parameters(nn.DataParallel(torch.compile(model, backend="eager"))), before)


def test_a_wrapped_models_coordinates_are_frozen(tiny_model):
    model = load(tiny_model)
    name = "model.layers.0.mlp.up_proj.weight"
    region = CoreRegion({name: torch.arange(0, 384, 3)}, {name: (24, 16)})
    wrapped = WRAPPERS["all"](model)
    frozen = FrozenCore(wrapped, region)
    assert len(frozen) == 128
    assert frozen.fraction == 128 / sum(p.numel() for p in model.parameters())


# --- regions that do not fit ---


def parameters(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


def region(**shapes: tuple[int, ...]) -> CoreRegion:
    return CoreRegion({name: torch.tensor([0]) for name in shapes}, shapes)


def refusal(region: CoreRegion, parameters: dict[str, nn.Parameter]) -> str:
    with pytest.raises(CpiftError) as error:
        locate_region(region, parameters)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_missing_names_are_counted_and_the_first_three_shown(count):
    names = ["e", "c", "a", "d", "b"][:count]
    message = refusal(region(w=(2,), **dict.fromkeys(names, (2,))), parameters(w=(2,), x=(2,), y=(2,)))
    assert f"core region has {count} tensors that the model has not" in message
    assert f"first {', '.join(sorted(names)[:3])}; the model's are named like w, x: use" in message


def test_a_model_without_names_says_so():
    assert "named like nothing at all" in refusal(region(w=(2,)), {})


@pytest.mark.parametrize("count", [1, 3, 5])
def test_other_shapes_are_counted_and_the_first_three_shown(count):
    names = [f"w{i}" for i in range(count)]
    message = refusal(region(v=(2,), **dict.fromkeys(names, (2, 3))), parameters(v=(2,), **dict.fromkeys(names, (6,))))
    assert f"differ in the shape of {count} tensors" in message
    shown = [f"'{name}' ([6] in the model, [2, 3] in the region)" for name in names[:3]]
    assert f"first {', '.join(shown)}: they" in message


def test_equal_sizes_are_not_equal_shapes():
    assert "'w' ([3, 2] in the model, [2, 3] in the region)" in refusal(region(w=(2, 3)), parameters(w=(3, 2)))


def test_a_tensor_without_coordinates_need_not_be_in_the_model():
    """A region lists the shape of all that was considered, for instance of a head that this model has not."""
    found = CoreRegion({"w": torch.tensor([1])}, {"w": (2,), "head": (9,), "x": (1,)})
    live = parameters(w=(2,), x=(5,))
    places = locate_region(found, live)
    assert list(places) == ["w"]
    assert places["w"].parameter is live["w"]


def test_the_region_of_another_adapter_type_is_refused(tiny_model):
    model = load(tiny_model, ADAPTERS["lora"])
    found = saved_parameters(model)
    lora = CoreRegion({n: torch.tensor([0]) for n in found}, {n: tuple(p.shape) for n, p in found.items()})
    with pytest.raises(CpiftError, match=r"has 8 tensors that the model has not.*propulsion_z"):
        FrozenCore(load(tiny_model, ADAPTERS["propulsion"]), lora)


def test_several_active_adapters_are_refused(tiny_model):
    model = load(tiny_model, ADAPTERS["lora"])
    model.add_adapter("second", ADAPTERS["lora"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(CpiftError, match="several adapters are active"):
        saved_parameters(model)
