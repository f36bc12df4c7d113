"""What a report shows of local paths: their last part, so that it tells others nothing of the machine."""

from __future__ import annotations

import os
import re
from typing import Any

PATHS = {"output", "data", "files", "chat_template", "start", "include_path"}
"""Keys of a recipe whose texts are paths, or words that no shortening changes."""
TEXTS = {"prompt", "completion", "text", "answer", "choices"}
"""Keys of a recipe whose texts are for the model or from it: `/think {{ question }}` is no path."""
LOCAL = re.compile(r"~[^/\\]*[/\\]|/|\\\\|[A-Za-z]:[/\\]|\.{1,2}[/\\]|file:")
"""How a local path begins, on whatever machine."""


def without_paths(tree: Any, *, known: bool = False) -> Any:
    """Plain values as they may be shown to others: of each local path the last part only, however deep it is.

    A path is what begins as one, on this machine or another, and what exists here and is more than a name. Names on
    the Hub stay whole, unless a folder is in their way here.

    Args:
        tree: a recipe, or settings: mappings, lists and plain values.
        known: whether texts are known to be paths, whatever they look like.

    Source: ours.

    Example:
        >>> without_paths({"model": "org/tiny", "output": "runs/first", "training": {"deepspeed": "/home/me/ds.json"}})
        {'model': 'org/tiny', 'output': 'first', 'training': {'deepspeed': 'ds.json'}}
    """
    if isinstance(tree, dict):
        return {
            key: value if key in TEXTS else without_paths(value, known=known or key in PATHS)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [without_paths(value, known=known) for value in tree]
    return last_part(tree) if isinstance(tree, str) and (known or _is_path(tree)) else tree


def last_part(path: str) -> str:
    """The last part of a path of this machine or another.

    Example:
        >>> last_part("/home/me/model/"), last_part(r"C:\\models\\tiny"), last_part("model")
        ('model', 'tiny', 'model')
    """
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _is_path(text: str) -> bool:
    return LOCAL.match(text) is not None or (("/" in text or os.sep in text) and os.path.exists(text))
