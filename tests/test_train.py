"""``fastmargin train``: learning, resuming, several processes."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_cases import IMAGES, PEOPLE, SIZE, SMALL, Image, new_backbone_of, train, write_faces
from typer.testing import CliRunner

import fastmargin as fm
from fastmargin import verification
from fastmargin.cli import app
from fastmargin.data import RecordWriter, to_tensor
from fastmargin.train import validation
from fastmargin.train.backbones import load_pretrained, new_backbone
from fastmargin.train.images import Epochs, Resized, open_faces
from fastmargin.train.settings import BY_NAME, Settings, new_margin


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces") / "train", PEOPLE, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces") / "unseen", 3, 1)


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
    assert "epoch 2: loss" in result.stderr
    again = CliRunner().invoke(app, [*map(str, args), "--resume"], env={"COLUMNS": "200"})
    assert again.exit_code == 0 and again.stdout == result.stdout


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--margin", "adaface", "--sample-rate", "0.5", "--warm-up", "0.5"),
        ("--margin", "kappaface", "--setting", "m=0.3"),
        ("--margin", "npt", "--sample-rate", "0.5"),
        ("--margin", "elasticface", "--setting", "angular=false", "--setting", "s=16"),
        ("--margin", "curricularface", "--backbone", "tiny_backbone:with_dropout"),
    ],
    ids=["arcface", "adaface", "kappaface", "npt", "elasticface", "dropout"],
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


def torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastmargin", "train", *map(str, args), "--json"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)


def test_two_processes_then_one(faces, others, tmp_path):
    run = faces, "--out", tmp_path / "run", "--validation", others, "--sample-rate", "0.5", *SMALL
    done = torchrun(*run, "--epochs", "3", "--save-every", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout)  # of the first process alone
    assert figures["processes"] == 2 and len(figures["epochs"]) == 3
    assert figures["epochs"][-1]["steps"] == PEOPLE * IMAGES // 2 // 8
    result, figures = train(*run, "--epochs", "4", "--resume")
    assert result.exit_code == 0, result.stderr
    assert [row["steps"] for row in figures["epochs"]] == [3, 3, 3, 6]


def test_two_processes_are_one(tmp_path):
    """One step over all images, which are symmetric, so that mirroring changes nothing."""
    for person in range(4):
        (tmp_path / "train" / f"p{person}").mkdir(parents=True)
        for image in range(4):
            half = torch.rand(SIZE, SIZE // 2, 3)
            pixels = (255 * torch.cat([half, half.flip(1)], 1)).byte()
            file = tmp_path / "train" / f"p{person}" / f"{image}.png"
            Image.fromarray(pixels.numpy()).save(file)
    run = tmp_path / "train", *SMALL[:-4], "--device", "cpu", "--epochs", 3
    run += "--backbone", "tiny_backbone:without_norms", "--setting", "s=8"
    done = torchrun(*run, "--out", tmp_path / "two", "--batch", 8)
    assert done.returncode == 0, done.stderr[-4000:]
    result, one = train(*run, "--out", tmp_path / "one", "--batch", 16)
    assert result.exit_code == 0, result.stderr
    for found, wanted in zip(json.loads(done.stdout)["epochs"], one["epochs"], strict=True):
        for key in ("steps", "loss", "lr", "top1", "target_cosine", "norm_mean"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4), key
    weights = [torch.load(tmp_path / name / "backbone.pt") for name in ("one", "two")]
    start = new_backbone_of(0, "tiny_backbone:without_norms").state_dict()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name])


def test_two_processes_stop_in_the_middle_of_an_epoch(faces, tmp_path):
    wild = "--lr", 1e30, "--clip", "inf", "--save-every", 1, "--epochs", 1
    done = torchrun(faces, "--out", tmp_path / "run", *SMALL, *wild)
    assert done.returncode != 0 and "no longer finite at step 2" in done.stderr
    stored = fm.checkpoint.load(tmp_path / "run" / "checkpoint", {}, strict=False)
    assert (stored["epoch"], stored["seen"]) == (0, 2 * 8)


def test_an_error_on_one_process_ends_both(faces, tmp_path):
    done = torchrun(faces, "--out", tmp_path / "run", *SMALL, "--validation", "nowhere")
    assert done.returncode != 0 and "nowhere" in done.stderr and done.stdout == ""
    assert "reading the data" in done.stderr  # what the other one says


def test_is_the_loop_that_the_docs_describe(faces, tmp_path):
    args = "--seed", 3, "--sample-rate", 0.7, "--warm-up", 1, "--epochs", 2, "--momentum", 0.8
    args += "--weight-decay", 0.01, "--clip", 1.0, "--margin", "cosface", "--setting", "m=0.2"
    result, figures = train(faces, "--out", tmp_path / "run", *SMALL, *args)
    assert result.exit_code == 0, result.stderr

    backbone = new_backbone_of(3).train()
    head = fm.MarginHead(16, PEOPLE, fm.CosFace(m=0.2), sample_rate=0.7, seed=3, batch_size=8)
    rule = {"lr": 1.0, "momentum": 0.8, "weight_decay": 0.01}
    optimizer = torch.optim.SGD(backbone.parameters(), **rule)
    centres = fm.optim.RowSGD(head.parameters(), unsampled="dense", **rule)
    epochs = Epochs(open_faces(faces, SIZE), 8, 3, 0, 1, 0, False)
    assert epochs.steps == 6
    losses, rates = (
        [],
        [*(0.1 * i / 6 for i in range(6)), *(0.1 * (1 - i / 6) ** 2 for i in range(6))],
    )
    for epoch in range(2):
        for batch in epochs.batches(epoch):
            views = [
                i.flip(2) if m else i for i, m in zip(batch.images, batch.mirrored, strict=True)
            ]
            loss = head(backbone(torch.stack(views)), batch.labels)
            optimizer.zero_grad()
            centres.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
            for one in (optimizer, centres):
                one.param_groups[0]["lr"] = rates[len(losses)]
                one.step()
            losses.append(loss.item())
    for name, value in torch.load(tmp_path / "run" / "backbone.pt").items():
        torch.testing.assert_close(value, backbone.state_dict()[name], rtol=1e-4, atol=1e-5)
    other = fm.MarginHead(16, PEOPLE, fm.CosFace(m=0.2), sample_rate=0.7, seed=3, sparse_grad=True)
    fm.checkpoint.load(tmp_path / "run" / "checkpoint", {"head": other}, strict=False)
    torch.testing.assert_close(other.weight, head.weight, rtol=1e-4, atol=1e-5)
    assert [row["loss"] for row in figures["epochs"]] == pytest.approx(
        [sum(losses[:6]) / 6, sum(losses[6:]) / 6], rel=1e-4
    )
    assert figures["epochs"][0]["lr"] == pytest.approx(rates[5])


def test_epochs_of_two_processes():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.tensor(float(index)), index

    parts = [Epochs(Numbers(), 4, 0, rank, 2, 0, False) for rank in range(2)]
    assert [part.steps for part in parts] == [5, 5]
    taken = [[batch for batch in part.batches(0)] for part in parts]
    labels = [torch.cat([batch.labels for batch in part]) for part in taken]
    assert len(torch.cat(labels).unique()) == 40
    later = torch.cat([batch.labels for batch in parts[0].batches(1)])
    assert not torch.equal(later, labels[0])
    rest = list(parts[0].batches(0, 3))
    assert [batch.step for batch in rest] == [3, 4]
    for found, wanted in zip(rest, taken[0][3:], strict=True):
        assert torch.equal(found.labels, wanted.labels) and found.seed == wanted.seed
        assert torch.equal(found.mirrored, wanted.mirrored)
    mirrored = torch.cat([batch.mirrored for part in taken for batch in part])
    assert 8 < mirrored.sum() < 32
    assert len({batch.seed for part in taken for batch in part}) == 10


def test_validation_figures(faces, others, tmp_path):
    """Those of the written network in evaluation mode, with mirrored images."""
    run = faces, "--out", tmp_path / "run", "--validation", others, "--epochs", 2, *SMALL
    figures = train(*run)[1]["epochs"][-1]["validation"][str(others)]
    backbone = new_backbone_of(0).eval()
    load_pretrained(backbone, tmp_path / "run" / "backbone.pt")
    data = open_faces(others, SIZE)
    images = torch.stack([data[i][0] for i in range(len(data))])
    with torch.no_grad():
        unit, flipped = (
            torch.nn.functional.normalize(backbone(view)) for view in (images, images.flip(3))
        )
    curve = verification.roc(verification.all_pairs(unit + flipped, data.labels))
    assert figures["auc"] == pytest.approx(verification.auc(curve), abs=1e-6)
    assert figures["tar_at_far_1e-03"] == pytest.approx(verification.tar_at_far(curve, 1e-3))


def test_kappaface_ends_its_epochs(faces, tmp_path):
    run = faces, "--out", tmp_path / "run", "--epochs", 1, "--margin", "KappaFace", *SMALL
    assert train(*run)[0].exit_code == 0
    head = fm.MarginHead(16, PEOPLE, fm.KappaFace())
    fm.checkpoint.load(tmp_path / "run" / "checkpoint", {"head": head}, strict=False)
    assert (head.margin.class_weights < 1).all() and not head.margin.class_seen.any()


def test_pretrained(faces, tmp_path):
    assert train(faces, "--out", tmp_path / "a", "--epochs", 2, *SMALL)[0].exit_code == 0
    start = "--pretrained", tmp_path / "a" / "backbone.pt", "--epochs", 1
    result, _ = train(faces, "--out", tmp_path / "b", *SMALL, *start, "--lr", 1e-12)
    assert result.exit_code == 0, result.stderr
    a, b = (torch.load(tmp_path / name / "backbone.pt") for name in "ab")
    torch.testing.assert_close(a["0.weight"], b["0.weight"])


def test_images_of_another_size():
    image = Image.new("RGB", (10, 20), (255, 0, 127))
    assert Resized(16)(image).shape == (3, 16, 16)
    picture = Image.fromarray(torch.randint(0, 256, (16, 16, 3)).byte().numpy())
    assert torch.equal(Resized(16)(picture), to_tensor(picture))


@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_damaged_image_stops_and_can_be_mended(faces, others, tmp_path, where):
    folders = {"train": tmp_path / "train", "validation": tmp_path / "unseen"}
    shutil.copytree(faces, folders["train"])
    shutil.copytree(others, folders["validation"])
    file = sorted(folders[where].glob("*/*.png"))[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[:40])
    run = folders["train"], "--out", tmp_path / "run", "--validation", folders["validation"]
    run += "--epochs", 1, *SMALL, "--workers", 1
    result, _ = train(*run)
    assert result.exit_code == 1
    assert str(file) in result.stderr and "Traceback" not in result.stderr
    file.write_bytes(whole)
    result, figures = train(*run, "--resume")
    assert result.exit_code == 0, result.stderr
    assert len(figures["epochs"]) == 1 and figures["epochs"][0]["validation"]
    assert (tmp_path / "run" / "backbone.pt").exists()


def test_records_and_a_bin_file(faces, tmp_path):
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


def test_all_margins_have_a_name():
    counts = torch.ones(4, dtype=torch.int64)
    for name, kind in BY_NAME.items():
        assert type(new_margin(name, (), lambda: counts)) is kind
    assert new_margin("cosface", ("m=0.25",), None).m == 0.25
    assert torch.equal(new_margin("kappaface", (), lambda: counts).class_counts, counts)


def test_schedule():
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
