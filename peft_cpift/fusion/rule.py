"""The rule by which a tensor is fused: weights, space, conflicts; one for all tensors, or other ones by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from peft_cpift.errors import CpiftError
from peft_cpift.fusion.slerp import LINEAR_ABOVE
from peft_cpift.fusion.transplant import CONFLICTS

SPACES = ("weights", "delta")


@dataclass(frozen=True)
class Rule:
    """How a tensor is fused; the attributes are those of `fuse`.

    Example:
        >>> Rule(weights={"maths": 1.0, "code": 2.0}).omegas(["maths", "code"])
        [0.5, 0.5]
        >>> Rule(start_weight=0.0).omegas(["maths", "code"])
        [1.0, 0.5]
    """

    weights: Mapping[str, float] | None = None
    start_weight: float = 1.0
    omega: float | None = None
    conflict: str = "largest_update"
    space: str = "weights"
    linear_above: float = LINEAR_ABOVE

    def omegas(self, tasks: Iterable[str]) -> list[float]:
        """The factor with which each task is folded in: w_n / (w_0 + ... + w_n), or `omega`."""
        total, omegas = self.start_weight, []
        for task in tasks:
            weight = 1.0 if self.weights is None else self.weights[task]
            total += weight
            omegas.append(weight / total if self.omega is None else self.omega)
        return omegas

    def needs_pretrained(self, claims: int) -> bool:
        """Whether a tensor with coordinates in so many cores needs its values before any training."""
        return self.space == "delta" or (self.conflict == "largest_update" and claims > 1)

    def check(self, tasks: Collection[str]) -> None:
        """Raise CpiftError if a setting is out of range, or the weights are not those of `tasks`."""
        if self.weights is not None:
            if not isinstance(self.weights, Mapping):
                raise CpiftError(f"weights must be given by task, got {self.weights!r}")
            if set(self.weights) != set(tasks):
                raise CpiftError(
                    f"weights are given for {sorted(self.weights)}, but the tasks are {sorted(tasks)}: name the same"
                )
            if self.omega is not None:
                raise CpiftError("weights and omega contradict each other: give one of them")
        for name, weight in (self.weights or {}).items():
            if not _is_number(weight) or not 0 < weight < float("inf"):
                raise CpiftError(f"the weight of '{name}' must be positive, got {weight!r}")
        if not _is_number(self.start_weight) or not 0 <= self.start_weight < float("inf"):
            raise CpiftError(f"start_weight must be at least 0, got {self.start_weight!r}")
        if not math.isfinite(self.start_weight + sum((self.weights or {}).values())):
            raise CpiftError("the weights are too large to be added up: divide all by the same number")
        for key in ("omega", "linear_above"):
            value = getattr(self, key)
            if (key, value) != ("omega", None) and not (_is_number(value) and 0 <= value <= 1):
                raise CpiftError(f"{key} must be in [0, 1], got {value!r}")
        if self.conflict not in CONFLICTS:
            raise CpiftError(f"unknown conflict rule '{self.conflict}': use one of {', '.join(CONFLICTS)}")
        if self.space not in SPACES:
            raise CpiftError(f"unknown space '{self.space}': use one of {', '.join(SPACES)}")


def rules_by_name(
    names: Collection[str], tasks: Collection[str], rule: Rule, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, Rule]:
    """The rule of every tensor: `rule`, changed by the overrides whose patterns match, later ones last.

    Raises:
        CpiftError: a pattern that matches nothing, an unknown setting, or one out of range.

    Example:
        >>> rules = rules_by_name(["embed.weight", "norm.weight"], ["maths"], Rule(), {"embed*": {"omega": 0.25}})
        >>> {name: rule.omegas(["maths"]) for name, rule in rules.items()}
        {'embed.weight': [0.25], 'norm.weight': [0.5]}
    """
    rule.check(tasks)
    rules = dict.fromkeys(names, rule)
    known = [field.name for field in fields(Rule)]
    for pattern, settings in overrides.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise CpiftError(f"no tensor matches the override '{pattern}': the first is called '{min(names)}'")
        if not isinstance(settings, Mapping):
            raise CpiftError(f"override '{pattern}' must give settings by name, got {settings!r}")
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise CpiftError(f"override '{pattern}' sets '{unknown[0]}', which is none of {', '.join(known)}")
        settings = dict(settings)
        # Of weights and omega the one that the override gives takes the other's place.
        if settings.keys() & {"weights", "omega"}:
            settings = {"weights": None, "omega": None} | settings
        for name in matched:
            rules[name] = replace(rules[name], **settings)
            try:
                rules[name].check(tasks)
            except CpiftError as error:
                raise CpiftError(f"override '{pattern}': {error}") from error
    return rules


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
