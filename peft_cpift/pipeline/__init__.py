"""The whole method from a recipe: probe, find cores, group, fuse, integrate, evaluate."""
