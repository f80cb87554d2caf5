"""ClassSampler against rand + topk + sort over all classes, as insightface's partial FC samples.

Both draw in turns in one process, so that a busy machine slows both. Writes
``results/sampling_<cpu or cuda>.json`` beside this file.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --classes 100000 --sampled 10000 --repeats 5 --output -
    python benchmarks/sampling.py --device cuda
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from cpu_head import cpu_model, git
from measure import provenance, time_gpu

from fastmargin.build_info import build_info
from fastmargin.sampling import ClassSampler

HERE = Path(__file__).resolve().parent


def partial_fc(labels, num_classes: int, num_sampled: int):
    """The operations of insightface's ``PartialFC``: sampled rows, and labels as places in them."""
    here = (labels >= 0) & (labels < num_classes)
    labels = torch.where(here, labels, -1)
    positive = torch.unique(labels[here], sorted=True)
    index = positive
    if num_sampled >= positive.numel():
        priority = torch.rand(num_classes, device=labels.device)
        priority[positive] = 2.0
        index = torch.topk(priority, k=num_sampled)[1].sort()[0]
    labels[here] = torch.searchsorted(index, labels[here])
    return index, labels


def check(labels, sample, index, column) -> None:
    """Both took as many distinct rows, and every label finds its own."""
    ours, n = sample.index, index.numel()
    if not ours.numel() == n == ours.unique().numel() == index.unique().numel():
        raise SystemExit("the samplers took different numbers of rows")
    if not (torch.equal(ours[sample.column], labels) and torch.equal(index[column], labels)):
        raise SystemExit("a label's own row is not where it should be")


def compare(batch: int, classes: int, sampled: int, repeats: int, device: str) -> dict:
    sampler = ClassSampler(classes, sampled, device=device)
    labels = torch.randint(0, classes, (batch,), device=device)
    draws = {
        "partial_fc": lambda: partial_fc(labels, classes, sampled),
        "sampler": lambda: sampler.draw(labels),
    }
    check(labels, draws["sampler"](), *draws["partial_fc"]())
    load = os.getloadavg()[0]
    if device == "cpu":
        seconds = {name: [] for name in draws}
        for _ in range(repeats):
            labels = torch.randint(0, classes, (batch,))
            for name, draw in draws.items():
                start = time.perf_counter()
                draw()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        best = {name: min(times) for name, times in seconds.items()}
    else:
        found = {name: time_gpu(draw, repeats) for name, draw in draws.items()}
        median = {name: result["ms"] / 1e3 for name, result in found.items()}
        best = {name: result["ms_p10"] / 1e3 for name, result in found.items()}
    return {
        "classes": classes,
        "seconds_median": median,
        "seconds_best": best,  # the least; on a GPU the 10th percentile
        "time_ratio_median": median["sampler"] / median["partial_fc"],
        "load_average_before": load,
    }


def machine() -> dict:
    """Provenance of a run on the CPU."""
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": build_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--classes", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    parser.add_argument("--sampled", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
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
        "machine": machine() if arguments.device == "cpu" else provenance(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "../csrc", "../fastmargin")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/sampling.py", *sys.argv[1:]]),
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output == "-":
        print(text, end="")
    else:
        default = HERE / "results" / f"sampling_{arguments.device}.json"
        Path(arguments.output or default).write_text(text)


if __name__ == "__main__":
    main()
