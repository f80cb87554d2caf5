"""How the compiled code was built, for bug reports and the ``doctor`` command."""

from __future__ import annotations

from fastmargin.backends import _extension


def build_info() -> dict[str, object] | None:
    """Compiler, C++ standard, CUDA release and architectures, torch versions; None if not compiled.

    ``torch_built_against`` gave the headers, ``torch_abi_target`` is the oldest torch that the
    modules run with.
    """
    if _extension.reason("_host"):
        return None
    return _extension.module("_host").build_info()
