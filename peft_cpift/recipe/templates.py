"""Jinja templates of a recipe: how a row's columns become a prompt and its completion."""

from __future__ import annotations

import math
from typing import Annotated

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, Field


def _present(value: object) -> object:
    if value is None:
        raise ValueError("a column that it uses is null")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("a column that it uses is NaN")
    return value


# A sandbox, for a template has no business with Python's inside; strict, since a misspelt or empty column must not
# become the text "", "None" or "nan".
TEMPLATES = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=_present, keep_trailing_newline=True
)


def _check(text: str) -> str:
    try:
        TEMPLATES.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not a Jinja template: {error.message}") from error
    except (SyntaxError, RecursionError) as error:  # of the Python that Jinja makes of it
        raise ValueError(f"is too deeply nested for a Jinja template: {error}") from error
    if any(True for _ in jinja2.meta.find_referenced_templates(TEMPLATES.parse(text))):
        raise ValueError("takes in another template, which a recipe cannot hold")
    return text


Template = Annotated[str, Field(min_length=1), AfterValidator(_check)]


def variables(template: str) -> set[str]:
    """The names that a template takes from outside."""
    return jinja2.meta.find_undeclared_variables(TEMPLATES.parse(template))
