"""Conversions lose no bit of the centres, from and to every format and number of processes."""

from __future__ import annotations

import itertools

import convert_files as make
import pytest
import torch

import fastmargin as fm
from fastmargin import convert
from fastmargin.convert import centres as described
from fastmargin.convert import shards

SHARDED = ("insightface", "kappaface", "cvlface")
FORMATS = tuple(convert.FORMATS)
DIM = 6


def place(folder, name):
    """Where to write a format, under a name that says so."""
    if convert.FORMATS[name].owns:
        return folder / name
    return folder / ("c.safetensors" if name == "safetensors" else f"{name}.pt")


def source(folder, name, weight, ranks=1):
    """Files of a foreign format as the foreign code makes them."""
    path = place(folder, name)
    folder.mkdir(exist_ok=True)
    if name in SHARDED:
        getattr(make, name)(path, weight, ranks)
    elif name == "safetensors":
        head = fm.MarginHead(weight.shape[1], len(weight), fm.ArcFace())
        head.weight.data.copy_(weight)
        head.export_centers(normalized=False, path=path)
    elif name == "fastmargin":
        head = fm.MarginHead(weight.shape[1], len(weight), fm.AdaFace())
        head.weight.data.copy_(weight)
        fm.checkpoint.save(path, {"head": head})
    else:
        getattr(make, name)(path, weight)
    return path


def read(path, classes, **options):
    """All rows, by a format that is found out."""
    found = convert.read(path, num_classes=classes, **options)
    return found.weight.tensor(0, found.weight.num_rows), found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of three rows, so that every conversion has many."""
    monkeypatch.setattr(described, "BLOCK_BYTES", 3 * DIM * 4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("classes, ranks", [(26, 12), (24, 3), (5, 8), (7, 2), (1, 1)])
def test_every_format_is_found_out_and_read(tmp_path, name, classes, ranks):
    weight = make.centres(classes)
    path = source(tmp_path, name, weight, ranks)
    rows, found = read(path, classes)
    assert found.format == name and found.num_classes == classes
    assert rows.dtype == torch.float32 and torch.equal(rows, weight)
    assert torch.equal(found.weight.read(classes // 2, classes), weight[classes // 2 :])


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("via", ["itself", "fastmargin", "safetensors"])
@pytest.mark.parametrize("classes", [26, 5])
def test_eight_three_eight(tmp_path, name, via, classes):
    weight = make.centres(classes)
    first, step = source(tmp_path / "first", name, weight, 8), name if via == "itself" else via
    found = convert.read(first, num_classes=classes)
    middle, ranks = place(tmp_path, step), 1 if via == "safetensors" else 3
    convert.write(found, middle, step, world_size=ranks)
    found = convert.read(middle, num_classes=classes)
    convert.write(found, tmp_path / "last", name, world_size=8)
    rows, last = read(tmp_path / "last", classes)
    assert torch.equal(rows, weight)
    before = convert.read(first, num_classes=classes)
    assert [s.num_rows for s in last.weight.shards] == [s.num_rows for s in before.weight.shards]
    if before.momentum is not None and via != "safetensors" and name == "kappaface":
        assert torch.equal(last.momentum.tensor(0, classes), before.momentum.tensor(0, classes))


@pytest.mark.parametrize("start, target", list(itertools.product(FORMATS, FORMATS)))
def test_any_format_to_any_other_and_back(tmp_path, start, target):
    weight = make.centres(11)
    path = source(tmp_path / "start", start, weight, 3)
    middle, last = place(tmp_path, target), place(tmp_path / "last", start)
    found = convert.read(path, num_classes=11)
    convert.write(found, middle, target, world_size=2 if convert.FORMATS[target].sharded else 1)
    rows, found = read(middle, 11)
    assert found.format == target and torch.equal(rows, weight)
    convert.write(found, last, start)
    rows, found = read(last, 11)
    assert found.format == start and torch.equal(rows, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("target", FORMATS)
def test_other_dtypes_stay_what_they_are(tmp_path, dtype, target):
    weight = make.centres(9, dtype=dtype)
    make.wespeaker(tmp_path / "model.pt", weight)
    convert.write(convert.read(tmp_path / "model.pt"), place(tmp_path, target), target)
    rows, _ = read(place(tmp_path, target), 9)
    assert rows.dtype == dtype and torch.equal(rows, weight)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shards_are_those_the_foreign_code_loads(tmp_path, ranks):
    weight = make.centres(26)
    make.pml(tmp_path / "loss.pth", weight)
    found = convert.read(tmp_path / "loss.pth")
    for name in SHARDED:
        convert.write(found, tmp_path / name, name, world_size=ranks)
    rounded = -(-26 // ranks) * ranks
    for rank in range(ranks):
        start, stop = make.insightface_bounds(26, ranks, rank)
        loaded = torch.load(tmp_path / "insightface" / f"checkpoint_gpu_{rank}.pt")
        assert torch.equal(loaded["state_dict_softmax_fc"]["weight"], weight[start:stop])
        loaded = torch.load(tmp_path / "kappaface" / f"rank_{rank}_softmax_weight.pt")
        assert torch.equal(loaded, weight[start:stop])
        loaded = torch.load(tmp_path / "kappaface" / f"rank_{rank}_softmax_weight_mom.pt")
        assert torch.equal(loaded, torch.zeros(stop - start, DIM))
        start, stop = make.insightface_bounds(rounded, ranks, rank)
        loaded = torch.load(tmp_path / "cvlface" / f"classifier_rank{rank}.pt")
        padded = torch.cat([weight, torch.zeros(rounded - 26, DIM)])
        assert torch.equal(loaded["partial_fc.weight"], padded[start:stop])
    for name in SHARDED:
        files = ranks * (2 if name == "kappaface" else 1)
        assert len(list((tmp_path / name).iterdir())) == files + 1  # and the order of the shards


@pytest.mark.parametrize("ranks", [3, 8])
def test_pad_rows_of_the_source_go_nowhere(tmp_path, ranks):
    make.cvlface(tmp_path / "source", make.centres(26), 8)
    found = convert.read(tmp_path / "source", num_classes=26)
    assert len(found.weight.shards[-1].read(0, 4).unique()) > 1
    convert.write(found, tmp_path / "out", "cvlface", world_size=ranks)
    shards_there = convert.read(tmp_path / "out", num_classes=26).weight.shards
    rows = torch.cat([shard.read(0, shard.num_rows) for shard in shards_there])
    assert not rows[26:].any() and len(rows) == {3: 27, 8: 32}[ranks]


def test_single_files_are_those_the_foreign_code_loads(tmp_path):
    weight = make.centres(10)
    make.cvlface(tmp_path / "cvlface", weight, 1)
    found = convert.read(tmp_path / "cvlface")
    paths = {name: tmp_path / f"{name}.pt" for name in ("adaface", "npt", "pml", "wespeaker")}
    for name, path in paths.items():
        convert.write(found, path, name)
    loaded = {name: torch.load(path) for name, path in paths.items()}
    state = loaded["adaface"]["state_dict"]
    assert torch.equal(state["head.kernel"], weight.t()) and state["head.kernel"].is_contiguous()
    assert state["head.t"].tolist() == [0]
    assert state["head.batch_mean"].tolist() == [21.5] and state["head.batch_std"].tolist() == [
        7.25
    ]
    assert torch.equal(loaded["npt"]["head_fc"], weight) and loaded["npt"]["num_classes"] == 10
    assert torch.equal(loaded["pml"]["W"], weight.t())
    assert torch.equal(loaded["wespeaker"]["projection.weight"], weight)


def test_statistics_travel_among_those_who_have_them(tmp_path):
    weight = make.centres(10)
    make.adaface(tmp_path / "last.ckpt", weight)
    convert.write(convert.read(tmp_path / "last.ckpt"), tmp_path / "a", "cvlface", world_size=4)
    found = convert.read(tmp_path / "a", num_classes=10)
    convert.write(found, tmp_path / "b", "fastmargin", world_size=2)
    convert.write(convert.read(tmp_path / "b"), tmp_path / "c.ckpt", "adaface")
    for path in ("last.ckpt", "a", "b", "c.ckpt"):
        found = convert.read(tmp_path / path, num_classes=10)
        assert {name: value.tolist() for name, value in found.statistics.items()} == {
            "batch_mean": [18.25],
            "batch_std": [4.5],
        }


@pytest.mark.parametrize("name", ["insightface", "kappaface", "cvlface", "adaface", "npt"])
def test_files_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path = source(tmp_path, name, make.centres(7), 2)
    monkeypatch.undo()
    data = next(file for file in [path, *path.glob("*0*.pt")] if file.is_file()).read_bytes()
    assert b"cuda:3" in data
    rows, _ = read(path, 7)
    assert torch.equal(rows, make.centres(7)) and rows.device.type == "cpu"


def test_checkpoints_of_old_lightning(tmp_path):
    path = source(tmp_path, "adaface", make.centres(7))
    make.of_old_lightning(path)
    rows, found = read(path, 7)
    assert torch.equal(rows, make.centres(7)) and "callbacks" in found.left_out


@pytest.mark.parametrize("name", ["insightface", "kappaface", "adaface"])
def test_momentum_is_found_beside_the_centres(tmp_path, name):
    weight, path = make.centres(13), place(tmp_path, name)
    maker = getattr(make, name)
    buffer = maker(path, weight, 4) if name in SHARDED else maker(path, weight)
    found = convert.read(path)
    assert torch.equal(found.momentum.tensor(0, 13), buffer)
    convert.write(found, tmp_path / "out", "fastmargin", world_size=3)
    convert.write(convert.read(tmp_path / "out"), tmp_path / "shards", "kappaface", world_size=2)
    assert torch.equal(convert.read(tmp_path / "shards").momentum.tensor(0, 13), buffer)


@pytest.mark.parametrize("name", ["insightface", "kappaface", "adaface"])
def test_a_source_without_momentum(tmp_path, name):
    weight, path = make.centres(13), place(tmp_path, name)
    maker = getattr(make, name)
    if name in SHARDED:
        maker(path, weight, 4, momentum=False)
    else:
        maker(path, weight, momentum=False)
    assert convert.read(path).momentum is None


def test_ddp_prefixes_and_fc_classifiers_are_looked_through(tmp_path):
    weight = make.centres(9)
    make.wespeaker(tmp_path / "ddp.pt", weight, ddp=True)
    rows, found = read(tmp_path / "ddp.pt", 9)
    assert torch.equal(rows, weight)
    assert set(found.backbone.load()) == set(make._backbone().state_dict())
    torch.save({"classifier.weight": weight}, tmp_path / "classifier_rank0.pt")
    rows, found = read(tmp_path / "classifier_rank0.pt", 9)
    assert found.format == "cvlface" and torch.equal(rows, weight)


@pytest.mark.parametrize("name", ["insightface", "kappaface", "cvlface", "adaface", "npt"])
def test_the_backbone_is_written_when_asked_for(tmp_path, name):
    path = source(tmp_path, name, make.centres(6), 2)
    found = convert.read(path, num_classes=6)
    asked = convert.write(
        found, tmp_path / "a.safetensors", "safetensors", backbone=tmp_path / "net.pt"
    )
    state, wanted = torch.load(tmp_path / "net.pt"), make._backbone().state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert not any("--backbone" in line for line in asked)
    left = convert.write(found, tmp_path / "b.safetensors", "safetensors")
    assert any("--backbone" in line for line in left)


def test_what_is_left_out_is_told(tmp_path):
    make.insightface(tmp_path / "i", make.centres(6), 2)
    left = convert.write(convert.read(tmp_path / "i"), tmp_path / "o", "insightface")
    text = " ".join(left)
    for word in ("epoch", "global_step", "state_optimizer", "state_lr_scheduler", "momentum"):
        assert word in text
    left = convert.write(convert.read(tmp_path / "i"), tmp_path / "f", "fastmargin")
    assert "momentum:" not in " ".join(left) and "state_optimizer of the backbone" in left
    make.cvlface(tmp_path / "c", make.centres(6), 2)
    left = convert.write(convert.read(tmp_path / "c", num_classes=6), tmp_path / "n.pth", "npt")
    assert "optimizer.pt" in left and any("batch_mean" in line for line in left)
    make.npt(tmp_path / "m.pth", make.centres(6))
    assert {"train_trans", "optim_state", "Param"} <= set(convert.read(tmp_path / "m.pth").left_out)


@pytest.mark.parametrize("target", ["pml", "wespeaker", "safetensors"])
def test_sub_centres_stay_together(tmp_path, target):
    weight = make.centres(12)
    make.pml(tmp_path / "loss.pth", weight)
    found = convert.read(tmp_path / "loss.pth", sub_centers=3, num_classes=4)
    assert found.num_classes == 4
    convert.write(found, place(tmp_path, target), target)
    known = {} if target == "safetensors" else {"sub_centers": 3}
    rows, found = read(place(tmp_path, target), 4, **known)
    assert found.sub_centers == 3 and found.num_classes == 4 and torch.equal(rows, weight)


def test_a_head_inside_a_module_is_taken_by_its_name(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {
            "face": fm.MarginHead(DIM, 9, fm.AdaFace()),
            "dog": fm.MarginHead(DIM, 4, fm.ArcFace()),
        }
    )
    optimiser = torch.optim.SGD(net["face"].parameters(), lr=0.1, momentum=0.9)
    net["face"](torch.randn(2, DIM), torch.tensor([0, 1])).backward()
    optimiser.step()
    fm.checkpoint.save(tmp_path / "c", {"net": net, "sgd": optimiser, "epoch": 4})
    with pytest.raises(convert.ConvertError, match=r"--head.*net\.dog, net\.face"):
        convert.read(tmp_path / "c")
    rows, found = read(tmp_path / "c", 9, head="net.face")
    assert torch.equal(rows, net["face"].weight)
    assert found.statistics["batch_mean"].tolist() == net["face"].margin.batch_mean.tolist()
    buffer = optimiser.state[net["face"].weight]["momentum_buffer"]
    assert torch.equal(found.momentum.tensor(0, 9), buffer)
    assert "epoch (int)" in found.left_out


def test_split_rules_are_those_of_the_code_bases():
    assert shards.even(26, 8) == [4, 4, 3, 3, 3, 3, 3, 3]
    assert shards.even(2, 4) == [1, 1, 0, 0]
    assert shards.padded(26, 8) == [4] * 8
    assert shards.padded(2, 4) == [1] * 4
