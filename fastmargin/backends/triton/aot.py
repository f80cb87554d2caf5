"""Compiles the shipped kernels without a GPU and reads what the compiler made of them.

    python -m fastmargin.backends.triton.aot [--json] [--full] [--arch 90] [--match centre_pass]

lists registers, stack (which must be 0: nothing spilled) and shared memory of every configuration
per architecture, and exits with 1 if one does not fit. Without ``--full`` a representative part:
every width, the variants that need most registers. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmargin.backends.triton import (
    centre_pass,
    centres,
    compact,
    epilogues,
    margin_loss,
    margin_rows,
    own_rows,
    permutation,
    row_prologue,
    rows_backward,
    stats_finish,
    stats_forward,
    stats_merge,
    topk,
    topk_backward,
)
from fastmargin.backends.triton.configs import (
    OPERAND_DTYPES,
    SHARED_LIMIT,
    choose,
    needs_shift,
    operand_width,
)
from fastmargin.backends.triton.tile import INTERPRETED
from fastmargin.backends.triton.tuned import using
from fastmargin.spec import GRAD_MODES, GUARDS, SOURCES, MarginForm

ARCHS = (80, 90, 100)
WIDTHS = (128, 192, 256, 512, 1024)

EPILOGUES = ("store_gradient", "sgd", "sgd_momentum", "sgd_nesterov")

_OPERANDS = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "bf16": "bf16"}
_POINTERS = {
    **dict.fromkeys(("p_label", "p_key", "p_index", "p_column", "p_nearest", "p_touched"), "*i64"),
    **dict.fromkeys(("p_count", "p_code", "p_own_code", "p_code_out"), "*i32"),
    "p_valid": "*i1",
    **dict.fromkeys(("p_threshold", "p_rule", "p_shift", "p_pull", "p_partial"), "*fp32"),
}
_FLOATS = (
    *(
        "scale",
        "slope_unit",
        "slope_limit",
        "rate",
        "momentum",
        "decay",
        "alpha",
        "low",
        "high",
        "norm_low",
        "norm_high",
    ),
    "tolerance",
    *("m2", "m3", "m2_u", "m3_u", "cos_limit", "angle_eps", "angle_top", "cos_angle_eps", "h"),
    "eps",
)


@dataclass(frozen=True)
class Build:
    """One kernel with its compile-time arguments, as a launcher would ask for it.

    types: argument -> Triton type; None where the launcher passes None, 1 for a stride of 1.
    """

    name: str
    kernel: triton.JITFunction
    constants: dict
    types: dict


@dataclass(frozen=True)
class Report:
    """What came of a build; sizes in bytes."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    shared_limit: int

    @property
    def fits(self) -> bool:
        return self.stack == 0 and self.shared <= self.shared_limit


def _signature(build: Build) -> tuple[dict, dict, dict, dict]:
    """Types, constants, alignments and options as the compiler takes them."""
    constants = dict(build.constants)
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
    signature, fixed, aligned = {}, {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        default = _POINTERS.get(name, "*fp32") if name.startswith("p_") else "i32"
        kind = build.types.get(name, "fp32" if name in _FLOATS else default)
        if name in constants or kind in (None, 1):
            signature[name], fixed[(i,)] = "constexpr", constants.get(name, kind)
            continue
        signature[name] = kind
        if kind.startswith("*") or name.startswith("stride"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return signature, fixed, aligned, options


def compile_build(build: Build, arch: int) -> Report:
    """Compiles for compute capability ``arch`` (90 for 9.0)."""
    signature, fixed, aligned, options = _signature(build)
    source = ASTSource(build.kernel, signature, fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(part.split(":")[:2] for part in text.split() if part.count(":") == 1)
    return Report(
        build.name,
        arch,
        int(usage["REG"]),
        int(usage["STACK"]),
        compiled.metadata.shared,
        SHARED_LIMIT[arch] * 1024,
    )


def _layout(packed: bool, indexed: bool) -> str:
    return f"{'' if packed else ' transposed'}{' indexed' if indexed else ''}"


def _weights(weight: str, packed: bool, indexed: bool) -> dict:
    strides = (
        {"stride_wc": "i32", "stride_wd": 1} if packed else {"stride_wc": 1, "stride_wd": "i32"}
    )
    index = {} if indexed else {"p_index": None}
    return {"p_w": f"*{weight}", "p_out": f"*{weight}", **strides, **index}


def _blocks(operand: str, rows: int, columns: int) -> str:
    """Type of a tensor descriptor."""
    return f"tensordesc<{operand}[{rows}, {columns}]>"


def _forward(arch: int, d: int, precision: str, unit: bool, gaps: bool, every: bool):
    """The passes that stream the centres, for one width and operand."""
    operand = _OPERANDS[precision]
    label = f"D={d} {precision}{'' if unit else ' raw'}{' gaps' if gaps else ''}"
    inverse = {} if gaps or not unit else {"p_inverse": None}
    for pull, online, hard in itertools.product((True, False), repeat=3):
        if hard and not unit:
            continue
        if not online and needs_shift(64.0, 1000, unit, precision, pull):
            continue
        if not every and hard != online and unit:
            continue
        kernel = "stats_pull" if pull else "stats_sum"
        tile = choose(kernel, d, precision, arch, hard or not unit)
        types = {
            "d_x": _blocks(operand, tile.block_b, tile.block_k),
            "d_w": _blocks(operand, tile.block_c, tile.block_k),
            "d_w_pull": _blocks(operand, tile.block_c, tile.block_d) if pull else None,
            **inverse,
        }
        types |= {} if hard else {"p_threshold": None, "p_rule": None}
        types |= {} if pull else {"p_pull": None}
        types |= {} if online else {"p_shift": None}
        words = ("pull", pull), ("online", online), ("hard", hard)
        yield Build(
            " ".join(["stats_forward", label, *(word for word, said in words if said)]),
            stats_forward.stats_forward_kernel,
            stats_forward.constants(d, precision, unit, gaps, tile, pull, online, hard),
            types,
        )
    tile = choose("topk", d, precision, arch)
    for k, continued in itertools.product((1, 16), (True, False)) if every else ((16, True),):
        yield Build(
            f"topk_scan {label} k={k}{' continued' if continued else ''}",
            topk.topk_scan_kernel,
            topk.scan_constants(d, k, precision, unit, gaps, continued, tile),
            {
                "d_x": _blocks(operand, tile.block_b, tile.block_k),
                "d_w": _blocks(operand, tile.block_c, tile.block_k),
                **inverse,
            },
        )


def _centre_pass(
    arch: int, d: int, precision: str, weight: str, packed: bool, indexed: bool, every: bool
) -> Iterator[Build]:
    """The pass over the batch for one width, operand, and type and layout of the centres."""
    operand = _OPERANDS[precision]
    raw = packed and not indexed and operand == weight != "fp32"
    label = f"D={d} {precision} W={weight}{_layout(packed, indexed)}"
    kinds = itertools.product((True, False), (False, True), EPILOGUES, (False, True))
    for hard, counted, epilogue, stochastic in kinds:
        crowded = hard or not packed or epilogue == "sgd_nesterov"
        tile = choose("centre_pass", d, precision, arch, crowded)
        updates = epilogue != "store_gradient"
        if updates and not (packed and tile.block_d >= d):
            continue  # not updated in place: see centre_step
        if stochastic and (not updates or (epilogue == "sgd" and weight == "fp32")):
            continue  # nothing to round
        if not every and (counted or (hard and updates) or (epilogue == "sgd" and not stochastic)):
            continue
        if not every and stochastic and not raw:
            continue
        base = {
            "d_x": _blocks(operand, tile.block_b, tile.block_k),
            "d_x_grad": _blocks(operand, tile.block_b, tile.block_d),
            "d_w": _blocks(operand, tile.block_c, tile.block_k),
            **_weights(weight, packed, indexed),
        }
        types = {} if hard else {"p_lse": None, "p_threshold": None, "p_rule": None}
        types |= {} if counted else {"p_count": None}
        heavy = "bf16" if stochastic else "fp32"
        state = {"sgd_momentum": heavy, "sgd_nesterov": heavy, "sgd": weight}.get(epilogue)
        types["p_state"] = state and f"*{state}"
        yield Build(
            f"centre_pass {label}{' hard' if hard else ''}{' counted' if counted else ''}"
            f"{' ' + epilogue if updates else ''}{' stochastic' if stochastic else ''}",
            centre_pass.centre_pass_kernel,
            centre_pass.constants(
                d,
                precision,
                packed,
                indexed,
                hard or not raw,
                tile,
                hard,
                counted,
                getattr(epilogues, epilogue),
                stochastic,
            ),
            base | types,
        )


def _row_kernels(widths: tuple[int, ...], every: bool) -> Iterator[Build]:
    """The kernels that do not depend on an operand type."""
    for d in widths:
        layouts = itertools.product(("fp32", "bf16"), (True, False), (False, True))
        for weight, packed, indexed in layouts:
            base = _weights(weight, packed, indexed)
            label = f"D={d} W={weight}{_layout(packed, indexed)}"
            for operand in (None, "fp16", "fp32") if every else (None, "fp16"):
                width = operand and operand_width(d, OPERAND_DTYPES[operand])
                yield Build(
                    f"stage {label} operand={operand}",
                    centres.stage_kernel,
                    centres.constants(d, packed, indexed, width),
                    base | {"p_operand": operand and f"*{operand}"},
                )
            if not every and weight == "bf16":
                continue
            yield Build(
                f"stats_finish {label}",
                stats_finish.stats_finish_kernel,
                stats_finish.constants(d, indexed, 132, True, True),
                base,
            )
            yield Build(
                f"topk_merge {label}",
                topk.topk_merge_kernel,
                topk.merge_constants(d, 16, indexed, 132),
                base,
            )
            yield Build(
                f"topk_backward {label}",
                topk_backward.topk_backward_kernel,
                topk_backward.constants(d, 16, indexed),
                base | {"p_rows": "*fp32"},
            )
            yield Build(
                f"own_rows {label}",
                own_rows.own_rows_kernel,
                own_rows.constants(d, indexed),
                base,
            )
            yield Build(
                f"rows_backward {label}",
                rows_backward.rows_backward_kernel,
                rows_backward.constants(d, indexed, True, True),
                base | {"p_d_x": "*bf16"},
            )
        yield Build(
            f"stats_merge D={d}",
            stats_merge.stats_merge_kernel,
            stats_merge.constants(d, 132, True, True),
            {},
        )
        for kind, operand in (("fp32", "fp16"), ("bf16", "bf16"), ("fp32", None)):
            yield Build(
                f"row_prologue D={d} x={kind} operand={operand}",
                row_prologue.row_prologue_kernel,
                row_prologue.constants(
                    d, True, operand and operand_width(d, OPERAND_DTYPES[operand])
                ),
                {"p_x": f"*{kind}", "stride_xd": 1, "p_operand": operand and f"*{operand}"},
            )
        for operand in ("fp16", "fp32"):
            yield Build(
                f"compact D={d} {operand}",
                compact.compact_kernel,
                compact.constants(d, True),
                dict.fromkeys(("p_x", "p_x_out"), f"*{operand}"),
            )
    yield Build(
        "norm_statistics",
        row_prologue.norm_statistics_kernel,
        row_prologue.statistics_constants(),
        {},
    )
    for name, wide in (("", "i32"), (" beyond 31 bits", "i64")):
        yield Build(
            f"permutation{name}",
            permutation.permutation_kernel,
            permutation.constants(),
            {"p_out": "*i64", "size": wide, "count": wide},
        )
    forms = (
        itertools.product(SOURCES, GUARDS, GRAD_MODES)
        if every
        else zip(SOURCES, ("clip", "mm", "mmm", "easy"), ("exact",) * 4, strict=True)
    )
    for source, guard, grad in forms:
        form = MarginForm(64.0, source=source, guard=guard, grad=grad)
        advance = source == "adaface"
        types = {
            "p_mean": "*fp32" if advance else None,
            "p_std": "*fp32" if advance else None,
            "p_table": "*fp32" if source == "class" else None,
        }
        yield Build(
            f"margin_rows {source} {guard} {grad}",
            margin_rows.margin_rows_kernel,
            margin_rows.constants(form),
            types,
        )
        yield Build(
            f"margin_loss {source} {guard} {grad}",
            margin_loss.margin_loss_kernel,
            margin_loss.constants(form, advance, "mean"),
            types,
        )


def builds(arch: int, full: bool = False) -> Iterator[Build]:
    """Everything that ships for an architecture, or a representative part of it."""
    if full:
        for d, precision in itertools.product(WIDTHS, OPERAND_DTYPES):
            for unit, gaps in ((True, False), (True, True), (False, False)):
                if unit or precision in ("fp16", "bf16"):
                    yield from _forward(arch, d, precision, unit, gaps, every=True)
            layouts = itertools.product(("fp32", "fp16", "bf16"), (True, False), (False, True))
            for weight, packed, indexed in layouts:
                yield from _centre_pass(arch, d, precision, weight, packed, indexed, every=True)
        yield from _row_kernels(WIDTHS, every=True)
        return
    for d, precision in itertools.product((128, 192, 256, 512, 1024), ("fp16", "tf32")):
        yield from _forward(arch, d, precision, True, True, every=False)
        yield from _centre_pass(arch, d, precision, "fp32", True, True, every=False)
    yield from _forward(arch, 512, "fp16", False, False, every=False)
    yield from _centre_pass(arch, 512, "fp16", "fp16", True, False, every=False)
    yield from _forward(arch, 512, "bf16", True, False, every=False)
    yield from _centre_pass(arch, 512, "bf16", "fp32", False, False, every=False)
    yield from _forward(arch, 512, "fp32", True, False, every=False)
    yield from _centre_pass(arch, 512, "fp32", "fp32", True, False, every=False)
    yield from _row_kernels((512,), every=False)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if a configuration spills or needs too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--full", action="store_true", help="every configuration: thousands")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--match", default="", help="only names that contain this")
    chosen = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set; nothing is compiled in the interpreter")
    reports = []
    for arch in chosen.arch or ARCHS:
        for build in builds(arch, chosen.full):
            if chosen.match not in build.name:
                continue
            reports.append(report := compile_build(build, arch))
            if not chosen.json:
                print(
                    f"sm_{arch:<4}{report.registers:4} registers {report.stack:5} B stack"
                    f" {report.shared / 1024:7.1f} KB shared  {build.name}"
                    f"{'' if report.fits else '  DOES NOT FIT'}",
                    flush=True,
                )
    if chosen.json:
        print(json.dumps([asdict(r) | {"fits": r.fits} for r in reports], indent=1))
    return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
    with using({}):  # tiles that ship, whatever table this user has
        sys.exit(main())
