"""PEFT adapters as the weights they stand for, one module at a time."""

from peft_cpift.adapters.lora import check_linear, write_lora
from peft_cpift.adapters.weights import MergedWeights, WeightDeltas, Zeros, find_model, open_deltas

__all__ = ["MergedWeights", "WeightDeltas", "Zeros", "check_linear", "find_model", "open_deltas", "write_lora"]
