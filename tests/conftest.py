"""Shared by all tests: interpreter for Triton without a GPU, poisoned memory, backends."""

from __future__ import annotations

import os

import torch
from inductor_cache import directory

if not torch.cuda.is_available():
    # read when triton is imported, so before anything of fastmargin's Triton backend
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tiles as shipped, whatever table this user has
os.environ.setdefault("FASTMARGIN_TUNED", "")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", directory())

import pytest
from dead_context import pytest_runtest_logfinish  # noqa: F401  a hook

from fastmargin import backends
from fastmargin.margins import (
    NPT,
    AdaFace,
    ArcFace,
    ClassMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    Filtered,
    KappaFace,
    MagFace,
    SoftmaxMargin,
)


def pytest_collection_modifyitems(items):
    """Long ones first: at the end one worker would do them alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills what ``torch.empty`` returns with NaN, so that reading it before writing shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


BACKENDS = backends.NAMES
"""All of them; the reference, which is the specification of the others, is the first."""
ON_GPU = ("triton", "cuda")
ON_CPU = tuple(name for name in BACKENDS if name not in ON_GPU)
"""These compute in float64, too."""
BACKENDS_AND_DTYPES = [
    pytest.param(backend, dtype, id=f"{backend}-fp{8 * dtype.itemsize}")
    for backend in BACKENDS
    for dtype in (torch.float64, torch.float32)
    if backend in ON_CPU or dtype == torch.float32
]


def device_for(backend: str) -> str:
    """Where tests run this backend; skips with the backend's reason if it cannot run."""
    device = "cuda" if torch.cuda.is_available() and backend in ON_GPU else "cpu"
    instance = backends.get(backend)
    reason = instance.unavailable() or instance.refuses(torch.device(device), torch.float32)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return device


class NoForm(SoftmaxMargin):
    """A user's margin: no kernel form, a penalty, the norm with its gradient, singular at 0."""

    def forward(self, cos_y, norm, labels):
        return 0.9 * cos_y - 0.01 * norm.sqrt() - 0.1

    def penalty(self, norm):
        return 0.2 / norm


# name -> margin; made anew for every test, since margins carry state
MARGINS = {
    "softmax": lambda: CosFace(m=0.0, s=32),
    "cosface": lambda: CosFace(m=0.4, s=64),
    "arcface": lambda: ArcFace(),
    "arcface_none": lambda: ArcFace(guard="none"),
    "arcface_clip": lambda: ArcFace(guard="clip", cos_eps=1e-4, angle_eps=1e-4),
    "arcface_mmm": lambda: ArcFace(guard="mmm", s=16),
    "arcface_easy": lambda: ArcFace(guard="easy", m=0.7),
    "arcface_insightface": lambda: ArcFace(guard="none", grad="straight_through"),
    "arcface_cold": lambda: ArcFace(s=1.0),
    "arcface_hot": lambda: ArcFace(s=256.0),
    "adaface": lambda: AdaFace(t_alpha=0.5),
    "adaface_cvlface": lambda: AdaFace(
        t_alpha=0.5, guard="none", grad="straight_through", cos_eps=0.0
    ),
    "magface": lambda: MagFace(l_a=10.0, u_a=20.0, guard="mm", lambda_g=2.0, s=32.0),
    "magface_insightface": lambda: MagFace(l_a=5.0, u_a=30.0, grad="straight_through", s=16.0),
    "curricularface": lambda: CurricularFace(alpha=0.5, s=32.0),
    "class_margin": lambda: ClassMargin([0.3]),
    "class_margin_cosine": lambda: ClassMargin([0.3], angular=False, s=32.0),
    "elasticface": lambda: ElasticFace(std=0.1),
    "kappaface": lambda: KappaFace(m=0.8),
    "filtered": lambda: Filtered(CosFace(m=0.2, s=20), 0.3),
    "filtered_cvlface": lambda: Filtered(
        AdaFace(t_alpha=0.5, guard="none", grad="straight_through", cos_eps=0.0), 0.2
    ),
    "no_form": lambda: NoForm(s=20.0),
    "npt": lambda: NPT(),
    "npt_3": lambda: NPT(delta=0.3, top_k=3, r=2.0),
    "npt_zero_slot": lambda: NPT(top_k=2, zero_slot=True),
}


def margin_for(name: str, classes: int):
    """A new margin for a head with this number of classes."""
    margin = MARGINS[name]()
    if isinstance(margin, ClassMargin):
        margin.m = torch.linspace(0.1, 0.6, classes)
    return margin


@pytest.fixture(params=MARGINS)
def margin(request):
    return MARGINS[request.param]()
