"""A model without weights that carries an adapter, and PEFT's own merging of one module of it at a time.

Every parameter of the model is hollow: one NaN, seen as a tensor of the right shape. PEFT takes it for an ordinary
model on the CPU, and what it would compute from a weight is NaN instead of quietly wrong.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from peft_cpift.checkpoint.reader import MODEL_CONFIG, Checkpoint, read_json
from peft_cpift.errors import CpiftError

PREFIX = "base_model.model."
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where PEFT subtracts the start from the base's weights."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What PEFT and transformers raise where a configuration or an adapter does not fit; passed on in one line."""
MERGE_ELSEWHERE = "merge it in memory with merge_and_unload, and use the saved model"


@dataclass
class Target:
    """A module that the adapter changes.

    Attributes:
        module: PEFT's layer around the hollow module; never merged itself, only copies of it are.
        hollow: name in the model -> the hollow parameter, for all of the module's own.
        changed: the names among them whose values merging changes.
        additive: whether merging adds the same to them, whatever the base's values are.
    """

    name: str
    module: nn.Module
    hollow: dict[str, nn.Parameter]
    changed: frozenset[str] = frozenset()
    additive: bool = False

    def merge(
        self, values: Mapping[str, Tensor], fill: Callable[[list[nn.Parameter]], None] | None = None
    ) -> dict[str, Tensor]:
        """The values of the module's parameters after the adapter was merged into `values`, which may be overwritten.

        Works on a copy of the layer in which real values stand for the hollow ones, so that nothing has to be undone.
        `fill` may change the copied parameters of the adapter before.
        """
        copied = {id(parameter): parameter for parameter in self.hollow.values()}
        given = {id(self.hollow[name]): nn.Parameter(value, False) for name, value in values.items()}
        copied |= given
        layer = copy.deepcopy(self.module, copied)
        with torch.no_grad():
            if fill is not None:
                base = {id(parameter) for parameter in given.values()}
                fill([p for p in layer.parameters() if id(p) not in base and p.is_floating_point()])
            if hasattr(layer, "unload_and_optionally_merge_module"):
                merged = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge(safe_merge=False, adapter_names=None)
                merged = layer.get_base_layer()
            return {name: merged.get_parameter(name[len(self.name) + 1 :]).data for name in self.hollow}


class Skeleton:
    """The model that a configuration describes, without weights, with an adapter on it.

    Args:
        model_folder: holds `config.json`; its weights are not looked at.
        adapter: the adapter.
        dtype: in which to merge.

    Attributes:
        prefix: what the names of the model's inner part begin with, and may lack where that was saved alone.
        shapes: name -> shape of all the model's parameters; tied ones under each of their names.
        ties: name -> all names of the parameter, sorted.
        targets: what the adapter's layers change.
        saved: name of a parameter -> its name in the adapter, which has a trained copy of it.

    Raises:
        CpiftError: the model cannot be built, or the adapter cannot be put on it or merged.
    """

    def __init__(self, model_folder: Path, adapter: Checkpoint, dtype: torch.dtype):
        self._adapter = adapter
        _check_mergeable(adapter)
        with _quiet():
            model = hollow_model(model_folder, dtype)
            self.prefix = f"{model.base_model_prefix}."
            parameters = dict(model.named_parameters(remove_duplicate=False))
            self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            names: dict[int, list[str]] = {}
            for name in sorted(parameters):
                names.setdefault(id(parameters[name]), []).append(name)
            self.ties = {name: names[id(parameter)] for name, parameter in parameters.items()}
            self.saved = {}
            for key in adapter:
                name = re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", key.removeprefix(PREFIX))
                if name in self.shapes:
                    self.saved[name] = key
            self._check_saved_shapes()
            try:
                layers = self._attach(model)
            except CpiftError:
                raise
            except FAILURES as error:
                raise CpiftError(
                    f"{adapter.label} cannot be put on the model of {model_folder}: {one_line(error)}; give the model "
                    f"that it was trained on, or {MERGE_ELSEWHERE}"
                ) from error
            self.targets = []
            for path, layer in layers.items():
                inside = {name: p for name, p in parameters.items() if name.startswith(f"{path}.")}
                self.targets.append(Target(path, layer, inside))
            self._try_out()
        self._check_ties()

    def _attach(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put the adapter on the model; return PEFT's layers by the names of the modules that they stand for."""
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        config = PeftConfig.from_pretrained(str(self._adapter.folder))
        config.inference_mode = True
        config.task_type = None  # the plain PeftModel, which asks nothing more of a model
        if saved := getattr(config, "modules_to_save", None):
            # Saved copies are read from the file when they are wanted; PEFT must only know not to adapt the modules.
            old = getattr(config, "exclude_modules", None) or []
            patterns = [old] if isinstance(old, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in old]
            patterns += [rf"(?:.*\.)?{name}(?:\..*)?" for name in saved]
            config.exclude_modules, config.modules_to_save = "|".join(f"(?:{p})" for p in patterns), None
        wrapped = PeftModel(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False).eval()
        known = set(self.saved.values())
        own = {key: self._adapter[key] for key in self._adapter if key not in known}
        loaded = set_peft_model_state_dict(wrapped, own, low_cpu_mem_usage=True)
        for key in loaded.unexpected_keys:
            raise CpiftError(
                f"tensor '{key}' of {self._adapter.label} fits nothing in the model: give the model that the adapter "
                "was trained on, with the same head"
            )
        for name, parameter in [*wrapped.named_parameters(), *wrapped.named_buffers()]:
            if parameter.is_meta:
                raise CpiftError(
                    f"{self._adapter.label} has no '{name}', which its configuration asks for: save it again"
                )
        layers: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not any(
                path.startswith(f"{outer}.") for outer in layers
            ):
                layers[path] = module
        return layers

    def _try_out(self) -> None:
        """Find out from one small layer of each kind whether it can be merged, what that changes, and how."""
        kinds: dict[tuple, list[Target]] = {}
        for target in self.targets:
            inside = tuple((path, type(module), _flags(module)) for path, module in target.module.named_modules())
            own = tuple(name[len(target.name) :] for name in target.hollow)
            kinds.setdefault((inside, own), []).append(target)
        for alike in kinds.values():
            smallest = min(alike, key=lambda target: sum(p.numel() for p in target.hollow.values()))
            try:
                changed, additive = _behaviour(smallest)
            except FAILURES as error:
                raise CpiftError(
                    f"{self._adapter.label} cannot be merged into '{smallest.name}': {one_line(error)}; "
                    "keep to adapters of a kind that PEFT can merge"
                ) from error
            for target in alike:
                target.changed = frozenset(target.name + name for name in changed)
                target.additive = additive

    def _check_saved_shapes(self) -> None:
        for name, key in self.saved.items():
            if self._adapter.shapes[key] != self.shapes[name]:
                raise CpiftError(
                    f"tensor '{key}' of {self._adapter.label} is {list(self._adapter.shapes[key])}, the model's is "
                    f"{list(self.shapes[name])}: its vocabulary was resized; {MERGE_ELSEWHERE}"
                )

    def _check_ties(self) -> None:
        """Refuse a change of one use of a tied parameter: merged, it would change the other uses too."""
        tokens = {
            name
            for target in self.targets
            if type(target.module).__name__ in ("TrainableTokensLayer", "TrainableTokensWrapper")
            for name in target.changed
        }
        for name in {*self.saved, *(name for target in self.targets for name in target.changed)}:
            names = self.ties[name]
            if len(names) == 1 or tokens.issuperset(names):
                continue
            if not any(set(names) & target.changed for target in self.targets) and self.saved.keys() >= set(names):
                first, *others = (self._adapter[self.saved[name]] for name in names)
                if all(torch.equal(first, other) for other in others):
                    continue
            raise CpiftError(
                f"{self._adapter.label} changes '{name}', which the model ties to "
                f"{' and '.join(other for other in names if other != name)}, so that merging would change both: save "
                "the base with tie_word_embeddings=False and its own copy of the weights, and use that as base"
            )


def hollow_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that `config.json` in `folder` describes, with hollow parameters; CpiftError if it is not known."""
    import transformers
    from accelerate import init_empty_weights

    named = read_json(folder / MODEL_CONFIG).get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    if model_class is None:
        raise CpiftError(
            f"{folder / MODEL_CONFIG} names the architecture {name}, which transformers does not have: adapters "
            f"of custom models cannot be merged here; {MERGE_ELSEWHERE}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = model_class._from_config(config, dtype=torch.float32)
        model.tie_weights()
    except FAILURES as error:
        raise CpiftError(f"cannot build the model of {folder / MODEL_CONFIG}: {one_line(error)}") from error
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    hollow = torch.full((), torch.nan, dtype=dtype).expand(parameter.shape)
                    made[id(parameter)] = nn.Parameter(hollow, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
    return model.eval()


def one_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _check_mergeable(adapter: Checkpoint) -> None:
    """Refuse what the configuration alone shows."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config = adapter.adapter_config
    kind = config.get("peft_type")
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if tuner is None or not hasattr(tuner, "merge_and_unload"):
        raise CpiftError(f"{adapter.label} is a {kind} adapter, which changes no weights: it cannot be merged")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_INITS):
        raise CpiftError(
            f"{adapter.label} was started with init_lora_weights='{start}', which changes the base's weights too: "
            "save it with path_initial_model_for_weight_conversion, which makes an ordinary LoRA adapter of it"
        )


def _flags(module: nn.Module) -> str:
    """The switches of a layer, and of what kinds its settings are: layers of one class may behave differently."""
    found = {}
    for key, value in vars(module).items():
        if isinstance(value, bool):
            found[key] = value
        elif isinstance(value, dict) and not key.startswith("_"):
            found[key] = {name: its if isinstance(its, bool) else type(its).__name__ for name, its in value.items()}
    return repr(sorted(found.items()))


def _behaviour(target: Target) -> tuple[set[str], bool]:
    """What merging changes, as names after the target's own, and whether it adds the same to any base."""
    generator = torch.Generator()

    def fill(parameters: list[nn.Parameter]) -> None:
        generator.manual_seed(1)
        for parameter in parameters:
            parameter.data = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)

    generator.manual_seed(0)
    base = {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in target.hollow.items()}
    if not all(bool(value.isfinite().all()) for value in target.merge(_copies(base)).values()):
        raise ValueError("it has values that are not finite, or that PEFT computes from the base and does not save")
    # Whatever the adapter can change, it does change with random parameters; a trained one may happen not to.
    merged, alone = target.merge(_copies(base), fill), target.merge(_copies(base, 0), fill)
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    additive = all(
        torch.allclose(merged[name] - base[name], alone[name], rtol=1e-3, atol=1e-3 * float(alone[name].abs().max()))
        for name in changed
    )
    return {name[len(target.name) :] for name in changed}, additive


def _copies(tensors: Mapping[str, Tensor], factor: float = 1) -> dict[str, Tensor]:
    return {name: tensor * factor for name, tensor in tensors.items()}


@contextmanager
def _quiet():
    """Hold back the warnings that the user has seen when the adapter was trained, and leave random numbers alone."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield
