"""The check on a GPU: build, tests, then a short benchmark, in one command under ten minutes.

Writes ``benchmarks/results/<gpu>.json``. A case whose result is wrong gets no time. Every case and
peer that fails is a row that says so. ``make gpu-check`` runs it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from measure import ROOT, copy_ceiling, matmul_ceiling, peak_bytes, provenance, time_gpu

CASES = {  # name: (batch, classes, dim)
    "100k": (512, 100_000, 512),
    "1M": (1024, 1_000_000, 512),
    "1M_b4096": (4096, 1_000_000, 512),
    "2M": (1024, 2_060_000, 512),
    "10M": (1024, 10_000_000, 512),
}
PEER_LIMIT = 2_100_000  # classes; beyond it plain PyTorch does not fit


def run(command: list[str], limit: float) -> dict:
    """Exit status, seconds and the end of the output."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(limit, 1)
        )
        status, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        status, output = "timeout", str(late.stdout or "")
    return {
        "command": " ".join(command[1:]),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "tail": output[-3000:],
    }


def plain_head(x, weight, labels, s=64.0, m=0.5):
    """An ArcFace head in the order of operations that insightface has; written anew."""
    cos = (F.normalize(x) @ F.normalize(weight).t()).clamp(-1, 1)
    theta = cos.float().acos()
    theta = theta.scatter_add(1, labels[:, None], torch.full_like(theta[:, :1], m))
    return F.cross_entropy(theta.cos() * s, labels)


def relative_gradient_error(fm, backend, precision) -> float:
    """Gate: gradients of a small case against float64."""
    from fastmargin import testing

    case = testing.make_case("random", batch=256, classes=4097, dim=512)

    def gradients(loss, case):
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        return torch.autograd.grad(loss(x, weight, case.labels), (x, weight))

    margin = fm.ArcFace()
    truth = gradients(lambda *a: testing.plain_loss(*a, margin), case.to(torch.double, "cuda"))
    ours = gradients(
        lambda *a: fm.margin_loss(*a, margin, backend=backend, precision=precision),
        case.to(torch.float32, "cuda"),
    )
    return max(testing.relative_error(a, t) for a, t in zip(ours, truth, strict=True))


def case_steps(fm, batch: int, classes: int, dim: int, dtype: torch.dtype) -> dict:
    """What to measure of one case: name -> forward and backward, as a function."""
    weight = (torch.randn(classes, dim, device="cuda") * 0.01).to(dtype).requires_grad_()
    x = torch.randn(batch, dim, device="cuda", requires_grad=True)
    labels = torch.randint(0, classes, (batch,), device="cuda")
    margin = fm.ArcFace()

    def step(loss_of, amp=False):
        x.grad = weight.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = loss_of(x, weight, labels)
        loss.backward()

    def ours(backend, precision):
        def loss(*tensors):
            return fm.margin_loss(*tensors, margin, backend=backend, precision=precision)

        return lambda: step(loss)

    tag = str(dtype).removeprefix("torch.")
    steps = {f"fastmargin triton {p}, W {tag}": ours("triton", p) for p in ("fp16", "bf16")}
    if dtype == torch.float32:
        steps[f"fastmargin triton tf32, W {tag}"] = ours("triton", "tf32")
        if fm.backends.available()["cuda"] is None:
            steps[f"fastmargin cuda fp16, W {tag}"] = ours("cuda", "fp16")
        if classes <= PEER_LIMIT:
            compiled = torch.compile(plain_head)
            steps["plain PyTorch fp32"] = lambda: step(plain_head)
            steps["plain PyTorch bf16 AMP"] = lambda: step(plain_head, amp=True)
            steps["torch.compile bf16 AMP"] = lambda: step(compiled, amp=True)
    return steps


def measure(step) -> dict:
    """Times and peak memory, or the error."""
    try:
        return {"peak_bytes": peak_bytes(step), **time_gpu(step, repeats=10)}
    except Exception as error:
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def benchmark(fm, limit: float) -> list[dict]:
    deadline = time.monotonic() + limit
    rows = []
    for name, (batch, classes, dim) in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            late = time.monotonic() > deadline
            steps = {} if late else case_steps(fm, batch, classes, dim, dtype)
            if late:
                rows.append({"case": name, "what": f"W {dtype}", "error": "no time left"})
            for what, step in steps.items():
                row = {"case": name, "what": what, **measure(step)}
                if "ms" in row:
                    row["tflops_of_8BCD"] = 8 * batch * classes * dim / row["ms"] / 1e9
                rows.append(row)
            del steps
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--skip-tests", action="store_true", help="benchmark only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device; there is none here")
    end = time.monotonic() + 60 * options.minutes
    report = {"build": run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 240)}
    if not options.skip_tests:
        files = [f"tests/test_{n}.py" for n in ("gpu", "backends", "ops", "margins", "head")]
        report["tests"] = run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton or cuda or gpu", *files],
            (end - time.monotonic()) * 0.5,
        )
    sys.path.insert(0, str(ROOT))
    import fastmargin as fm

    report["backends"] = fm.backends.available()
    report["ceilings"] = {
        "bf16_matmul_tflops": matmul_ceiling(torch.bfloat16),
        "copy_bytes_per_s": copy_ceiling(),
    }
    report["gradient_error"] = {
        precision: relative_gradient_error(fm, "triton", precision)
        for precision in ("fp32", "tf32", "fp16", "bf16")
    }
    right = report["gradient_error"]["fp16"] < 3e-3 and report["gradient_error"]["fp32"] < 1e-4
    report["gate"] = "passed" if right else "failed: no times"
    report["rows"] = benchmark(fm, end - time.monotonic() - 20) if right else []
    report["provenance"] = provenance()
    name = re.sub(r"[^a-z0-9]+", "_", report["provenance"]["gpu"].lower()).strip("_")
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    failed = report.get("tests", {}).get("status", 0) != 0 or not right
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
