"""Benchmarks: ``fastmargin bench`` in a source checkout, or ``python -m benchmarks.run``.

docs/benchmarks.md says what is measured and how. Nothing here is part of the package.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
