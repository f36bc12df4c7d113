"""Sections as one self-contained HTML page: style inside, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from peft_cpift.report.blocks import Block, Charts, Folded, Section, Table


def to_html(
    title: str,
    sections: Sequence[Section],
    *,
    facts: Sequence[tuple[str, str]] = (),
    figures: Sequence[tuple[str, str, str]] = (),
    lead: str = "",
) -> str:
    """A page of sections under one title.

    Args:
        facts: pairs of a name and a value, shown in one line below the title.
        figures: the numbers that count: a name, a number and further words each.
        lead: a paragraph before the sections.
    """
    # Everything is escaped but the drawings, which chart.py makes as markup.
    environment = Environment(
        loader=PackageLoader("peft_cpift.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["kind"] = _kind
    template = environment.get_template("index.html.jinja")
    return template.render(title=title, sections=sections, facts=facts, figures=figures, lead=lead)


def _kind(block: Block) -> str:
    kinds = {Table: "table", Charts: "charts", Folded: "folded", str: "text"}
    return kinds[type(block)]
