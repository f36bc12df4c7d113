"""Makes `PROPULSION` a method that stock PEFT knows, as if it stood in `peft.tuners`.

`peft.PeftType` is an enum without a door for newcomers, so a member is added through the enum's own tables; all the
rest is PEFT's public `register_peft_method`.
"""

from __future__ import annotations

from importlib import import_module

from peft import PeftType, mapping
from peft.utils import register_peft_method

_NAME = "PROPULSION"
_OWNER = "peft_cpift"


def register_propulsion() -> None:
    """Register Propulsion with PEFT. Importing `peft_cpift.propulsion` does it; calling it again is harmless.

    A second call, for instance after `importlib.reload`, replaces the registered classes by the present ones.

    Raises:
        RuntimeError: PEFT, or another package, has a PROPULSION of its own; or this Python's enum has changed so
            much that the member could not be added.

    Example:
        >>> import peft
        >>> register_propulsion()
        >>> peft.PeftType("PROPULSION").value
        'PROPULSION'
    """
    member = PeftType.__members__.get(_NAME)
    if member is None:
        member = _add_member(_NAME)
    elif getattr(member, "owner", None) != _OWNER:
        raise RuntimeError(
            "PEFT already has a method PROPULSION that is not peft_cpift's; use that one without importing "
            "peft_cpift, or install a peft release without it."
        )
    for table in (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        table.pop(member, None)
    # looked up now rather than at import, so that reloaded modules are seen
    register_peft_method(
        name=_NAME.lower(),
        config_cls=import_module(".config", __package__).PropulsionConfig,
        model_cls=import_module(".model", __package__).PropulsionModel,
        prefix="propulsion_",
    )


def _add_member(name: str) -> PeftType:
    """Add `name` to `PeftType` with the value `name`, and make sure that every way to look it up finds it."""
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    member.owner = _OWNER
    if hasattr(PeftType, "_add_member_"):  # Python >= 3.13
        PeftType._add_member_(name, member)
    else:
        setattr(PeftType, name, member)
        PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):
        PeftType._hashable_values_.append(name)

    try:
        found = {id(m) for m in (PeftType(name), PeftType[name], getattr(PeftType, name), list(PeftType)[-1])}
    except (ValueError, KeyError, AttributeError):
        found = set()
    if found != {id(member)} or (member.name, member.value, str.__str__(member)) != (name, name, name):
        raise RuntimeError(
            f"could not add {name} to peft.PeftType: this version of Python stores enum members differently; "
            "use a Python version that peft_cpift is tested with."
        )
    return member
