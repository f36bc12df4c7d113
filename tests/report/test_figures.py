"""Strategy: draw the picture of an imagined run and read the numbers, names and group frames back from its axes."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from peft_cpift.report import figures

REPORT = {
    "recipe": {"core": {"percent": 1.0}},
    "cores": {"a": {}, "b": {}, "c": {}},
    "jaccard": [[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]],
    "groups": [["c"], ["a", "b"]],
    "models": [
        {"name": name, "average": 10 * score, "scores": {task: {"score": score} for task in "abc"}}
        for name, score in (("base", 0.1), ("final", 0.2))
    ],
}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_heat_map_is_in_the_order_trained_with_each_group_framed():
    axes = Figure().subplots()
    figures._overlap(axes, REPORT)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a", "b"]
    assert texts(axes) == ["1.000", "0.200", "0.300", "0.200", "1.000", "0.100", "0.300", "0.100", "1.000"]
    frames = [(p.get_x(), p.get_width()) for p in axes.patches if isinstance(p, Rectangle)]
    assert frames == [(-0.5, 1), (0.5, 2)]


def test_scores_of_every_model_and_their_average():
    axes = Figure().subplots()
    figures._scores(axes, REPORT)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "final"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c", "average"]
    assert texts(axes) == ["1.00"] * 4 + ["2.00"] * 4


def test_file_is_a_picture(tmp_path):
    figures.draw(REPORT, tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")
