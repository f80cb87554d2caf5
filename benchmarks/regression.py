"""The working tree against another version, taking turns in one run: ``make bench-cpu``.

    python -m benchmarks.regression               against the merge base with main
    python -m benchmarks.regression --ref v0.1.0 --threshold 1.05

The other version is checked out into a temporary worktree and built there, or uses the working
tree's compiled files if the sources are the same. Exits with 1 if in some case the median ratio of
times exceeds the threshold and the ratio exceeds 1 in nine of ten turns, and both again in a second
measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.cases import Case
from benchmarks.provenance import git
from benchmarks.report import ratio, seconds, title
from benchmarks.spread import Spread, paired_ratio

CASES = (
    Case("launch", 32, 100, 64),  # the overhead of a step besides the passes
    Case("arc", 256, 20_000, 128),
    Case("arc-d512", 128, 10_000, 512),
    Case("ada", 256, 10_000, 128, "adaface"),
    Case("pfc", 256, 100_000, 128, "cosface", rate=0.1, state="sgd"),
)
THRESHOLD = 1.10
WORKER = Path(__file__).with_name("regression_worker.py")
COMPILED = ("csrc", "setup.py")


class VersionError(RuntimeError):
    """A version cannot be checked out, built or run."""


@dataclass(frozen=True)
class Outcome:
    """ratio: the working tree's time over the other version's, turn by turn; if None, see error.
    seconds: median of the working tree."""

    case: Case
    ratio: Spread | None = None
    seconds: float = 0.0
    error: str | None = None

    def slower(self, threshold: float) -> bool:
        return self.ratio is not None and self.ratio.median > threshold and self.ratio.low > 1


class Version:
    """A process that runs one tree's fastmargin."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.tree = tree
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(tree), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tree,
        )
        loaded = Path(self._answer()["file"]).resolve()
        if tree.resolve() not in loaded.parents:
            self.close()
            raise VersionError(f"fastmargin was imported from {loaded}, not from {tree}")

    def ask(self, **line) -> dict:
        """Sends a request and returns the answer; raises VersionError if the request failed."""
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        found = self._answer()
        if "error" in found:
            raise VersionError(found["error"])
        return found

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise VersionError(f"the process of {self.tree} ended; its errors are above")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)


def default_ref() -> str:
    """The merge base with main or origin/main; else HEAD."""
    for branch in ("main", "origin/main"):
        if found := git("merge-base", "HEAD", branch):
            return found
    return "HEAD"


@contextmanager
def checked_out(ref: str) -> Iterator[Path]:
    """A temporary worktree of a version, built.

    Raises:
        VersionError: there is no such version, or it does not compile.
    """
    commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if not commit:
        raise VersionError(f"--ref: no commit {ref!r} in this repository")
    with tempfile.TemporaryDirectory(prefix="fastmargin-") as folder:
        tree = Path(folder) / "tree"
        _run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], ROOT)
        try:
            build(tree, commit)
            yield tree
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def build(tree: Path, commit: str) -> None:
    """Compiles a version for the CPU, or copies files compiled from the same sources."""
    same = subprocess.run(["git", "diff", "--quiet", commit, "--", *COMPILED], cwd=ROOT)
    new = git("ls-files", "--others", "--exclude-standard", "--", *COMPILED)
    if same.returncode == 0 and not new:
        for file in (ROOT / "fastmargin").glob("*.so"):
            shutil.copy(file, tree / "fastmargin")
        return
    environment = os.environ | {"FASTMARGIN_CUDA": "0"}
    _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, environment)


def _run(command: list[str], folder: Path, environment: dict | None = None) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise VersionError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def compare(here: Version, there: Version, case: Case, turns: int) -> Outcome:
    """Times both in alternating order, after two warm-up steps."""
    try:
        for version in (here, there):
            version.ask(case=asdict(case))
            version.ask(steps=2)
        times = {here: [], there: []}
        for turn in range(turns):
            for version in (here, there) if turn % 2 else (there, here):
                times[version] += version.ask(steps=1)["seconds"]
    except VersionError as error:
        return Outcome(case, error=str(error))
    own, other = times.values()
    return Outcome(case, paired_ratio(own, other), Spread.of(own).median)


def confirmed(here: Version, there: Version, case: Case, turns: int, threshold: float) -> Outcome:
    """:func:`compare`, repeated if slower, since other load may have been the cause."""
    found = compare(here, there, case, turns)
    return compare(here, there, case, turns) if found.slower(threshold) else found


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a case is slower; 2 if the versions cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ref", help="commit, branch or tag (default: merge base with main)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="default %(default)s")
    parser.add_argument("--turns", type=int, default=30, help="default %(default)s")
    options = parser.parse_args(arguments)
    ref = options.ref or default_ref()
    threads = torch.get_num_threads()
    try:
        with checked_out(ref) as tree:
            versions = [Version(ROOT, threads)]
            try:
                versions.append(Version(tree, threads))
                print(f"working tree / {git('log', '-1', '--format=%h %s', ref)}", flush=True)
                found = [
                    confirmed(*versions, case, options.turns, options.threshold) for case in CASES
                ]
            finally:
                for version in versions:
                    version.close()
    except VersionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return judge(found, options.threshold)


def judge(found: list[Outcome], threshold: float) -> int:
    """Prints a line per case; 1 if one is slower than allowed, 2 if none could be compared."""
    for outcome in found:
        if outcome.ratio is None:
            print(f"      not compared: {outcome.error}  {title(outcome.case)}")
            continue
        verdict = "  SLOWER" if outcome.slower(threshold) else ""
        told = f"{ratio(vars(outcome.ratio))}  {seconds(outcome.seconds)}"
        print(f"{told}  {title(outcome.case)}{verdict}")
    print(f"ratio: median (10th to 90th percentile) of the turns; allowed {threshold:.2f}")
    if all(outcome.ratio is None for outcome in found):
        return 2
    return int(any(outcome.slower(threshold) for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
