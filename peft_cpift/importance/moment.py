"""The optimizer's second moment, written as a file from which a core region can be found.

Adam and its kin keep, as `exp_avg_sq`, a running mean v of every coordinate's squared gradient, v = beta2 * v +
(1 - beta2) * g**2, so that a measure of what mattered is there without a single further pass. Its root is the RMS
gradient over about the last 1 / (1 - beta2) steps, up to a factor that is the same for all coordinates as long as v
still grows from its zero. The factor is left in: taken out, a coordinate that got few gradients would rank above its
worth. The gradients are those that the optimizer gets: of batches, not of rows, and clipped. The optimizer skips a
parameter that a batch gave no gradient at all (None, not zeros): its v stays as it was.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_cpift.checkpoint import write_tensors
from peft_cpift.checkpoint.tensors import kept_name
from peft_cpift.core.importance import FILE, FORMAT, FORMAT_VERSION
from peft_cpift.errors import CpiftError
from peft_cpift.isolation.engines import Whole, locate_parameter, reduce_, stepping_optimizer
from peft_cpift.isolation.names import saved_tensors

# Half the size of a float32 model, and enough to rank by: two values closer than 0.8% may come out equal, which the
# tie rule of the search decides. The root keeps it safe: float32's smallest square, 1e-45, has the root 4e-23, far
# above bfloat16's smallest normal number, 1e-38, so that nothing small becomes zero.
DTYPE = torch.bfloat16
CURE = "train with optim='adamw_torch', or find the core by importance 'update'"


def save_importance(model: nn.Module, optimizer: object, file: str | os.PathLike) -> None:
    """Write how much each trainable coordinate mattered lately: the root of the optimizer's second moment.

    The file is safetensors, with a tensor for every trainable parameter, under the name that it has in a checkpoint
    (tied ones once; for a PEFT model those of its active adapter): its RMS gradient over about the last
    1 / (1 - beta2) steps, in bfloat16, >= 0, up to a factor common to all. 0 is for coordinates without a gradient:
    parameters that no batch reached, and what is frozen by `freeze_core`. `find_core_region(..., importance=file)`
    takes it, with the model as it was saved after this training; that the two belong together is for the caller to
    see to, since all trainings of a model have the same names and shapes. The file appears under its name when it is
    complete, and replaces what was there.

    Args:
        model: a model in memory, wrapped by PEFT, `torch.compile`, DistributedDataParallel or DeepSpeed or not, or
            sharded by FSDP2. All processes of a distributed training call this together; the main one writes.
        optimizer: the one that trains it, or accelerate's or DeepSpeed's wrapper of it: AdamW, or another that keeps
            `exp_avg_sq` for each coordinate, as plain floating-point numbers, with one beta2 in `betas` of all its
            groups, and whose weight decay is no part of the gradient.
        file: where to; its folder is made if need be.

    Raises:
        CpiftError: the optimizer keeps no such state (SGD, Adafactor, Lion, Muon, bitsandbytes), has made no step
            yet, leaves a trainable parameter out, mixes beta2, or adds weight decay to the gradient (Adam); or its
            engine is not supported. Raised by all processes.
        OSError: the file cannot be written.

    Warns:
        UserWarning: the moment is in half precision, where it hardly decays and small gradients are lost, because the
            model is: hold it in float32 and train with `bf16=True`. Or it is not finite: the training diverged.

    Source: ours; the second moment is Adam's (arXiv 1412.6980).

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.75))
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> optimizer.step()
        >>> save_importance(model, optimizer, f"{tempfile.gettempdir()}/importance.safetensors")
        >>> from safetensors.torch import load_file
        >>> load_file(f"{tempfile.gettempdir()}/importance.safetensors")["weight"].tolist()
        [[1.5, 2.0]]
    """
    places, untrained = _places(model)
    stepping = _stepping(optimizer)
    moments = _moments(places, stepping)
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "measure": "second_moment",
        "optimizer": type(stepping).__name__,
        "beta2": json.dumps(float(stepping.param_groups[0]["betas"][1])),
        "untrained": json.dumps(untrained),
    }
    # In the order in which `write_tensors` asks for tensors of one dtype; a tensor at a time is whole in memory.
    roots = ((name, place.gather(_root(place, moments[name]))) for name, place in sorted(places.items()))
    file, failure, broken = Path(file), None, []

    def whole(wanted: str) -> list[Tensor]:
        name, root = next(roots)
        assert name == wanted
        if not root.isfinite().all():
            broken.append(name)
        return [root.cpu()]

    if not dist.is_initialized() or dist.get_rank() == 0:
        layout = {name: (place.shape, DTYPE) for name, place in places.items()}
        try:
            write_tensors(
                file.parent,
                layout,
                whole,
                file.name,
                max_shard_bytes=None,
                metadata=metadata,
            )
        except OSError as error:  # a full disk; the others are told below, once they are through
            failure = error
    for _ in roots:  # what is gathered is gathered by all, whoever writes it
        pass
    failed = reduce_(torch.tensor(int(failure is not None), device=_device(places)), "max")
    if failure is not None:
        raise failure
    if failed:
        raise CpiftError(_told(file))
    if broken:
        warnings.warn(
            f"the second moment of {len(broken)} tensors is not finite, first '{broken[0]}': the training diverged, "
            f"and no core can be found by {file}",
            UserWarning,
            stacklevel=2,
        )


def check_second_moment(model: nn.Module, optimizer: object) -> None:
    """Raise CpiftError, on all processes, if `save_importance` could not write what the optimizer has now."""
    places, _ = _places(model)
    moments = _moments(places, _stepping(optimizer))
    half = next((m.dtype for m in moments.values() if m is not None and m.dtype.itemsize < 4), None)
    if half is not None:
        warnings.warn(
            f"the optimizer keeps its second moment in {half}, as the model's parameters are, where it hardly decays "
            "and small gradients are lost: for a true importance hold the model in float32, and train with bf16=True",
            UserWarning,
            stacklevel=2,
        )


def check_place(file: Path, device: torch.device) -> None:
    """Make the folder of a file, and raise CpiftError, on all processes, if the file could not be written there.

    The main process is the one that looks; `device` is where processes may talk of it.
    """
    trouble = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            trouble = f"{file} cannot be written, {error.strerror}: give the importance another place"
        else:
            if file.is_dir():
                trouble = f"{file} is a folder: name a file for the importance, such as {file / FILE}"
            elif not os.access(file.parent, os.W_OK):
                trouble = f"{file} cannot be written, no permission: give the importance another place"
    failed = reduce_(torch.tensor(int(trouble is not None), device=device), "max")
    if failed:
        raise CpiftError(trouble or _told(file))


def _told(file: Path) -> str:
    return f"the main process could not write {file}: see what it says"


def _places(model: nn.Module) -> tuple[dict[str, Whole], list[str]]:
    """The trainable parameters by their names in a checkpoint, and the names of whatever else one may hold."""
    tensors = saved_tensors(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            names.setdefault(id(tensor), []).append(name)
    if not names:
        raise CpiftError("the model has no trainable parameter: there is no importance to save")
    kept = [kept_name(tied) for tied in names.values()]
    may_hold = tensors | saved_tensors(model, embeddings=True)
    untrained = sorted(name for name, tensor in may_hold.items() if not tensor.requires_grad)
    return {name: locate_parameter(name, tensors[name]) for name in kept}, untrained


def _stepping(optimizer: object) -> torch.optim.Optimizer:
    try:
        return stepping_optimizer(optimizer)
    except CpiftError as error:
        raise CpiftError(f"no importance can be saved where no core can be frozen: {error}") from error


def _moments(places: dict[str, Whole], optimizer: torch.optim.Optimizer) -> dict[str, Tensor | None]:
    """`exp_avg_sq` by name, at the positions that this process stores; None where there is no state yet."""
    kind = f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, place in places.items():
        if not place.has_master_copy and id(place.parameter) not in trained:
            raise CpiftError(
                f"parameter '{name}' is trainable, and {kind} does not train it: give the optimizer all that trains, "
                "or set its requires_grad to False"
            )
    decays = all(len(group.get("betas", ())) == 2 for group in optimizer.param_groups)
    if decays and len({float(group["betas"][1]) for group in optimizer.param_groups}) > 1:
        raise CpiftError(
            f"{kind} has parameter groups with different beta2, whose second moments cannot be compared: give all one"
        )
    # torch's Adam, NAdam and RAdam, unless they say otherwise
    coupled = (
        group["weight_decay"] for group in optimizer.param_groups if not group.get("decoupled_weight_decay", True)
    )
    if any(coupled):
        raise CpiftError(
            f"{kind} adds weight decay to the gradient, so that its second moment is of the weights as well: use AdamW"
        )
    moments, unfit, known = {}, 0, False
    for number, (name, place) in enumerate(places.items(), 1):
        state, stored = place.state(optimizer), place.stored()
        moment = state.get("exp_avg_sq") if decays else None
        fits = type(moment) is Tensor and moment.shape == stored.shape and moment.is_floating_point()
        if state and not fits:
            unfit = unfit or number
        known = known or fits
        moments[name] = moment if fits else None
    # Of a parameter that DeepSpeed has cut up, some processes have no state: what one of them misses, all are told.
    unfit, known = reduce_(torch.tensor([unfit, int(known)], device=_device(places)), "max").tolist()
    if unfit:
        name = list(places)[unfit - 1]
        raise CpiftError(f"{kind} keeps no second moment of each coordinate of '{name}' (exp_avg_sq): {CURE}")
    if not known:
        raise CpiftError(
            f"{kind} has no second moment (exp_avg_sq), because it keeps none or has made no step yet: {CURE}"
        )
    return moments


def _root(place: Whole, moment: Tensor | None) -> Tensor:
    if moment is None:
        return torch.zeros_like(place.stored(), dtype=DTYPE)
    root = moment.to(torch.promote_types(moment.dtype, torch.float32)).sqrt()
    if root.dtype == torch.float64:  # whose smallest numbers bfloat16 has not
        root = torch.where(root > 0, root.clamp_min(torch.finfo(DTYPE).tiny), root)
    return root.to(DTYPE)


def _device(places: dict[str, Whole]) -> torch.device:
    return next(iter(places.values())).parameter.device
