"""What becomes of a process whose CUDA context has faulted: every later test would fail in it."""

from __future__ import annotations

import os

import pytest
import torch

LEFT_FREE = 4 << 30
"""Bytes that a process may hold for its next test; pytest's workers share one device."""


def pytest_runtest_logfinish():
    """Ends such a process with its test; xdist starts another one for the tests that are left."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the CUDA context is lost: {error}", returncode=1)
    if torch.cuda.memory_reserved() > LEFT_FREE:
        torch.cuda.empty_cache()
