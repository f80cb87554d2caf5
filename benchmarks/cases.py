"""The table of cases, selected by name or by suite."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

MARGINS = ("arcface", "cosface", "adaface")
DTYPES = ("float32", "bfloat16", "float16")
STATES = ("none", "sgd", "sgd-16-bit", "sgd-16-bit-plain")


@dataclass(frozen=True)
class Case:
    """A problem that heads are timed on.

    batch, classes, dim: B, C, D. margin: one of MARGINS, at its usual setting. dtype: of the
    centres; embeddings are float32. rate: fraction of classes sampled, in (0, 1]. state: "none":
    forward and backward only; "sgd": a whole step with momentum and weight decay; "sgd-16-bit":
    the same with momentum in 16 bits, as the centres (ours: stochastic rounding);
    "sgd-16-bit-plain": the same without momentum. world: processes the classes are sharded over,
    each with ``batch`` rows.
    """

    name: str
    batch: int
    classes: int
    dim: int
    margin: str = "arcface"
    dtype: str = "float32"
    rate: float = 1.0
    state: str = "none"
    world: int = 1
    suites: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("margin", MARGINS), ("dtype", DTYPES), ("state", STATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("batch", "classes", "dim", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")

    @property
    def sampled(self) -> int:
        """Classes that take part in a step, over all processes."""
        return self.classes if self.rate == 1 else max(1, int(self.rate * self.classes))

    @property
    def momentum(self) -> bool:
        """Whether the optimiser keeps momentum."""
        return self.state in ("sgd", "sgd-16-bit")


CPU, LARGE, GPU, SMOKE = ("cpu",), ("cpu-large",), ("gpu",), ("smoke",)
HALF, LOW, LEAST = "float16", "sgd-16-bit", "sgd-16-bit-plain"
CASES = (
    Case("smoke-arc", 16, 500, 32, suites=SMOKE),
    Case("smoke-ada", 16, 300, 32, "adaface", suites=SMOKE),
    Case("smoke-pfc", 16, 600, 32, "cosface", rate=0.2, state="sgd", suites=SMOKE),
    # growing numbers of identities, otherwise equal
    Case("arc-5k", 256, 5_000, 128, state="sgd", suites=CPU),
    Case("arc-20k", 256, 20_000, 128, state="sgd", suites=CPU),
    Case("arc-80k", 256, 80_000, 128, state="sgd", suites=CPU),
    Case("arc-200k", 256, 200_000, 128, state="sgd", suites=LARGE),
    Case("ada-20k", 256, 20_000, 128, "adaface", suites=CPU),
    Case("arc-20k-d512", 256, 20_000, 512, suites=LARGE),
    # a whole step at decreasing sample rates
    Case("pfc-50k-r1", 256, 50_000, 128, "cosface", state="sgd", suites=CPU),
    Case("pfc-50k-r0.3", 256, 50_000, 128, "cosface", rate=0.3, state="sgd", suites=CPU),
    Case("pfc-50k-r0.1", 256, 50_000, 128, "cosface", rate=0.1, state="sgd", suites=CPU),
    Case("pfc-1m-r0.1", 256, 1_000_000, 128, "cosface", rate=0.1, state="sgd", suites=LARGE),
    Case("world2-20k", 128, 20_000, 128, "cosface", state="sgd", world=2, suites=LARGE),
    # a GPU; most important first, since gpu-check stops when its time is up
    Case("gpu-100k", 512, 100_000, 512, state="sgd", suites=GPU),
    Case("gpu-1m", 1024, 1_000_000, 512, state="sgd", suites=GPU),
    Case("gpu-10m", 1024, 10_000_000, 512, state="sgd", suites=GPU),
    Case("gpu-1m-16-bit", 1024, 1_000_000, 512, dtype=HALF, state=LOW, suites=GPU),
    Case("gpu-10m-16-bit", 1024, 10_000_000, 512, dtype=HALF, state=LOW, suites=GPU),
    Case("gpu-100m", 1024, 100_000_000, 512, dtype=HALF, state=LEAST, suites=GPU),
    Case("gpu-pfc-1m-r0.1", 1024, 1_000_000, 512, "cosface", rate=0.1, state="sgd", suites=GPU),
    Case("gpu-pfc-10m-r0.1", 8192, 10_000_000, 512, "cosface", rate=0.1, state="sgd", suites=GPU),
    Case("gpu-1m-b4096", 4096, 1_000_000, 512, state="sgd", suites=GPU),
    Case("gpu-1m-b4096-16-bit", 4096, 1_000_000, 512, dtype=HALF, state=LOW, suites=GPU),
    Case("gpu-ada-1m", 1024, 1_000_000, 512, "adaface", suites=GPU),
    Case("gpu-pfc-1m-r1", 1024, 1_000_000, 512, "cosface", state="sgd", suites=GPU),
    Case("gpu-pfc-1m-r0.3", 1024, 1_000_000, 512, "cosface", rate=0.3, state="sgd", suites=GPU),
    Case("gpu-2m", 1024, 2_060_000, 512, state="sgd", suites=GPU),
    Case("gpu-2m-16-bit", 1024, 2_060_000, 512, dtype=HALF, state=LOW, suites=GPU),
    Case("gpu-100k-16-bit", 512, 100_000, 512, dtype=HALF, state=LOW, suites=GPU),
    Case("gpu-1m-bf16", 1024, 1_000_000, 512, dtype="bfloat16", state=LOW, suites=GPU),
)
SUITES = tuple(dict.fromkeys(suite for case in CASES for suite in case.suites))


def of_suites(suites: list[str]) -> list[Case]:
    """The cases of these suites, in the order of the table."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite must be one of {SUITES}, got {suite!r}")
    return [case for case in CASES if set(suites) & set(case.suites)]


def of_names(names: list[str]) -> list[Case]:
    """The cases of these names."""
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise ValueError(f"case must be one of {', '.join(known)}, got {name!r}")
    return [known[name] for name in names]


def of_values(base: Case, **values: list) -> list[Case]:
    """Every combination of the fields' values, otherwise as ``base``, with descriptive names."""
    found = []
    for chosen in itertools.product(*values.values()):
        own = dict(zip(values, chosen, strict=True))
        case = replace(base, **own, suites=())
        found.append(replace(case, name=_name(case)))
    return found


def gate_case(case: Case) -> Case:
    """The same case, small enough for float64; 16-bit kernels still get whole tiles."""
    small = {"batch": min(case.batch, 128), "classes": min(case.classes, 4097)}
    return replace(case, **small, world=1)


def _name(case: Case) -> str:
    parts = [case.margin, f"B{case.batch}", f"C{case.classes}", f"D{case.dim}", case.dtype]
    parts += [f"r{case.rate:g}"] * (case.rate < 1)
    parts += [case.state] * (case.state != "none") + [f"w{case.world}"] * (case.world > 1)
    return "-".join(parts)


def from_dict(values: dict) -> Case:
    """A case from JSON."""
    known = {field.name for field in fields(Case)}
    found = Case(**{name: value for name, value in values.items() if name in known})
    return replace(found, suites=tuple(found.suites))
