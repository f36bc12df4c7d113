"""Propulsion tuning and core parameter isolation (CPI-FT) for PEFT and TRL.

Importing this package registers the Propulsion tuner with PEFT.
"""

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
from peft_cpift.isolation import CoreIsolationCallback, freeze_core
from peft_cpift.propulsion import PropulsionConfig, PropulsionModel

__version__ = "0.1.0"

__all__ = [
    "CoreIsolationCallback",
    "CoreRegion",
    "CpiftError",
    "FusionReport",
    "NoEffectWarning",
    "PropulsionConfig",
    "PropulsionModel",
    "find_core_region",
    "freeze_core",
    "fuse",
    "group_tasks",
    "jaccard_index",
    "jaccard_matrix",
    "order_groups",
    "slerp",
]
