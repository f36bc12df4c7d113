"""`PropulsionConfig`: what a user chooses about a Propulsion adapter, checked as soon as it is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.targets import ATTENTION


@dataclass
class PropulsionConfig(PeftConfig):
    """The configuration of a [`PropulsionModel`].

    Only z is trained, from 1, so the learning rate must be far above that of full fine-tuning, and yet be chosen with
    the degree in view: a step of Adam moves z by about the learning rate and the outputs by about `degree` times that,
    1.5% for 1e-3 at degree 15. After training the paper sees z within 0.98 and 1.02.

    Args:
        target_modules: Which layers to scale. A list matches names or their endings, a string is a regular expression
            for the full name, `"all-linear"` means every linear layer but the output layer, and `"attention"` or
            `None` the query, key and value layers of a known architecture (see `targets.py`).
        exclude_modules: Layers to leave out, a list or a regular expression like `target_modules`.
        degree: The exponent k of `z**k`, an integer >= 1. The paper uses 15 to 55.
        fan_in_fan_out: Whether weights are stored as `(in, out)`. Leave it at `None`: the layer's class tells. A value
            that contradicts the class is corrected with a warning.
        modules_to_save: Modules trained in full and saved beside z, for instance a new classification head.
        layers_to_transform: Index or indices of the blocks to adapt, all by default. Needs `target_modules` to be a
            list, `"attention"` or `None`.
        layers_pattern: Name(s) of the list of blocks that `layers_to_transform` counts in, where it is not obvious.
        init_weights: `True` starts z at exactly 1, so that the adapted model equals the base model bit for bit.
            `False` draws z from [0.98, 1.02], for tests that need to see an effect.

    Raises:
        CpiftError: A `ValueError`: `degree` is not an integer >= 1, or `layers_to_transform` and `layers_pattern`
            would not be honoured.

    Source: section 3 of arXiv 2409.10927; the default degree is the one it uses for language models.

    Example:
        >>> PropulsionConfig(target_modules=["q_proj", "v_proj"], degree=25).degree
        25
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to scale: names, a regular expression, 'all-linear' or 'attention'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: names or a regular expression."}
    )
    degree: int = field(default=15, metadata={"help": "The exponent k of z**k, an integer >= 1."})
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
    init_weights: bool = field(
        default=True, metadata={"help": "True starts z at exactly 1, False at random in [0.98, 1.02]."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROPULSION
        # bool is an int in Python, and degree=True is a mistake, not a 1
        if isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 1:
            raise CpiftError(f"degree={self.degree!r} is not an integer >= 1; set for instance degree=15.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise CpiftError("layers_pattern has no effect without layers_to_transform; set both or neither.")
        # PEFT applies the indices to lists of name endings only
        if (
            self.layers_to_transform is not None
            and isinstance(self.target_modules, str)
            and self.target_modules != ATTENTION
        ):
            raise CpiftError(
                f"layers_to_transform has no effect with target_modules={self.target_modules!r}; "
                "give target_modules as a list of names, or write the blocks into the regular expression."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
