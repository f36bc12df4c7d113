"""Uploading a finished run: one commit with everything that others need to use it and to judge it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from peft_cpift.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from peft_cpift.core.importance import FILE as IMPORTANCE
from peft_cpift.errors import CpiftError
from peft_cpift.hub.card import Subject, model_card
from peft_cpift.report.page import read_report
from peft_cpift.report.paths import without_paths

CARD = "README.md"
PICTURE = "report/report.png"
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}
"""Suffixes of files that run code when they are read, such as the Trainer's `training_args.bin`: never uploaded."""
REPLACED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "cores/*.safetensors",
    PICTURE,
)
"""What an earlier push may have left that must not stand beside a later one's files: other weights, other tasks."""
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
BINARY = {".safetensors", ".png"}


def push_run(
    run: str | os.PathLike, repository: str, *, private: bool | None = None, base_model: str | None = None
) -> str:
    """Upload a finished run to the Hub, in one commit, with a model card.

    At the top lies what `from_pretrained` loads: the files of `RUN/final`. Beside it are `cores/<task>.safetensors`,
    `report/`, and `recipe.yaml` with no more than the last part of each local path. Weights and cores that an earlier
    push left under other names go in the same commit. Hidden and unfinished files, folders inside `final`, and
    pickled files stay where they are.

    Args:
        run: the run's folder.
        repository: as `user/name`; made if it does not exist.
        private: True makes a new repository private, and refuses one that exists and is public. None and False make a
            new one public, and leave one that exists as it is: a private one is never opened.
        base_model: the base model's name on the Hub, where the run had it from a local folder. An adapter needs it,
            for it loads with its base model only: it is written to the uploaded `adapter_config.json` and the card.

    Returns:
        The address of the commit.

    Raises:
        CpiftError: the run is not complete; an adapter's base model is not on the Hub; the repository is public and
            `private` is true; a file holds an access token; or the Hub refuses or is not to be reached. Nothing was
            committed then; a new repository may have been made.

    Source: ours.

    Example:
        >>> push_run("no/such/run", "me/maths-and-code")
        Traceback (most recent call last):
        ...
        peft_cpift.errors.CpiftError: no/such/run has no final/: finish the run with `cpift run`
    """
    run = Path(run)
    if not _is_name(repository) or "/" not in repository:
        raise CpiftError(f"{repository!r} is no name of a repository: give it as user/name")
    _check_complete(run)
    report, recipe = read_report(run), _read_recipe(run)
    _check_cores(run, report["cores"])
    adapter = _open_final(run).adapter_config
    with _in_one_line(repository):
        api = HfApi()
        base = _find_base(api, adapter.get("base_model_name_or_path") if adapter else recipe["model"], base_model)
        if adapter and base is None:
            raise CpiftError(
                f"the adapter's base model '{Path(adapter.get('base_model_name_or_path') or '').name}' is not on the "
                "Hub, and without it nobody can load the adapter: give its name there with --base-model"
            )
        subject = Subject(
            repository=repository,
            report=report,
            peft_type=adapter.get("peft_type"),
            base=base,
            datasets=frozenset(name for name in _named_datasets(recipe) if _is_on_hub(api, name, "dataset")),
            picture=PICTURE if (run / PICTURE).is_file() else None,
        )
        files: dict[str, Path | bytes] = dict(_files(run, report["cores"]))
        files["recipe.yaml"] = yaml.safe_dump(without_paths(report["recipe"]), sort_keys=False).encode()
        files[CARD] = str(model_card(subject)).encode()
        if adapter:
            named = {**without_paths(adapter), "base_model_name_or_path": base}
            files[ADAPTER_CONFIG] = (json.dumps(named, indent=2) + "\n").encode()
        _check_tokens(files)
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise CpiftError(
                f"{repository} exists and is public: make it private in its settings, choose another name, or push "
                "without --private"
            )
        stale = [path for path in api.list_repo_files(repository) if _is_replaced(path) and path not in files]
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path, content) for path, content in files.items()),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message="Push a run of CPI-FT",
        )
    return str(commit.commit_url)


def _check_complete(run: Path) -> None:
    for part in ("final/", "cores/", "recipe.yaml", "report/report.json", "report/index.html"):
        if not (run / part).exists():
            raise CpiftError(f"{run} has no {part}: finish the run with `cpift run`")


def _open_final(run: Path) -> Checkpoint:
    """The result; opening it reads the headers, and so finds what is missing or cut off."""
    try:
        return Checkpoint(run / "final")
    except CpiftError as error:
        raise CpiftError(f"{run}/final is not complete, finish the run with `cpift run`: {error}") from error


def _check_cores(run: Path, tasks: Iterable[str]) -> None:
    missing = next((task for task in tasks if not (run / "cores" / f"{task}.safetensors").is_file()), None)
    if missing is not None:
        raise CpiftError(f"{run} has no cores/{missing}.safetensors: finish the run with `cpift run`")


def _read_recipe(run: Path) -> dict[str, Any]:
    """The recipe with its paths whole, so that a local folder is known for what it is."""
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CpiftError(f"cannot read {run}/recipe.yaml: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict) or not {"model", "tasks"} <= recipe.keys():
        raise CpiftError(f"{run}/recipe.yaml is not a run's recipe: finish the run with `cpift run`")
    return recipe


def _find_base(api: HfApi, name: str | None, given: str | None) -> str | None:
    """The base model's name on the Hub: the given one, else the run's own if it is one."""
    if given is not None:
        if not _is_name(given) or not api.repo_exists(given):
            raise CpiftError(f"base model '{given}' is not on the Hub: give its name there, as org/name")
        return given
    return name if name and _is_on_hub(api, name, "model") else None


def _is_on_hub(api: HfApi, name: str, kind: str) -> bool:
    """Whether a name means a repository; a folder comes first, as it does for those who load it."""
    return _is_name(name) and not Path(name).exists() and api.repo_exists(name, repo_type=kind)


def _is_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _named_datasets(recipe: dict[str, Any]) -> set[str]:
    return {task["hub"]["name"] for task in recipe["tasks"].values() if task.get("hub")}


def _files(run: Path, tasks: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """What is uploaded as it is: the path in the repository, and the file."""
    for file in sorted((run / "final").iterdir()):
        unfinished = file.name.startswith(".") or file.suffix == ".part"
        if file.is_file() and not unfinished and file.suffix not in PICKLES and file.name not in (CARD, IMPORTANCE):
            yield file.name, file
    for path in (*(f"cores/{task}.safetensors" for task in tasks), "report/report.json", "report/index.html", PICTURE):
        if (run / path).is_file():
            yield path, run / path


def _is_replaced(path: str) -> bool:
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in REPLACED)


def _check_tokens(files: dict[str, Path | bytes]) -> None:
    """Raise CpiftError if a text holds an access token, for instance from `hub_token` among a recipe's settings."""
    own = (get_token() or "").encode()
    for path, content in files.items():
        if Path(path).suffix in BINARY:
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if TOKEN.search(text) or (own and own in text):
            raise CpiftError(
                f"{path} holds an access token, so nothing was pushed: take the token out of the recipe and the run, "
                "and log in with `hf auth login`"
            )


@contextmanager
def _in_one_line(repository: str) -> Iterator[None]:
    """Turn what the Hub's client raises into CpiftErrors."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise CpiftError(f"cannot push to {repository} while HF_HUB_OFFLINE is set: unset it") from error
    except (HTTPError, RuntimeError) as error:  # RuntimeError: the client's own, around a failed upload of a file
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            cure = "log in with `hf auth login` and a token that may write to it"
        else:
            cure = "check the name and the connection, and push again"
        reason = "refused" if status in (401, 403) else " ".join(str(error).split())
        code = f" ({status})" if status else ""
        raise CpiftError(f"the Hub did not take {repository}{code}, {reason}: {cure}") from error
