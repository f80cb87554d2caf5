"""The demo's figures as rich tables; nothing is computed here."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fastmargin.demo.run import RAW, Figures

COLUMNS = (  # key in demo.json, heading, format
    ("auc", "AUC", "{:.4f}"),
    ("tar_at_far_1e-2", "TAR at\nFAR 1e-2", "{:.3f}"),
    ("rank_1", "rank-1", "{:.3f}"),
    ("final_loss", "final loss", "{:.3f}"),
    ("seconds_per_epoch", "s/epoch", "{:.3f}"),
)


def print_report(console: Console, figures: Figures, out: str) -> None:
    """Prints the whole report."""
    console.print(_verification_table(figures))
    console.print(
        "Losses of different heads are not comparable; softmax is CosFace with m = 0.\n"
        "The choice of the ten people matters more than the head: see --splits 3.\n",
        style="dim",
    )
    _print_twin(console, figures["twin"])
    if figures["scaling"]:
        console.print(_scaling_table(figures))
        console.print(
            "Peak: memory of one forward and backward pass beyond the centres and features;\n"
            "for both it includes the gradient of the centres.\n",
            style="dim",
        )
    console.print(
        f"{figures['seconds']:.0f} s on {figures['device']}, backend {figures['backend']}. "
        f"Written to {out}: {', '.join(figures['files'])}"
    )


def _verification_table(figures: Figures) -> Table:
    splits = len(figures["unseen_people"])
    title = "Verification on 10 people the network has never seen"
    table = Table(title=title + (f", mean of {splits} splits" if splits > 1 else ""))
    table.add_column("head")
    for _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for name, row in figures["heads"].items():
        cells = [form.format(row[key]) if key in row else "" for key, _, form in COLUMNS]
        table.add_row(name, *cells, style="dim" if name == RAW else "")
    return table


def _print_twin(console: Console, twin: Figures) -> None:
    table = Table(title=f"{twin['head']} trained twice, by fastmargin and in plain PyTorch")
    table.add_column("largest difference of the losses")
    table.add_column("steps", justify="right")
    table.add_column("", justify="right")
    for what, steps, gap in (
        ("float64, the two loss curves", twin["double_steps"], twin["double_gap"]),
        ("float32, the two loss curves", twin["steps"], twin["largest_gap"]),
        ("  plain against plain, started one bit apart", twin["steps"], twin["rounding_gap"]),
        ("float32, same embeddings and centres", twin["steps"], twin["same_state_gap"]),
    ):
        table.add_row(what, str(steps), f"{gap:.1e}")
    console.print(table)
    console.print()


def _scaling_table(figures: Figures) -> Table:
    table = Table(title="One ArcFace step (forward and backward) as the identities grow")
    table.add_column("identities", justify="right")
    for heading in ("ms\nfastmargin", "ms\nplain", "time\nratio"):
        table.add_column(heading, justify="right")
    for heading in ("peak MiB\nfastmargin", "peak MiB\nplain", "of which\ngradient"):
        table.add_column(heading, justify="right")
    rows = {(row["implementation"], row["identities"]): row for row in figures["scaling"]}
    for identities in dict.fromkeys(row["identities"] for row in figures["scaling"]):
        fast, plain = rows["fastmargin", identities], rows["plain", identities]
        table.add_row(
            f"{identities:,}",
            f"{fast['step_ms']:.1f}",
            f"{plain['step_ms']:.1f}",
            f"{fast['step_ms'] / plain['step_ms']:.2f}",
            f"{fast['peak_mib']:,.1f}",
            f"{plain['peak_mib']:,.1f}",
            f"{fast['centers_gradient_mib']:,.1f}",
        )
    return table
