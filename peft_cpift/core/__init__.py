"""Core regions: the coordinates that matter most to a task, how those of tasks overlap, and the order to train in."""

from peft_cpift.core.order import measured_helps, order_groups
from peft_cpift.core.overlap import Overlap, group_tasks, jaccard_index, jaccard_matrix, measure_overlap
from peft_cpift.core.region import CoreRegion, load_regions
from peft_cpift.core.search import CoreSearch, find_core_region

__all__ = [
    "CoreRegion",
    "CoreSearch",
    "Overlap",
    "find_core_region",
    "group_tasks",
    "jaccard_index",
    "jaccard_matrix",
    "load_regions",
    "measure_overlap",
    "measured_helps",
    "order_groups",
]
