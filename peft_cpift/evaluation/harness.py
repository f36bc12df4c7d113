"""Tasks of lm-evaluation-harness on a model in memory."""

from __future__ import annotations

import difflib
import logging

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from datasets.exceptions import DatasetsError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_cpift.errors import CpiftError
from peft_cpift.recipe.tree import LmEval


def check_harness(settings: LmEval) -> None:
    """Check, before a model is loaded, that the tasks can be run: loads their definitions and data sets.

    Raises:
        CpiftError: the package is not installed, a task is unknown, its data cannot be loaded, or it would execute
            code that the model writes.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CpiftError("'evaluation.lm_eval' needs lm-eval: pip install 'peft-cpift[lm-eval]'") from error
    folder = settings.include_path
    if folder is not None and not folder.is_dir():
        raise CpiftError(f"'evaluation.lm_eval.include_path' is {folder}, which is not a folder: name one with tasks")
    manager = TaskManager(include_path=folder)
    for name in settings.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            cure = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise CpiftError(f"'evaluation.lm_eval.tasks': lm-evaluation-harness has no task '{name}': {cure}")
        try:
            tasks = manager.load(name)["tasks"]
        except (DatasetsError, ValueError, OSError) as error:
            raise CpiftError(
                f"'evaluation.lm_eval.tasks': the data of '{name}' cannot be loaded: {' '.join(str(error).split())}; "
                "connect to the Hub once, or leave the task out"
            ) from error
        unsafe = next((part for part, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)), None)
        if unsafe is not None:
            raise CpiftError(
                f"'evaluation.lm_eval.tasks': '{unsafe}' executes the code that the model writes, which is not "
                "supported: leave it out"
            )


def score_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: LmEval, batch_size: int
) -> dict[str, dict[str, float]]:
    """Score `model`, also one with an adapter, on tasks of lm-evaluation-harness.

    Of several processes, each holding the whole model, every one scores its share and gets all scores. The model is
    left in evaluation mode, and the global seeds are set to the harness's own.

    Args:
        settings: tasks that `check_harness` accepts.
        batch_size: rows at once.

    Returns:
        Name of a task or group -> metric -> value, as the harness names them (`acc`, `acc_stderr`,
        `exact_match,strict-match`), with the filter left out where it is none. A standard error is missing where the
        harness has none.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # It warns of models in memory, which are what this function is about.
    logging.getLogger(HFLM.__module__).setLevel(logging.ERROR)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    state = PartialState()
    if state.num_processes > 1:
        # The wrapper takes a model in memory for that of a single process, and leaves the rest to its caller.
        wrapped.accelerator = Accelerator()
        wrapped._rank, wrapped._world_size = state.process_index, state.num_processes
    found = simple_evaluate(
        model=wrapped,
        tasks=list(settings.tasks),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=TaskManager(include_path=settings.include_path),
        log_samples=False,
    )
    scores = {name: _numbers(row) for name, row in found["results"].items()} if state.is_main_process else {}
    return broadcast_object_list([scores])[0]


def _numbers(row: dict) -> dict[str, float]:
    """The metrics in a row of results, which also holds its name and "N/A" for standard errors that there are not."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if "," in key and not isinstance(value, str)
    }
