"""`PropulsionConfig`: what a user chooses about a Propulsion adapter, checked as soon as it is built."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.card import add_loading_section
from peft_cpift.propulsion.scale import POOLINGS
from peft_cpift.propulsion.targets import MEANINGS

BIASES = ("none", "all", "propulsion_only")
WRITER = "peft_cpift"


@dataclass
class PropulsionConfig(PeftConfig):
    """The configuration of a [`PropulsionModel`].

    Only z is trained, from 1, so the learning rate must be far above that of full fine-tuning, and yet be chosen with
    the degree in view: a step of Adam moves z by about the learning rate and the outputs by about `degree` times that,
    1.5% for 1e-3 at degree 15. After training the paper sees z within 0.98 and 1.02.

    Args:
        target_modules: Which layers to scale. A list matches names or their endings, a string is a regular expression
            for the full name, `"all-linear"` means every linear layer but the output layer. In a known architecture
            (see `targets.py`) `"attention"` and `"all"` are the paper's settings, the query, key and value layers, or
            every linear layer of each block and the embeddings; `"blocks"` is the latter without the embeddings.
            `None` means `"blocks"`, or no layer where `target_parameters` are given.
        exclude_modules: Layers to leave out, a list or a regular expression like `target_modules`.
        target_parameters: Parameters to scale that are no layer of their own, by the endings of their names: tensors
            `(experts, ...)` that hold the experts of a mixture, such as `"mlp.experts.gate_up_proj"`. Each expert has
            a z of its own. The scaled tensor is formed in every forward pass, which costs memory of its size.
        degree: The exponent k of `z**k`, an integer >= 1. The paper uses 15 to 55. At degree 1 a layer keeps its
            unscaled output for the backward pass beside the scaled one; from 2 on the scaled one is enough.
        degree_pattern: Degrees of single layers: name endings or regular expressions for them to integers >= 1.
        num_vectors: Number of vectors m >= 1 a layer has; their powers `z_i**k` are pooled to one scale. All start
            at 1, so that under every pooling they begin with equal gradients and, as long as nothing tells them
            apart, stay equal: start them at random (`init_weights=False`) if they are to differ.
        pooling: How m vectors are pooled, elementwise: `"mean"` (the paper's best), `"max"`, `"min"` or `"l2"` (root
            mean square).
        bias: Whether biases of the base model are trained in its own dtype and saved too: `"none"`, `"all"`, or
            `"propulsion_only"`, those of the scaled layers. Only one adapter of a model may train biases.
        fan_in_fan_out: Whether weights are stored as `(in, out)`. Leave it at `None`: the layer's class tells. A value
            that contradicts the class is corrected with a warning.
        modules_to_save: Modules trained in full and saved beside z, for instance a new classification head.
        layers_to_transform: Index or indices of the blocks to adapt, all by default. Needs `target_modules` to be a
            list, a preset or `None`.
        layers_pattern: Name(s) of the list of blocks that `layers_to_transform` counts in, where it is not obvious.
        trainable_token_indices: Rows of the token embedding that are trained and saved beside z: a list of token
            ids, or a dictionary from the names of embedding layers to such lists.
        init_weights: `True` starts z at exactly 1, so that the adapted model equals the base model bit for bit.
            `False` draws z from [0.98, 1.02].
        written_by: Who wrote a saved configuration. Leave it: it is there so that another package with a method of
            the same name does not take this file for its own, nor this one a file of theirs.

    Raises:
        CpiftError: A `ValueError`: a value is out of range, or would not be honoured, or the file that is read was
            not written by this package.

    Source: section 3 of arXiv 2409.10927; the default degree is the one it uses for language models. `degree_pattern`,
        `target_parameters`, `"blocks"` and the meaning of `"l2"` are ours.

    Example:
        >>> PropulsionConfig(target_modules=["q_proj", "v_proj"], degree=25).degree
        25
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Layers to scale: names, an expression, 'all-linear', 'attention', 'blocks' or 'all'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: names or a regular expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters to scale that hold the experts of a mixture, by name endings."}
    )
    degree: int = field(default=15, metadata={"help": "The exponent k of z**k, an integer >= 1."})
    degree_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Degrees of single layers: name endings or expressions to integers."}
    )
    num_vectors: int = field(default=1, metadata={"help": "Number of vectors a layer has, an integer >= 1."})
    pooling: str = field(
        default="mean", metadata={"help": "How several vectors become one scale: 'mean', 'max', 'min' or 'l2'."}
    )
    bias: str = field(
        default="none", metadata={"help": "Biases that are trained too: 'none', 'all' or 'propulsion_only'."}
    )
    fan_in_fan_out: bool | None = field(
        default=None, metadata={"help": "Whether weights are stored as (in, out); None reads it from the layer."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved beside z."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the blocks to adapt, all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name(s) of the list of blocks that layers_to_transform counts in."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the token embedding that are trained and saved beside z."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True starts z at exactly 1, False at random in [0.98, 1.02]."}
    )
    written_by: str | None = field(default=None, metadata={"help": "Who wrote a saved configuration; leave it."})

    def __post_init__(self) -> None:
        # only a file names PEFT's version; one that does not say who wrote it is another package's
        if self.written_by is None and self.peft_version is None:
            self.written_by = WRITER
        if self.written_by != WRITER:
            raise CpiftError(
                f"this PROPULSION configuration was written by {self.written_by or 'another package'}, not by "
                f"{WRITER}, and may mean something else; load it with the package that wrote it."
            )
        super().__post_init__()
        self.peft_type = PeftType.PROPULSION
        _check_degree("degree", self.degree)
        if not isinstance(self.degree_pattern, dict):
            raise CpiftError(
                f"degree_pattern={self.degree_pattern!r} is not a dictionary of layer names to degrees; write for "
                "instance degree_pattern={'down_proj': 5}."
            )
        for name, degree in self.degree_pattern.items():
            _check_expression("degree_pattern", name)
            _check_degree(f"degree_pattern[{name!r}]", degree)
        if not _is_integer(self.num_vectors) or self.num_vectors < 1:
            raise CpiftError(
                f"num_vectors={self.num_vectors!r} is not an integer >= 1; set for instance num_vectors=1."
            )
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("bias", self.bias, BIASES)
        for name in ("init_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise CpiftError(f"{name}={getattr(self, name)!r} is neither True nor False; choose one of them.")
        if not (self.fan_in_fan_out is None or isinstance(self.fan_in_fan_out, bool)):
            raise CpiftError(
                f"fan_in_fan_out={self.fan_in_fan_out!r} is neither True nor False nor None; leave it at None."
            )
        for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
            self._check_names(name, may_be_expression=name in ("target_modules", "exclude_modules"))
        _check_token_indices(self.trainable_token_indices)
        self._check_blocks()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the configuration as `adapter_config.json`, and beside an adapter's weights add to its model card.

        PEFT saves the configuration last, see `PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(save_directory)

    def _check_names(self, field_name: str, may_be_expression: bool) -> None:
        value = getattr(self, field_name)
        if value is None:
            return
        if isinstance(value, str) and value and may_be_expression:
            _check_expression(field_name, value)
        elif isinstance(value, str) or not (
            isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)
        ):
            what = "a list of names or a regular expression" if may_be_expression else "a list of names"
            raise CpiftError(f"{field_name}={value!r} is not {what}; write for instance {field_name}=['name'].")

    def _check_blocks(self) -> None:
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        if not (patterns is None or (isinstance(patterns, list) and all(isinstance(name, str) for name in patterns))):
            raise CpiftError(
                f"layers_pattern={self.layers_pattern!r} is not a name or a list of names; write for instance "
                "layers_pattern='layers'."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise CpiftError("layers_pattern has no effect without layers_to_transform; set both or neither.")
        if self.layers_to_transform is None:
            return
        # PEFT applies the indices to lists of name endings only
        if isinstance(self.target_modules, str) and self.target_modules not in MEANINGS:
            raise CpiftError(
                f"layers_to_transform has no effect with target_modules={self.target_modules!r}; "
                "give target_modules as a list of names, or write the blocks into the regular expression."
            )
        indices = (
            self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        )
        if not indices or not all(_is_integer(index) and index >= 0 for index in indices):
            raise CpiftError(
                f"layers_to_transform={self.layers_to_transform!r} is not an index >= 0 or a list of them; "
                "leave it at None for all blocks."
            )


def _is_integer(value: object) -> bool:
    # bool is an int in Python, and degree=True is a mistake, not a 1
    return isinstance(value, int) and not isinstance(value, bool)


def _check_degree(name: str, value: object) -> None:
    if not _is_integer(value) or value < 1:
        raise CpiftError(f"{name}={value!r} is not an integer >= 1; set for instance degree=15.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CpiftError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def _check_token_indices(value: object) -> None:
    by_layer = value if isinstance(value, dict) else {"embed_tokens": [] if value is None else value}
    for name, indices in by_layer.items():
        if not isinstance(name, str) or not (
            isinstance(indices, (list, tuple)) and all(_is_integer(index) and index >= 0 for index in indices)
        ):
            raise CpiftError(
                f"trainable_token_indices={value!r} is neither a list of token ids >= 0 nor a dictionary from names "
                "of embedding layers to such lists; write for instance trainable_token_indices=[0, 1]."
            )


def _check_expression(name: str, value: object) -> None:
    try:
        if not value:
            raise TypeError("it is empty")
        re.compile(value)
    except (re.error, TypeError) as error:
        raise CpiftError(f"{name} has {value!r}, which is not a name or regular expression: {error}.") from None
