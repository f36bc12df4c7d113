"""Strategy: measures of importance against sums formed by hand in a loop of the test's own; each protection must do to
the demonstration's model what its name says; tables are made of invented runs whose numbers can be told in advance."""

from __future__ import annotations

import math
import sys
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import interference
from evidence.importance import MEASURES, Recorder, fisher, measure
from evidence.language import Diverged, Row, compact_vocabulary, draw, load_demo, loss_of, score, start, train, trained
from evidence.protection_tables import collect, control_of, table
from evidence.runs import save
from evidence.sequence import Place, choose, first_task, run_sequence
from interference import correlate, cosine, harm
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from peft_cpift.demo import MODEL

SETTINGS = {
    **{"model": "demo", "first": "reverse", "second": "sort", "seed": 0, "tuner": None, "optimizer": "adamw"},
    **{"steps": 6, "batch": 8, "rate": 1e-3, "second_rate": 1e-3, "split": "validation"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(None, None, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def records(place):
    return first_task(place, SETTINGS)


@pytest.fixture(scope="module")
def rows():
    return load_demo(0)[1]["reverse"]


def test_only_completions_are_scored(rows):
    model = start(load_demo(0)[0])
    some = rows.test[:3]
    total, count = 0.0, 0
    for row in some:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        for at in range(row.start, len(row.ids)):
            total -= logits[at - 1].log_softmax(0)[row.ids[at]].item()
            count += 1
    assert loss_of(model, some).item() == pytest.approx(total / count, rel=1e-5)
    assert score(model, some)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_exact_is_what_greedy_decoding_gets_right(rows):
    model, tokenizer = start(load_demo(0)[0]), AutoTokenizer.from_pretrained(MODEL)
    some = rows.test[:40]
    right = 0
    for row in some:
        ids = torch.tensor([row.ids[: row.start]])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(row.ids) - row.start,
            do_sample=False,
        )
        right += made[0].tolist() == row.ids
    assert tokenizer.eos_token_id == some[0].ids[-1]
    assert 0 < right < len(some)
    assert score(model, some)["exact"] == pytest.approx(right / len(some))


def test_a_compact_vocabulary_keeps_the_logits_of_what_is_left():
    model = start(load_demo(0)[0])
    ids = load_demo(0)[1]["sort"].test[0].ids
    row = Row(list(ids), 3)
    before = model(input_ids=torch.tensor([ids])).logits[0][:, sorted(set(ids))]
    task = type("Task", (), {"train": [row], "validation": [], "test": [row]})()
    compact_vocabulary(model, {"one": task})
    assert sorted(set(row.ids)) == list(range(len(set(ids))))
    hidden = model.model(input_ids=torch.tensor([row.ids])).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden)[0], before)


def test_recorded_sums_are_those_of_the_steps(rows):
    model = start(load_demo(0)[0])
    name = "model.layers.0.mlp.up_proj.weight"
    weight, seen, values = trained(model)[name], [], []
    recorder = Recorder(model)

    def before():
        recorder.before_step()
        seen.append(weight.grad.clone())
        values.append(weight.detach().clone())

    optimizer = train(
        model, rows.train[:40], batch_size=8, rate=1e-3, before_step=before, after_step=recorder.after_step
    )
    values.append(weight.detach().clone())
    steps = [b - a for a, b in pairwise(values)]
    path = -sum(g * step for g, step in zip(seen, steps, strict=True))
    torch.testing.assert_close(recorder.sums["path"][name], path)
    torch.testing.assert_close(recorder.sums["squared_gradient"][name], sum(g * g for g in seen))
    torch.testing.assert_close(recorder.sums["moved"][name], sum(step.abs() for step in steps))
    expected = torch.zeros_like(weight)
    for g in seen:
        expected = 0.999 * expected + 0.001 * g * g
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], expected)


def test_fisher_information_is_of_single_rows(rows):
    model = start(load_demo(0)[0]).eval()
    weight = trained(model)["model.norm.weight"]
    expected = torch.zeros_like(weight)
    for row in rows.train[:3]:
        expected += torch.autograd.grad(loss_of(model, [row]), weight)[0] ** 2 / 3
    torch.testing.assert_close(fisher(model, rows.train[:3])["model.norm.weight"], expected)


@pytest.mark.parametrize("kind", MEASURES)
def test_every_measure_chooses_so_many(records, kind):
    total = sum(tensor.numel() for tensor in records["end"].values())
    assert len(choose(records, {"by": kind, "percent": 1}, 0)) == total // 100


def test_measures_are_what_they_are_called(records):
    name = "model.norm.weight"
    a, b = records["start"][name], records["end"][name]
    assert torch.equal(measure("update", name, records, 0), (b - a).abs())
    torch.testing.assert_close(measure("put_back", name, records, 0), records["fisher"][name] * (b - a) ** 2)
    torch.testing.assert_close(measure("consistency", name, records, 0), (b - a).abs() / records["moved"][name])
    assert torch.equal(measure("random", name, records, 3), measure("random", name, records, 3))
    assert not torch.equal(measure("random", name, records, 3), measure("random", name, records, 4))
    assert measure("least_update", name, records, 0).argmax() == measure("update", name, records, 0).argmin()


def test_a_choice_gives_way_to_as_many_anywhere_in_each_tensor(records):
    protect = {"by": "second_moment", "percent": 2}
    chosen, anywhere = (choose(records, protect | more, 0) for more in ({}, {"anywhere": True}))
    assert {n: len(i.unique()) for n, i in anywhere.indices.items()} == {n: len(i) for n, i in chosen.indices.items()}
    assert any(not torch.equal(anywhere.indices[name].long(), i.long()) for name, i in chosen.indices.items())


def test_another_tasks_choice_is_frozen(place):
    protect = {"kind": "freeze", "by": "second_moment", "percent": 10}
    own, others = (run_sequence(place, SETTINGS | {"protect": protect | more}) for more in ({}, {"of": "compare"}))
    assert own["held_fisher"] > others["held_fisher"]


def test_rows_are_frozen_as_one(records):
    region = choose(records, {"by": "fisher", "percent": 10, "unit": "row"}, 0)
    name = max(region.indices, key=lambda name: len(region.indices[name]))
    width = region.shapes[name][1]
    counts = torch.bincount(region.indices[name].long() // width)
    assert ((counts == 0) | (counts == width)).sum() >= len(counts) - 1  # one may be cut by the number wanted


@pytest.mark.parametrize(
    "protect",
    [
        {"kind": "none"},
        {"kind": "freeze", "by": "fisher", "percent": 100},
        {"kind": "restore", "by": "random", "percent": 100},
        {"kind": "l2", "strength": 1e6},
    ],
    ids=lambda protect: protect["kind"],
)
def test_what_is_protected_altogether_stays(place, protect):
    first = run_sequence(place, SETTINGS | {"protect": protect})["first"]
    if protect["kind"] == "none":
        assert abs(first["end"]["loss"] - first["own"]["loss"]) > 0.01
    elif protect["kind"] == "l2":  # the pull comes after a step has been made
        free = run_sequence(place, SETTINGS | {"protect": {"kind": "none"}})["first"]
        away = abs(first["end"]["loss"] - first["own"]["loss"])
        assert away < abs(free["end"]["loss"] - free["own"]["loss"])
    else:
        assert first["end"] == first["own"]


def test_the_middle_of_a_blend_lies_between_the_ends(place):
    result = run_sequence(place, SETTINGS | {"protect": {"kind": "none"}})
    losses = [
        result["second"]["own"]["loss"],
        *(result["blend"][share]["second"]["loss"] for share in ("0.25", "0.5")),
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "protect",
    [
        {"kind": "ewc", "by": "fisher", "strength": 0.1},
        {"kind": "decay", "by": "second_moment", "power": 1, "strength": 0.1},
        {"kind": "project", "gradients": 2},
        {"kind": "replay", "share": 0.5},
    ],
    ids=lambda protect: protect["kind"],
)
def test_other_protections_change_the_outcome_and_repeat(place, protect):
    free = run_sequence(place, SETTINGS | {"protect": {"kind": "none"}})
    one, two = (run_sequence(place, SETTINGS | {"protect": protect}) for _ in range(2))
    assert one == two
    assert one["first"]["end"]["loss"] != free["first"]["end"]["loss"]


def test_an_unknown_protection_is_refused(place):
    with pytest.raises(ValueError, match="unknown protection prayer"):
        run_sequence(place, SETTINGS | {"protect": {"kind": "prayer"}})


def invented(seed, protect, first, second):
    """A run whose first task's loss went from 3 to 1 by itself, and whose second task's stood at 2."""
    result = {
        "first": {
            "base": {"loss": 3.0, "exact": 0},
            "own": {"loss": 1.0, "exact": 0},
            "end": {"loss": first, "exact": 0},
        },
        "second": {
            **{"base": {"loss": 2.0, "exact": 0}, "own": {"loss": 2.0, "exact": 0}},
            "end": {"loss": second, "exact": 0},
        },
    }
    return {"settings": {**SETTINGS, "seed": seed, "protect": protect}, "result": result}


def test_a_table_of_invented_runs():
    fisher_, random_ = ({"kind": "freeze", "by": by, "percent": 1} for by in ("fisher", "random"))
    runs = []
    for seed, noise in ((0, 0.0), (1, 0.2)):
        runs += [
            invented(seed, {"kind": "none"}, 2.0 + noise, 1.0),  # half of what was gained is lost
            invented(seed, fisher_, 1.2 + noise, 1.1),
            invented(seed, random_, 2.0 + noise, 1.0),
        ]
    runs.append(invented(2, fisher_, 0.0, 0.0))  # without its unprotected run there is nothing to compare it with
    ((_, protections),) = collect(runs).items()
    assert protections["nothing"]["kept"] == {0: 0.5, 1: pytest.approx(0.4)}
    assert protections["freeze 1% by fisher"]["learned"] == {0: pytest.approx(0.9), 1: pytest.approx(0.9)}
    text = table(protections)
    row = (
        "| freeze 1% by fisher | 2 | 0.850 ± 0.635 | 0.900 ± 0.000 | **+0.400 ± 0.000** | **-0.100 ± 0.000** | 1.300 |"
    )
    assert row in text
    assert harm(runs[0]["result"]) == 1.0


def test_pairs_of_another_study_and_seeds_without_all_pairs_do_not_count():
    freeze = {"kind": "freeze", "by": "random", "percent": 1}
    other = {"first": "sort", "second": "reverse"}
    runs = [invented(0, protect, 2.0, 1.0) for protect in ({"kind": "none"}, freeze)]
    lone = invented(0, {"kind": "none"}, 9.0, 9.0)
    runs.append({**lone, "settings": {**lone["settings"], **other}})
    ((_, protections),) = collect(runs).items()
    assert protections["nothing"]["first_loss"] == {0: 2.0}
    runs.append({**invented(0, freeze, 4.0, 1.0), "settings": {**runs[1]["settings"], **other}})
    ((_, protections),) = collect(runs).items()
    assert protections["freeze 1% by random"]["first_loss"] == {0: 3.0}  # now both pairs are of the study
    del runs[1]
    ((_, protections),) = collect(runs).items()
    assert list(protections["nothing"]["first_loss"].values()) == [9.0]


def test_what_cannot_be_learned_has_no_share():
    runs = [invented(0, protect, 2.0, 2.5) for protect in ({"kind": "none"}, {"kind": "l2", "strength": 1})]
    ((_, protections),) = collect(runs).items()
    assert "learned" not in protections["nothing"]
    assert "| nothing | 1 | 0.500 (1 seed) | — |" in table(protections)


def test_correlations_are_of_names_that_are_permuted():
    tasks = ["a", "b", "c", "d"]
    pairs = list(permutations(tasks, 2))
    harms = {pair: float(number) for number, pair in enumerate(pairs)}
    rho, p = correlate(tasks, [harms, harms], [harms, harms], 0)
    assert rho == pytest.approx(1)
    assert p == pytest.approx(2 / 24)  # itself, and its reverse
    of_first = {pair: float(tasks.index(pair[0])) for pair in pairs}
    rho, p = correlate(tasks, [of_first], [harms], 0)
    assert rho == pytest.approx(spearmanr(list(of_first.values()), list(harms.values()))[0])
    assert correlate(tasks, [of_first], [harms], 1) == (0.0, 1.0)  # within one first task it is constant
    against = {pair: -value for pair, value in harms.items()}
    assert correlate(tasks, [against], [harms], 1)[0] == pytest.approx(-1)


def test_rates_are_tables_of_their_own(place, tmp_path, monkeypatch):
    monkeypatch.setattr(interference, "RESULTS", tmp_path)
    monkeypatch.setattr(interference, "best_rates", lambda place, ways: {"full": 0.003})
    for times, rise in ((1, 2.0), (1 / 3, 0.25)):
        wanted = list(interference.sequences(place, range(1), times))
        for settings in wanted:
            lost = {name: {"loss": loss} for name, loss in (("base", 2.0), ("own", 1.0), ("end", 1.0 + rise))}
            save(tmp_path / "demo.jsonl", {"settings": settings, "result": {"first": lost}})
        assert interference.table(place, times) == ""  # nothing to correlate it with yet
        shared = interference.settings_of(place, 0, times)
        pairs = {f"{run['first']} {run['second']}": float(number) for number, run in enumerate(wanted)}
        save(tmp_path / "demo-predictors.jsonl", {"settings": shared, "result": {f"at {times:.2f}": pairs}})
    whole, third = (interference.table(place, times) for times in (1, 1 / 3))
    assert all(text in whole for text in ("rate 0.003", "200% is lost", "| at 1.00 |"))
    assert all(text in third for text in ("rate 0.001", "25% is lost", "| at 0.33 |"))
    assert "at 0.33" not in whole
    assert "at 1.00" not in third


def test_a_random_unit_is_drawn_once(place, records):
    region = choose(records, {"by": "random", "percent": 10, "unit": "row"}, 0)
    shares = [len(chosen) / math.prod(region.shapes[name]) for name, chosen in region.indices.items()]
    wide = [share for name, share in zip(region.indices, shares, strict=True) if len(region.shapes[name]) > 1]
    assert len(wide) == sum(value.ndim > 1 for value in records["end"].values())  # by means narrow rows would win
    assert max(wide) < 0.3


def test_a_diverging_training_says_so(rows):
    with pytest.raises(Diverged, match="step"):
        train(start(load_demo(0)[0]), rows.train[:64], batch_size=8, rate=1e30)


def test_controls_are_of_the_same_kind():
    assert control_of("freeze 10% by fisher, by rows") == "freeze 10% by random, by rows"
    assert control_of("restore 1% by update") == "restore 1% by random"
    assert control_of("freeze 10% by fisher, of a third task") == "freeze 10% by random"
    assert control_of("freeze 10% by random") is None
    assert control_of("elastic pull by Fisher information (EWC), 0.1") is None


def test_cosine_of_vectors_in_parts():
    one, other = (
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0])},
        {"a": torch.tensor([0.0, 3.0]), "b": torch.ones(1)},
    )
    assert cosine(one, other) == pytest.approx(2 / (5**0.5 * 10**0.5))


def test_rows_are_drawn_once_before_any_comes_twice():
    drawn = draw([Row([n], 0) for n in range(5)], 8, "seed")
    assert len({row.ids[0] for row in drawn[:5]}) == 5
    assert drawn == draw([Row([n], 0) for n in range(5)], 8, "seed")
    assert drawn != draw([Row([n], 0) for n in range(5)], 8, "other")
