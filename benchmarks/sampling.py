"""ClassSampler against rand + topk + sort over all classes, as in insightface's partial FC.

Both take turns in one process, so that other load slows both. Writes
``results/sampling_<cpu or cuda>.json`` beside this file.

    python -m benchmarks.sampling
    python -m benchmarks.sampling --classes 100000 --sampled 10000 --repeats 5 --output -
    python -m benchmarks.sampling --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import RESULTS, timing
from benchmarks.contenders import partial_fc
from benchmarks.provenance import provenance
from fastmargin.sampling import ClassSampler


def check(labels, sample, index, column) -> None:
    """Checks that both took the same number of distinct rows, and map each label to its row."""
    ours, n = sample.index, index.numel()
    if not ours.numel() == n == ours.unique().numel() == index.unique().numel():
        raise SystemExit("the samplers took different numbers of rows")
    if not (torch.equal(ours[sample.column], labels) and torch.equal(index[column], labels)):
        raise SystemExit("a label is not mapped to its own row")


def compare(batch: int, classes: int, sampled: int, repeats: int, device: str) -> dict:
    sampler = ClassSampler(classes, sampled, device=device)
    labels = torch.randint(0, classes, (batch,), device=device)
    draws = {
        "partial_fc": lambda: partial_fc.sample(labels, classes, sampled),
        "sampler": lambda: sampler.draw(labels),
    }
    check(labels, draws["sampler"](), *draws["partial_fc"]())
    load, clock = os.getloadavg()[0], timing.clock_for(torch.device(device))
    seconds = {name: [] for name in draws}
    for _ in range(repeats):
        labels = torch.randint(0, classes, (batch,), device=device)
        for name, draw in draws.items():
            clock.flush()
            start = clock.mark()
            draw()
            seconds[name] += clock.laps([start, clock.mark()])
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "classes": classes,
        "seconds_median": median,
        "seconds_best": {name: min(times) for name, times in seconds.items()},
        "time_ratio_median": median["sampler"] / median["partial_fc"],
        "load_average_before": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--classes", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--sampled", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", help="a file, or - to print")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = []
    for classes in arguments.classes:
        case = compare(
            arguments.batch, classes, arguments.sampled, arguments.repeats, arguments.device
        )
        cases.append(case)
        milliseconds = {name: 1e3 * value for name, value in case["seconds_median"].items()}
        summary = "{:>11,} classes: sampler {sampler:.2f} ms, partial FC {partial_fc:.2f} ms"
        print(summary.format(classes, **milliseconds), file=sys.stderr)
    ours = [case["seconds_median"]["sampler"] for case in cases]
    result = {
        "batch": arguments.batch,
        "sampled": arguments.sampled,
        "repeats": arguments.repeats,
        "cases": cases,
        "sampler_slowest_over_fastest": max(ours) / min(ours),
        **provenance(
            " ".join(["python -m benchmarks.sampling", *sys.argv[1:]]),
            torch.device(arguments.device),
        ),
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output == "-":
        print(text, end="")
    else:
        default = RESULTS / f"sampling_{arguments.device}.json"
        Path(arguments.output or default).write_text(text)


if __name__ == "__main__":
    main()
