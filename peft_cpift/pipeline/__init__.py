"""The whole method from a recipe: probe, find cores, group, fuse, integrate, evaluate."""

from peft_cpift.pipeline.reading import read_recipe
from peft_cpift.pipeline.recipe import Recipe
from peft_cpift.pipeline.run import run

__all__ = ["Recipe", "read_recipe", "run"]
