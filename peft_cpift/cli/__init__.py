"""The command line: the whole method from a recipe (`cpift run` and its kin), and its single steps on folders."""

from __future__ import annotations

import difflib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer

from peft_cpift.cli import files, runs
from peft_cpift.errors import CpiftError, MismatchWarning, NoEffectWarning

app = typer.Typer(
    help="Core parameter isolation (CPI-FT): find what matters most to each task, fuse, and fine-tune around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 130
GOES_ON = ": the same command goes on from here"
GRACE = 5
"""Seconds for which a process leaves it to the first one to say what is wrong."""
UsageError = typer.BadParameter.__base__
"""Click's, which newer typers bring along under a name of their own, and older ones import."""
FROM_A_RECIPE = "From a recipe"
app.command(rich_help_panel=FROM_A_RECIPE)(runs.init)
app.command(rich_help_panel=FROM_A_RECIPE, cls=runs.WithKeys)(runs.validate)
app.command(rich_help_panel=FROM_A_RECIPE, cls=runs.WithKeys)(runs.run)
app.command(rich_help_panel=FROM_A_RECIPE)(runs.probe)
app.command(rich_help_panel=FROM_A_RECIPE)(runs.demo)
ON_A_RUN = "With a run's folder"
app.command(rich_help_panel=ON_A_RUN)(runs.report)
app.command(rich_help_panel=ON_A_RUN)(runs.compare)
app.command(rich_help_panel=ON_A_RUN)(runs.push)
ON_FOLDERS = "On checkpoints and adapters of your own"
app.command(rich_help_panel=ON_FOLDERS)(files.core)
app.command(rich_help_panel=ON_FOLDERS)(files.group)
app.command(rich_help_panel=ON_FOLDERS)(files.fuse)


def main() -> None:
    """Run the command line.

    Exit codes: 0, all went well; 2, something in the call or its files is wrong, which the user can mend; 1, the disk
    failed, as when it is full; 130, it was interrupted. Each is one line without a traceback.

    Of several processes the first one has the word. What another one fails at, the first one mostly fails at too, and
    then the launcher ends the other while it waits; only what it meets alone it says itself.
    """
    others = int(os.environ.get("RANK", "0")) > 0
    try:
        with warnings.catch_warnings():
            if others:
                warnings.simplefilter("ignore")
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            code = app(None if sys.argv[1:] else ["--help"], prog_name="cpift", standalone_mode=False)
    except (CpiftError, UsageError, OSError) as error:
        if others:
            time.sleep(GRACE)
        text = _explain(error) if isinstance(error, UsageError) else error
        print(f"cpift: error: {text}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, OSError) else 2) from None
    except (KeyboardInterrupt, typer.Abort):  # typer makes the one into the other, or into the exit code
        code = INTERRUPTED
    if code == INTERRUPTED and not others:
        print(f"cpift: interrupted{GOES_ON if _goes_on(sys.argv[1:]) else ''}", file=sys.stderr)
    raise SystemExit(code or 0)


def _explain(error: Exception) -> str:
    """A wrong call in one line, with the nearest of the choices where there are some."""
    message = " ".join(error.format_message().split()).rstrip(".")
    given = re.search(r"'([^']*)' is not one of (.*)", message)
    near = difflib.get_close_matches(given[1], re.findall(r"'([^']*)'", given[2]), n=1) if given else []
    if message.endswith(("?", ")")):  # it names the nearest command or option itself
        return message
    command = error.ctx.command_path if error.ctx else "cpift"
    return f"{message}: " + (f"did you mean '{near[0]}'?" if near else f"see {command} --help")


def _goes_on(arguments: list[str]) -> bool:
    """Whether the same call would go on: a demo takes a new folder by itself, and --from begins there again."""
    command, options = arguments[:1], {argument.partition("=")[0] for argument in arguments[1:]}
    return (
        "--output" in options if command == ["demo"] else command in (["run"], ["probe"]) and "--from" not in options
    )


def _show_warning(show: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Ours are for the user, who has nothing from the line of code that raised them."""
    if issubclass(category, NoEffectWarning | MismatchWarning) or Path(place[0]).is_relative_to(PACKAGE):
        print(f"cpift: warning: {message}", file=sys.stderr)
    else:
        show(message, category, *place)
