"""Strategy: small rows and columns, looked at number by number."""

from __future__ import annotations

from peft_cpift.report.blocks import Cell, Table, mark_best, shaded


def marked(rows) -> list[list[bool]]:
    return [[cell.strong for cell in row] for row in rows]


def test_shades_go_from_nothing_to_the_largest():
    assert [cell.shade for cell in shaded("abc", [0.0, 1.0, None])] == [0.0, 1.0, None]
    assert [cell.shade for cell in shaded("ab", [1.0, 9.0], largest=4.0)] == [0.25, 1.0]
    assert [cell.shade for cell in shaded("ab", [0.0, 0.0])] == [0.0, 0.0]


def test_best_is_among_those_compared_and_may_be_shared():
    rows = [[Cell("9"), Cell("1.00")], [Cell("3"), Cell("2.00")], [Cell("4"), Cell("2.00")], [Cell("1"), Cell("1.50")]]
    mark_best(rows, [1, 2, 3], [0, 1])
    assert marked(rows) == [[False, False], [False, True], [True, True], [False, False]]


def test_nothing_is_best_alone_or_where_all_are_equal():
    rows = [[Cell("1")], [Cell("1")]]
    mark_best(rows, [0], [0])
    mark_best(rows, [0, 1], [0])
    assert marked(rows) == [[False], [False]]


def test_strings_are_cells():
    assert Table("", ["a"], [["x", Cell("y")]]).cells() == [[Cell("x"), Cell("y")]]
