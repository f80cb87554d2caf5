"""Options of the benchmark; see the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from benchmarks import glyphs
from benchmarks.glyphs.fonts import FontsMissingError
from benchmarks.glyphs.heads import MARGINS
from benchmarks.glyphs.report import print_report
from benchmarks.glyphs.run import RATES, BenchmarkError, Settings, run
from fastmargin.progress import RichProgress

QUICK = {
    "classes": 500,
    "margins": ("softmax", "ArcFace", "AdaFace"),
    "rates": (1.0, 0.3),
    "epochs": 12,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.glyphs", description=glyphs.__doc__.splitlines()[0]
    )
    parser.add_argument("--classes", type=int, help="characters (default 2000)")
    parser.add_argument("--margins", nargs="+", choices=MARGINS, help="default all")
    parser.add_argument("--rates", nargs="+", type=float, help=f"default {RATES}")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="of network, batches and views")
    parser.add_argument("--out", type=Path, default=Path("glyphs"), help="folder for all files")
    parser.add_argument(
        "--noto",
        action="store_true",
        help="fonts-noto-cjk too: 40,000 characters instead of 19,000",
    )
    parser.add_argument("--fonts", type=Path, help="look for the fonts in this folder instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU, instead of torch's own choice")
    parser.add_argument(
        "--one-bit",
        action="store_true",
        help="plain PyTorch from one bit apart to the end: what rounding does to an accuracy",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"where nothing else is given: {QUICK}"
    )
    parser.add_argument("--json", action="store_true", help="print figures instead of tables")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> Settings:
    """What was given, then what ``--quick`` means, then the defaults."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    given = (QUICK if given.pop("quick") else {}) | given
    del given["json"]
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def main() -> None:
    options = parse()
    settings = settings_of(options)
    errors = Console(stderr=True)
    try:
        with RichProgress(errors) as progress:
            figures = run(settings, progress)
    except (FontsMissingError, BenchmarkError, ValueError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(1) from error
    if options.json:
        print(json.dumps(figures))
    else:
        print_report(Console(), figures, str(settings.out))


if __name__ == "__main__":
    main()
