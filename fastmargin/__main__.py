"""``python -m fastmargin`` is the ``fastmargin`` command."""

from fastmargin.cli import app

if __name__ == "__main__":
    app(prog_name="fastmargin")
