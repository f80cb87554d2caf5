"""Imports point one way: head > functional > {margins, ops, distributed}, ops > backends."""

from __future__ import annotations

import ast
from pathlib import Path

import fastmargin

PACKAGE = Path(fastmargin.__file__).parent

# room -> what it may import of fastmargin; a room is a file or folder of the package
ALLOWED = {
    "spec": set(),
    "norms": {"spec"},
    "hashing": set(),
    "counter": set(),
    "rounding": {"hashing"},
    "rows": set(),
    "margins": {"counter", "margins", "spec"},
    "distributed": {"distributed"},
    "backends": {"backends", "counter", "hashing", "norms", "rounding", "rows", "spec"},
    "factors": {"spec"},
    "first_order": set(),
    "ops": {"backends", "factors", "norms", "rows", "spec"},
    "sampling": {"ops", "spec"},
    "columns": {"distributed", "sampling", "spec"},
    "sharded": {"columns", "distributed", "factors", "ops", "spec"},
    "class_set": {"distributed"},
    "export": {"distributed", "norms"},
    "checks": {"margins", "spec"},
    "deferred": set(),
    "fused": {"columns", "first_order", "ops", "spec"},
    "functional": {
        *("checks", "columns", "deferred", "distributed", "factors", "fused", "margins", "norms"),
        *("ops", "sampling", "sharded", "spec"),
    },
    "head": {
        *("checks", "class_set", "columns", "deferred", "distributed", "export", "functional"),
        *("margins", "norms", "ops", "sampling"),
    },
    "optim": {"deferred", "factors", "norms", "ops", "rounding", "rows", "spec"},
    "checkpoint": {"checkpoint", "deferred", "distributed", "head"},
    "gradient_norm": {"distributed", "factors", "norms", "optim"},
    "testing": {"margins"},
    "data": {"data"},  # and the compiled _host
    "verification": set(),
    "progress": set(),
    "__init__": {
        *("backends", "checkpoint", "data", "distributed", "functional", "gradient_norm"),
        *("head", "margins", "optim", "spec"),
    },
}
# may import anything; nothing below imports them
TOP = {"__main__", "cli", "compat", "convert", "demo", "doctor", "build_info", "plan"}
TOP |= {"train", "tune"}
ONLY_HERE = {
    "triton": ("backends",),
    "torch.distributed": ("distributed", "checkpoint"),
    "torch.library": ("ops",),
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).with_suffix("").parts[0], path


def imports(path):
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports from the root"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ONLY_HERE:
            yield ast.unparse(node)


def test_imports_point_one_way():
    seen = set()
    for room, path in modules():
        seen.add(room)
        if room in TOP:
            continue
        assert room in ALLOWED, f"{room}: give it a place in this test"
        for name in imports(path):
            top, _, rest = name.partition(".")
            if top == "fastmargin" and rest:
                target = rest.split(".")[0]
                if (PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists():
                    assert target in ALLOWED[room] | {room}, f"{path.name} imports {name}"
    assert ALLOWED.keys() <= seen


def test_some_things_are_in_one_room():
    for room, path in modules():
        if room in TOP:
            continue
        for name in imports(path):
            for what, rooms in ONLY_HERE.items():
                if name == what or name.startswith(what + "."):
                    assert room in rooms, f"{path.name} uses {name}"


def test_margins_import_torch_only():
    for path in (PACKAGE / "margins").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] in {
                "torch",
                "fastmargin",
                "math",
                "copy",
                "collections",
                "dataclasses",
                "numbers",
                "typing",
                "zlib",
            } | {"__future__"}, f"{path.name} imports {name}"
