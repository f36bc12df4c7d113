"""The weights of a model with an adapter merged in, and what an adapter adds to them, read part by part."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from peft_cpift.adapters.skeleton import MERGE_ELSEWHERE, Skeleton, Target
from peft_cpift.checkpoint.reader import (
    ADAPTER_WEIGHTS,
    MODEL_CONFIG,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    Checkpoint,
    read_json,
)
from peft_cpift.checkpoint.tensors import Tensors
from peft_cpift.errors import CpiftError

UNRELATED = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}
"""Settings of an adapter that do not change what its tensors mean."""


class _Adapted(Tensors):
    """What an adapter makes of a model's tensors, for one module at a time; the last one is kept."""

    def __init__(self, base: str | os.PathLike, adapter: str | os.PathLike, *, need_weights: bool):
        folder = Path(base)
        self._adapter = _open_adapter(adapter)
        if (folder / ADAPTER_WEIGHTS).is_file():
            raise CpiftError(f"{folder} is an adapter itself: give the folder of the model that it is for as base")
        with_weights = need_weights or any((folder / file).is_file() for file in (MODEL_INDEX, MODEL_WEIGHTS))
        self._base = Checkpoint(folder) if with_weights else None
        if read_json(folder / MODEL_CONFIG).get("quantization_config"):
            raise CpiftError(
                f"{folder} is quantized (its {MODEL_CONFIG} has a quantization_config), and adapters are "
                "not merged into such weights: dequantize the model and save it again"
            )
        double = self._base is not None and torch.float64 in self._base.dtypes.values()
        self._dtype = torch.float64 if double else torch.float32
        self._skeleton = Skeleton(folder, self._adapter, self._dtype)
        self.label = f"{folder} with {self._adapter.label}"
        self._targets: dict[str, Target] = {}
        for target in self._skeleton.targets:
            stored = {self._stored(name): name in target.changed for name in target.hollow}
            for name in (name for name, changed in stored.items() if changed):
                self._targets.setdefault(name, target)
        self._saved = {self._stored(name): key for name, key in self._skeleton.saved.items()}
        self._lock = threading.Lock()
        self._last: dict[str, Tensor] = {}

    @override
    def part(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._targets:
            return self._plain_part(name, start, stop)
        with self._lock:
            if name not in self._last:
                self._last = {}  # two modules are never held at once
                merged = self._merge(self._targets[name])
                self._last = {self._stored(live): value.reshape(-1) for live, value in merged.items()}
            last = self._last[name]
        return last[start:stop].clone()

    @property
    @override
    def peak_bytes(self) -> int:
        # The weight, PEFT's copies of it, and the result.
        return 4 * max(map(self.bytes, self._targets or self.shapes))

    @cached_property
    @override
    def digest(self) -> str:
        """A SHA-256 of the base's and the adapter's digests and the adapter's settings; nothing is merged for it."""
        config = {key: value for key, value in self._adapter.adapter_config.items() if key not in UNRELATED}
        # PEFT saves its sets in any order.
        config = {key: sorted(v, key=str) if isinstance(v, list) else v for key, v in config.items()}
        content = [type(self).__name__, self._base.digest if self._uses_base else None, self._adapter.digest, config]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def _uses_base(self) -> bool:
        return True

    def _plain_part(self, name: str, start: int, stop: int) -> Tensor:
        """A part of a tensor that no layer of the adapter changes."""
        raise NotImplementedError

    def _merge(self, target: Target) -> dict[str, Tensor]:
        """What becomes of the changed parameters of a module, by their names in the model."""
        raise NotImplementedError

    def _values(self, target: Target) -> dict[str, Tensor]:
        """The values of a module's parameters before the adapter's layer is merged."""
        values = {}
        for name in target.hollow:
            key = self._skeleton.saved.get(name)
            value = self._base[self._stored(name)] if key is None else self._adapter[key]
            values[name] = value.to(self._dtype)
        return values

    def _stored(self, name: str) -> str:
        """What the base's checkpoint calls a parameter of the model."""
        ties, prefix = self._skeleton.ties[name], self._skeleton.prefix
        if self._base is None:
            return ties[0]
        for tied in ties:
            for stored in (tied, tied.removeprefix(prefix), prefix + tied):
                if self._base.shapes.get(stored) == self._skeleton.shapes[name]:
                    return stored
        raise CpiftError(
            f"{self._adapter.label} is for '{name}' of shape {list(self._skeleton.shapes[name])}, which "
            f"{self._base.label} has not, or saved under another name or in another form: {MERGE_ELSEWHERE}"
        )


class MergedWeights(_Adapted):
    """The weights of a model with an adapter merged in, named as in the model's checkpoint.

    Tensors that the adapter leaves alone are the model's own, to the bit. The others are merged by PEFT in float32, or
    in float64 if a tensor of the model is, and never rounded to the model's dtype. One module is in memory at a time,
    besides the adapter's own layers (ours).

    Args:
        base: the model's folder.
        adapter: the adapter's folder. Any method of PEFT that can be merged, with trained biases, saved modules and
            trained tokens.

    Attributes:
        changed: the names of the tensors that are not the model's own.

    Raises:
        CpiftError: the adapter is not for this model or cannot be merged exactly; raised before anything is merged.

    Example:
        >>> MergedWeights("models/llama", "runs/lora")["lm_head.weight"]  # doctest: +SKIP
    """

    def __init__(self, base: str | os.PathLike, adapter: str | os.PathLike):
        super().__init__(base, adapter, need_weights=True)
        self.shapes = dict(self._base.shapes)
        self.changed = {*self._targets, *self._saved}
        self.dtypes = {name: self._dtype if name in self.changed else self._base.dtypes[name] for name in self.shapes}

    @property
    @override
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        return self._base.dtypes

    @override
    def _plain_part(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._saved:
            return self._adapter.part(self._saved[name], start, stop).to(self._dtype)
        return self._base.part(name, start, stop)

    @override
    def _merge(self, target: Target) -> dict[str, Tensor]:
        merged = target.merge(self._values(target))
        return {name: merged[name] for name in target.changed}


class WeightDeltas(_Adapted):
    """What an adapter adds to the weights of a model, for the tensors that it changes, named as in the checkpoint.

    Where a method adds the same to any weight, as LoRA does, that is what is given, not the rounded difference of two
    large numbers, and of the model only `config.json` is needed. Elsewhere, as for DoRA, Propulsion, trained biases
    and saved modules, it is the merged weights minus the model's (ours).

    Args, Raises: as for `MergedWeights`; also CpiftError if the model's weights are needed and not there.

    Example:
        >>> WeightDeltas("models/llama", "runs/lora").shapes  # doctest: +SKIP
    """

    def __init__(self, base: str | os.PathLike, adapter: str | os.PathLike):
        super().__init__(base, adapter, need_weights=False)
        if self._base is None:
            # An adapted embedding is saved with its frozen weights.
            self._saved = {
                name: key
                for name, key in self._saved.items()
                if name not in self._targets or not key.endswith(".base_layer.weight")
            }
            if self._uses_base:
                kind = self._adapter.adapter_config.get("peft_type")
                what = f"tensor '{next(iter(self._saved.values()))}'" if self._saved else f"{kind} adapter"
                raise CpiftError(
                    f"the change by the {what} of {self._adapter.label} depends on the model's weights, and "
                    f"{Path(base)} has none in safetensors: give a folder with the weights"
                )
        changed = sorted({*self._targets, *self._saved})
        live = {self._stored(name): name for name in self._skeleton.shapes}
        self.shapes = {name: self._skeleton.shapes[live[name]] for name in changed}
        self.dtypes = dict.fromkeys(changed, self._dtype)

    @property
    @override
    def _uses_base(self) -> bool:
        return bool(self._saved) or not all(target.additive for target in self._targets.values())

    @override
    def _plain_part(self, name: str, start: int, stop: int) -> Tensor:
        after, before = self._adapter.part(self._saved[name], start, stop), self._base.part(name, start, stop)
        return after.to(self._dtype) - before.to(self._dtype)

    @override
    def _merge(self, target: Target) -> dict[str, Tensor]:
        if target.additive:
            zeros = {name: torch.zeros(p.shape, dtype=self._dtype) for name, p in target.hollow.items()}
            deltas = target.merge(zeros)
        else:
            deltas = target.merge(self._values(target))
        deltas = {name: deltas[name] for name in target.changed}
        for name, delta in deltas.items():
            stored = self._stored(name)
            if not target.additive:
                delta -= self._base[stored].to(self._dtype)
            elif stored in self._saved:
                delta += self._adapter[self._saved[stored]].to(self._dtype) - self._base[stored].to(self._dtype)
        return deltas


class Zeros(Tensors):
    """Tensors of zeros that take no memory.

    Example:
        >>> Zeros({"w": (3,)}, {"w": torch.float32})["w"].tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]):
        self.shapes, self.dtypes, self.label = dict(shapes), dict(dtypes), "no change"

    @override
    def part(self, name: str, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, dtype=self.dtypes[name])


def open_deltas(tuned: str | os.PathLike, base: str | os.PathLike | None = None) -> tuple[Tensors, Tensors]:
    """What an adapter adds to a model's weights after training, and before it.

    Args:
        tuned: the adapter's folder.
        base: the model's folder, by default the one that the adapter names, which may be a Hub name if it is in the
            local cache; nothing is fetched. Or the adapter's folder as it was before training, if it did not start
            with a change of zero.

    Raises:
        CpiftError: `tuned` is no adapter, the model is not found, or as for `WeightDeltas`.

    Example:
        >>> after, before = open_deltas("runs/lora")  # doctest: +SKIP
    """
    for side, source in (("tuned", tuned), ("base", base)):
        if not isinstance(source, str | os.PathLike) and source is not None:
            raise CpiftError(f"{side} is a {type(source).__name__}: deltas are those of an adapter's folder")
    adapter = _open_adapter(tuned)
    if base is not None and (Path(base) / ADAPTER_WEIGHTS).is_file():
        model = find_model(adapter.adapter_config)
        return WeightDeltas(model, tuned), WeightDeltas(model, base)
    if not _starts_at_zero(adapter.adapter_config):
        raise CpiftError(
            f"{adapter.label} did not start at a change of zero (by its configuration): give the adapter as it "
            "was before training as base"
        )
    after = WeightDeltas(find_model(adapter.adapter_config) if base is None else base, tuned)
    return after, Zeros(after.shapes, after.dtypes)


def find_model(adapter_config: dict) -> Path:
    """The local folder of the model that an adapter names; CpiftError if there is none."""
    name = adapter_config.get("base_model_name_or_path")
    if name and Path(name).is_dir():
        return Path(name)
    if name:
        import huggingface_hub

        try:
            file = huggingface_hub.try_to_load_from_cache(name, MODEL_CONFIG, revision=adapter_config.get("revision"))
        except ValueError:  # no name of a repository, but a path that does not exist
            file = None
        if isinstance(file, str):
            return Path(file).parent
    raise CpiftError(
        f"the adapter's model, base_model_name_or_path={name!r}, is neither a folder nor in the Hub's local cache: "
        "give the model's folder as base"
    )


def _starts_at_zero(config: dict) -> bool:
    """Whether an untrained adapter changes nothing (tests/test_adapters.py tries every method)."""
    if config.get("peft_type") == "C3A":
        return config.get("init_weights") is True
    if config.get("kasa_config"):
        return False
    random = any(key.startswith("init_") and value is False for key, value in config.items())
    return not random and config.get("peft_type") not in {"UNILORA", "VBLORA"}


def _open_adapter(folder: str | os.PathLike) -> Checkpoint:
    adapter = Checkpoint(folder)
    if not adapter.is_adapter:
        raise CpiftError(f"{adapter.label} is a whole model, not an adapter: give a folder with {ADAPTER_WEIGHTS}")
    return adapter
