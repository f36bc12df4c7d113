"""Core isolation: single coordinates of a model held fixed while the rest of it trains."""

from peft_cpift.isolation.callback import CoreIsolationCallback
from peft_cpift.isolation.freeze import FrozenCore, freeze_core

__all__ = ["CoreIsolationCallback", "FrozenCore", "freeze_core"]
