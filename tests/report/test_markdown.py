"""Strategy: read tables back cell by cell, and put every sign that means something to Markdown into a name."""

from __future__ import annotations

from peft_cpift.report.blocks import Cell, Charts, Folded, Section, Table
from peft_cpift.report.markdown import code, escape, table, to_markdown

TABLE = Table(
    "Caption.", ["model", "score"], [["base", "1"], [Cell("a much longer name", note="x"), Cell("2", strong=True)]]
)


def test_columns_line_up_and_the_best_is_bold():
    lines = table(TABLE).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["model", "score"],
        ["-" * 18, "----:"],
        ["base", "1"],
        ["a much longer name", "**2**"],
    ]


def test_names_cannot_be_markup():
    assert escape("<script>|[x](y)`*\\\n# z") == r"&lt;script&gt;\|\[x\](y)\`\*\\ # z"
    assert escape("code_alpaca _x_ __y__") == r"code_alpaca \_x\_ \_\_y\_\_"


def test_what_plain_text_cannot_show_is_left_out():
    dense = Table("Dense.", ["", "1"], [["a", "2"]], dense=True)
    text = to_markdown("T", [Section("a", "A", [dense, Charts("Curves.", [])]), Section("b", "B", ["Said.", TABLE])])
    assert text.startswith("# T\n\n## B\n\nSaid.\n\nCaption.\n\n| model")
    assert "Dense" not in text
    assert "Curves" not in text


def test_a_fence_is_longer_than_any_in_the_text():
    text = to_markdown("T", [Section("a", "A", [Folded("More", "x: |\n  ````python\n")])])
    assert "<details><summary>More</summary>\n\n`````\nx: |\n  ````python\n`````\n\n</details>" in text


def test_code_holds_any_text_of_one_line():
    assert code("org/tiny|*") == "`org/tiny|*`"
    assert code("a``b\n`") == "``` a``b ` ```"
