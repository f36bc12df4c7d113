"""Strategy: a random BERT of two narrow layers and made-up rows take the place of the real ones. Every method is put
on and trained for three steps; sweeps follow results that are known; kernels are held against whole gradients."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tangent_kernels
import tuner_quality
from evidence import classification
from evidence.classification import Classifier, Example, make_classifier, put_on, train, trainable_count

WORDS = [
    "good",
    "bad",
    "film",
    "dull",
    "great",
    "poor",
    "one",
    "two",
    "red",
    "blue",
    "what",
    "is",
    "sum",
    "of",
    "list",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*specials, *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, max_position_embeddings=64, **size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=4))

    def write(name: str, rows: list[dict]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    for split in ("train", "dev", "test"):
        write(f"sst2_{split}", [{"text": text(), "label": rng.randrange(2)} for _ in range(24)])
    question = "Please choose the correct answer to the question: {}\n\n{}\n\nAnswer format: {}"
    for split in ("train", "test"):
        rows = []
        for count in [4] * 12 + [3]:
            answers = " ".join(f"Answer{number}: {text()}" for number in range(1, count + 1))
            names = "/".join(f"answer{number}" for number in range(1, count + 1))
            rows.append({"prompt": question.format(text(), answers, names), "answer": "answer2"})
        write(f"arc_easy_{split}", rows)
        for source in classification.MATCH_SOURCES:
            # a separator inside a string must not end a row
            rows = [{"prompt": f"{text()} {n}", "completion": f"{text()}\u2028{n}"} for n in range(10)]
            write(f"{source}_{split}", rows)
    return folder


@pytest.mark.parametrize("name", classification.TASKS)
def test_tasks_keep_their_splits_apart(name, model, data):
    task = classification.load_task(name, model, data, 16, 8)
    assert len(task.validation) == 8
    assert len(task.train) == {"sst2": 24, "arc_easy": 4, "match": 72}[name]  # without the question of three answers
    assert {len(row.sequences) for row in task.train} == {4 if name == "arc_easy" else 1}
    assert task.outputs == (1 if name == "arc_easy" else 2)


def test_neither_prompt_nor_completion_tells_whether_they_match(data):
    for rows in classification._match(data, 8):
        for place in (0, 1):
            labels: dict[str, list[int]] = {}
            for [texts], label in rows:
                labels.setdefault(texts[place], []).append(label)
            assert all(sorted(found) == [0, 1] for found in labels.values())


def test_similar_texts_are_paired():
    texts = ["a red cat", "two sums of lists", "a red dog", "sums of two lists", "alone"]
    pairs = {frozenset(pair) for pair in classification.pair_off(texts, random.Random(0))}
    assert len(pairs) == 2
    assert {0, 2} in pairs or {1, 3} in pairs


@pytest.mark.parametrize(
    "method", [*tuner_quality.METHODS, "position: MLP", "start: normal, 1 ± 0.1", "vectors: 1", "vectors: 4, l2"]
)
def test_every_method_trains_what_it_should(method, model):
    tuner = {**tuner_quality.METHODS, **tuner_quality.ABLATIONS}[method][0]
    encoder = copy.deepcopy(classification.load_encoder(model))
    classifier = make_classifier(encoder, tuner, 2, 0)
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    rows = [Example([[2, 5 + n, 3]], n % 2) for n in range(8)]
    found = train(classifier, rows, rate=1e-3, head_rate=1e-2, steps=3, batch_size=4, seed=0)
    assert found["diverged_at"] is None
    moved = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert moved <= trained
    assert {"head.weight", "head.bias"} <= moved
    count = trainable_count(classifier.encoder)
    assert len(moved) > 2 or method == "head"
    # the file holds what was trained, and no head; its header and VeRA's vectors' names come on top
    assert (count == 0) == (method == "head")
    assert 4 * count <= classification.file_bytes(classifier.encoder) < 4 * count + 20_000


def test_a_start_is_z_s(model):
    tuner = tuner_quality.propulsion(start=["constant", 0.9])
    encoder = put_on(copy.deepcopy(classification.load_encoder(model)), tuner)
    assert classification.z_summary(encoder) == pytest.approx(
        {"min": 0.9, "q01": 0.9, "median": 0.9, "q99": 0.9, "max": 0.9, "within": 0.0}
    )


def test_choices_share_a_softmax_and_padding_does_not_count(model):
    classifier = make_classifier(copy.deepcopy(classification.load_encoder(model)), {"train": "nothing"}, 1, 0).eval()
    rows = [Example([[2, 5, 3], [2, 6, 7, 8, 9, 3]], 0)]
    together = classifier(rows)
    alone = [classifier.head(classifier.pooled([sequence]))[0, 0] for sequence in rows[0].sequences]
    assert together.shape == (1, 2)
    torch.testing.assert_close(together[0], torch.stack(alone))


def test_a_run_is_reproducible_and_a_sweep_sees_no_test_rows(model, data):
    settings = tuner_quality.make_settings("LoRA r=8", 1e-3, 1e-2, 0, task="sst2", steps=4, model="")
    settings |= {"batch": 4, "validation_rows": 8, "curve_rows": 4, "evaluations": 2}
    runs = [tuner_quality.make_run(settings, model=model, data=data) for _ in range(2)]
    assert runs[0]["curve"] == runs[1]["curve"]
    assert runs[0]["test"] == runs[1]["test"] is not None
    assert [point["step"] for point in runs[0]["curve"]] == [0, 2, 4]
    swept = tuner_quality.make_run({**settings, "seed": tuner_quality.SWEEP_SEED}, model=model, data=data)
    assert swept["test"] is None


def test_peaks_of_memory_follow_what_is_trained(model, data):
    peaks = {}
    for method in ("head", "LoRA r=8", "full"):
        settings = {**tuner_quality.memory_settings(method, ""), "batch": 4, "length": 16}
        peaks[method] = tuner_quality.measure_memory(settings, model=model, data=data)["peak_bytes"]
    weights = trainable_count(classification.load_encoder(model))
    assert peaks["head"] < peaks["LoRA r=8"] < peaks["full"]
    assert peaks["full"] > 12 * weights  # gradients and two moments, of four bytes each


def test_every_method_s_steps_are_timed_in_every_round(model, data):
    settings = {**tuner_quality.time_settings(["full", "BEFT"], ""), "batch": 4, "length": 16, "rounds": 2, "steps": 2}
    seconds = tuner_quality.measure_time(settings, model=model, data=data)
    assert list(map(len, seconds.values())) == [2, 2]
    assert min(map(min, seconds.values())) > 0


def test_a_study_follows_the_best_rate_beyond_an_edge_and_makes_its_table(tmp_path, monkeypatch):
    def work(settings, *, model, data):
        rate = settings["rate"] or settings["head_rate"]
        accuracy = 1 - abs(math.log10(rate) - 0) / 10  # best at 1, which no grid begins with
        score = {"accuracy": accuracy, "loss": 1 - accuracy}
        curve = [{"step": 0, "accuracy": 0.5, "loss": 1.0}, {"step": 10, **score}]
        return {
            **{"curve": curve, "step_seconds": 1.0, "peak_bytes": None, "diverged_at": None, "validation": score},
            **{"test": None if settings["seed"] == tuner_quality.SWEEP_SEED else score},
            **{"parameters": 10, "head_parameters": 2, "file_bytes": 100, "z": None},
        }

    monkeypatch.setattr(tuner_quality, "make_run", work)
    monkeypatch.setattr(tuner_quality, "fingerprint", lambda model: "none")
    for seeds in (range(1), range(3)):  # the second goes on where the first ended
        tuner_quality.run_study(
            tmp_path / "runs.jsonl",
            Path("model"),
            Path("data"),
            task="sst2",
            methods=["head", "full", "BEFT"],
            seeds=seeds,
            steps=10,
            workers=0,
        )
    runs = tuner_quality.load(tmp_path / "runs.jsonl")
    rates = {run["settings"]["method"]: run["settings"]["rate"] for run in runs if run["settings"]["seed"] == 0}
    assert rates == {"head": None, "full": 1e-2, "BEFT": 1.0}  # full: two steps beyond 1e-3
    assert {run["settings"]["head_rate"] for run in runs if run["settings"]["method"] != "head"} == {1.0}
    peak = {"settings": {"task": "sst2", "method": "BEFT"}, "result": {"peak_bytes": 3 << 20}}
    (tmp_path / "memory.jsonl").write_text(json.dumps(peak))
    times = {"settings": {"task": "sst2"}, "result": {"full": [2.0, 1.0, 4.0], "BEFT": [1.0, 0.5, 1.0]}}
    (tmp_path / "time.jsonl").write_text(json.dumps(times))
    tuner_quality.write_tables(tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert "| full | 0.01* | 10 | 80.00 ± 0.00 |  |  | 0.200 ± 0.000 |  |  | 10 | 10 | 1.00 |  | 0.1 |" in table
    assert "| BEFT | 1* |" in table
    assert "| 0.000 ± 0.000 |  | -0.200 ± 0.000 |" in table
    assert "| 0.50 | 3 | 0.1 |" in table
    assert (tmp_path / "sst2-10-accuracy.png").exists()


def test_steps_are_read_off_between_two_scores():
    curve = [{"step": step, "accuracy": accuracy} for step, accuracy in ((0, 0.5), (10, 0.7), (20, 0.9))]
    assert tuner_quality.steps_until(curve, 0.8) == pytest.approx(15)
    assert tuner_quality.steps_until(curve, 0.5) == 0
    assert tuner_quality.steps_until(curve, 0.95) == math.inf
    assert tuner_quality.target(curve) == pytest.approx(0.88)


def test_a_diverged_rate_is_never_best():
    scored, diverged = {"validation": {"accuracy": 0.0, "loss": 9.0}}, {"validation": None}
    assert min([diverged, scored], key=tuner_quality.rank) is scored


def test_a_kernel_is_that_of_the_whole_gradient(model):
    encoder = classification.load_encoder(model)
    sequences = [[2, 5 + n, 6, 3] for n in range(6)]
    function = torch.randn(64, generator=torch.Generator().manual_seed(0))
    cut, renumbered = tangent_kernels.cut_vocabulary(encoder, sequences)
    put_on(cut, {"train": "all"})
    found = tangent_kernels.tangent_kernel(cut, renumbered, function, held=60_000)  # in several parts
    whole = Classifier(put_on(copy.deepcopy(encoder), {"train": "all"}), 1).eval()
    rows = []
    for sequence in sequences:
        gradients = torch.autograd.grad(whole.pooled([sequence])[0] @ function, list(whole.encoder.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    torch.testing.assert_close(found, torch.stack(rows) @ torch.stack(rows).T, rtol=1e-4, atol=1e-4)


def test_the_degree_does_not_change_an_alignment(model):
    encoder, sequences = classification.load_encoder(model), [[2, 5 + n, 6, 3] for n in range(6)]
    function = torch.randn(64, generator=torch.Generator().manual_seed(0))
    one, other = (
        tangent_kernels.tangent_kernel(
            put_on(copy.deepcopy(encoder), tuner_quality.propulsion(degree=k)), sequences, function
        )
        for k in (1, 15)
    )
    torch.testing.assert_close(225 * one, other, rtol=1e-4, atol=1e-4)
    assert tangent_kernels.alignments(one, other) == pytest.approx({"cka": 1.0, "unbiased": 1.0}, abs=1e-5)


def test_unrelated_kernels_align_by_the_biased_form_alone():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(64, 2000, dtype=torch.float64, generator=generator) for _ in range(2))
    found = tangent_kernels.alignments(one @ one.T, other @ other.T)
    assert found["cka"] > 0.9
    assert abs(found["unbiased"]) < 0.1


def test_the_embedding_is_cut_to_what_is_used(model):
    encoder, sequences = tangent_kernels.cut_vocabulary(classification.load_encoder(model), [[2, 9, 3], [2, 5, 3]])
    assert isinstance(encoder.get_input_embeddings(), nn.Embedding)
    assert encoder.get_input_embeddings().num_embeddings == 5
    assert sequences == [[1, 4, 2], [1, 3, 2]]
