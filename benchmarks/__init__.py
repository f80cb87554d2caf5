"""Benchmarks: ``fastmargin bench`` in a source checkout, or ``python -m benchmarks.run``.

What is measured and how is told in docs/benchmarks.md. Nothing here is part of the package.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
