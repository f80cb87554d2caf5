"""``fastmargin train``: learning, resuming, several processes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastmargin as fm
from fastmargin.cli import app
from fastmargin.data import RecordWriter
from fastmargin.train import validation
from fastmargin.train.backbones import load_pretrained, new_backbone
from fastmargin.train.iresnet import DEPTHS, IResNet
from fastmargin.train.settings import BY_NAME, TrainError, new_margin

Image = pytest.importorskip("PIL.Image")

PEOPLE, IMAGES, SIZE = 6, 9, 16
SMALL = ("--backbone", "tiny_backbone:make", "--embedding-size", "16", "--image-size", str(SIZE))
SMALL += ("--workers", "0", "--batch", "8", "--lr", "0.1", "--device", "cpu")


def write_faces(folder: Path, people: int, seed: int) -> Path:
    """Noisy copies of one random image per person."""
    generator = torch.Generator().manual_seed(seed)
    for person in range(people):
        (folder / f"p{person}").mkdir(parents=True)
        face = torch.rand(SIZE, SIZE, 3, generator=generator)
        for image in range(IMAGES):
            noise = torch.rand(SIZE, SIZE, 3, generator=generator)
            pixels = (255 * (0.7 * face + 0.3 * noise)).byte()
            Image.fromarray(pixels.numpy()).save(folder / f"p{person}" / f"{image}.png")
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces") / "train", PEOPLE, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces") / "unseen", 3, 1)


def train(*args):
    """The result of the command, and its figures if it succeeded."""
    result = CliRunner().invoke(app, ["train", *map(str, args), "--json"], env={"COLUMNS": "200"})
    return result, json.loads(result.stdout) if result.exit_code == 0 else None


def test_learns_and_writes(faces, others, tmp_path):
    out = tmp_path / "run"
    result, figures = train(faces, "--out", out, "--validation", others, "--epochs", 6, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert (figures["images"], figures["identities"]) == (PEOPLE * IMAGES, PEOPLE)
    first, last = figures["epochs"][0], figures["epochs"][-1]
    assert last["epoch"] == 6 and last["steps"] == PEOPLE * IMAGES // 8
    assert last["loss"] < first["loss"] / 2 and last["top1"] > 0.9
    assert last["validation"][str(others)]["auc"] > 0.75
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == figures["epochs"]
    backbone = new_backbone("tiny_backbone:make", 16, SIZE)
    load_pretrained(backbone, out / "backbone.pt")
    head = fm.MarginHead(16, PEOPLE, fm.ArcFace())
    stored = fm.checkpoint.load(
        out / "checkpoint", {"head": head, "network": backbone}, strict=False
    )
    assert stored["epoch"] == 6 and head.weight.abs().sum() > 0


def test_table_of_epochs(faces, tmp_path):
    args = ["train", faces, "--out", tmp_path / "run", "--epochs", 2, *SMALL]
    result = CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "54 images of 6 identities" in result.stdout
    result = CliRunner().invoke(app, [*map(str, args), "--resume"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Nothing to do" in result.stdout


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--margin", "adaface", "--sample-rate", "0.5", "--warm-up", "0.5"),
        ("--margin", "kappaface", "--setting", "m=0.3"),
        ("--margin", "npt", "--sample-rate", "0.5"),
        ("--margin", "elasticface", "--setting", "angular=false", "--setting", "s=16"),
    ],
    ids=["arcface", "adaface", "kappaface", "npt", "elasticface"],
)
def test_resumed_training_is_the_same(faces, tmp_path, monkeypatch, options):
    """Stopped in the middle of an epoch, and after one."""
    run = faces, "--epochs", 2, "--save-every", 4, *SMALL, *options
    result, _ = train(*run, "--out", tmp_path / "whole")
    assert result.exit_code == 0, result.stderr
    save, saves = fm.checkpoint.save, []

    def save_then_stop(*args):
        save(*args)
        saves.append(args)
        if len(saves) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(fm.checkpoint, "save", save_then_stop)
    for _ in range(2):
        assert train(*run, "--out", tmp_path / "parts", "--resume")[0].exit_code == 130
    result, rest = train(*run, "--out", tmp_path / "parts", "--resume")
    assert result.exit_code == 0, result.stderr
    assert [saved[1]["seen"] for saved in saves] == [32, 0, 32, 0]
    assert rest["epochs"][-1]["steps"] == 2  # of 6
    ends = [torch.load(tmp_path / name / "backbone.pt") for name in ("whole", "parts")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_two_processes_then_one(faces, others, tmp_path):
    run = [
        "train",
        faces,
        "--out",
        tmp_path / "run",
        "--validation",
        others,
        "--sample-rate",
        "0.5",
    ]
    run = [*map(str, run), *SMALL, "--epochs", "3", "--save-every", "3", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "fastmargin", *run]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout)  # of the first process alone
    assert figures["processes"] == 2 and len(figures["epochs"]) == 3
    assert figures["epochs"][-1]["steps"] == PEOPLE * IMAGES // 2 // 8
    head = fm.MarginHead(16, PEOPLE, fm.ArcFace(), sample_rate=0.5, sparse_grad=True)
    stored = fm.checkpoint.load(tmp_path / "run" / "checkpoint", {"head": head}, strict=False)
    assert stored["epoch"] == 3


def test_records_and_a_bin_file(faces, tmp_path):
    import pickle

    files = sorted(faces.glob("*/*.png"))
    with RecordWriter(tmp_path / "train.rec", image_size=(SIZE, SIZE)) as writer:
        for file in files:
            writer.add(file.read_bytes(), int(file.parent.name[1:]))
    # pair i: the same person for even i
    pairs = [files[i * IMAGES // 4 + j * (1 + IMAGES * (i % 2))] for i in range(20) for j in (0, 1)]
    answers = [a.parent == b.parent for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    content = [file.read_bytes() for file in pairs], answers
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(content))
    bin_file = tmp_path / "lfw.bin"
    args = tmp_path, "--out", tmp_path / "run", "--validation", bin_file, "--epochs", 4, *SMALL
    result, figures = train(*args)
    assert result.exit_code == 0, result.stderr
    found = figures["epochs"][-1]["validation"][str(bin_file)]
    assert 0.8 < found["accuracy"] <= 1 and 0 <= found["accuracy_std"] < 0.5
    assert 0 < sum(answers) < 20


def test_stops_when_the_loss_is_not_finite(faces, tmp_path):
    args = faces, "--out", tmp_path / "run", "--epochs", 2, "--save-every", 1, *SMALL
    result, _ = train(*args, "--lr", 1e30, "--clip", "inf")
    assert result.exit_code == 1
    assert "no longer finite" in result.stderr and "--lr" in result.stderr
    assert not (tmp_path / "run" / "backbone.pt").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--margin", "archface"), "--margin must be one of adaface"),
        (("--setting", "h=1"), "--setting 'h=1': arcface has m, s"),
        (("--setting", "m=deep"), "expected a float, such as 0.5"),
        (("--setting", "m=28.6"), "radians"),
        (("--margin", "kappaface", "--setting", "features=memory"), "not 'features'"),
        (("--margin", "elasticface", "--setting", "angular=no"), "expected a bool"),
        (("--sample-rate", "0"), "--sample-rate must be in (0, 1]"),
        (("--warm-up", "20"), "--warm-up must be"),
        (("--lr", "nan"), "--lr must be positive"),
        (("--clip", "0"), "--clip must be positive"),
        (("--batch", "1000"), "lower --batch"),
        (("--embedding-size", "0"), "--embedding-size must be at least 1"),
        (("--workers", "-1"), "--workers must not be negative"),
        (("--backbone", "resnet"), "--backbone must be one of iresnet18"),
        (("--backbone", "tiny_backbone:none"), "none"),
        (("--backbone", "tiny_backbone:not_a_module"), "not a torch.nn.Module"),
        (("--pretrained", __file__), "does not fit"),
        (("--validation", "nowhere"), "nowhere"),
        (("--validation", __file__ + "/x.bin"), "x.bin"),
    ],
)
def test_refuses_before_anything_is_written(faces, tmp_path, options, message):
    result, _ = train(faces, "--out", tmp_path / "run", *SMALL, *options)
    assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_refuses_data_and_checkpoints(faces, tmp_path):
    result, _ = train(tmp_path / "none", "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 1 and "none" in result.stderr
    run = faces, "--out", tmp_path / "run", "--epochs", 1, *SMALL
    assert train(*run)[0].exit_code == 0
    before = (tmp_path / "run" / "backbone.pt").read_bytes()
    for options, message in (
        ((), "continue it with --resume"),
        (("--resume", "--setting", "m=0.3"), "margin_settings was () and is now ('m=0.3',)"),
        (("--resume", "--embedding-size", "8"), "embedding_size was 16"),
    ):
        result, _ = train(*run, *options)
        assert result.exit_code == 1 and message in result.stderr
    result, _ = train(write_faces(tmp_path / "five", 5, 2), *run[1:], "--resume")
    assert result.exit_code == 1 and "does not fit" in result.stderr
    assert (tmp_path / "run" / "backbone.pt").read_bytes() == before


def test_all_margins_have_a_name():
    counts = torch.ones(4, dtype=torch.int64)
    for name, kind in BY_NAME.items():
        assert type(new_margin(name, (), lambda: counts)) is kind
    assert new_margin("cosface", ("m=0.25",), None).m == 0.25
    assert torch.equal(new_margin("kappaface", (), lambda: counts).class_counts, counts)


def test_schedule():
    from fastmargin.train.settings import Settings

    settings = Settings(Path("x"), Path("y"), epochs=10, warm_up=2.0)
    assert settings.rate(1024, 2.0) == pytest.approx(0.1)
    assert settings.rate(256, 2.0) == pytest.approx(0.025)
    assert settings.rate(1024, 1.0) == pytest.approx(0.05)
    assert settings.rate(1024, 6.0) == pytest.approx(0.1 / 4)
    assert settings.rate(1024, 10.0) == 0


def test_validation_compares_whole_runs(faces, monkeypatch):
    monkeypatch.setattr(validation, "MOST_IMAGES", 20)
    people = validation.open_validation(faces, SIZE)
    assert people.chosen.tolist() == [*range(10), *range(30, 40)]


# ---- the network ----


@pytest.mark.parametrize(
    "name, millions", [("iresnet18", 24.03), ("iresnet50", 43.59), ("iresnet100", 65.16)]
)
def test_iresnet_is_that_of_insightface(name, millions):
    with torch.device("meta"):
        network = IResNet(DEPTHS[name])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer1.1.bn1.running_mean"] == (64,)
    assert shapes["layer4.0.prelu.weight"] == (512,)
    assert shapes["fc.weight"] == (512, 25088) and shapes["features.bias"] == (512,)
    assert not network.features.weight.requires_grad


def test_iresnet_of_other_sizes():
    network = IResNet((1, 1, 1, 1), 24, (40, 36)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(torch.randn(2, 3, 40, 36))
    assert found.shape == (2, 24) and found.dtype == torch.float32


def test_pretrained_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"weight": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(TrainError, match="does not fit"):
        load_pretrained(torch.nn.Linear(2, 2), tmp_path / "harmful.pt")
