"""Strategy: render values as rows of JSON, CSV and Parquet have them, and those that stand for nothing."""

from __future__ import annotations

import jinja2
import numpy as np
import pytest

from peft_cpift.recipe.templates import TEMPLATES, variables


@pytest.mark.parametrize(
    ("value", "text"),
    [("", ""), ("nan", "nan"), ("None", "None"), (0, "0"), (0.0, "0.0"), (-1.5, "-1.5"), (False, "False"), ([], "[]")],
)
def test_values_become_text(value, text):
    assert TEMPLATES.from_string("<{{ a }}>\n").render(a=value) == f"<{text}>\n"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a column that it uses is null"),
        (float("nan"), "a column that it uses is NaN"),
        (-float("nan"), "a column that it uses is NaN"),
        (np.float64("nan"), "a column that it uses is NaN"),
    ],
)
def test_a_value_that_is_none_is_refused_where_it_would_be_written(value, message):
    for template in ("{{ a }}", "{{ b }}{{ a }}", "{% if b %}{{ a }}{% endif %}"):
        with pytest.raises(ValueError, match=message):
            TEMPLATES.from_string(template).render(a=value, b=1)
    assert TEMPLATES.from_string("{{ b if a is none or a != a else a }}").render(a=value, b=1) == "1"


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(jinja2.UndefinedError, match="'a' is undefined"):
        TEMPLATES.from_string("{{ a }}").render(b=1)


def test_names_that_a_template_takes():
    assert variables("{{ a }}{% set c = b %}{{ c }}{% for d in e %}{{ d }}{% endfor %}") == {"a", "b", "e"}
