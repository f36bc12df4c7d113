"""What a fusion did, tensor by tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class TensorFusion:
    """How one tensor was fused."""

    angles: list[float | None] = field(default_factory=list)
    """Per task, the angle in radians of the interpolation; None where it is undefined (a zero vector)."""
    linear: list[bool] = field(default_factory=list)
    """Per task, whether it was folded in linearly instead of along the sphere."""
    core: int = 0
    """Coordinates that were transplanted."""
    conflicts: int = 0
    """Coordinates that are in more than one core."""


@dataclass
class FusionReport:
    """How every tensor was fused, by name."""

    tensors: dict[str, TensorFusion]
    errors: dict[str, float] | None = None
    """Where the result is a LoRA adapter: by weight, |difference| / |change| of its change from the fused one."""

    @property
    def folds(self) -> int:
        """Interpolations made: tensors with coordinates outside all cores, times tasks."""
        return sum(len(tensor.angles) for tensor in self.tensors.values())

    @property
    def linear_folds(self) -> int:
        """Interpolations among them that fell back to linear."""
        return sum(sum(tensor.linear) for tensor in self.tensors.values())

    @property
    def core(self) -> int:
        """Coordinates transplanted, over all tensors."""
        return sum(tensor.core for tensor in self.tensors.values())

    @property
    def conflicts(self) -> int:
        """Coordinates in more than one core, over all tensors."""
        return sum(tensor.conflicts for tensor in self.tensors.values())

    def to_dict(self) -> dict:
        """The totals and the tensors, ready for JSON."""
        totals = {key: getattr(self, key) for key in ("folds", "linear_folds", "core", "conflicts")}
        errors = {} if self.errors is None else {"errors": self.errors}
        return {**totals, **errors, "tensors": {name: asdict(self.tensors[name]) for name in sorted(self.tensors)}}
