"""The recipe of a run: what there is to say in it, how it is read, and what its keys mean."""
