"""``fastmargin bench``: margin heads and their peers, side by side in one run.

    fastmargin bench                                      the suite for this machine
    fastmargin bench --suite cpu-large --repeats 15
    fastmargin bench --classes 20000 50000 --dim 512 --only fastmargin insightface
    fastmargin bench --compare before.json after.json

A contender is timed only if its loss and gradients agree with float64. Inputs are random; nothing
is downloaded. Method: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import bench, cases, compare, contenders, data, provenance, report

FLAGS = {"batch": int, "classes": int, "dim": int, "margin": str, "dtype": str, "rate": float}
FLAGS |= {"state": str, "world": int}
CHOICES = {"margin": cases.MARGINS, "dtype": cases.DTYPES, "state": cases.STATES}


def parser() -> argparse.ArgumentParser:
    """The options."""
    usage, _, rest = __doc__.partition("\n\n")
    found = argparse.ArgumentParser(
        prog="fastmargin bench",
        description=usage,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = found.add_argument_group("what to measure")
    what.add_argument(
        "--suite",
        action="append",
        choices=cases.SUITES,
        help="may be repeated; default: gpu if there is one, else cpu",
    )
    what.add_argument("--case", nargs="+", metavar="NAME", help="cases by name instead")
    for name, kind in FLAGS.items():
        what.add_argument(
            f"--{name}",
            nargs="+",
            type=kind,
            choices=CHOICES.get(name),
            help="cases of your own: every combination of the values given"
            if name == "batch"
            else None,
        )
    what.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PART",
        help="only contenders whose name contains one of these; includes the reference backend",
    )
    what.add_argument("--list", action="store_true", help="list cases and contenders, then exit")
    how = found.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    how.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    how.add_argument("--repeats", type=int, default=9, help="timed turns (default 9)")
    how.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="number of passes over all cases, each with new heads and a part of the turns "
        "(default 3)",
    )
    how.add_argument(
        "--seconds",
        type=float,
        default=15.0,
        help="start no further turn of a case after this time, but run at least three (default 15)",
    )
    how.add_argument("--no-memory", action="store_true", help="skip peak memory")
    how.add_argument("--no-accuracy", action="store_true", help="skip the error by logit gap")
    how.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="instead of times: a torch "
        "profiler trace of two steps of every contender, for Perfetto",
    )
    out = found.add_argument_group("output")
    out.add_argument(
        "--output",
        type=Path,
        default=Path("bench"),
        metavar="FOLDER",
        help="for bench.json and the plots (default bench/)",
    )
    out.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the report here instead of bench.json; - prints it and nothing else",
    )
    out.add_argument("--no-plots", action="store_true", help="write no plots")
    out.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing; print the ratios of two reports",
    )
    return found


def chosen_cases(options: argparse.Namespace, device: torch.device) -> list[cases.Case]:
    """The cases selected by the options.

    Raises:
        ValueError: an invalid value, or --case together with --suite or flags.
    """
    default = "gpu" if device.type == "cuda" else "cpu"
    values = {name: getattr(options, name) for name in FLAGS if getattr(options, name)}
    if options.case and (values or options.suite):
        raise ValueError("--case selects whole cases: leave out --suite and the other flags")
    if options.case:
        return cases.of_names(options.case)
    found = cases.of_suites(options.suite or [default])
    return cases.of_values(found[0], **values) if values else found


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 if a contender of ours gave wrong results or failed."""
    options = parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    try:
        if options.compare:
            compare.print_differences(console, *(read(path) for path in options.compare))
            return 0
        has_gpu = torch.cuda.is_available()
        device = torch.device(options.device or ("cuda" if has_gpu else "cpu"))
        if device.type == "cuda" and not has_gpu:
            raise ValueError("--device cuda: torch sees no CUDA device")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        for name in ("repeats", "rounds"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
        chosen = chosen_cases(options, device)
    except (ValueError, OSError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    if options.list:
        print_list(console, device)
        return 0
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if options.profile:
        return profile(chosen, device, options, errors)
    found = measure(chosen, device, options, errors)
    text = json.dumps(found, indent=1) + "\n"
    if str(options.json) == "-":
        sys.stdout.write(text)
    else:
        file = options.json or options.output / "bench.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        report.print_report(console, found)
        console.print(f"written: {file}", highlight=False)
    if not options.no_plots:
        draw(found, options.output, errors)
    wrong = ("failed gate", "failed")
    return int(any(row["ours"] and row["status"] in wrong for row in found["rows"]))


def measure(
    chosen: list[cases.Case],
    device: torch.device,
    options: argparse.Namespace,
    console: Console,
) -> dict:
    """The whole report, with a progress bar on ``console``."""
    settings = bench.Settings(
        repeats=options.repeats,
        seconds=options.seconds,
        rounds=options.rounds,
        only=tuple(options.only),
        memory=not options.no_memory,
        accuracy=not options.no_accuracy,
        small_ceilings=all("smoke" in case.suites for case in chosen),
    )
    command = shlex.join(["fastmargin", "bench", *sys.argv[1 + ("bench" in sys.argv[1:2]) :]])
    origin = provenance.provenance(command, device)
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=bench.pieces(chosen, device, settings))
        bar.advance(task, -1)
        found = bench.run(
            chosen, device, settings, lambda what: bar.update(task, description=what, advance=1)
        )
    return {"provenance": origin, **found}


def draw(found: dict, folder: Path, console: Console) -> None:
    """Writes the plots, or says what is missing for them."""
    try:
        from benchmarks import plots
    except ImportError as error:
        console.print(
            f"no plots ({error}): pip install 'fastmargin[bench]'", highlight=False, markup=False
        )
        return
    for path in plots.draw(found, folder):
        console.print(f"written: {path}", highlight=False)


def profile(chosen: list[cases.Case], device: torch.device, options, console: Console) -> int:
    """Writes one trace per case and contender that can run it."""
    from torch.profiler import ProfilerActivity

    options.profile.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (device.type == "cuda")
    for case in chosen:
        for taker in contenders.contenders(case, device, options.only):
            reason = taker.refuses(case, device) or ("in one process" if case.world > 1 else None)
            if reason:
                console.print(f"{case.name}: {taker.name}: not run: {reason}", highlight=False)
                continue
            unit = taker.prenormalised
            head = taker.make(case, data.centres(case, device, unit))
            batches = data.batches(case, device, unit)
            for x, labels in batches[:2]:
                profiled_step(head, x, labels)
            with torch.profiler.profile(activities=activities, record_shapes=True) as found:
                for x, labels in batches[2:]:
                    profiled_step(head, x, labels)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            name = "".join(c if c.isalnum() else "_" for c in taker.name)
            file = options.profile / f"{case.name}_{name}.json"
            found.export_chrome_trace(str(file))
            console.print(f"written: {file}", highlight=False)
            del head
    return 0


def profiled_step(head: contenders.Head, x: torch.Tensor, labels: torch.Tensor) -> None:
    """A step with named phases in the trace."""
    with torch.profiler.record_function("forward"):
        loss = head.loss(x, labels)
    with torch.profiler.record_function("backward"):
        loss.backward()
    if head.optimiser is not None:
        with torch.profiler.record_function("update"):
            head.optimiser.step()
    head.zero_grad()


def read(file: Path) -> dict:
    """A report.

    Raises:
        ValueError: the file is something else.
    """
    try:
        found = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != bench.SCHEMA:
        raise ValueError(f"{file}: not a report of this version of fastmargin bench")
    return found


def print_list(console: Console, device: torch.device) -> None:
    for case in cases.CASES:
        console.print(f"{'/'.join(case.suites):10} {report.title(case)}", highlight=False)
    console.print()
    for taker in contenders.everybody(device):
        console.print(f"[bold]{taker.name}[/bold]: {taker.settings}", highlight=False)
        if taker.limits:
            console.print(f"    limits: {taker.limits}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
