"""Consolidation: all coordinates of a model pulled back to where they were, the harder the more they mattered."""

from peft_cpift.consolidation.callback import ConsolidationCallback
from peft_cpift.consolidation.pull import Consolidation, consolidate

__all__ = ["Consolidation", "ConsolidationCallback", "consolidate"]
