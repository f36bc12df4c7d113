"""The section of a model card that says how to load a Propulsion adapter.

Stock PEFT does not know Propulsion: a reader who loads the adapter without `import peft_cpift` meets a bare
`KeyError: 'PROPULSION'`, in which nothing points to this package. So every save writes the section into the card, as
`PropulsionConfig.save_pretrained` calls `add_loading_section`.

Pushing needs one line more. `push_to_hub` of PEFT, TRL and transformers saves the adapter, and then puts a card of its
own over the saved one, without any hook in between. `update_card` mends the card that has been pushed:

    trainer.push_to_hub()
    update_card("name/repository")
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from peft_cpift.errors import CpiftError

TAGS = ("propulsion", "peft-cpift")
"""Put into the card's front matter, so that the Hub's search finds the adapter and its page names the package."""

_CARD = "README.md"
_BEGIN = "<!-- peft_cpift: written anew at every save, put your own text outside -->"
_END = "<!-- peft_cpift: end -->"
# a begin without its end, left by an edit, must not swallow the text up to the end of a later section
_SECTION = re.compile(f"{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL)
_FENCE = re.compile(r" {0,3}(```|~~~)")
_CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS")
_HEAD_WEIGHT = re.compile(r"\.(?:score|classifier)(?:\.out_proj)?\.weight$")


def add_loading_section(folder: str | os.PathLike) -> None:
    """Write into the model card of a saved adapter how to load it; `PropulsionConfig.save_pretrained` calls this.

    The section stands above the card's first section. Saving again replaces it; the rest of the text stays as it was,
    and the front matter keeps all but its comments and gains the tags `propulsion` and `peft-cpift`. A folder without
    a card gets one. Each adapter has its own: PEFT saves the adapter `default` to the folder itself, others to
    subfolders.

    A card beside which there are no adapter weights is left alone: who saves a bare configuration may do so anywhere,
    for instance beside the README of a project.

    Args:
        folder: Where the adapter was saved, with `adapter_config.json`.

    Raises:
        CpiftError: `adapter_config.json` cannot be read or is not that of a Propulsion adapter, or the card's front
            matter cannot be read.

    Source: ours; `KeyError: 'PROPULSION'` is what PEFT 0.21 raises for a method that it does not know.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> config = {"peft_type": "PROPULSION", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2"}
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps(config))
        >>> (folder / "adapter_model.safetensors").touch()
        >>> add_loading_section(folder)
        >>> "import peft_cpift" in (folder / "README.md").read_text()
        True
    """
    folder = Path(folder)
    if _has_weights(folder) or not (folder / _CARD).exists():
        _write_card(folder, repository=None)


def update_card(adapter: str | os.PathLike, *, token: str | bool | None = None) -> None:
    """Write into the model card of an adapter, in a folder or on the Hub, how to load it.

    Call it after `push_to_hub`, which leaves a card without the section. On the Hub the section names the repository,
    and the change is a commit of its own.

    Args:
        adapter: The folder of a saved adapter, or the id of a repository with an adapter at its top.
        token: As in `push_to_hub`; by default the one that you are logged in with.

    Raises:
        CpiftError: There is no Propulsion adapter, its files or the card's front matter cannot be read, or the Hub
            does not find the repository or refuses the change.

    Source: ours.

    Example:
        >>> update_card("no/such/adapter")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        peft_cpift.errors.CpiftError: no/such/adapter is neither a folder nor a repository whose card ...
    """
    if Path(adapter).is_dir():
        if not _has_weights(Path(adapter)):
            raise CpiftError(f"{adapter} holds no adapter weights; name the folder that save_pretrained wrote.")
        _write_card(Path(adapter), repository=None)
        return
    repository, hub = os.fspath(adapter), HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            hub.hf_hub_download(repository, CONFIG_NAME, local_dir=folder)
            task = _read_config(Path(folder, CONFIG_NAME), repository).get("task_type")
            for name in (_CARD, SAFETENSORS_WEIGHTS_NAME) if task in _CLASSIFICATION else (_CARD,):
                if hub.file_exists(repository, name):
                    hub.hf_hub_download(repository, name, local_dir=folder)
            _write_card(Path(folder), repository)
            hub.upload_file(
                path_or_fileobj=Path(folder, _CARD),
                path_in_repo=_CARD,
                repo_id=repository,
                commit_message="Say how to load this adapter",
            )
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
            raise CpiftError(
                f"{repository} is neither a folder nor a repository whose card could be updated ({_one_line(error)}); "
                "check the name, the connection, and that you are logged in with the right to write to it."
            ) from error


def _write_card(folder: Path, repository: str | None) -> None:
    path = folder / _CARD
    where = repository or folder
    config = _read_config(folder / CONFIG_NAME, where)
    section = _loading_section(config, repository, _number_of_labels(config, folder / SAFETENSORS_WEIGHTS_NAME, where))
    try:
        card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: peft\n---\n")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CpiftError(
            f"the front matter of {where}/{_CARD} cannot be read ({_one_line(error)}); mend what stands between its "
            "lines '---', or remove the file."
        ) from error
    card.text = _insert(card.text, section)
    tags = card.data.tags or []
    card.data.tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    temporary = path.with_name(f".{_CARD}.{os.getpid()}.part")
    try:
        card.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _insert(text: str, section: str) -> str:
    """Put the section in place of an earlier one, else before the first heading of level two, else at the end."""
    newline = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", newline)
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: section, text, count=1)
    lines, fenced = text.splitlines(keepends=True), False
    for place, line in enumerate(lines):
        if _FENCE.match(line):
            fenced = not fenced
        elif line.startswith("## ") and not fenced:
            return "".join([*lines[:place], section, newline, newline, *lines[place:]])
    gap = newline if not text or text.endswith("\n") else newline * 2
    return f"{text}{gap}{section}{newline}"


def _loading_section(config: dict, repository: str | None, labels: int | None) -> str:
    base = config.get("base_model_name_or_path")
    adapter = f"adapter = {json.dumps(repository or '.')}"
    if repository is None:
        adapter += '  # the folder of this card, or the id of its repository on the Hub, such as "name/repository"'
    auto_class = _auto_class(config) if base else None
    if auto_class:
        imported = auto_class
        loading = [f"model = {auto_class}.from_pretrained(adapter{f', num_labels={labels}' if labels else ''})"]
        with_base = f" The lines below load the base model, `{base}`, too."
    else:
        imported, with_base = "PeftModel", ""
        loading = [
            f"base_model = ...  # the model that the adapter was trained on{f': {base}' if base else ''}",
            "model = PeftModel.from_pretrained(base_model, adapter)",
        ]
    lines = [
        _BEGIN,
        "## How to load this adapter",
        "",
        "This is a Propulsion adapter ([arXiv 2409.10927](https://arxiv.org/abs/2409.10927)), a method that the",
        "package `peft-cpift` adds to PEFT:",
        "",
        "    pip install peft-cpift",
        "",
        "`import peft_cpift` registers the method, and must come before any way of loading the adapter with PEFT or",
        f"transformers. Without that line, loading ends with `KeyError: 'PROPULSION'`.{with_base}",
        "",
        "```python",
        "import peft_cpift  # registers PROPULSION with PEFT",
        f"from peft import {imported}",
        "",
        adapter,
        *loading,
        "```",
        _END,
    ]
    return "\n".join(lines)


def _auto_class(config: dict) -> str | None:
    """Name PEFT's class that loads the adapter with its base model, if PEFT can tell the base model's class."""
    if config.get("task_type") is not None:
        model_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config["task_type"])
        return model_class and f"Auto{model_class.__name__}"
    library = (config.get("auto_mapping") or {}).get("parent_library", "")
    return "AutoPeftModel" if library.partition(".")[0] == "transformers" else None


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def _read_config(path: Path, where: str | Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CpiftError(f"{where} has no {CONFIG_NAME}; name the folder that save_pretrained wrote.") from None
    except ValueError as error:
        raise CpiftError(f"{where}/{CONFIG_NAME} is not JSON ({_one_line(error)}); save the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "PROPULSION":
        raise CpiftError(
            f"{where} is not a Propulsion adapter ({CONFIG_NAME} says peft_type={kind!r}); name one that is."
        )
    return config


def _number_of_labels(config: dict, path: Path, where: str | Path) -> int | None:
    """Read from the saved classification head how many labels it has, which the adapter's configuration omits.

    The base model knows only its own number of labels, by default 2; the saved head of another size would not fit.
    """
    if config.get("task_type") not in _CLASSIFICATION or not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if _HEAD_WEIGHT.search(name)]  # noqa: SIM118
            sizes = {file.get_slice(name).get_shape()[0] for name in names}
    except SafetensorError as error:
        raise CpiftError(
            f"{where}/{path.name} cannot be read ({_one_line(error)}); save the adapter again."
        ) from error
    return sizes.pop() if len(sizes) == 1 else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
