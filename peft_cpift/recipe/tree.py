"""The recipe of a run: one tree of dataclasses, from which its checks, its starter file and its help are made."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from peft_cpift.recipe.templates import Template, variables

# The text under a field is its description, for whoever reads the tree by its schema.
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _named(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError(
            "is no name of a task, after which files are named: up to 100 letters, digits, '.', '_' and '-', "
            "the first one a letter or digit"
        )
    return name


Name = Annotated[str, AfterValidator(_named)]


def _filled(section: object) -> object:
    return {} if section is None else section  # as a section is in YAML whose keys are all commented out


# Strictly, since YAML tells numbers and switches from text: "10" and "yes" are not what they look like.
Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Count = Annotated[Integer, Field(ge=1)]
Settings = Annotated[dict[str, JsonValue], BeforeValidator(_filled)]


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


@dataclass(config=STRICT)
class Files:
    """Local files by their suffix: JSON lines (`.jsonl`), JSON (`.json`), CSV with a header, whose values are all text
    (`.csv`), or Parquet (`.parquet`). Relative paths start at the working directory."""

    train: Path
    """Rows to train on."""
    test: Path
    """Rows to score on."""


@dataclass(config=STRICT)
class Task:
    """One task: its data and how it is scored."""

    hub: HubData | None = None
    """Its data on the Hub."""
    files: Files | None = None
    """Or its data in local files."""
    prompt: Template | None = None
    """The prompt, a Jinja template over the row's columns, such as `{{ question }}`; by default `{{ prompt }}`."""
    completion: Template | None = None
    """The completion, likewise, such as `{{ "ABCD"[label] }}`; by default `{{ completion }}`."""
    messages: str | None = None
    """Instead of the two: the column that holds a conversation. Its last answer is the completion, and what comes
    before it the prompt, both through `chat_template`; later turns are left out."""
    text: Template | None = None
    """Or: plain text without a prompt, such as `{{ text }}`; neither the recipe's `prompt` nor its `chat_template` is
    put around it."""
    train_samples: Count | None = None
    """Rows to train on, drawn by the seed; all by default."""
    test_samples: Count | None = None
    """Rows to score on, drawn by the seed; all by default."""
    weight: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its weight in the fusion, next to the other tasks' and the start's."""
    metric: Literal["loss", "exact_match", "choice", "codebleu"] = "loss"
    """`loss`: exp(-mean loss per token of the held-out completions), a probability. `exact_match`: share of greedy
    generations that equal the completion. `choice`: share of rows whose completion is the likeliest of `choices`.
    `codebleu`: CodeBLEU of greedy generations, all rows together, which needs `pip install 'peft-cpift[code]'`."""
    answer: str | None = None
    """For `exact_match`: a regular expression whose first group is the answer, last match counting."""
    choices: list[str] | None = None
    """For `choice`: the candidates. Where the tokens of one begin those of another, such as `1` and `10`, all are
    scored with the end of the completion, otherwise without."""
    language: str | None = None
    """For `codebleu`: the programming language, such as `python`."""

    @model_validator(mode="after")
    def _agree(self):
        if self.hub is not None and self.files is not None:
            raise ValueError("'hub' and 'files' are two sources of the data: keep one")
        templates = self.prompt is not None or self.completion is not None
        if templates + (self.messages is not None) + (self.text is not None) > 1:
            raise ValueError("'prompt' and 'completion', 'messages', and 'text' exclude each other: keep one form")
        if self.text is not None and self.metric != "loss":
            raise ValueError(f"plain 'text' has no prompt to answer: metric '{self.metric}' needs prompts, use 'loss'")
        for key, metric in (("choices", "choice"), ("language", "codebleu")):
            if (self.metric == metric) != (getattr(self, key) is not None):
                raise ValueError(f"metric '{metric}' and '{key}' go together: give both or neither")
        if self.answer is not None:
            if self.metric != "exact_match":
                raise ValueError("'answer' is for metric 'exact_match' only: remove it or change the metric")
            try:
                groups = re.compile(self.answer).groups
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"'answer' is not a regular expression: {error}") from error
            if groups < 1:
                raise ValueError("'answer' has no group: put the part that is the answer in parentheses")
        return self


@dataclass(config=STRICT)
class Probe:
    """Stage 1: a brief fine-tuning on each task alone."""

    training: Settings = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig, over the recipe's own `training`."""


@dataclass(config=STRICT)
class Core:
    """Stage 1: what is core."""

    percent: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """p: the share of all coordinates, in percent."""
    importance: Literal["update", "second_moment"] = "update"
    """By what they are chosen. `update`: how far the training moved each (the paper). `second_moment`: the size of the
    gradients that each had, as AdamW remembers it when the training ends."""
    scope: Literal["global", "tensor"] = "global"
    """`global`: the largest of all tensors together (the paper); `tensor`: p percent of each tensor."""
    exclude: list[str] = dataclasses.field(default_factory=list)
    """Patterns of tensor names that are never core, such as `*embed_tokens*`."""


@dataclass(config=STRICT)
class Grouping:
    """Stage 2: which tasks train together, and in which order."""

    threshold: Annotated[Number, Field(ge=0, le=1)] = 0.1
    """tau: tasks whose cores have at least this Jaccard index are joined."""
    order: Literal["random", "difficulty", "overlap", "dependency"] | list[list[str]] = "random"
    """Order of the groups. `random`: shuffled by the seed (the paper). `difficulty`: easy first, by the probes'
    training loss. `overlap`: least overlap with the others first. `dependency`: helpers first, by `helps`. Or the
    groups themselves, in order, in place of those that the overlaps give."""
    helps: Literal["measured"] | list[tuple[str, str]] | None = None
    """For `dependency`: pairs `[a, b]`, task a helps task b; or `measured`, a pair wherever the probe of a lowers the
    loss on training rows of b, and by more than the probe of b does for a; of pairs that form a circle of groups,
    the least clear is left aside."""

    @model_validator(mode="after")
    def _agree(self):
        if (self.order == "dependency") != (self.helps is not None):
            raise ValueError("order 'dependency' and 'helps' go together: give both or neither")
        return self


@dataclass(config=STRICT)
class Fusion:
    """Stage 3: cores transplanted, the rest interpolated."""

    start: str = "multi_stage"
    """theta_base: `multi_stage`, the end of a plain fine-tuning over the groups in their order (the paper);
    `last_probe`, that of the last task of the last group; `pretrained`, the parameters before any training; or a
    folder with such parameters."""
    start_weight: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 1.0
    """The start's own weight in the interpolation; 0 forgets it outside the cores."""
    conflict: Literal["largest_update", "last", "mean"] = "largest_update"
    """What a coordinate in several cores takes: `largest_update`, of the task that moved it most; `last`, of the last
    of these tasks; or their `mean`."""
    space: Literal["weights", "delta"] = "weights"
    """Interpolate the `weights` (the paper), or as `delta` their differences from the start of training."""
    omega: Annotated[Number, Field(ge=0, le=1)] | None = None
    """A fixed factor for every task; by default all tasks and the start count by their weights."""
    training: Settings = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig for `start: multi_stage`, over the recipe's own `training`."""


@dataclass(config=STRICT)
class Integration:
    """Stage 4: fine-tuning of the fused model under frozen cores."""

    schedule: Literal["staged", "mixed", "none"] = "staged"
    """`staged`: group by group with the cores of earlier groups frozen (the paper). `mixed`: all at once with every
    core frozen. `none`: the fused model is the result."""
    calibration_fraction: Annotated[Number, Field(gt=0, le=1)] = 0.25
    """Share of the training rows that is drawn, as many from every task; all of a task that has fewer."""
    dynamic_regions: Switch = False
    """Find after each stage the stage's own core, `core.percent` of all coordinates, and freeze that as well in later
    stages."""
    training: Settings = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig, over the recipe's own `training`."""

    @model_validator(mode="after")
    def _agree(self):
        if self.dynamic_regions and self.schedule != "staged":
            raise ValueError("'dynamic_regions' are for later stages: they need schedule 'staged'")
        return self


@dataclass(config=STRICT)
class Baselines:
    """Ordinary fine-tunings to compare with, each for as many tokens as all stages of the method together."""

    multi_task: Switch = True
    """All tasks mixed."""
    random_stages: Count | None = None
    """Tasks dealt into this many stages by the seed, trained one after another (the paper's K = 3)."""
    heuristic_stages: list[list[str]] | None = None
    """Stages as you would choose them, trained one after another."""
    merge: list[Literal["linear", "ties", "dare_linear", "dare_ties"]] = dataclasses.field(default_factory=list)
    """The probes merged in other ways, without training: a list of `linear`, `ties`, `dare_linear`, `dare_ties`."""
    density: Annotated[Number, Field(gt=0, le=1)] = 0.2
    """Share of each task's changes that `ties` and `dare_*` keep."""
    training: Settings = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig, over the recipe's own `training`; how long they train is not among them."""

    @model_validator(mode="after")
    def _agree(self):
        twice = next((method for method in self.merge if self.merge.count(method) > 1), None)
        if twice is not None:
            raise ValueError(f"'merge' lists {twice} twice: list each once")
        return self


@dataclass(config=STRICT)
class LmEval:
    """Tasks of lm-evaluation-harness, which needs `pip install 'peft-cpift[lm-eval]'`."""

    tasks: Annotated[list[str], Field(min_length=1)]
    """Names of its tasks, such as `arc_easy`."""
    limit: Count | None = None
    """Rows of each task; all by default."""
    num_fewshot: Annotated[Integer, Field(ge=0)] | None = None
    """Examples in the prompt; each task's own number by default."""
    include_path: Path | None = None
    """A folder with tasks of your own. It can name Python functions, so use only what you trust."""


@dataclass(config=STRICT)
class Evaluation:
    """How every model is scored on every task."""

    batch_size: Count = 16
    """Rows at once."""
    max_length: Annotated[Integer, Field(ge=2)] = 1024
    """Tokens of prompt and completion beyond which the loss is not taken."""
    max_new_tokens: Count = 64
    """Longest generation, for `exact_match` and `codebleu`."""
    lm_eval: LmEval | None = None
    """Score the base model, the result and the baselines on tasks of lm-evaluation-harness too."""


@dataclass(config=STRICT)
class Report:
    """What is reported beside the tables."""

    picture: Switch = True
    """Draw the picture for pages that show no HTML; needs matplotlib."""


@dataclass(config=STRICT)
class Push:
    """Where the result goes on the Hub when the run is done."""

    repository: str
    """As `user/name`; made if it does not exist."""
    private: Switch = False
    """Make a new repository a private one; one that is there and public is refused."""
    base_model: str | None = None
    """For an adapter whose `model` is a local folder: the name on the Hub of the model that it is for."""

    @field_validator("repository")
    @classmethod
    def _allowed(cls, repository: str) -> str:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise ValueError(f"is not of the form user/name, got {repository!r}")
        validate_repo_id(repository)
        return repository


SECTIONS = ("probe", "core", "grouping", "fusion", "integration", "baselines", "evaluation", "report")


@dataclass(config=STRICT)
class Recipe:
    """Everything that a run depends on."""

    model: str
    """A causal language model: a folder, or a name on the Hub."""
    output: Path
    """The run's folder. The same command started again goes on where an earlier one stopped."""
    tasks: dict[Name, Annotated[Task, BeforeValidator(_filled)]]
    """Two or more tasks by name."""
    revision: str | None = None
    """The model's branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the model is loaded: `float32`, `bfloat16`, `float16`, or `auto`, as it was saved."""
    trust_remote_code: Switch = False
    """Whether the model may bring Python code of its own."""
    data: Path | None = None
    """A folder with `<task>_train.jsonl` and `<task>_test.jsonl`, rows with `prompt` and `completion`, in place of the
    tasks' own sources and columns; a task of plain `text` takes them as one."""
    prompt: Template = "{{ prompt }}"
    """How every task's prompt is put to the model, for instance `"Question: {{ prompt }}\\nAnswer:\\n"`; not for
    `messages` and `text`."""
    chat_template: str | None = None
    """`model`, the one that comes with the model's tokenizer, or a Jinja file. Prompts become a user's message and
    completions the answer. Without it texts are used as they are. What the template puts before an answer, such as an
    empty block of thoughts, counts as the prompt, and dates are fixed."""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Of sampling, shuffling and training."""
    tuner: Literal["full"] | dict[str, JsonValue] = dataclasses.field(
        default_factory=lambda: {"peft_type": "PROPULSION"}
    )
    """`full`, or a PEFT configuration by its `peft_type` and fields."""
    training: Settings = dataclasses.field(default_factory=dict)
    """Fields of TRL's SFTConfig for every training of the run; each stage's own go over them."""
    probe: Probe = dataclasses.field(default_factory=Probe)
    core: Core = dataclasses.field(default_factory=Core)
    grouping: Grouping = dataclasses.field(default_factory=Grouping)
    fusion: Fusion = dataclasses.field(default_factory=Fusion)
    integration: Integration = dataclasses.field(default_factory=Integration)
    baselines: Baselines = dataclasses.field(default_factory=Baselines)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    report: Report = dataclasses.field(default_factory=Report)
    push: Push | None = None

    @field_validator(*SECTIONS, mode="before")
    @classmethod
    def _sections(cls, section: object) -> object:
        return _filled(section)

    @field_validator("tasks")
    @classmethod
    def _several(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        if len(tasks) < 2:
            raise ValueError("there is nothing to fuse with fewer than two tasks: add another")
        if "average" in tasks:
            raise ValueError("the scores have a column 'average' over all tasks: give the task 'average' another name")
        alike: dict[str, str] = {}
        for name in tasks:
            other = alike.setdefault(name.lower(), name)
            if other != name:
                raise ValueError(f"'{other}' and '{name}' would share their files on some disks: rename one")
        return tasks

    @field_validator("tuner", mode="before")
    @classmethod
    def _form(cls, tuner: object) -> object:
        if tuner != "full" and not isinstance(tuner, dict):
            raise ValueError(f"is full, or a PEFT configuration {{peft_type: LORA, ...}}, got {reprlib.repr(tuner)}")
        return tuner

    @model_validator(mode="after")
    def _agree(self):
        for name, task in self.tasks.items():
            if self.data is None and task.hub is None and task.files is None:
                raise ValueError(f"task '{name}' has no data: give tasks.{name}.hub or tasks.{name}.files")
            if self.data is not None and task.files is not None:
                raise ValueError(f"'data' is read in place of 'tasks.{name}.files': give one of the two")
            if self.data is None and task.messages is not None and self.chat_template is None:
                raise ValueError(
                    f"task '{name}' has messages, which need a chat_template: set it to 'model' or to a Jinja file"
                )
        for key, stages in (
            ("grouping.order", self.grouping.order),
            ("baselines.heuristic_stages", self.baselines.heuristic_stages),
        ):
            if isinstance(stages, list):
                listed = sorted(task for stage in stages for task in stage)
                if listed != sorted(self.tasks):
                    raise ValueError(f"{key} lists {listed}, but the tasks are {sorted(self.tasks)}: list each once")
                if not all(stages):
                    raise ValueError(f"{key} has an empty stage: remove it")
        for pair in self.grouping.helps if isinstance(self.grouping.helps, list) else ():
            odd = next((task for task in pair if task not in self.tasks), None)
            if odd is not None:
                raise ValueError(f"grouping.helps names '{odd}', but the tasks are {sorted(self.tasks)}")
        if (self.baselines.random_stages or 1) > len(self.tasks):
            raise ValueError(f"baselines.random_stages is more than the {len(self.tasks)} tasks: lower it")
        if variables(self.prompt) != {"prompt"}:
            raise ValueError("'prompt' must contain {{ prompt }}, where the task's prompt goes, and no other variable")
        weighted = next((name for name, task in self.tasks.items() if task.weight != 1), None)
        if self.fusion.omega is not None and weighted is not None:
            raise ValueError(f"fusion.omega fixes what tasks.{weighted}.weight would decide: give one of the two")
        if self.fusion.omega is not None and self.fusion.start_weight != 1:
            raise ValueError("fusion.omega fixes what fusion.start_weight would decide: give one of the two")
        return self

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as written to YAML and JSON."""
        return TypeAdapter(Recipe).dump_python(self, mode="json")
