"""`cpift core`, `cpift group` and `cpift fuse`: the method's steps on folders that are there already."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_cpift.cli.output import AsJson, DryRun, import_torch, named, print_result, progress_bar, size
from peft_cpift.errors import CpiftError

# Commands import what they need themselves: --help should not wait for torch, nor these for PEFT.


def core(
    tuned: Annotated[Path, typer.Argument(help="Checkpoint or adapter folder after fine-tuning on the task.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Region file to write (.safetensors).")],
    base: Annotated[Path | None, typer.Option(help="The same before; not needed for Propulsion adapters.")] = None,
    importance: Annotated[
        Path | None, typer.Option(help="What matters most, by a file of ImportanceCallback's; needs no base.")
    ] = None,
    percent: Annotated[float, typer.Option(help="Share of all coordinates, in percent.")] = 1.0,
    scope: Annotated[str, typer.Option(help="global: of all tensors together; tensor: of each one.")] = "global",
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensor names to consider, as '*.mlp.*'.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of tensor names to leave out.")] = None,
    coordinates: Annotated[str, typer.Option(help="own: an adapter's tensors; delta: its change of weights.")] = "own",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier core region.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Find the core region of a task: the coordinates that fine-tuning moved most, or that mattered most to it."""
    import_torch()
    from peft_cpift.core import CoreSearch
    from peft_cpift.core.region import check_free_region

    check_free_region(output, overwrite=overwrite)
    search = CoreSearch(
        tuned,
        base,
        importance=importance,
        percent=percent,
        scope=scope,
        include=include or "*",
        exclude=exclude or (),
        coordinates=coordinates,
    )
    plan = {
        "output": str(output),
        "importance": search.measure,
        "percent": percent,
        "scope": scope,
        "tensors": len(search.shapes),
        "total": search.total,
        "wanted": search.wanted,
        "bytes_to_read": search.bytes_to_read,
        "peak_bytes": search.peak_bytes,
    }
    if dry_run:
        print_result(
            plan,
            f"would find {search.wanted:,} of {search.total:,} coordinates in {len(search.shapes)} tensors, and write "
            f"{output}\nreads {size(search.bytes_to_read)}, needs about {size(search.peak_bytes)} of memory",
            as_json,
        )
        return
    with progress_bar(search.bytes_to_read) as progress:
        region = search.run(progress)
    region.save(output)
    tensors = f"{len(region.indices)} of {len(region.shapes)} tensors"
    print_result(
        {**plan, "coordinates": len(region), "core_tensors": len(region.indices)},
        f"{output}: {len(region):,} of {region.total:,} coordinates, in {tensors}",
        as_json,
    )


def group(
    cores: Annotated[list[str], typer.Argument(help="Core regions as task=FILE.")],
    threshold: Annotated[float, typer.Option(help="Jaccard index from which tasks are joined.")] = 0.1,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Group tasks whose core regions overlap."""
    given = named(cores)
    import_torch()
    from peft_cpift.core import CoreRegion, measure_overlap
    from peft_cpift.core.overlap import check_comparable, check_threshold, connected_tasks

    check_threshold(threshold)
    regions = {task: CoreRegion.load(file) for task, file in given.items()}
    check_comparable(regions.values())
    shapes = {name: shape for region in regions.values() for name, shape in region.shapes.items()}
    total = sum(map(math.prod, shapes.values()))
    if dry_run:
        sizes = {task: len(region) for task, region in regions.items()}
        lines = "\n".join(f"{task}: {size:,} of {regions[task].total:,} coordinates" for task, size in sizes.items())
        print_result(
            {"threshold": threshold, "coordinates": sizes}, f"would compare, by {threshold}\n{lines}", as_json
        )
        return
    with progress_bar(total, unit="coordinates") as progress:
        overlap = measure_overlap(regions, progress=progress)
    matrix = overlap.jaccard()
    groups = connected_tasks(overlap.tasks, matrix, threshold)
    width = max(map(len, regions))
    rows = [
        f"{task.ljust(width)} {' '.join(f'{value:.3f}' for value in row)}"
        for task, row in zip(regions, matrix, strict=True)
    ]
    print_result(
        {
            "tasks": overlap.tasks,
            "jaccard": matrix,
            "containment": overlap.containment(),
            "layers": {layer: overlap.jaccard(tensors) for layer, tensors in overlap.layers.items()},
            "threshold": threshold,
            "groups": groups,
        },
        "\n".join([*rows, *(f"group {number}: {', '.join(tasks)}" for number, tasks in enumerate(groups, 1))]),
        as_json,
    )


def fuse(
    tasks: Annotated[list[str], typer.Argument(help="Fine-tuned folders as task=FOLDER, in the order of folding.")],
    cores: Annotated[list[str], typer.Option("--core", help="Core region as task=FILE; once for each task.")],
    start: Annotated[Path, typer.Option(help="Folder from which coordinates outside all cores start.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    pretrained: Annotated[Path | None, typer.Option(help="Folder as it was before any fine-tuning.")] = None,
    weights: Annotated[list[str] | None, typer.Option("--weight", help="Weight as task=NUMBER; default 1.")] = None,
    start_weight: Annotated[float, typer.Option(help="Weight of the start; 0 forgets it.")] = 1.0,
    omega: Annotated[float | None, typer.Option(help="Fixed factor; by default all count alike.")] = None,
    conflict: Annotated[str, typer.Option(help="largest_update, last or mean.")] = "largest_update",
    space: Annotated[str, typer.Option(help="weights or delta.")] = "weights",
    linear_above: Annotated[float, typer.Option(help="|cosine| above which to interpolate linearly.")] = 0.9995,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--override", help="Other settings for some tensors: 'PATTERN:omega=0,conflict=last'."),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Fuse weights, adapters merged into their model.")] = False,
    base: Annotated[Path | None, typer.Option(help="Model of the adapters, if not where they say.")] = None,
    rank: Annotated[int | None, typer.Option(help="As --merged, but write a LoRA adapter of this rank.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the result, such as bfloat16.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier fusion.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fuse fine-tuned folders: cores transplanted, all else interpolated spherically."""
    folders, files = named(tasks), named(cores)
    by_task = None
    if weights:
        given = {task: _number(value, f"--weight {task}") for task, value in named(weights, "task=NUMBER").items()}
        by_task = dict.fromkeys(folders, 1.0) | given
    by_pattern = {}
    for pattern, settings in map(_override, overrides or []):
        if pattern in by_pattern:
            raise CpiftError(f"'{pattern}' is given twice")
        by_pattern[pattern] = settings
    torch = import_torch()
    from peft_cpift.fusion import FusionPlan, Rule

    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise CpiftError(f"unknown dtype '{dtype}': use bfloat16, float16, float32 or float64")
    plan = FusionPlan(
        folders,
        files,
        Rule(by_task, start_weight, omega, conflict, space, linear_above),
        start=start,
        output=output,
        pretrained=pretrained,
        overrides=by_pattern,
        merged=merged,
        base=base,
        rank=rank,
        dtype=kind,
        overwrite=overwrite,
    )
    sizes = {key: getattr(plan, key) for key in ("bytes_to_read", "bytes_to_write", "peak_bytes")}
    if dry_run:
        print_result(
            {"output": str(output), "tensors": len(plan.rules), **sizes},
            f"would fuse {len(plan.rules)} tensors of {len(folders)} tasks, and write {output}\n"
            f"reads {size(plan.bytes_to_read)} (each tensor twice, the second time mostly from the system's cache), "
            f"writes {size(plan.bytes_to_write)}, needs about {size(plan.peak_bytes)} of memory",
            as_json,
        )
        return
    with progress_bar(plan.bytes_to_read) as progress:
        report = plan.run(progress)
    worst = max(report.errors.values(), default=0.0) if report.errors is not None else None
    print_result(
        {"output": str(output), **sizes, **report.to_dict()},
        f"{output}: {report.core:,} coordinates transplanted ({report.conflicts:,} in several cores), "
        f"{report.linear_folds} of {report.folds} interpolations linear"
        + (f", at rank {rank} within {worst:.1%} of the fused change" if worst is not None else ""),
        as_json,
    )


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CpiftError(f"{what}={text} is not a number") from None


def _override(text: str) -> tuple[str, dict[str, Any]]:
    """'PATTERN:key=value,key=value' as a pattern and its settings."""
    pattern, found, pairs = text.rpartition(":")
    if not found:
        raise CpiftError(f"--override '{text}' is not of the form PATTERN:key=value,key=value")
    numbers = ("start_weight", "omega", "linear_above")
    settings = named(pairs.split(","), "key=value")
    return pattern, {k: _number(v, f"--override {k}") if k in numbers else v for k, v in settings.items()}
