"""Fusion of tasks fine-tuned from one base: core coordinates transplanted, all others interpolated spherically."""

from peft_cpift.fusion.fuse import FusionPlan, fuse
from peft_cpift.fusion.report import FusionReport
from peft_cpift.fusion.rule import Rule
from peft_cpift.fusion.slerp import slerp
from peft_cpift.fusion.transplant import transplant

__all__ = ["FusionPlan", "FusionReport", "Rule", "fuse", "slerp", "transplant"]
