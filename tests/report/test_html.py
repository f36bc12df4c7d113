"""Strategy: parse the page with the standard library and compare its tables with the sections they came from; put
markup into every name and see that none of it arrives as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from peft_cpift.report.blocks import Folded, Table
from peft_cpift.report.page import _sections, html_page


class Page(HTMLParser):
    """The tags of a page, its tables cell by cell, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1] and self.open():
            self.tables[-1][-1][-1] += data.strip()

    def open(self) -> bool:
        return self.cell

    cell = False

    def parse_starttag(self, i):
        end = super().parse_starttag(i)
        self.cell = self.tags[-1][0] in ("td", "th", "strong", "small", "wbr")
        return end

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")


def test_every_cell_arrives(large_report):
    found = Page(html_page(large_report)).tables
    blocks = [block for section in _sections(large_report) for block in section.blocks]
    expected = [b.content if isinstance(b, Folded) else b for b in blocks]
    expected = [table for table in expected if isinstance(table, Table)]
    assert len(found) == len(expected) > 15
    for rows, table in zip(found, expected, strict=True):
        assert rows[0] == list(table.head)
        assert rows[1:] == [[cell.text + cell.note for cell in row] for row in table.cells()]


def test_nothing_is_loaded_and_nothing_runs(large_report):
    text = html_page(large_report)
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")]
        assert attributes.get("href", "#").startswith("#") or attributes == {"rel": "icon", "href": "data:,"}, tag
    assert not re.search(r"url\(|@import|http:|https:", text)


def test_tables_have_headings_and_drawings_a_label(large_report):
    page = Page(html_page(large_report))
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert drawings
    assert all(a.get("aria-label") or a.get("aria-hidden") == "true" for a in drawings)
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"} == anchors
    assert ("html", {"lang": "en"}) in page.tags


def test_names_cannot_be_markup(report):
    evil = "</td></pre></style><script>alert('x')</script>\"><img src=x onerror=y>"
    text = (
        json.dumps(report).replace("maths", "EVIL").replace("stage 1/2", "EVIL stage").replace("org/tiny", "EVIL org")
    )
    report = json.loads(
        text.replace("multi-task", "EVIL method").replace("q_proj", "EVIL module").replace("torch", "EVIL")
    )
    report["warnings"] = ["EVIL warning"]
    plain = Page(html_page(report))
    hostile = Page(html_page(json.loads(json.dumps(report).replace("EVIL", json.dumps(evil)[1:-1]))))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.text.count(evil) == plain.text.count("EVIL") > 20
