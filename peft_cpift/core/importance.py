"""How much each coordinate of a model matters to a task, as given from outside: a file, or tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_cpift.checkpoint.header import read_metadata
from peft_cpift.checkpoint.reader import Source, TensorFile
from peft_cpift.checkpoint.tensors import InMemory, Tensors
from peft_cpift.errors import CpiftError

FILE = "importance.safetensors"
"""The file's name by default."""
FORMAT = "peft_cpift.importance"
FORMAT_VERSION = 1
UPDATE, SECOND_MOMENT, GIVEN = "update", "second_moment", "given"
MEASURES = (UPDATE, SECOND_MOMENT, GIVEN)
"""What a core may be chosen by: |tuned - base| (the paper), the optimizer's second moment, tensors of the user's."""


@dataclass(frozen=True)
class Importance:
    """Non-negative tensors with the names and shapes of those that were trained."""

    tensors: Tensors
    measure: str
    untrained: frozenset[str] = frozenset()
    """Names of tensors that were there and were not trained: frozen parameters, and buffers."""

    def check(self, tuned: Tensors, names: list[str]) -> None:
        """Raise CpiftError, naming the first tensor of `names` whose importance is missing or does not fit."""
        ours = self.tensors
        for name in names:
            if name not in ours:
                if name in tuned and tuned.dtypes[name].is_floating_point and name not in self.untrained:
                    raise CpiftError(
                        f"tensor '{name}' of {tuned.label} is missing in {ours.label}: give that of the same "
                        "training, or exclude it (models that transformers saves under other names, Mixtral and LLaVA "
                        "for two, are not supported)"
                    )
            elif name not in tuned:
                raise CpiftError(
                    f"tensor '{name}' of {ours.label} is missing in {tuned.label}: give that of the same "
                    "training, or exclude it"
                )
            elif ours.shapes[name] != tuned.shapes[name]:
                raise CpiftError(
                    f"tensor '{name}' has shape {list(ours.shapes[name])} in {ours.label} and "
                    f"{list(tuned.shapes[name])} in {tuned.label}: give that of the same training"
                )
            elif not ours.dtypes[name].is_floating_point:
                raise CpiftError(f"tensor '{name}' in {ours.label} is {ours.dtypes[name]}: importance is in floats")


def open_importance(source: Source) -> Importance:
    """Open what `save_importance` wrote, or take tensors by name.

    Raises:
        CpiftError: the file is missing, damaged, or none that `save_importance` wrote.
    """
    if isinstance(source, Mapping):
        return Importance(source if isinstance(source, Tensors) else InMemory(source, "the importance given"), GIVEN)
    file = Path(source)
    if not file.is_file():
        raise CpiftError(f"no importance file {file}: give one that save_importance or ImportanceCallback wrote")
    tensors, metadata = TensorFile(file), read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise CpiftError(f"{file} is no importance file: give one that save_importance or ImportanceCallback wrote")
    if metadata.get("version") != str(FORMAT_VERSION) or metadata.get("measure") != SECOND_MOMENT:
        raise CpiftError(
            f"{file} has version {metadata.get('version')!r} of the importance format and measure "
            f"{metadata.get('measure')!r}, which this package does not read (but {FORMAT_VERSION} and "
            f"'{SECOND_MOMENT}'): upgrade peft-cpift"
        )
    try:
        untrained = json.loads(metadata["untrained"])
        if not isinstance(untrained, list) or not all(isinstance(name, str) for name in untrained):
            raise ValueError("its 'untrained' is no list of names")
    except (KeyError, ValueError, RecursionError) as error:
        raise CpiftError(f"{file} is damaged: {str(error)[:300]}") from error
    return Importance(tensors, SECOND_MOMENT, frozenset(untrained))
