"""Importance: how much each coordinate mattered to a training, kept from what the optimizer remembers of it."""

from peft_cpift.importance.callback import ImportanceCallback
from peft_cpift.importance.moment import save_importance

__all__ = ["ImportanceCallback", "save_importance"]
