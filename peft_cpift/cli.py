"""The command line: `cpift run`, `cpift demo`, and the single steps `cpift core`, `cpift group`, `cpift fuse`."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from peft_cpift.checkpoint.writer import check_free
from peft_cpift.core import CoreRegion, find_core_region, group_tasks, jaccard_matrix
from peft_cpift.errors import CpiftError
from peft_cpift.fusion import fuse

app = typer.Typer(
    help="Core parameter isolation (CPI-FT): find what each task moved most, fuse, and fine-tune around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; what the user can mend is one line and exit code 2, without a traceback."""
    try:
        app()
    except (CpiftError, OSError) as error:
        print(f"cpift: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys to change, such as core.percent=0.5.")] = None,
) -> None:
    """Run the whole method as a recipe says, and write its folder and report."""
    from peft_cpift.pipeline import read_recipe

    _run(read_recipe(recipe, overrides or []))


@app.command()
def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the demo's recipe to change.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to fill; by default a new one in runs/.")] = None,
) -> None:
    """Run the whole method on a tiny model that comes with the package; needs no network."""
    import torch

    from peft_cpift import demo
    from peft_cpift.pipeline import read_recipe

    folder = output or Path("runs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    paths = {"model": demo.MODEL, "data": folder / "data", "output": folder / "run"}
    fixed = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    recipe = read_recipe(demo.RECIPE, [*fixed, *(overrides or [])])
    check_free(folder)
    # So small a model gains nothing from a second thread, and loses much where another program wants the core.
    torch.set_num_threads(1)
    demo.write_tasks(folder / "data", train=demo.TRAIN_ROWS, test=demo.TEST_ROWS)
    _run(recipe)


@app.command()
def core(
    tuned: Annotated[Path, typer.Argument(help="Checkpoint or adapter folder after fine-tuning on the task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Region file to write (.safetensors).")],
    base: Annotated[Path | None, typer.Option(help="The same before; not needed for Propulsion adapters.")] = None,
    percent: Annotated[float, typer.Option(help="Share of all coordinates, in percent.")] = 1.0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Find the core region of a task: the coordinates that fine-tuning moved most."""
    if output.exists() and not overwrite:
        raise CpiftError(f"{output} exists: choose another output, or add --overwrite")
    region = find_core_region(tuned, base, percent=percent)
    region.save(output)
    tensors = f"{len(region.indices)} of {len(region.shapes)} tensors"
    print(f"{output}: {len(region)} of {region.total} coordinates, in {tensors}")


@app.command()
def group(
    cores: Annotated[list[str], typer.Argument(help="Core regions as task=FILE.")],
    threshold: Annotated[float, typer.Option(help="Jaccard index from which tasks are joined.")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Group tasks whose core regions overlap."""
    regions = {task: CoreRegion.load(file) for task, file in _named(cores).items()}
    matrix, groups = jaccard_matrix(regions), group_tasks(regions, threshold)
    if as_json:
        print(json.dumps({"tasks": list(regions), "jaccard": matrix, "threshold": threshold, "groups": groups}))
        return
    width = max(map(len, regions))
    for task, row in zip(regions, matrix, strict=True):
        print(task.ljust(width), *(f"{value:.3f}" for value in row))
    for number, tasks in enumerate(groups, 1):
        print(f"group {number}: {', '.join(tasks)}")


@app.command(name="fuse")
def fuse_(
    tasks: Annotated[list[str], typer.Argument(help="Fine-tuned folders as task=FOLDER, in the order of folding.")],
    cores: Annotated[list[str], typer.Option("--core", help="Core region as task=FILE; once for each task.")],
    start: Annotated[Path, typer.Option(help="Folder from which coordinates outside all cores start.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    pretrained: Annotated[Path | None, typer.Option(help="Folder as it was before any fine-tuning.")] = None,
    omega: Annotated[float | None, typer.Option(help="Fixed factor; by default all count alike.")] = None,
    conflict: Annotated[str, typer.Option(help="largest_update, last or mean.")] = "largest_update",
    space: Annotated[str, typer.Option(help="weights or delta.")] = "weights",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier fusion.")] = False,
) -> None:
    """Fuse fine-tuned folders: cores transplanted, all else interpolated spherically."""
    report = fuse(
        _named(tasks),
        _named(cores),
        start=start,
        output=output,
        pretrained=pretrained,
        omega=omega,
        conflict=conflict,
        space=space,
        overwrite=overwrite,
    )
    print(
        f"{output}: {report.core} coordinates transplanted ({report.conflicts} in several cores), "
        f"{report.linear_folds} of {report.folds} interpolations linear"
    )


def _run(recipe) -> None:
    import datasets
    import transformers

    from peft_cpift.pipeline import run
    from peft_cpift.report.page import score_table

    # One bar a training and an evaluation is progress; one for every tokenizing and loading of a small file is noise.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    report = run(recipe)
    print("\n" + score_table(json.loads((report / "report.json").read_text())))
    print(f"\nreport:  {report / 'report.md'}")
    if recipe.report.picture:
        print(f"picture: {report / 'report.png'}")


def _named(pairs: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found or not name or not value:
            raise CpiftError(f"'{pair}' is not of the form task=PATH")
        if name in named:
            raise CpiftError(f"task '{name}' is given twice")
        named[name] = value
    return named


if __name__ == "__main__":
    main()
