"""Where compiled graphs of the tests are kept from run to run."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

OPS = Path(__file__).parent.parent / "fastmargin" / "ops"


def directory() -> str:
    """Another one for other operators: torch does not see that a schema has changed."""
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(OPS.glob("*.py"))))
    return str(Path(tempfile.gettempdir(), f"fastmargin-inductor-{key.hexdigest()[:12]}"))
