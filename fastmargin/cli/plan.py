"""``fastmargin plan``: memory, before any is allocated."""

from __future__ import annotations

from typing import Annotated

import typer

from fastmargin.cli.app import app, failure, show


@app.command()
def plan(
    classes: Annotated[int, typer.Argument(min=1, help="Number of identities.")],
    embedding_size: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch, per process.")] = 256,
    processes: Annotated[int, typer.Option(min=1, help="GPUs the classes are sharded over.")] = 1,
    sample_rate: Annotated[float, typer.Option(help="Fraction of classes per step.")] = 1.0,
    memory: Annotated[
        float | None, typer.Option(help="GB of one GPU: also say what fits, and how many classes.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print bytes as JSON instead of a table.")
    ] = False,
) -> None:
    """Estimate how much GPU memory a classifier needs, before any is allocated.

    Compares a head in plain PyTorch with the options of fastmargin, from the most common to the
    smallest: class centres, optimiser state, gradient, and temporary buffers of a step. Computed
    from shapes; does not include the backbone and what CUDA itself reserves.
    """
    from fastmargin.plan import Problem, print_report, report

    try:
        if memory is not None and not 0 < memory < float("inf"):
            raise ValueError(f"memory must be positive and finite, got {memory}")
        problem = Problem(classes, embedding_size, batch, processes, sample_rate)
    except ValueError as error:
        raise failure(error) from error
    found = report(problem, None if memory is None else int(memory * 1e9))
    show(found, as_json, print_report)
