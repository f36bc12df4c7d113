"""The model card of a fusion: what was fused, how, and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_cpift.checkpoint.reader import ADAPTER_CONFIG, MODEL_CONFIG, read_json
from peft_cpift.fusion.report import FusionReport

CARD = "README.md"
REPOSITORY = r"\w[\w.-]*(/\w[\w.-]*)?"
"""The Hub's form of a model's name; anything else is a path."""
TASK_HEADS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
"""PEFT's name of a task -> the end of its auto class's name."""


def write_card(folder: Path, settings: Mapping[str, Any], report: FusionReport) -> None:
    """Write `README.md` into the folder of a fusion.

    Folders are named without the path to them, which is nobody's business.
    """
    adapter = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    model = read_json(folder / MODEL_CONFIG) if (folder / MODEL_CONFIG).is_file() else {}
    front = {"library_name": "peft" if adapter else "transformers", "tags": ["cpi-ft", "merge", "peft-cpift"]}
    base = adapter.get("base_model_name_or_path") or ""
    if re.fullmatch(REPOSITORY, base) and not Path(base).exists():
        front["base_model"] = base
    if adapter.get("peft_type") == "PROPULSION":
        front["tags"].append("propulsion")
    text = f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Fusion of {", ".join(settings["tasks"])}

Made by peft-cpift with the fusion of CPI-FT, core parameter isolation
([arXiv 2508.21741](https://arxiv.org/abs/2508.21741)): each task's core coordinates are transplanted from its own
fine-tuning, all others interpolated spherically, task after task.

| task | folder |
|---|---|
| (start) | `{settings["start"]}` |
{"".join(f"| {task} | `{name}` |{chr(10)}" for task, name in settings["tasks"].items())}
{_form(settings, report)}{report.core:,} coordinates were transplanted, {report.conflicts:,} of them in the cores of
several tasks; of {report.folds:,} interpolations {report.linear_folds:,} were linear. Every tensor is listed in
`fusion.json`.

```json
{json.dumps({key: value for key, value in settings.items() if key not in ("start", "tasks")}, indent=2)}
```

## Use

```python
{_snippet(adapter, model)}
```
"""
    (folder / CARD).write_text(text, encoding="utf-8")


def _form(settings: Mapping[str, Any], report: FusionReport) -> str:
    """What the fused tensors are, where they are not the tasks' own."""
    if settings["merged"] is None:
        return ""
    text = f"Adapters were merged into `{settings['merged']}`, and the weights were fused. "
    if settings["rank"] is not None:
        worst = max(report.errors.values())
        text += (
            f"Their change is written as a LoRA adapter of rank {settings['rank']}, which loses up to {worst:.1%} of "
            "a weight's change, so that cores are near their tasks' values, not equal to them. "
        )
    return text


def _snippet(adapter: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    if not adapter:
        named = model.get("architectures")
        name = str(named[0]) if isinstance(named, list) and named else "AutoModel"
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")'
    propulsion = (
        "import peft_cpift  # registers Propulsion with PEFT\n" if adapter["peft_type"] == "PROPULSION" else ""
    )
    name = f"AutoPeftModel{TASK_HEADS.get(adapter.get('task_type'), '')}"
    return f'{propulsion}from peft import {name}\n\nmodel = {name}.from_pretrained("FOLDER")'
