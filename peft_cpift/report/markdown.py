"""Sections as Markdown that also reads well as plain text."""

from __future__ import annotations

import re

from peft_cpift.report.blocks import Block, Charts, Folded, Section, Table


def to_markdown(title: str, sections: list[Section]) -> str:
    """A page of sections under one title. Curves and dense heat maps are left to the HTML page."""
    parts = [f"# {escape(title)}"]
    for section in sections:
        shown = [text for block in section.blocks if (text := _block(block))]
        if shown:
            parts += [f"## {escape(section.title)}"] * bool(section.title) + shown
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Charts):
        return ""
    if isinstance(block, Table):
        if block.dense:
            return ""
        return "\n\n".join([*([escape(block.caption)] if block.caption else []), table(block)])
    if isinstance(block, Folded):
        content = table(block.content) if isinstance(block.content, Table) else _fenced(block.content)
        return f"<details><summary>{escape(block.summary)}</summary>\n\n{content}\n\n</details>"
    return escape(block)


def table(content: Table) -> str:
    """A table with padded columns."""
    body = [
        [f"**{escape(c.text)}**" if c.strong and c.text else escape(c.text) for c in row] for row in content.cells()
    ]
    rows = [[escape(text) for text in content.head], *body]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(content.head))]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])


def escape(text: str) -> str:
    """Plain text as Markdown of one line that shows it.

    Example:
        >>> escape("a|b <c> *d*")
        'a\\\\|b &lt;c&gt; \\\\*d\\\\*'
    """
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
    return re.sub(r"([\\`*|\[\]]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def code(text: str) -> str:
    """Text of one line in the type of code.

    Example:
        >>> print(code("org/tiny"), code("a`b"))
        `org/tiny` `` a`b ``
    """
    text = " ".join(text.split())
    fence = "`" * (_longest(text) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _longest(text: str) -> int:
    """The length of the longest run of backticks."""
    return max((len(run) for run in re.findall("`+", text)), default=0)
