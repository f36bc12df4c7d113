"""Fusion of tasks fine-tuned from one base: core coordinates transplanted, all others interpolated spherically."""

from peft_cpift.fusion.fuse import FusionReport, fuse
from peft_cpift.fusion.slerp import slerp
from peft_cpift.fusion.transplant import transplant

__all__ = ["FusionReport", "fuse", "slerp", "transplant"]
