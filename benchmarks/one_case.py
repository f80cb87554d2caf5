"""Runs one case in its own process, which may crash or hang without affecting others.

    python -m benchmarks.one_case '{"name": ..., "batch": ...}' cuda '{"repeats": 9}' found.json

Prints its progress; writes the report without provenance to the file when it is complete.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks import bench, cases


def main(case: str, device: str, settings: str, file: str) -> None:
    """case, settings: as JSON."""
    chosen = {name: tuple(v) if name == "only" else v for name, v in json.loads(settings).items()}
    found = bench.run(
        [cases.from_dict(json.loads(case))],
        torch.device(device),
        bench.Settings(**chosen),
        lambda what: print(f"at {what}", flush=True),
    )
    part = Path(f"{file}.part")
    part.write_text(json.dumps(found))
    part.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
