"""Where in a model a tensor lies, by its name, and where the coordinates of a core lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

# Parts of a name that adapters and wrappers put between a module and its parameter.
WRAPPERS = re.compile(r"\d+|lora_.*|base_layer|original_module|modules_to_save|default")


def layer_of(name: str) -> int | None:
    """The number of a tensor's layer: the first integer in its dotted name; None where there is none (ours).

    Example:
        >>> layer_of("model.layers.10.mlp.experts.3.up_proj.weight"), layer_of("lm_head.weight")
        (10, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def module_type(name: str) -> str:
    """The kind of module that a tensor belongs to: the last part of its dotted name before the parameter's (ours).

    What adapters and wrappers put between the two is passed over.

    Example:
        >>> module_type("base_model.model.model.layers.0.self_attn.q_proj.propulsion_z")
        'q_proj'
        >>> module_type("model.embed_tokens.weight"), module_type("layers.1.mlp.up_proj.lora_A.default.weight")
        ('embed_tokens', 'up_proj')
    """
    modules = [part for part in name.split(".")[:-1] if not WRAPPERS.fullmatch(part)]
    return modules[-1] if modules else name


@dataclass(frozen=True)
class Place:
    """One place of the model, as one core sees it."""

    core: int
    """Core coordinates in it."""
    entries: int
    """All coordinates in it."""
    share: float
    """Part of the whole core that lies in it, in [0, 1]; 0 for an empty core."""

    @property
    def density(self) -> float:
        """Part of the place that is core, in [0, 1]."""
        return self.core / self.entries if self.entries else 0.0


def spread(
    core: Mapping[str, int], tensors: Mapping[str, int], place: Callable[[str], Hashable]
) -> dict[Hashable, Place]:
    """How a core is spread over the places of a model.

    Args:
        core: tensor name -> core coordinates in it; tensors without any may be left out.
        tensors: tensor name -> number of its entries.
        place: gives a tensor's place by its name, such as `layer_of`.

    Returns:
        Every place that has a tensor, in the order of its first.

    Example:
        >>> tensors = {"layers.0.q.weight": 8, "layers.0.v.weight": 8, "layers.1.q.weight": 4}
        >>> {at: (p.share, p.density) for at, p in spread({"layers.0.q.weight": 4}, tensors, layer_of).items()}
        {0: (1.0, 0.25), 1: (0.0, 0.0)}
    """
    found: dict[Hashable, list[int]] = {}
    for name, entries in tensors.items():
        counts = found.setdefault(place(name), [0, 0])
        counts[0] += core.get(name, 0)
        counts[1] += entries
    size = sum(core.values())
    return {at: Place(count, entries, count / size if size else 0.0) for at, (count, entries) in found.items()}
