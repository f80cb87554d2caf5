"""Loads the compiled modules on first use, and remembers each, or the reason why it failed."""

from __future__ import annotations

import functools
import importlib

REMEDY = (
    "Reinstall from source with a C++20 compiler, torch, setuptools, ninja and pybind11 present: "
    "pip install --no-build-isolation <fastmargin>"
)


@functools.cache
def _load(name: str) -> tuple[object | None, str | None]:
    import torch  # noqa: F401  the modules link against the libraries that this loads

    try:
        return importlib.import_module(f"fastmargin.{name}"), None
    except ModuleNotFoundError:
        return None, f"the extension fastmargin.{name} is not compiled. {REMEDY}"
    except ImportError as error:
        return None, f"the extension fastmargin.{name} does not load: {error}. {REMEDY}"


def reason(name: str = "_C") -> str | None:
    """None if the module loads (which registers its operators), else the reason and the remedy.

    ``_C`` has the CPU operators, ``_cuda`` the CUDA operators, ``_host`` build info and records.
    """
    return _load(name)[1]


def cuda_architectures() -> list[str]:
    """Architectures the CUDA operators are compiled for, as in TORCH_CUDA_ARCH_LIST."""
    return module("_host").build_info()["cuda_architectures"]


def module(name: str = "_C"):
    """The module.

    Raises:
        ImportError: with :func:`reason` as its text.
    """
    found, why = _load(name)
    if found is None:
        raise ImportError(why)
    return found
