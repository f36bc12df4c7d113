"""Changes of weights as a LoRA adapter, cut down to a low rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_cpift.adapters.skeleton import PREFIX, hollow_model
from peft_cpift.adapters.weights import find_model
from peft_cpift.checkpoint.reader import ADAPTER_WEIGHTS
from peft_cpift.checkpoint.writer import complete_file
from peft_cpift.errors import CpiftError

OVERSAMPLING = 16
POWER_ITERATIONS = 4
SMALL = 512
"""Up to this many rows or columns the full decomposition is as quick."""


def write_lora(
    folder: str | os.PathLike,
    deltas: Iterable[tuple[str, Tensor]],
    rank: int,
    config: Mapping[str, object],
    *,
    base: str | os.PathLike | None = None,
) -> dict[str, float]:
    """Write changes of weights as a LoRA adapter that comes as near to them as its rank allows.

    Args:
        folder: made if need be; its configuration is written last.
        deltas: (name of a weight, its change), of linear layers; taken one at a time.
        rank: of every layer, an integer >= 1; where the smaller side of a weight is less, that.
        config: settings of an adapter of the same model, as saved: the model's name, its revision and the task are
            taken over.
        base: the model's folder, to look at its layers; by default the one that `config` names.

    Returns:
        Name -> the share of the change that is lost, `|D - B A| / |D|` in the Frobenius norm, from 0 to 1.

    Raises:
        CpiftError: the rank is no integer >= 1, a name is not the weight of a linear layer, or a change is not finite
            or of the wrong shape.

    Source: ours.

    Example:
        >>> deltas = WeightDeltas("models/llama", "runs/lora")  # doctest: +SKIP
        >>> write_lora("runs/as_lora", deltas.items(), 8, {}, base="models/llama")  # doctest: +SKIP
    """
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CpiftError(f"rank={rank!r} is no integer >= 1")
    model = hollow_model(find_model(dict(config)) if base is None else Path(base))
    modules = dict(model.named_modules())
    factors, ranks, errors, transposed = {}, {}, {}, False
    for name, delta in deltas:
        path = _linear_layer(name, model.base_model_prefix, modules)
        module = modules[path]
        if delta.shape != module.weight.shape:
            raise CpiftError(
                f"the change of '{name}' is {list(delta.shape)}, the weight {list(module.weight.shape)}: wrong base?"
            )
        if not bool(delta.isfinite().all()):
            raise CpiftError(f"the change of '{name}' has a value that is not finite: the training diverged")
        transposed |= isinstance(module, Conv1D)
        change = delta.float().T if isinstance(module, Conv1D) else delta.float()
        down, up = low_rank(change, rank)
        size, ranks[path] = float(change.norm()), len(down)
        errors[name] = float((change - up @ down).norm()) / size if size else 0.0
        factors |= {f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": up}
    if not factors:
        raise CpiftError("there is no change to write: give at least one")
    lower = {path: its for path, its in ranks.items() if its != rank}
    written = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=lower,
        alpha_pattern=dict(lower),
        target_modules=list(ranks),
        fan_in_fan_out=transposed,
        base_model_name_or_path=config.get("base_model_name_or_path") or (None if base is None else str(base)),
        revision=config.get("revision"),
        task_type=config.get("task_type"),
        inference_mode=True,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with complete_file(folder / ADAPTER_WEIGHTS) as file:
        save_file(factors, file, metadata={"format": "pt"})
    written.save_pretrained(str(folder))
    return errors


def check_linear(names: Iterable[str], base: str | os.PathLike) -> None:
    """Raise CpiftError unless all names are weights of linear layers of the model in the folder `base`."""
    model = hollow_model(Path(base))
    modules = dict(model.named_modules())
    for name in names:
        _linear_layer(name, model.base_model_prefix, modules)


def low_rank(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `(r, in)` and B `(out, r)` whose product is nearest to `change`, `(out, in)`; both of about the same size.

    Example:
        >>> down, up = low_rank(torch.ones(3, 2), 1)
        >>> torch.allclose(up @ down, torch.ones(3, 2))
        True
    """
    smaller = min(change.shape)
    wanted = min(rank, smaller)
    if smaller <= max(SMALL, 2 * (wanted + OVERSAMPLING)):
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        # A full decomposition of a large matrix takes minutes, most of them for values that are thrown away. The
        # randomized one takes seconds, and with four power iterations loses hardly more (tests/test_adapters.py); a
        # change whose rank is at most wanted + OVERSAMPLING it finds exactly. The seed makes results repeatable.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(change, wanted + OVERSAMPLING, POWER_ITERATIONS)
        right = right.T
    root = values[:wanted].sqrt()
    return (root[:, None] * right[:wanted]).contiguous(), (left[:, :wanted] * root).contiguous()


def _linear_layer(name: str, prefix: str, modules: Mapping[str, nn.Module]) -> str:
    """The linear layer whose weight `name` is, also where the checkpoint leaves out, or adds, the model's prefix."""
    from transformers.pytorch_utils import Conv1D

    path, _, kind = name.rpartition(".")
    for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        if kind == "weight" and isinstance(modules.get(candidate), nn.Linear | Conv1D):
            return candidate
    raise CpiftError(f"'{name}' is not the weight of a linear layer, and LoRA of low rank is for those: give no rank")
