"""Strategy: state by hand, for every schedule, start and baseline, which trainings there are, from which folder each
starts and what it holds frozen; then look over recipes with odd names for two things with one path or one name.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest

from peft_cpift.pipeline import plan
from peft_cpift.recipe.reading import parse_recipe

GROUPS = [["c"], ["a", "b"], ["d"]]
CORES = {task: f"cores/{task}.safetensors" for task in "abcd"}


def recipe(tasks="abcd", **sections):
    return parse_recipe({"model": "m", "output": "run", "data": "data", "tasks": {t: {} for t in tasks}, **sections})


def shown(stages):
    return [(s.path, s.name, s.tasks, s.start, s.frozen) for s in stages]


def test_probes_start_alike():
    assert shown(plan.probes(recipe("ab"))) == [
        ("probes/a", "probe a", ("a",), "start", ()),
        ("probes/b", "probe b", ("b",), "start", ()),
    ]


def test_multi_stage_goes_from_group_to_group_with_nothing_frozen():
    assert shown(plan.multi_stage(GROUPS)) == [
        ("multi_stage/01-c", "multi-stage 1/3", ("c",), "start", ()),
        ("multi_stage/02-a+b", "multi-stage 2/3", ("a", "b"), "multi_stage/01-c", ()),
        ("multi_stage/03-d", "multi-stage 3/3", ("d",), "multi_stage/02-a+b", ()),
    ]
    assert not any(stage.calibration or stage.region for stage in plan.multi_stage(GROUPS))


def test_staged_integration_freezes_the_cores_of_earlier_groups():
    stages = plan.integration(recipe(), GROUPS)
    assert shown(stages) == [
        ("stages/01-c", "stage 1/3", ("c",), "fused", ()),
        ("stages/02-a+b", "stage 2/3", ("a", "b"), "stages/01-c", (CORES["c"],)),
        ("stages/03-d", "final", ("d",), "stages/02-a+b", (CORES["c"], CORES["a"], CORES["b"])),
    ]
    assert all(stage.calibration and stage.region is None for stage in stages)
    assert plan.result(recipe(), GROUPS) == "stages/03-d"


def test_dynamic_regions_are_frozen_beside_the_cores_from_the_next_stage_on():
    dynamic = recipe(integration={"dynamic_regions": True})
    one, two = "regions/01.safetensors", "regions/02.safetensors"
    stages = plan.integration(dynamic, GROUPS)
    assert [stage.region for stage in stages] == [one, two, None]
    assert [stage.frozen for stage in stages] == [
        (),
        (CORES["c"], one),
        (CORES["c"], one, CORES["a"], CORES["b"], two),
    ]
    (alone,) = plan.integration(dynamic, [["a", "b", "c", "d"]])
    assert (alone.frozen, alone.region, alone.name) == ((), None, "final")


def test_the_second_moment_is_kept_where_a_region_is_found_by_it():
    core = {"core": {"importance": "second_moment"}}
    assert not any(stage.importance for stage in plan.probes(recipe()))
    assert all(stage.importance for stage in plan.probes(recipe(**core)))
    assert not any(stage.importance for stage in plan.multi_stage(GROUPS))
    assert not any(stage.importance for stage in plan.integration(recipe(**core), GROUPS))
    dynamic = {"integration": {"dynamic_regions": True}}
    assert [stage.importance for stage in plan.integration(recipe(**core, **dynamic), GROUPS)] == [True, True, False]
    assert not any(stage.importance for stage in plan.integration(recipe(**dynamic), GROUPS))


def test_mixed_integration_is_one_stage_with_every_core_frozen():
    mixed = recipe(integration={"schedule": "mixed"})
    (stage,) = plan.integration(mixed, GROUPS)
    assert shown([stage]) == [
        ("stages/01-c+a+b+d", "final", tuple("cabd"), "fused", tuple(CORES[task] for task in "cabd")),
    ]
    assert stage.calibration
    assert plan.result(mixed, GROUPS) == stage.path


def test_no_integration_ends_at_the_fused_parameters():
    none = recipe(integration={"schedule": "none"})
    assert plan.integration(none, GROUPS) == []
    assert plan.result(none, GROUPS) == "fused"


@pytest.mark.parametrize(
    ("start", "folder"),
    [
        ("multi_stage", "multi_stage/03-d"),
        ("last_probe", "probes/d"),
        ("pretrained", "start"),
        ("some/where", os.path.abspath("some/where")),
        ("/else/where/", "/else/where"),
        ("./pretrained", os.path.abspath("pretrained")),  # a folder that is called like a start of the run's own
    ],
)
def test_starts_of_the_fusion(start, folder):
    assert plan.fusion_start(recipe(fusion={"start": start}), GROUPS) == folder


def test_the_last_probe_is_that_of_the_last_task_of_the_last_group():
    assert plan.fusion_start(recipe(fusion={"start": "last_probe"}), [["c", "d"], ["b", "a"]]) == "probes/a"


def test_baselines():
    chosen = recipe(baselines={"random_stages": 3, "heuristic_stages": [["d", "a"], ["b", "c"]]}, seed=5)
    multi, dealt, heuristic = plan.baselines(chosen)
    assert (multi.name, multi.start, shown(multi.stages)) == (
        *("multi-task", "base"),
        [("baselines/multi_task", "multi-task", tuple("abcd"), "start", ())],
    )
    assert (heuristic.name, shown(heuristic.stages)) == (
        "multi-stage heuristic",
        [
            ("baselines/heuristic/01-d+a", "heuristic stage 1/2", ("d", "a"), "start", ()),
            ("baselines/heuristic/02-b+c", "heuristic stage 2/2", ("b", "c"), "baselines/heuristic/01-d+a", ()),
        ],
    )
    assert dealt.name == "multi-stage random"
    assert [list(stage.tasks) for stage in dealt.stages] == plan.deal("abcd", 3, 5)
    starts = [stage.start for stage in dealt.stages]
    assert starts == ["start", *(stage.path for stage in dealt.stages[:-1])]
    assert {stage.settings for method in (multi, dealt, heuristic) for stage in method.stages} == {"baselines"}
    assert plan.baselines(recipe(baselines={"multi_task": False})) == []


@pytest.mark.parametrize(("tasks", "count"), [(7, 3), (4, 4), (5, 1), (2, 2)])
def test_tasks_are_dealt_evenly_by_the_seed(tasks, count):
    names = [f"t{number}" for number in range(tasks)]
    dealt = plan.deal(names, count, seed=0)
    assert sorted(itertools.chain(*dealt)) == names
    sizes = [len(stage) for stage in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert dealt == plan.deal(names, count, seed=0)
    if tasks > count > 1:
        assert any(dealt != plan.deal(names, count, seed=seed) for seed in range(1, 9))


def everything(of, groups):
    """Every path that a run of the recipe makes, and every name that its report calls a model."""
    methods = plan.baselines(of)
    stages = [*plan.probes(of), *plan.multi_stage(groups), *plan.integration(of, groups)]
    stages += [stage for method in methods for stage in method.stages]
    merged = [plan.merge_folder(name) for name in of.baselines.merge]
    regions = [stage.region for stage in stages if stage.region]
    cores = [plan.core_file(task) for task in of.tasks]
    paths = [plan.START, "tasks", "fused", "final", "groups.json", "report", "transfer.json", *merged, *regions]
    paths += [*cores, *(stage.path for stage in stages)]
    models = ["base", "fused", *(stage.name for stage in stages), *(f"merge {name}" for name in of.baselines.merge)]
    return [*paths, *(f"scores/{path}" for path in paths)], models


ODD = [
    "start",
    "fused",
    "final",
    "base",
    "x",
    "x.json",
    "x.safetensors",
    "1-3",
    "probe-x",
    "merge_ties",
    "stages",
    "a.b",
]
ODD += ["random", "heuristic", "multi_task", "scores", "steps", "report", "01-x", "cores", "regions", "checkpoints"]


@pytest.mark.parametrize("schedule", ["staged", "mixed"])
@pytest.mark.parametrize("groups", [[[name] for name in ODD], [ODD], [ODD[:9], ODD[9:]]])
def test_no_two_things_have_one_path_or_one_name(schedule, groups):
    of = recipe(
        ODD,
        baselines={
            **{"random_stages": len(ODD), "heuristic_stages": [[name] for name in ODD]},
            "merge": ["linear", "ties", "dare_linear", "dare_ties"],
        },
        integration={"schedule": schedule, "dynamic_regions": schedule == "staged"},
    )
    paths, models = everything(of, groups)
    assert not [path for path, count in Counter(paths).items() if count > 1]
    assert not [name for name, count in Counter(models).items() if count > 1]
    # None lies in another, nor its note, which would be removed with it.
    for a, b in itertools.permutations(paths, 2):
        assert not b.startswith(f"{a}/"), (a, b)
        assert not f"{b}.json".startswith(f"{a}.json/"), (a, b)


def test_folders_of_long_groups_stay_apart_and_short():
    tasks = [f"a-rather-long-name-of-a-task-{number:03d}" for number in range(30)]
    for stages in (
        plan.multi_stage([tasks[:15], tasks[:14], tasks[15:]]),
        plan.multi_stage([[task] for task in tasks * 4]),
    ):
        paths = [stage.path for stage in stages]
        assert len(set(paths)) == len(paths)
        assert max(len(path.rpartition("/")[2]) for path in paths) < 100
    assert plan.multi_stage([tasks])[0].tasks == tuple(tasks)
