"""The parameters of a live model by the names under which they are saved, and the coordinates of a region in them."""

from __future__ import annotations

from torch import Tensor, nn

from peft_cpift.core.region import CoreRegion
from peft_cpift.errors import CpiftError
from peft_cpift.isolation.engines import Whole, locate_parameter

# What wrappers put into the names of a model's parameters, and strip from those of its saved state.
WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_orig_mod.")


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by the names under which they are saved; for a PEFT model, its active adapter's.

    Raises:
        CpiftError: the model has adapters whose saved names cannot be told from the live ones.
    """
    return {name: tensor for name, tensor in saved_tensors(model).items() if isinstance(tensor, nn.Parameter)}


def saved_tensors(model: nn.Module, *, embeddings: bool = False) -> dict[str, Tensor]:
    """The same, and the model's buffers by the names that these have where they are saved; see `saved_parameters`.

    Args:
        model: as for `saved_parameters`.
        embeddings: whether those are to be there that PEFT saves with an adapter although they are not trained, as it
            does of a vocabulary that was resized.
    """
    from accelerate.utils import extract_model_from_parallel  # deferred: only needed once a model is at hand

    wrapped = None
    while wrapped is not model:  # a compiled model may be inside a parallel one, and the other way round
        wrapped, model = model, extract_model_from_parallel(model, keep_torch_compile=False)
        model = getattr(model, "_orig_mod", model)
    # Of the live parameters themselves, so that PEFT's renaming yields the saved name of each; by the names of live
    # modules, by which PEFT looks for its layers, where a state_dict() leaves out the prefixes of wrappers.
    live = dict(model.named_buffers(remove_duplicate=False)) | dict(model.named_parameters(remove_duplicate=False))
    if not hasattr(model, "peft_config"):
        return {_saved_name(name): tensor for name, tensor in live.items()}

    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise CpiftError("adapters added with add_adapter are not supported: put them on with peft.get_peft_model")
    if model.active_peft_config.is_prompt_learning:
        raise CpiftError("prompt-learning adapters keep no parameter under its saved name: not supported")
    if len(getattr(model.base_model, "active_adapters", [])) > 1:
        raise CpiftError("several adapters are active, and a region is of one: activate the one that it belongs to")
    named = get_peft_model_state_dict(
        model,
        state_dict=live,
        adapter_name=model.active_adapter,
        save_embedding_layers=embeddings,
    )
    return {_saved_name(name): tensor for name, tensor in named.items()}


def locate_region(region: CoreRegion, parameters: dict[str, nn.Parameter]) -> dict[str, Whole]:
    """The place of every tensor that has coordinates in `region` among a model's `saved_parameters`.

    Raises:
        CpiftError: names or shapes do not fit the model, naming the first few.
    """
    missing = sorted(region.indices.keys() - parameters.keys())
    if missing:
        known = ", ".join(list(parameters)[:2])
        raise CpiftError(
            f"core region has {len(missing)} tensors that the model has not, first {', '.join(missing[:3])}; the "
            f"model's are named like {known or 'nothing at all'}: use the region of this model or adapter type "
            "(models that transformers saves under other names, Mixtral and LLaVA for two, are not supported)"
        )
    places = {name: locate_parameter(name, parameters[name]) for name in region.indices}
    unfit = [
        f"'{name}' ({list(place.shape)} in the model, {list(region.shapes[name])} in the region)"
        for name, place in places.items()
        if place.shape != region.shapes[name]
    ]
    if unfit:
        raise CpiftError(
            f"core region and model differ in the shape of {len(unfit)} tensors, first {', '.join(unfit[:3])}: they "
            "belong to different models, or an engine that is not supported (FSDP1) has cut the parameters"
        )
    return places


def _saved_name(name: str) -> str:
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
