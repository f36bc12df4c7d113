"""Shared by the tests of the report: a small run whose numbers can be checked by hand, and a large one to look at."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

MASKED, FRACTION = "cpift/masked_grad_norm", "cpift/frozen_fraction"


def training(**values) -> dict[str, Any]:
    """A training, as the pipeline records it."""
    plain = {"steps": 7, "examples": 28, "tokens": 345, "loss": 1.0, "learning_rate": 0.005, "seconds": 2.0}
    return {**plain, "frozen": 0, "peak_memory": None, "processes": 1, "logs": [], **values}


def model(name: str, scores: dict[str, tuple[float, float]], lm_eval=None, training=None) -> dict[str, Any]:
    """A model with its losses and scores."""
    found = {task: {"loss": loss, "score": score} for task, (loss, score) in scores.items()}
    average = 10 * sum(score for _, score in scores.values()) / len(scores)
    return {"name": name, "average": average, "scores": found, "lm_eval": lm_eval, "training": training}


@pytest.fixture
def report() -> dict[str, Any]:
    """Two tasks in two groups; `maths` trains first, and `multi-task` wins on `code` and loses on `maths`."""

    def scored(code: float, maths: float) -> dict[str, tuple[float, float]]:
        return {"code": (1.5 - code, code), "maths": (0.25, maths)}

    stage_1 = training(logs=[{"step": 1, "loss": 2.0, "learning_rate": 0.005, "grad_norm": 1.5}])
    logs = [{"step": s, "loss": 1.0 / s, "grad_norm": 0.5 * s, MASKED: 0.25 * s, FRACTION: 0.04} for s in (1, 2, 3)]
    final = training(frozen=4, tokens=1655, peak_memory=1_500_000_000, logs=logs)
    return {
        "format": 1,
        "recipe": {
            "model": "org/tiny",
            "output": "/home/me/runs/first",
            "data": "/home/me/data",
            "tuner": {"peft_type": "PROPULSION"},
            "core": {"percent": 1.0},
            "grouping": {"threshold": 0.1},
            "seed": 3,
            "tasks": {"code": {"metric": "loss"}, "maths": {"metric": "exact_match"}},
        },
        "versions": {"torch": "2.13.0"},
        "settings": {"probe": {"learning_rate": 0.005, "max_steps": 7}, "integration": {"learning_rate": 0.001}},
        "tasks": {
            "code": {"train_rows": 100, "test_rows": 20, "train_tokens": 5000},
            "maths": {"train_rows": 80, "test_rows": 16, "train_tokens": 4000},
        },
        "parameters": {"total": 10000, "trainable": 500},
        "tensors": {"layers.0.q_proj.z": 200, "layers.1.q_proj.z": 200, "embed_tokens.z": 100},
        "cores": {
            "code": {"size": 5, "total": 500, "tensors": {"layers.0.q_proj.z": 1, "layers.1.q_proj.z": 4}},
            "maths": {"size": 4, "total": 500, "tensors": {"layers.0.q_proj.z": 2, "embed_tokens.z": 2}},
        },
        "jaccard": [[1.0, 0.125], [0.125, 1.0]],
        "groups": [["maths"], ["code"]],
        "fusion": {
            "folds": 4,
            "linear_folds": 1,
            "core": 8,
            "conflicts": 1,
            "tensors": {
                "layers.0.q_proj.z": {"angles": [0.5, 0.25], "linear": [False, False], "core": 3, "conflicts": 0},
                "layers.1.q_proj.z": {"angles": [0.1, None], "linear": [False, True], "core": 4, "conflicts": 1},
                "embed_tokens.z": {"angles": [], "linear": [], "core": 1, "conflicts": 0},
            },
        },
        "transfer": {"code": {"maths": 0.5}, "maths": {"code": -0.25}},
        "models": [
            model("base", scored(0.1, 0.2), {"arc_easy": {"acc": 0.25}}),
            model("fused", scored(0.3, 0.6)),
            model("stage 1/2", scored(0.35, 0.8), training=stage_1),
            model("final", scored(0.5, 0.75), {"arc_easy": {"acc": 0.5, "acc_norm": 0.375}}, final),
            model("multi-task", scored(0.6, 0.5), training=training()),
        ],
        "sequences": [
            {
                "method": "CPI-FT",
                "start": "fused",
                "stages": [{"model": "stage 1/2", "tasks": ["maths"]}, {"model": "final", "tasks": ["code"]}],
            }
        ],
        "methods": [{"method": "CPI-FT", "model": "final"}, {"method": "multi-task", "model": "multi-task"}],
        "warnings": [],
    }


TASKS = ["gsm8k", "codealpaca-python-and-more", "logiqa", "alpaca", "ultrachat_200k"]
GROUPS = [["logiqa"], ["codealpaca-python-and-more", "alpaca"], ["gsm8k", "ultrachat_200k"]]
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def large_report() -> dict[str, Any]:
    """Five tasks, some with long names, 28 models, 18 layers: sizes and numbers of the order of a real run's."""
    draw = random.Random(0)
    noise = lambda spread: draw.gauss(0, spread)  # noqa: E731
    easy = dict(zip(TASKS, (0.12, 0.4, 0.35, 0.28, 0.16), strict=True))
    losses = dict(zip(TASKS, (1.4, 0.95, 0.8, 1.25, 1.87), strict=True))

    def scored(lift: dict[str, float]) -> dict[str, tuple[float, float]]:
        return {
            t: (losses[t] * (1.05 - 0.4 * lift[t]) + noise(0.02), min(1.0, max(0.0, easy[t] * (0.8 + lift[t]))))
            for t in TASKS
        }

    def trained(steps: int, frozen: int = 0, rate: float = 1e-3, **more) -> dict[str, Any]:
        logs = []
        for step in range(2, steps + 1, 2):
            log = {"step": step, "loss": 1.1 + 1.2 * math.exp(-4 * step / steps) + noise(0.06)}
            log |= {"learning_rate": rate * (1 - step / steps), "grad_norm": 0.9 + abs(noise(0.3))}
            logs.append(log | ({MASKED: 0.3 + abs(noise(0.1)), FRACTION: frozen / 124416} if frozen else {}))
        return training(
            steps=steps,
            examples=4 * steps,
            tokens=583 * steps,
            loss=1.4 + noise(0.2),
            learning_rate=rate,
            seconds=3.1 * steps,
            frozen=frozen,
            peak_memory=2_345_678_901,
            logs=logs,
            **more,
        )

    flat = lambda value: {task: value + noise(0.08) for task in TASKS}  # noqa: E731
    models = [model("base", scored(flat(0.0)), {"arc_easy": {"acc,none": 0.571, "acc_norm,none": 0.5}})]
    models += [
        model(f"probe {task}", scored({t: 0.4 if t == task else -0.2 + noise(0.1) for t in TASKS}), None, trained(48))
        for task in TASKS
    ]
    sequences = []

    def sequence(
        method: str, start: str, names: list[str], groups: list[list[str]], keep: float, isolate: bool
    ) -> None:
        stages, lift, frozen = [], flat(0.1), 0
        for name, group in zip(names, groups, strict=True):
            lift = {t: 0.45 + noise(0.03) if t in group else keep * v + noise(0.05) for t, v in lift.items()}
            models.append(model(name, scored(lift), None, trained(24, frozen, 3e-4 if isolate else 1e-3)))
            stages.append({"model": name, "tasks": group})
            frozen += 1244 * len(group) * isolate
        sequences.append({"method": method, "start": start, "stages": stages})

    sequence("multi-stage", "base", [f"multi-stage {i}/3" for i in (1, 2, 3)], GROUPS, 0.3, False)
    models.append(model("fused", scored(flat(0.3))))
    sequence("CPI-FT", "fused", ["stage 1/3", "stage 2/3", "final"], GROUPS, 0.95, True)
    models.append(model("multi-task", scored(flat(0.32)), None, trained(240)))
    dealt = [[TASKS[0], TASKS[3]], [TASKS[1], TASKS[4]], [TASKS[2]]]
    sequence("multi-stage random", "base", [f"random stage {i}/3" for i in (1, 2, 3)], dealt, 0.4, False)
    chosen = [[TASKS[0]], [TASKS[2], TASKS[3]], [TASKS[4]], [TASKS[1]]]
    sequence("multi-stage heuristic", "base", [f"heuristic stage {i}/4" for i in (1, 2, 3, 4)], chosen, 0.4, False)
    models += [model(f"merge {kind}", scored(flat(0.15))) for kind in ("linear", "ties", "dare_linear", "dare_ties")]
    for name in ("final", "multi-task"):
        next(m for m in models if m["name"] == name)["lm_eval"] = {
            "arc_easy": {"acc,none": 0.6, "acc_norm,none": 0.51}
        }

    tensors = {"base_model.model.model.embed_tokens.propulsion_z": 640}
    sizes = (1024, 256, 256, 640, 2048, 2048, 640)
    for layer in range(18):
        for module, size in zip(MODULES, sizes, strict=True):
            tensors[f"base_model.model.model.layers.{layer}.{module}.propulsion_z"] = size
    total = sum(tensors.values())
    cores = {}
    for number, task in enumerate(TASKS):
        weight = {
            name: size * math.exp(noise(0.4) - ((i / len(tensors) - 0.2 * number) ** 2) * 4)
            for i, (name, size) in enumerate(tensors.items())
        }
        counts = {name: int(1244 * w / sum(weight.values())) for name, w in weight.items()}
        cores[task] = {"size": sum(counts.values()), "total": total, "tensors": {n: c for n, c in counts.items() if c}}
    fused = {
        name: {
            "angles": [abs(noise(0.02)) + 0.01 * i for i in range(5)],
            "linear": [draw.random() < 0.2 for _ in range(5)],
            "core": draw.randrange(90),
            "conflicts": draw.randrange(4),
        }
        for name in tensors
    }
    jaccard = [[1.0 if i == j else 0.0 for j in range(5)] for i in range(5)]
    for i, a in enumerate(TASKS):
        for j, b in enumerate(TASKS[:i]):
            together = any({a, b} <= set(group) for group in GROUPS)
            jaccard[i][j] = jaccard[j][i] = (0.14 if together else 0.05) + abs(noise(0.02))
    settings = {
        stage: {"report_to": [], "bf16": True, "learning_rate": rate, "lr_scheduler_type": "cosine", "max_length": 192}
        for stage, rate in (("probe", 1e-3), ("multi_stage", 1e-3), ("integration", 3e-4), ("multi_task", 1e-3))
    }
    metrics = dict(zip(TASKS, ("exact_match", "codebleu", "choice", "loss", "loss"), strict=True))
    return {
        "format": 1,
        "recipe": {
            "model": "google/gemma-3-270m",
            "output": "gemma3-270m",
            "data": None,
            "prompt": "Question: {{ prompt }}\nAnswer:\n",
            "seed": 0,
            "tuner": {"peft_type": "PROPULSION", "target_modules": "all-linear", "degree": 15},
            "core": {"percent": 1.0},
            "grouping": {"threshold": 0.1, "order": "random"},
            "fusion": {"start": "multi_stage"},
            "tasks": {task: {"metric": metric, "train_samples": 96} for task, metric in metrics.items()},
        },
        "versions": {"device": "NVIDIA H100 80GB HBM3", "python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2"},
        "settings": settings,
        "tasks": {task: {"train_rows": 96, "test_rows": 16, "train_tokens": 13985} for task in TASKS},
        "parameters": {"total": 268_222_592, "trainable": total},
        "tensors": tensors,
        "cores": cores,
        "jaccard": jaccard,
        "groups": GROUPS,
        "fusion": {
            "folds": sum(len(t["angles"]) for t in fused.values()),
            "linear_folds": sum(sum(t["linear"]) for t in fused.values()),
            "core": sum(t["core"] for t in fused.values()),
            "conflicts": sum(t["conflicts"] for t in fused.values()),
            "tensors": fused,
        },
        "transfer": {a: {b: noise(0.2) for b in TASKS if b != a} for a in TASKS},
        "models": models,
        "sequences": sequences,
        "methods": [
            {"method": "multi-task", "model": "multi-task"},
            {"method": "multi-stage", "model": "multi-stage 3/3"},
            {"method": "multi-stage random", "model": "random stage 3/3"},
            {"method": "multi-stage heuristic", "model": "heuristic stage 4/4"},
            {"method": "CPI-FT", "model": "final"},
            *({"method": f"merge {k}", "model": f"merge {k}"} for k in ("linear", "ties", "dare_linear", "dare_ties")),
        ],
        "warnings": ["probe logiqa: 12 more rows are cut by max_length before their completion: raise max_length"],
    }
