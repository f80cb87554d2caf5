"""``fastmargin convert``: what it says is what it found and did."""

from __future__ import annotations

import json
import subprocess
import sys

import convert_files as make
import torch
from typer.testing import CliRunner

import fastmargin as fm
from fastmargin import convert
from fastmargin.cli import app


def run(*arguments, code=0):
    outcome = CliRunner().invoke(
        app, ["convert", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"}
    )
    assert outcome.exit_code == code, outcome.output
    return outcome


def test_eight_shards_become_a_checkpoint_and_three_shards(tmp_path):
    weight = make.centres(26)
    buffer = make.kappaface(tmp_path / "eight", weight, 8)
    figures = json.loads(run(tmp_path / "eight", tmp_path / "c", "--json").stdout)
    assert figures["from"] == "kappaface" and figures["classes"] == 26 and figures["dim"] == 6
    assert [shard["rows"] for shard in figures["shards"]] == [4, 4, 3, 3, 3, 3, 3, 3]
    assert figures["shards"][7]["file"] == "rank_7_softmax_weight.pt"
    assert figures["dtype"] == figures["momentum"] == "float32" and figures["bytes"] == 26 * 6 * 4
    assert figures["left_out"] == ["backbone (7 tensors): --backbone writes it"]
    assert figures["to"]["format"] == "fastmargin" and not figures["dry_run"]
    for name, size in figures["to"]["files"].items():
        assert (tmp_path / "c" / name).stat().st_size == size
    three = tmp_path / "three"
    text = run(tmp_path / "c", three, "--to", "kappaface", "--world-size", 3).stdout
    assert "7 files" in text and str(three) in text
    found = convert.read(three)
    assert [shard.num_rows for shard in found.weight.shards] == [9, 9, 8]
    assert torch.equal(found.weight.tensor(0, 26), weight)
    assert torch.equal(found.momentum.tensor(0, 26), buffer)


def test_the_load_that_it_prints_works(tmp_path):
    make.insightface(tmp_path / "i", make.centres(9), 2)
    text = run(tmp_path / "i", tmp_path / "c").stdout
    assert "6 dimensions and 9 classes with a margin without state" in text
    call = next(line for line in text.splitlines() if "fm.checkpoint.load" in line)
    head = fm.MarginHead(6, 9, fm.ArcFace())
    row_sgd = fm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
    exec(call.removeprefix("Load it with "), {"fm": fm, "head": head, "row_sgd": row_sgd})
    assert torch.equal(head.weight, make.centres(9)) and row_sgd.state
    text = run(tmp_path / "i", tmp_path / "d", "--no-momentum").stdout
    call = next(line for line in text.splitlines() if "fm.checkpoint.load" in line)
    assert "row_sgd" not in call and "momentum: as asked" in text
    exec(call.removeprefix("Load it with "), {"fm": fm, "head": head})


def test_a_dry_run_tells_and_writes_nothing(tmp_path):
    make.adaface(tmp_path / "last.ckpt", make.centres(1234))
    before = sorted(tmp_path.rglob("*"))
    text = run(tmp_path / "last.ckpt", "--dry-run").stdout
    for word in ("adaface", "1,234", "last.ckpt", "float32", "18.25", "4.5", "7 tensors"):
        assert word in text
    for word in ("optimizer_states of the backbone", "hyper_parameters", "Nothing was written"):
        assert word in text
    figures = json.loads(run(tmp_path / "last.ckpt", tmp_path / "o", "--dry-run", "--json").stdout)
    assert figures["dry_run"] and figures["statistics"] == {
        "batch_mean": [18.25],
        "batch_std": [4.5],
    }
    assert figures["to"]["path"] == str(tmp_path / "o")
    assert figures["to"]["margin"] == "adaface"
    assert sorted(tmp_path.rglob("*")) == before
    # and refuses what the conversion would refuse
    (tmp_path / "o").touch()
    assert "--overwrite" in run(tmp_path / "last.ckpt", tmp_path / "o", "--dry-run", code=1).stderr


def test_errors_are_told_without_a_traceback(tmp_path):
    make.cvlface(tmp_path / "c", make.centres(9), 4)
    outcome = run(tmp_path / "c", tmp_path / "o", code=1)
    assert "error: " in outcome.stderr and "--num-classes" in outcome.stderr
    assert "Traceback" not in outcome.output and not (tmp_path / "o").exists()
    assert "nowhere" in run(tmp_path / "nowhere", tmp_path / "o", code=1).stderr
    assert "DEST is missing" in run(tmp_path / "c", "--num-classes", 9, code=1).stderr
    assert "onnx" in run(tmp_path / "c", tmp_path / "o", "--to", "onnx", code=1).stderr
    assert "onnx" in run(tmp_path / "c", tmp_path / "o", "--from", "onnx", code=1).stderr


def test_every_option_reaches_the_conversion(tmp_path):
    weight = make.centres(12)
    make.cvlface(tmp_path / "c", weight, 5)
    net, out = tmp_path / "net.pt", tmp_path / "o"
    options = ("--num-classes", 12, "--backbone", net, "--margin", "kappaface")
    options += ("--sampler-seed", 5)
    figures = json.loads(run(tmp_path / "c", out, *options, "--json").stdout)
    assert figures["pad_rows"] == 3 and figures["to"]["backbone"] == str(net)
    assert not any("--backbone" in line for line in figures["left_out"])
    assert any("kappaface has none" in line for line in figures["left_out"])
    assert torch.load(net).keys() == make._backbone().state_dict().keys()
    head = fm.MarginHead(6, 12, fm.KappaFace(), num_sampled=4)
    fm.checkpoint.load(out, {"head": head})
    assert head.sampler.seed.tolist() == [5]
    run(tmp_path / "c", out, *options, code=1)
    run(tmp_path / "c", out, *options, "--overwrite")
    make.pml(tmp_path / "loss.pt", weight)
    sub = ("--from", "pml", "--sub-centers", 3, "--to", "wespeaker")
    text = run(tmp_path / "loss.pt", tmp_path / "w.pt", *sub).stdout
    assert "centres per class" in text
    nested = torch.nn.ModuleDict({"face": fm.MarginHead(6, 9, fm.ArcFace())})
    fm.checkpoint.save(tmp_path / "n", {"net": nested})
    run(tmp_path / "n", tmp_path / "n.pt", "--to", "npt", "--head", "net.face")
    assert torch.equal(torch.load(tmp_path / "n.pt")["head_fc"], nested["face"].weight)


def test_a_number_of_classes_that_nobody_compared_is_told(tmp_path):
    make.insightface(tmp_path / "i", make.centres(9), 3)
    assert "--num-classes" in run(tmp_path / "i", "--dry-run").stdout
    assert "--num-classes" not in run(tmp_path / "i", "--dry-run", "--num-classes", 9).stdout
    make.pml(tmp_path / "loss.pt", make.centres(9))
    assert "--num-classes" not in run(tmp_path / "loss.pt", "--dry-run").stdout


def test_progress_counts_every_row(tmp_path):
    from fastmargin.convert.command import Settings
    from fastmargin.convert.command import run as convert_now

    class Counter:
        def begin(self, what, steps):
            self.what, self.steps, self.taken = what, steps, 0

        def advance(self, steps):
            self.taken += steps

    make.kappaface(tmp_path / "k", make.centres(26), 8)
    for target in convert.FORMATS:
        counter = Counter()
        convert_now(Settings(tmp_path / "k", tmp_path / target, dest_format=target), counter)
        assert counter.what == f"kappaface to {target}"
        assert counter.taken == counter.steps == (52 if convert.FORMATS[target].momentum else 26)


def test_the_help_names_every_format():
    text = run("--help").stdout
    for name in convert.FORMATS:
        assert name in text


def test_nothing_of_it_is_imported_before_it_is_needed():
    code = "import sys, fastmargin, fastmargin.cli; print('fastmargin.convert' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
