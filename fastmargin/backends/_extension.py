"""Loads the compiled modules when first asked, and remembers the module or the reason why not."""

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
    """None if the module loads (its operators are then registered), else why not and the remedy.

    ``_C`` holds the CPU operators, ``_cuda`` the CUDA operators, ``_host`` build info, records.
    """
    return _load(name)[1]


def cuda_architectures() -> list[str]:
    """What the CUDA operators are compiled for, as TORCH_CUDA_ARCH_LIST writes it."""
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
