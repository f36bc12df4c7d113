"""The commands that take a recipe, and those that take the folder of a run."""

from __future__ import annotations

import datetime
import gc
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from peft_cpift.cli.output import AsJson, print_result
from peft_cpift.errors import CpiftError

# Commands import what they need themselves: --help should not wait for torch.

Stage = Enum("Stage", {name: name for name in ("probe", "core", "group", "fuse", "integrate", "baselines", "report")})
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Keys to change, such as core.percent=0.5.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


class WithKeys(TyperCommand):
    """A command whose help ends with the keys of a recipe."""

    def format_help(self, ctx, formatter) -> None:
        """The usual help, then the keys."""
        from peft_cpift.recipe.keys import list_keys

        super().format_help(ctx, formatter)
        formatter.write(list_keys())


def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="The model that it names.")] = "google/gemma-3-270m",
) -> None:
    """Write a recipe to start from, with every key and what it does."""
    from peft_cpift.checkpoint import complete_file
    from peft_cpift.recipe.keys import make_starter

    if recipe.exists():
        raise CpiftError(f"{recipe} exists: choose another file")
    with complete_file(recipe) as file:
        file.write_text(make_starter(model), encoding="utf-8")
    print(f"{recipe}: fill in the tasks, then cpift validate {recipe}")


def validate(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe, its data and its settings without loading a model, and print what it would do."""
    from peft_cpift.pipeline.describe import describe, in_words
    from peft_cpift.pipeline.run import Run
    from peft_cpift.recipe.reading import read_recipe

    content = describe(Run(read_recipe(recipe, overrides or [])))
    print_result(content, in_words(content), as_json)


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    stop_after: Annotated[Stage | None, typer.Option(help="The last stage to do.")] = None,
    begin: Annotated[Stage | None, typer.Option("--from", help="The first stage to do again, with all later.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Do again what was made from another recipe.")] = False,
) -> None:
    """Run the whole method as a recipe says, and write its folder and report.

    Started again, it goes on from where it stopped.
    """
    from peft_cpift.recipe.reading import read_recipe

    _run(read_recipe(recipe, overrides or []), stop_after, begin, redo)


def probe(
    recipe: RecipeFile,
    task: Annotated[str, typer.Option(help="The task, by its name in the recipe.")],
    overrides: Overrides = None,
) -> None:
    """Do one task's probe alone, as one of several jobs; `cpift run` goes on from them."""
    from peft_cpift.pipeline.run import probe
    from peft_cpift.processes import part, say
    from peft_cpift.recipe.reading import read_recipe

    checked = read_recipe(recipe, overrides or [])
    _prepare_process()
    say(str(probe(checked, task)))
    part()


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the demo's recipe to change.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to fill; by default a new one in runs/.")] = None,
) -> None:
    """Run the whole method on a tiny model that comes with the package; needs no network.

    Started again with the same --output, it goes on from where it stopped.
    """
    import torch

    from peft_cpift import demo
    from peft_cpift.recipe.reading import read_recipe

    folder = output or Path("runs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    paths = {"model": demo.MODEL, "data": folder / "data", "output": folder / "run"}
    fixed = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    recipe = read_recipe(demo.RECIPE, [*fixed, *(overrides or [])])
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data").is_dir():
        raise CpiftError(f"{folder} holds something else than a demo: choose another output")
    # So small a model gains nothing from a second thread, and loses much where another program wants the core.
    torch.set_num_threads(1)
    demo.write_tasks(folder / "data", train=demo.TRAIN_ROWS, test=demo.TEST_ROWS)
    _run(recipe)


def report(folder: RunFolder) -> None:
    """Make the report of a run again."""
    from peft_cpift.pipeline.gather import gather
    from peft_cpift.report.page import write_report

    content = gather(folder)
    write_report(content, folder / "report", picture=content["recipe"]["report"]["picture"], overwrite=True)
    print(folder / "report" / "index.html")


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of two or more runs.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="HTML page to write as well.")] = None,
) -> None:
    """Set runs side by side: scores, and what differs in their recipes."""
    from peft_cpift.checkpoint import complete_file
    from peft_cpift.report.compare import compare, compare_page

    print(compare(folders))
    if output is not None:
        with complete_file(output) as file:
            file.write_text(compare_page(folders), encoding="utf-8")
        print(f"page: {output}")


def push(
    folder: RunFolder,
    repository: Annotated[str, typer.Argument(help="On the Hub, as user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="The adapter's model on the Hub, if a folder was used.")
    ] = None,
) -> None:
    """Push a run's result to the Hub, with its cores, its report and a model card."""
    from peft_cpift.hub import push_run

    print(push_run(folder, repository, private=private or None, base_model=base_model))


def _run(recipe, stop_after: Stage | None = None, begin: Stage | None = None, redo: bool = False) -> None:
    from peft_cpift.hub import push_run
    from peft_cpift.pipeline.run import run
    from peft_cpift.processes import is_main, part
    from peft_cpift.report.page import read_report, score_table

    _prepare_process()
    folder = run(recipe, stop_after=stop_after and stop_after.value, begin=begin and begin.value, redo=redo)
    part()
    report = folder / "report"
    if not is_main():
        return
    if stop_after is not None and stop_after is not Stage.report:
        print(f"\n{folder}: stopped after {stop_after.value}; start cpift run again to go on")
        return
    print("\n" + score_table(read_report(folder)))
    print(f"\nreport: {report / 'index.html'}")
    if recipe.push is not None:
        push = recipe.push
        address = push_run(folder, push.repository, private=push.private or None, base_model=push.base_model)
        print(f"pushed: {address}")


def _prepare_process() -> None:
    """Leave one bar a training and an evaluation, without one for every tokenizing and loading of a file.

    And keep the objects of the imports from the search for garbage that accelerate makes after every training.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()
