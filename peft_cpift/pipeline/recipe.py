"""The recipe of a run: one tree of dataclasses, read from YAML, checked before any model is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from peft_cpift.errors import CpiftError

STRICT = ConfigDict(extra="forbid")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _check_template(text: str) -> str:
    try:
        TEMPLATES.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not a Jinja template: {error.message}") from error
    return text


def _present(value: object) -> object:
    if value is None:
        raise ValueError("a column that it uses is null")
    return value


# A sandbox, for a template has no business with Python's inside; strict, since a misspelt or empty column must not
# become the text "" or "None".
TEMPLATES = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=_present, keep_trailing_newline=True
)
Template = Annotated[str, Field(min_length=1), AfterValidator(_check_template)]


@dataclass(config=STRICT)
class HubData:
    """A data set of the Hub, or any that `datasets.load_dataset` finds by name."""

    name: str
    """What `load_dataset` takes first, for instance `openai/gsm8k`."""
    subset: str | None = None
    """Its configuration, for instance `main`."""
    revision: str | None = None
    """Its branch, tag or commit."""
    train: str = "train"
    """Split to train on; slices such as `train[:90%]` work."""
    test: str = "test"
    """Split to score on."""
    prompt: Template = "{{ prompt }}"
    """The prompt, a Jinja template over the row's columns: `{{ question }}`, `{{ messages[0].content }}`."""
    completion: Template = "{{ completion }}"
    """The completion, likewise: `{{ "ABCD"[label] }}`."""


@dataclass(config=STRICT)
class Task:
    """One task: its data and how it is scored."""

    hub: HubData | None = None
    """Where the data comes from, unless the recipe's `data` names a folder."""
    train_samples: Annotated[int, Field(ge=1)] | None = None
    """Rows to train on, drawn by the seed; all by default."""
    test_samples: Annotated[int, Field(ge=1)] | None = None
    """Rows to score on, drawn by the seed; all by default."""
    metric: Literal["loss", "exact_match", "choice"] = "loss"
    """`loss`: exp(-mean loss per token of the held-out completions), a probability. `exact_match`: share of greedy
    generations that equal the completion. `choice`: share of rows whose completion is the likeliest of `choices`."""
    answer: str | None = None
    """For `exact_match`: a regular expression whose first group is the answer, last match counting."""
    choices: list[str] | None = None
    """For `choice`: the candidates."""

    @model_validator(mode="after")
    def _agree(self):
        if (self.metric == "choice") != (self.choices is not None):
            raise ValueError("metric 'choice' and the list 'choices' go together: give both or neither")
        if self.answer is not None:
            if self.metric != "exact_match":
                raise ValueError("'answer' is for metric 'exact_match' only: remove it or change the metric")
            try:
                groups = re.compile(self.answer).groups
            except re.error as error:
                raise ValueError(f"'answer' is not a regular expression: {error}") from error
            if groups < 1:
                raise ValueError("'answer' has no group: put the part that is the answer in parentheses")
        return self


@dataclass(config=STRICT)
class Probe:
    """Stage 1: a brief fine-tuning on each task alone."""

    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig, over the recipe's own `training`."""


@dataclass(config=STRICT)
class Core:
    """Stage 1: what is core."""

    percent: Annotated[float, Field(gt=0, le=100)] = 1.0
    """p: the share of all coordinates, in percent."""


@dataclass(config=STRICT)
class Grouping:
    """Stage 2: which tasks train together, and in which order."""

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.1
    """tau: tasks whose cores have at least this Jaccard index are joined."""
    order: Literal["random", "difficulty"] | list[list[str]] = "random"
    """Order of the groups: shuffled by the seed, or easy first by the probes' training loss; or the groups themselves,
    in order, in place of those that the overlaps give."""


@dataclass(config=STRICT)
class Fusion:
    """Stage 3: cores transplanted, the rest interpolated."""

    start: Literal["multi_stage", "last_probe", "pretrained"] = "multi_stage"
    """theta_base: the end of a plain fine-tuning over the groups in their order (the paper), the probe of the last
    task of the last group, or the parameters before any training."""
    conflict: Literal["largest_update", "last", "mean"] = "largest_update"
    """What a coordinate in several cores takes."""
    space: Literal["weights", "delta"] = "weights"
    """Interpolate the weights (the paper), or their differences from the start of training."""
    omega: Annotated[float, Field(ge=0, le=1)] | None = None
    """A fixed factor for every task; by default all tasks and the start count alike."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig for `start: multi_stage`, over the recipe's own `training`."""


@dataclass(config=STRICT)
class Integration:
    """Stage 4: fine-tuning of the fused model under frozen cores."""

    schedule: Literal["staged", "mixed"] = "staged"
    """Group by group with the cores of earlier groups frozen (the paper), or all at once with every core frozen."""
    calibration_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the smallest task's training rows that is drawn from every task."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig, over the recipe's own `training`."""


@dataclass(config=STRICT)
class Evaluation:
    """How every model is scored on every task."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows at once."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of prompt and completion beyond which the loss is not taken."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest generation, for `exact_match`."""


@dataclass(config=STRICT)
class Report:
    """What is reported beside the method itself."""

    baseline: bool = True
    """Also train on all tasks mixed, for as many tokens as the whole method saw."""
    picture: bool = True
    """Draw the picture; needs matplotlib."""


@dataclass(config=STRICT)
class Recipe:
    """Everything that a run depends on."""

    model: str
    """A causal language model: a folder, or a name on the Hub."""
    output: Path
    """The run's folder; must not exist, or be empty."""
    tasks: dict[Name, Task]
    """Two or more tasks by name."""
    data: Path | None = None
    """A folder with `<task>_train.jsonl` and `<task>_test.jsonl`, rows with `prompt` and `completion`; by default each
    task's data comes from the Hub."""
    prompt: Template = "{{ prompt }}"
    """How a task's prompt is put to the model, for instance `"Question: {{ prompt }}\\nAnswer:\\n"`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the model is loaded; `auto` is as it was saved."""
    trust_remote_code: bool = False
    """Whether the model may bring Python code of its own."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling, shuffling and training."""
    tuner: Literal["full"] | dict[str, Any] = dataclasses.field(default_factory=lambda: {"peft_type": "PROPULSION"})
    """`full`, or a PEFT configuration by its `peft_type` and fields."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig for every training of the run; each stage's own go over them."""
    probe: Probe = dataclasses.field(default_factory=Probe)
    core: Core = dataclasses.field(default_factory=Core)
    grouping: Grouping = dataclasses.field(default_factory=Grouping)
    fusion: Fusion = dataclasses.field(default_factory=Fusion)
    integration: Integration = dataclasses.field(default_factory=Integration)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    report: Report = dataclasses.field(default_factory=Report)

    @field_validator("tasks")
    @classmethod
    def _several(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        if len(tasks) < 2:
            raise ValueError("there is nothing to fuse with fewer than two tasks: add another")
        return tasks

    @model_validator(mode="after")
    def _agree(self):
        for name, task in self.tasks.items():
            if self.data is None and task.hub is None:
                raise ValueError(f"task '{name}' has no data: give tasks.{name}.hub, or data, a folder of JSON lines")
        if isinstance(self.grouping.order, list):
            listed = sorted(task for group in self.grouping.order for task in group)
            if listed != sorted(self.tasks):
                raise ValueError(f"grouping.order lists {listed}, but the tasks are {sorted(self.tasks)}")
        if jinja2.meta.find_undeclared_variables(TEMPLATES.parse(self.prompt)) != {"prompt"}:
            raise ValueError("'prompt' must contain {{ prompt }}, where the task's prompt goes, and no other variable")
        return self

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as written to YAML and JSON."""
        return TypeAdapter(Recipe).dump_python(self, mode="json")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which makes nothing but plain values, with two traps of YAML 1.1 taken away."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse a key that is given twice, where YAML would keep the last in silence."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes a number as common as 5e-3 for a string, because it has no point.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def read_recipe(file: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML.

    Args:
        file: the recipe.
        overrides: `key=value` each; the key's parts are joined by dots (`core.percent=0.5`), the value is YAML.

    Raises:
        CpiftError: the file cannot be read, or a key is unknown, missing, of the wrong kind or contradicts another;
            the message names every such key by its path.
    """
    try:
        tree = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise CpiftError(f"cannot read recipe {file}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise CpiftError(f"recipe {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise CpiftError(f"recipe {file} is not a mapping of keys to values: see recipes/ for examples")
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain values; see `read_recipe`."""
    try:
        return TypeAdapter(Recipe).validate_python(tree)
    except ValidationError as error:
        raise CpiftError("; ".join(_explain(problem) for problem in error.errors())) from None


def _override(tree: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    if not found or not path:
        raise CpiftError(f"'{override}' is not of the form key=value, for instance core.percent=0.5")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise CpiftError(f"the value of '{path}' is not YAML: {' '.join(str(error).split())}") from error
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise CpiftError(f"'{override}': '{key}' has no keys below it")
    tree[last] = value


def _explain(problem: dict[str, Any]) -> str:
    # pydantic also names the branch of a union, and marks a mapping's key, which are no part of the user's path.
    path = [str(part) for part in problem["loc"] if not re.match(r"(literal|dict|list)\[|\[key\]", str(part))]
    where = ".".join(path) or "recipe"
    if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        near = difflib.get_close_matches(path[-1], _all_keys(), n=1)
        return f"unknown key '{where}'" + (f": did you mean '{near[0]}'?" if near else ": remove it")
    if problem["type"] in {"missing", "missing_argument"}:
        return f"missing key '{where}'"
    message = problem["msg"].removeprefix("Value error, ")
    if where == "recipe" or problem["type"] == "value_error":
        return message if where == "recipe" else f"'{where}': {message}"
    return f"'{where}': {message}, got {reprlib.repr(problem['input'])}"


def _all_keys() -> list[str]:
    """Every key of every level, each once."""
    sections = [Recipe, Task, HubData, Probe, Core, Grouping, Fusion, Integration, Evaluation, Report]
    return sorted({field.name for section in sections for field in dataclasses.fields(section)})
