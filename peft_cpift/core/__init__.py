"""Core regions: which coordinates a task moved most, how the regions of tasks overlap, and in which order to train."""

from peft_cpift.core.order import order_groups
from peft_cpift.core.overlap import group_tasks, jaccard_index, jaccard_matrix
from peft_cpift.core.region import CoreRegion, find_core_region, load_regions

__all__ = [
    "CoreRegion",
    "find_core_region",
    "group_tasks",
    "jaccard_index",
    "jaccard_matrix",
    "load_regions",
    "order_groups",
]
