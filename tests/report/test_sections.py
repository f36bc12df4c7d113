"""Strategy: every table of the small run against numbers worked out by hand; then the same run with parts changed."""

from __future__ import annotations

import math

import pytest

from peft_cpift.report import cores, forgetting, fusion, record, scores, training
from peft_cpift.report.blocks import ABSENT, Charts, Folded, Section, Table


def tables(section: Section) -> list[Table]:
    return [block for block in section.blocks if isinstance(block, Table)]


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.cells()]


def strong(table: Table) -> set[tuple[str, str]]:
    return {
        (row[0].text, head) for row in table.cells() for head, cell in zip(table.head, row, strict=True) if cell.strong
    }


def framed(table: Table) -> dict[tuple[str, str], str]:
    return {
        (row[0].text, head): cell.edges
        for row in table.cells()
        for head, cell in zip(table.head, row, strict=True)
        if cell.edges
    }


# --- scores


def test_verdict_tells_wins_and_losses(report):
    assert scores.verdict(report) == (
        "CPI-FT ends at an average score of 6.25 of 10, 4.75 above the base model (1.50) and 0.75 above the best "
        "other method, multi-task (5.50). Task by task against that method: ahead on 1, behind on 1, level on 0. One "
        "run, one seed: a small difference can be chance."
    )
    assert [number for _, number, _ in scores.figures(report)] == ["6.25", "5.50", "1.50"]


def test_verdict_where_the_method_lost_or_nothing_was_compared(report):
    report["models"][3]["average"] = 1.0
    text = scores.verdict(report)
    assert "0.50 below the base model (1.50) and 4.50 below the best other method" in text
    report["models"][3]["average"] = 5.501
    assert "level with the best other method" in scores.verdict(report)
    report["methods"] = report["methods"][:1]
    assert scores.verdict(report).endswith("No other method was run to compare it with.")
    assert len(scores.figures(report)) == 2


def test_level_tasks_are_no_losses(report):
    report["models"][4]["scores"]["maths"]["score"] = 0.75
    assert "ahead on 0, behind on 1, level on 1." in scores.verdict(report)


def test_scores_that_look_alike_are_level(report):
    report["models"][3]["scores"]["maths"]["score"] = 0.7501  # 7.50 beside 7.50, however many rows they come from
    report["models"][4]["scores"]["maths"]["score"] = 0.7499
    report["models"][3]["scores"]["code"]["score"] = 0.6004
    assert "ahead on 0, behind on 0, level on 2." in scores.verdict(report)
    report["models"][4]["scores"]["maths"]["score"] = 0.7494
    assert "ahead on 1, behind on 0, level on 1." in scores.verdict(report)


def test_best_of_several_methods_is_the_one_named(report):
    report["methods"].insert(0, {"method": "merge ties", "model": "fused"})  # 4.50, below multi-task's 5.50
    assert "best other method, multi-task (5.50)" in scores.verdict(report)
    assert scores.figures(report)[1] == ("best other method", "5.50", "multi-task")


def test_scores_of_every_model(report):
    table = scores.score_table(report)
    assert table.head == ["model", "average", "code", "maths"]
    assert texts(table) == [
        ["base", "1.50", "1.00", "2.00"],
        ["fused", "4.50", "3.00", "6.00"],
        ["stage 1/2", "5.75", "3.50", "8.00"],
        ["final", "6.25", "5.00", "7.50"],
        ["multi-task", "5.50", "6.00", "5.00"],
    ]
    # stage 1/2 has the highest score of maths, and is a step on the way, not a result
    assert strong(table) == {("multi-task", "code"), ("final", "maths"), ("final", "average")}
    assert [row[0].note for row in table.cells()] == ["", "", "maths", "code", ""]
    assert table.breaks == {1, 4}
    assert table.caption.endswith("Bold: the best of what the methods come to, final, multi-task.")
    assert [row[2].shade for row in table.cells()] == pytest.approx([0, 0.4, 0.5, 0.8, 1])


def test_tokens_of_a_method_are_those_of_every_training_that_it_takes():
    tokens = {
        "base": None,
        "probe a": 1,
        "probe b": 20,
        "multi-stage 1/2": 300,
        "multi-stage 2/2": 4000,
        "fused": None,
    }
    tokens |= {"stage 1/2": 50_000, "final": 600_000, "multi-task": 7, "random stage 1/2": 8, "random stage 2/2": 80}
    chains = {
        "multi-stage": ["multi-stage 1/2", "multi-stage 2/2"],
        "CPI-FT": ["stage 1/2", "final"],
        "multi-stage random": ["random stage 1/2", "random stage 2/2"],
    }
    ends = {method: stages[-1] for method, stages in chains.items()}
    ends |= {"multi-task": "multi-task", "merge ties": "merge ties"}
    report = {
        "models": [{"name": name, "training": count and {"tokens": count}} for name, count in tokens.items()],
        "sequences": [{"method": m, "stages": [{"model": name} for name in names]} for m, names in chains.items()],
        "methods": [{"method": method, "model": model} for method, model in ends.items()],
    }
    expected = {"multi-stage": 4300, "CPI-FT": 654_321, "multi-stage random": 88, "multi-task": 7, "merge ties": 21}
    assert scores.method_tokens(report) == expected
    # Another start of the fusion; and a schedule of one stage, or of none.
    report["methods"] = [{"method": "CPI-FT", "model": "final"}]
    assert scores.method_tokens(report) == {"CPI-FT": 650_021}
    assert scores.method_tokens(report | {"sequences": []}) == {"CPI-FT": 600_021}
    report["methods"] = [{"method": "CPI-FT", "model": "fused"}]
    assert scores.method_tokens(report | {"sequences": []}) == {"CPI-FT": 21}


def test_methods_losses_metrics_and_harness(report):
    methods, _, losses, harness = tables(scores.section(report))
    assert texts(methods) == [["base model", "1.50", "0"], ["CPI-FT", "6.25", "2,000"], ["multi-task", "5.50", "345"]]
    assert strong(methods) == {("CPI-FT", "average")}
    assert texts(losses)[3] == ["final", "1.000", "0.250"]
    assert [row[1].shade for row in losses.cells()] == pytest.approx(
        [0, 0.4, 0.5, 0.8, 1]
    )  # the lowest loss is deepest
    assert [row[2].shade for row in losses.cells()] == [None] * 5  # all equal: nothing to tell apart
    assert harness.head == ["model", "arc_easy acc", "arc_easy acc_norm"]
    assert texts(harness) == [["base", "0.25", ABSENT], ["final", "0.5", "0.375"]]
    text = next(block for block in scores.section(report).blocks if isinstance(block, str))
    assert text == "Metrics: code exp(-loss) over 20 rows; maths exact match over 16 rows (steps of 0.62)."


# --- forgetting


def test_forgetting_matrix(report):
    report["sequences"][0]["start"] = "base"
    summary, matrix = tables(forgetting.section(report))
    assert texts(summary) == [["CPI-FT", "2", "-0.50", "+2.50"]]  # maths 7.5 - 8, code 3.5 - 1
    assert texts(matrix) == [
        ["base", "1.00", "2.00"],
        ["stage 1/2", "3.50", "8.00"],
        ["final", "5.00", "7.50"],
        ["change after own stage", ABSENT, "-0.50"],
        ["above base before it", "+2.50", ABSENT],
    ]
    frame = "top right bottom left"
    assert framed(matrix) == {("stage 1/2", "maths"): frame, ("final", "code"): frame}


def test_what_starts_with_something_of_every_task_has_no_forward_transfer(report):
    plain = {**report["sequences"][0], "method": "multi-stage", "start": "base"}
    report["sequences"].append(plain)
    text, summary, own, other = forgetting.section(report).blocks
    assert texts(summary) == [["CPI-FT", "2", "-0.50", ABSENT], ["multi-stage", "2", "-0.50", "+2.50"]]
    assert [row[0] for row in texts(own)] == ["fused", "stage 1/2", "final", "change after own stage"]
    assert [row[0] for row in texts(other)][-2:] == ["change after own stage", "above base before it"]
    assert text.count("A sequence that starts from “fused” has no forward transfer here") == 1
    report["sequences"] = [plain]
    assert "A sequence that starts from" not in forgetting.section(report).blocks[0]


def test_sequences_without_stages_are_passed_over(report):
    report["sequences"][0]["stages"] = []
    assert not tables(forgetting.section(report))


# --- cores


def test_overlap_is_in_the_order_trained_with_each_group_framed(report):
    overlap, helps, *_ = tables(cores.section(report))
    assert overlap.head == ["", "maths", "code", "group", "core", "of"]
    assert texts(overlap) == [
        ["maths", "1.000", "0.125", "1", "4", "500"],
        ["code", "0.125", "1.000", "2", "5", "500"],
    ]
    frame = {"top", "right", "bottom", "left"}
    assert {at: set(edges.split()) for at, edges in framed(overlap).items()} == {
        ("maths", "maths"): frame,
        ("code", "code"): frame,
    }
    assert texts(helps) == [["code", ABSENT, "+0.50"], ["maths", "-0.25", ABSENT]]


def test_it_tells_cores_that_are_not_what_moved_most(report):
    for importance, told in ((None, False), ("update", False), ("second_moment", True)):
        if importance:
            report["recipe"]["core"]["importance"] = importance
        texts = [block for block in cores.section(report).blocks if isinstance(block, str)]
        assert any("the largest gradients" in text for text in texts) == told


def test_overlaps_move_with_their_tasks(large_report):
    overlap = tables(cores.section(large_report))[0]
    names = list(large_report["cores"])
    for row in texts(overlap):
        for other, text in zip(overlap.head[1:6], row[1:6], strict=True):
            assert text == f"{large_report['jaccard'][names.index(row[0])][names.index(other)]:.3f}"


def test_a_group_of_two_has_one_frame(report):
    report["groups"] = [["maths", "code"]]
    edges = {at: set(sides.split()) for at, sides in framed(tables(cores.section(report))[0]).items()}
    assert edges == {
        ("maths", "maths"): {"top", "left"},
        ("maths", "code"): {"top", "right"},
        ("code", "maths"): {"bottom", "left"},
        ("code", "code"): {"bottom", "right"},
    }


def test_places_of_the_cores(report):
    report["transfer"] = None
    _, share, density, type_share, type_density = tables(cores.section(report))
    assert share.head == ["layer", "0", "1", "other"]
    assert texts(share) == [["code", "20", "80", "0"], ["maths", "50", "0", "50"]]
    assert texts(density) == [["code", "0.50", "2.0", "0"], ["maths", "1.0", "0", "2.0"]]
    assert [row[2].shade for row in share.cells()] == [1.0, 0.0]
    assert type_share.head == ["module type", "q_proj", "embed_tokens"]
    assert texts(type_share) == [["code", "100", "0"], ["maths", "50", "50"]]
    assert texts(type_density) == [["code", "1.2", "0"], ["maths", "0.50", "2.0"]]


def test_many_layers_are_dense_and_in_order(large_report):
    _, _, share, *_ = tables(cores.section(large_report))
    assert share.dense
    assert list(share.head) == ["layer", *map(str, range(18)), "other"]


# --- fusion


def test_angles_of_each_task_in_the_order_folded(report):
    section = fusion.section(report)
    angles, types = tables(section)
    d = math.degrees
    quantiles = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert texts(angles) == [
        ["maths", "2", "0", *(f"{d(q):.1f}" for q in quantiles)],
        ["code", "2", "1", *[f"{d(0.25):.1f}"] * 5],
    ]
    assert texts(types) == [
        ["q_proj", "2", "7", "1", "4", "1", f"{d(0.25):.1f}"],
        ["embed_tokens", "1", "1", "0", "0", "0", ABSENT],
    ]
    assert section.blocks[0].startswith("8 coordinates transplanted, 1 of them in several cores; 1 of 4 interp")
    charts = next(block for block in section.blocks if isinstance(block, Charts))
    assert [chart.title for chart in charts.charts] == ["maths", "code"]


def test_an_angle_of_zero_is_an_angle(report):
    report["fusion"]["tensors"]["layers.1.q_proj.z"]["angles"] = [0.1, 0.0]
    assert texts(tables(fusion.section(report))[0])[1][3] == "0"


def test_the_worst_loss_of_a_lora_result_is_told(report):
    report["fusion"]["errors"] = {"a.weight": 0.1, "b.weight": 0.25}
    assert "loses up to 25.0% of a weight's change, b.weight" in fusion.section(report).blocks[0]


# --- training


def test_costs_and_curves(report):
    section = training.section(report)
    (costs,) = tables(section)
    assert costs.head[-2:] == ["time", "peak memory"]
    assert texts(costs) == [
        ["stage 1/2", "7", "28", "345", "0.005", "1.000", "0", "2.0 s", ABSENT],
        ["final", "7", "28", "1,655", "0.005", "1.000", "4", "2.0 s", "1.50 GB"],
        ["multi-task", "7", "28", "345", "0.005", "1.000", "0", "2.0 s", ABSENT],
        ["all", "21", "84", "2,345", "", "", "", "6.0 s", ""],
    ]
    assert costs.cells()[1][6].note == "0.8%"
    assert training.totals(report) == (2345, 6.0)
    assert section.blocks[0].startswith("500 of the model's 10,000 parameters are trained (5.00%).")
    losses, pulls = (block for block in section.blocks if isinstance(block, Charts))
    assert [(c.title, c.caption) for c in losses.charts] == [
        ("stage 1/2", "2.000, logged once"),
        ("final", "1.000 to 0.333"),
    ]
    assert [chart.title for chart in pulls.charts] == ["final"]
    assert "line1" in pulls.charts[0].svg


def test_without_logs_or_a_gpu_it_says_so(report):
    for model in report["models"]:
        if model["training"]:
            model["training"] |= {"logs": [], "peak_memory": None, "processes": 4}
    section = training.section(report)
    assert not [block for block in section.blocks if isinstance(block, Charts)]
    assert "Set logging_steps" in section.blocks[-1]
    assert tables(section)[0].head[-1] == "processes"
    for model in report["models"]:
        model["training"] = None
    assert training.section(report).blocks == ["Nothing was trained."]


# --- record


def test_what_is_needed_to_do_it_again(report):
    for stage in report["settings"].values():
        stage["max_length"] = 64
    section = record.section(report)
    data, machine = tables(section)
    assert texts(data) == [["code", "100", "5,000", "20"], ["maths", "80", "4,000", "16"]]
    assert texts(machine) == [["torch", "2.13.0"], ["seed", "3"]]
    settings, recipe = (block for block in section.blocks if isinstance(block, Folded))
    assert texts(settings.content) == [
        ["learning_rate", "0.005", "0.001"],
        ["max_steps", "7", ""],
        ["max_length", "64", "64"],
    ]
    assert {key for key, _ in strong(settings.content)} == {"learning_rate", "max_steps"}
    assert "percent: 1.0" in recipe.content
    assert dict(record.facts(report)) == {
        "model": "org/tiny", "tuner": "PROPULSION", "tasks": "2", "p": "1 %", "τ": "0.1", "seed": "3"
    }  # fmt: skip
    report["recipe"]["tuner"] = "full"
    assert dict(record.facts(report))["tuner"] == "full"


def test_stages_made_with_other_versions_are_named(report):
    now, models = report["versions"], {model["name"]: model for model in report["models"]}
    for name, versions in {
        "stage 1/2": {**now, "torch": "2.14.0", "device": "GPU"},
        "final": now,
        "multi-task": {**now, "torch": "2.14.0", "device": "GPU"},
    }.items():
        models[name]["training"]["versions"] = versions
    told = "Stages made with other versions: stage 1/2, multi-task (torch 2.14.0, device GPU)."
    assert told in record.section(report).blocks
    models["multi-task"]["training"]["versions"] = {"torch": "2.12.0"}
    told = "Stages made with other versions: stage 1/2 (torch 2.14.0, device GPU); multi-task (torch 2.12.0)."
    assert told in record.section(report).blocks
    for name in ("stage 1/2", "multi-task"):
        models[name]["training"]["versions"] = dict(now)
    del models["final"]["training"]["versions"]  # as in earlier reports
    assert not any("other versions" in block for block in record.section(report).blocks if isinstance(block, str))
