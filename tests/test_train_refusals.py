"""What ``fastmargin train`` refuses, and what a stop leaves."""

from __future__ import annotations

import shutil

import pytest
import torch
from train_cases import PEOPLE, SMALL, train, write_faces

from fastmargin.train import out
from fastmargin.train.out import Out
from fastmargin.train.settings import TrainError


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return write_faces(tmp_path_factory.mktemp("faces") / "train", PEOPLE, 0)


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
        (("--backbone", "tiny_backbone:"), "--backbone must be one of iresnet18"),
        (("--backbone", ":make"), "--backbone must be one of iresnet18"),
        (("--backbone", "tiny_backbone:not_a_module"), "not a torch.nn.Module"),
        (("--backbone", "tiny_backbone:takes_nothing"), "takes_nothing"),
        (("--backbone", "tiny_backbone:frozen"), "no parameters to train"),
        (("--backbone", "tiny_backbone:without_parameters"), "no parameters to train"),
        (("--embedding-size", "8", "--backbone", "tiny_backbone:of_16"), "expected (2, 8)"),
        (("--image-size", "20"), "--backbone fails on images"),
        (("--batch", "1"), "--batch must be at least 2"),
        (("--seed", "99999999999999999999"), "--seed must be in"),
        (("--pretrained", "nowhere.pt"), "no such file"),
        (("--pretrained", __file__), "does not fit"),
        (("--validation", "nowhere"), "nowhere"),
        (("--validation", __file__ + "/x.bin"), "x.bin"),
    ],
)
def test_refuses_before_anything_is_written(faces, tmp_path, options, message):
    result, _ = train(faces, "--out", tmp_path / "run", *SMALL, *options)
    assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_refuses_data_and_folders(faces, tmp_path):
    result, _ = train(tmp_path / "none", "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 1 and "none" in result.stderr
    result, _ = train(write_faces(tmp_path / "one", 1, 0), "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 1 and "one identity" in result.stderr
    (tmp_path / "file").write_text("")
    result, _ = train(faces, "--out", tmp_path / "file", *SMALL)
    assert result.exit_code == 1 and "cannot be written" in result.stderr
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.jsonl").write_text('{"epoch": 1}\n')
    result, _ = train(faces, "--out", tmp_path / "old", *SMALL)
    assert result.exit_code == 1 and "checkpoint is gone" in result.stderr


def test_two_runs_in_one_folder(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(out, "PATIENCE", 0.6)
    first = Out(tmp_path / "run")
    with pytest.raises(TrainError, match="another run"):
        Out(tmp_path / "run")
    result, _ = train(faces, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 1 and "another run" in result.stderr
    assert first.epochs() == []
    first.close()
    Out(tmp_path / "run").close()


def test_refuses_other_checkpoints(faces, tmp_path):
    run = faces, "--out", tmp_path / "run", "--epochs", 1, *SMALL
    assert train(*run)[0].exit_code == 0
    before = (tmp_path / "run" / "backbone.pt").read_bytes()
    for options, message in (
        ((), "continue it with --resume"),
        (("--resume", "--setting", "m=0.3"), "margin was"),
        (("--resume", "--embedding-size", "8"), "embedding_size was 16"),
    ):
        result, _ = train(*run, *options)
        assert result.exit_code == 1 and message in result.stderr
    # the margin's default, and a longer run
    result, figures = train(*run, "--resume", "--setting", "m=0.5", "--epochs", 2, "--lr", 0.01)
    assert result.exit_code == 0 and len(figures["epochs"]) == 2
    result, _ = train(write_faces(tmp_path / "five", 5, 2), *run[1:], "--resume")
    assert result.exit_code == 1 and "number of images was 54 and is now 45" in result.stderr
    others = tmp_path / "others"
    shutil.copytree(faces, others)
    (others / "p0").rename(others / "q0")
    result, _ = train(others, *run[1:], "--resume")
    assert result.exit_code == 1 and "names of the folders" in result.stderr
    assert (tmp_path / "run" / "backbone.pt").read_bytes() != before  # of the second epoch
    version = next((tmp_path / "run" / "checkpoint").glob("version-*"))
    (version / "structure.pt").write_bytes(b"damaged")
    result, _ = train(*run, "--resume")
    assert result.exit_code == 1 and "damaged" in result.stderr
    (tmp_path / "run" / "checkpoint" / "current").write_text("nonsense")
    result, _ = train(*run, "--resume")
    assert result.exit_code == 1 and "does not name a version" in result.stderr


def test_a_folder_that_cannot_be_locked(faces, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(out.fcntl, "flock", refuse)
        with pytest.raises(TrainError, match="cannot be locked"):
            Out(tmp_path)


def test_a_torn_line_of_the_log(faces, tmp_path):
    run = faces, "--out", tmp_path / "run", *SMALL
    assert train(*run, "--epochs", 2)[0].exit_code == 0
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    result, figures = train(*run, "--epochs", 3, "--resume")
    assert result.exit_code == 0, result.stderr
    assert [row["epoch"] for row in figures["epochs"]] == [1, 2, 3]


def test_a_network_that_is_gone(faces, tmp_path):
    run = faces, "--out", tmp_path / "run", *SMALL, "--epochs", 1
    assert train(*run)[0].exit_code == 0
    file = tmp_path / "run" / "backbone.pt"
    before = torch.load(file)
    file.unlink()
    result, figures = train(*run, "--resume")
    assert result.exit_code == 0 and len(figures["epochs"]) == 1
    for name, value in torch.load(file).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("when", ["before its network", "before its log"])
def test_stopped_between_checkpoint_and_network(faces, tmp_path, monkeypatch, when):
    run = faces, "--out", tmp_path / "run", "--epochs", 1, *SMALL
    name = "write_backbone" if when == "before its network" else "add"
    with monkeypatch.context() as patch:
        patch.setattr(Out, name, lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(*run)[0].exit_code == 130
    result, figures = train(*run, "--resume")
    assert result.exit_code == 0, result.stderr
    assert len(figures["epochs"]) == 1 and (tmp_path / "run" / "backbone.pt").exists()
