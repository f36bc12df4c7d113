"""Propulsion tuning and core parameter isolation (CPI-FT) for PEFT and TRL.

Importing this package registers the Propulsion tuner with PEFT: at once if PEFT is imported already, else at the end
of PEFT's own import. The package loads no library itself; each public name loads what it needs when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ConsolidationCallback",
    "CoreIsolationCallback",
    "CoreRegion",
    "CpiftError",
    "FusionReport",
    "ImportanceCallback",
    "NoEffectWarning",
    "PropulsionConfig",
    "PropulsionModel",
    "consolidate",
    "find_core_region",
    "freeze_core",
    "fuse",
    "group_tasks",
    "jaccard_index",
    "jaccard_matrix",
    "merge_baseline",
    "order_groups",
    "save_importance",
    "slerp",
]

_HOMES = {
    "ConsolidationCallback": "consolidation",
    "CoreIsolationCallback": "isolation",
    "CoreRegion": "core",
    "CpiftError": "errors",
    "FusionReport": "fusion",
    "ImportanceCallback": "importance",
    "NoEffectWarning": "errors",
    "PropulsionConfig": "propulsion",
    "PropulsionModel": "propulsion",
    "consolidate": "consolidation",
    "find_core_region": "core",
    "freeze_core": "isolation",
    "fuse": "fusion",
    "group_tasks": "core",
    "jaccard_index": "core",
    "jaccard_matrix": "core",
    "merge_baseline": "baselines",
    "order_groups": "core",
    "save_importance": "importance",
    "slerp": "fusion",
}

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from peft_cpift.baselines import merge_baseline
    from peft_cpift.consolidation import ConsolidationCallback, consolidate
    from peft_cpift.core import (
        CoreRegion,
        find_core_region,
        group_tasks,
        jaccard_index,
        jaccard_matrix,
        order_groups,
    )
    from peft_cpift.errors import CpiftError, NoEffectWarning
    from peft_cpift.fusion import FusionReport, fuse, slerp
    from peft_cpift.importance import ImportanceCallback, save_importance
    from peft_cpift.isolation import CoreIsolationCallback, freeze_core
    from peft_cpift.propulsion import PropulsionConfig, PropulsionModel
else:
    # Type checkers do not see it, or they would accept every misspelled name.
    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        if name == "checkpoint" or name in _HOMES.values():
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _PeftFinder:
    """Finds PEFT as the other finders do, with a loader that registers Propulsion."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another finder that asks all others must not be sent round in circles. The import lock keeps threads apart.
        if name != "peft" or self._asking:
            return None
        self._asking = True
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next(filter(None, specs), None)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:  # a folder without __init__.py has no loader
            spec.loader = _PeftLoader(spec.loader)
        return spec


class _PeftLoader:
    """PEFT's loader in all but one thing: when PEFT has been executed, it registers Propulsion."""

    def __init__(self, loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # A propulsion that is there and not ready will register at its own end. Where another thread imports it, that
        # thread waits for PEFT, so that waiting for it here would be a deadlock.
        if "peft_cpift.propulsion" not in sys.modules:
            import_module("peft_cpift.propulsion")


# The finder of an earlier import or reload does as well: it names what it imports.
if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _PeftFinder())
if sys.modules.get("peft"):
    import_module("peft_cpift.propulsion")
