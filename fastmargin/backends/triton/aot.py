"""Compiles the shipped kernels without a GPU and reports the compiler's figures.

    python -m fastmargin.backends.triton.aot [--json] [--full] [--arch 90] [--match centre_pass]

lists registers, stack (which must be 0: nothing spilled), shared memory and the matrix instruction
of every configuration per architecture, and exits with 1 if one does not fit or its matrix
instructions were serialised by the assembler. Compiles what the calls of :mod:`problems` launch
(recorded by :mod:`asked`): with ``--full`` all of it, otherwise a representative part: every width,
and the variants that need most registers. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from fastmargin.backends.triton import epilogues
from fastmargin.backends.triton.asked import Asked, noted
from fastmargin.backends.triton.configs import SHARED_LIMIT
from fastmargin.backends.triton.problems import Problem, problems
from fastmargin.backends.triton.tile import INTERPRETED
from fastmargin.backends.triton.tuned import using

ARCHS = (80, 90, 100)

_HOPPERS = "wgmma.mma_async"
_PRODUCTS = (_HOPPERS, "tcgen05.mma", "mma.sync")

_WORDS = {
    "WANT_PULL": "pull",
    "ONLINE": "online",
    "HAS_HARD": "hard",
    "COUNTED": "counted",
    "CONTINUED": "continued",
    "STOCHASTIC": "stochastic",
}


@dataclass(frozen=True)
class Build:
    """One kernel with all that its compilation depends on."""

    name: str
    arch: int
    asked: Asked

    def compiled(self):
        """The kernel compiled by Triton."""
        target = GPUTarget("cuda", self.arch, 32)
        return triton.compile(self.asked.source, target=target, options=self.asked.options)


@dataclass(frozen=True)
class Report:
    """The result of a build; sizes in bytes.

    products: the matrix instructions: "wgmma.mma_async" on Hopper, "tcgen05.mma" on Blackwell,
        "mma.sync", slower on both; "" for none.
    serial: whether Hopper's are serialised, which the assembler does if it cannot prove that their
        registers are not written meanwhile (its note C7515).
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    shared_limit: int
    products: str
    serial: bool

    @property
    def fits(self) -> bool:
        return self.stack == 0 and self.shared <= self.shared_limit and not self.serial

    def __str__(self) -> str:
        return (
            f"sm_{self.arch:<4}{self.registers:4} registers {self.stack:5} B stack"
            f" {self.shared / 1024:7.1f} KB shared {self.products:>16}  {self.name}"
            f"{'  SERIAL' if self.serial else '' if self.fits else '  DOES NOT FIT'}"
        )


def compile_build(build: Build) -> Report:
    """Compiles a kernel and reads the compiler's figures."""
    compiled = build.compiled()
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    read = ["--dump-resource-usage"]
    if _HOPPERS in ptx:
        read.append("--dump-sass")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, *read, file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"\b(REG|STACK):(\d+)", text))
    # of each group the last one is marked; Triton asks for as many as it closes
    groups = len(re.findall(r"\bHGMMA\..*gsb0", text))
    return Report(
        build.name,
        build.arch,
        int(usage["REG"]),
        int(usage["STACK"]),
        compiled.metadata.shared,
        SHARED_LIMIT[build.arch] * 1024,
        ", ".join(name for name in _PRODUCTS if name in ptx),
        groups > ptx.count("wgmma.commit_group"),
    )


def _name(asked: Asked, problem: Problem) -> str:
    """The kernel, the first problem that launched it, and its variant."""
    names = asked.source.fn.arg_names
    constants = {names[at[0]]: value for at, value in asked.source.constants.items()}
    words = [word for name, word in _WORDS.items() if constants.get(name)]
    epilogue = constants.get("EPILOGUE", epilogues.store_gradient)
    if epilogue is not epilogues.store_gradient:
        words.append(epilogue.__name__)
    return " ".join([asked.kernel, problem.name, *words])


def builds(arch: int, of: Iterable[Problem]) -> Iterator[Build]:
    """All kernels to compile for these problems, each once."""
    seen, names = set(), Counter()
    for problem in of:
        with noted(arch) as notes:
            problem.run()
        for asked in notes:
            if asked.key in seen:
                continue
            seen.add(asked.key)
            name = _name(asked, problem)
            names[name] += 1
            nth = f" #{names[name]}" if names[name] > 1 else ""
            yield Build(name + nth, arch, asked)


_forked: list[Build] = []
"""Inherited by the forked workers: builds contain functions, which cannot be pickled."""


def _report(at: int) -> Report:
    return compile_build(_forked[at])


def _reports(found: list[Build], jobs: int) -> Iterator[Report]:
    if jobs == 1:
        yield from map(compile_build, found)
        return
    global _forked
    _forked = found
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_report, range(len(found)))


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if a configuration spills or needs too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--full", action="store_true", help="every configuration: thousands")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--match", default="", help="only names that contain this")
    parser.add_argument("--jobs", type=int, default=1, help="that many at a time")
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set; nothing is compiled in the interpreter")
    found = [
        build
        for arch in chosen.arch or ARCHS
        for build in builds(arch, problems(chosen.full))
        if chosen.match in build.name
    ]
    reports = []
    for report in _reports(found, chosen.jobs):
        reports.append(report)
        if not chosen.json:
            print(report, flush=True)
    if chosen.json:
        print(json.dumps([asdict(r) | {"fits": r.fits} for r in reports], indent=1))
    return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
    with using({}):  # tiles that ship, whatever table this user has
        sys.exit(main())
