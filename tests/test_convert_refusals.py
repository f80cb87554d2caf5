"""Shards that are wrong, missing or dangerous are errors that name them, and change nothing."""

from __future__ import annotations

import os
import pickle
import re
import shutil

import convert_files as make
import pytest
import torch

import fastmargin as fm
from fastmargin import convert
from fastmargin.convert import ConvertError, files

NAMES = {
    "insightface": "checkpoint_gpu_{}.pt",
    "kappaface": "rank_{}_softmax_weight.pt",
    "cvlface": "classifier_rank{}.pt",
}
EVERY = pytest.mark.parametrize("name", NAMES)


def shards_of(folder, name, classes=26, ranks=8, **options):
    getattr(make, name)(folder, make.centres(classes), ranks, **options)
    return [folder / NAMES[name].format(rank) for rank in range(ranks)]


def refused(path, *words, **options):
    """The error names all the words."""
    with pytest.raises(ConvertError) as caught:
        convert.read(path, **options)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def change(path, edit):
    """Rewrites the centres in a shard of any format."""
    content = torch.load(path)
    if isinstance(content, torch.Tensor):
        content = edit(content)
    elif "state_dict_softmax_fc" in content:
        state = content["state_dict_softmax_fc"]
        state["weight"] = edit(state["weight"])
    else:
        content["partial_fc.weight"] = edit(content["partial_fc.weight"])
    torch.save(content, path)


@EVERY
@pytest.mark.parametrize("rank", [0, 3])
def test_a_missing_rank_is_named(tmp_path, name, rank):
    paths = shards_of(tmp_path, name)
    paths[rank].unlink()
    refused(tmp_path, re.escape(paths[rank].name), "missing", num_classes=26)


@EVERY
def test_a_missing_last_rank_shows_in_the_number_of_classes(tmp_path, name):
    paths = shards_of(tmp_path, name, classes=24)
    paths[7].unlink()
    if name == "kappaface":
        (tmp_path / "rank_7_softmax_weight_mom.pt").unlink()
    refused(tmp_path, "num_classes", "missing", "after " + re.escape(paths[6].name), num_classes=24)


@pytest.mark.parametrize("name", ["insightface", "kappaface"])
def test_swapped_shards_are_named(tmp_path, name):
    paths = shards_of(tmp_path, name, momentum=False)  # 4, 4, 3, ...
    paths[1].rename(tmp_path / "aside")
    paths[5].rename(paths[1])
    (tmp_path / "aside").rename(paths[5])
    refused(
        tmp_path,
        re.escape(paths[1].name) + " has 3 rows instead of 4",
        re.escape(paths[5].name) + " has 4 rows instead of 3",
        "swapped",
    )


def written(folder, name, classes=24):
    """Shards of one size that were written here, for which sizes tell nothing."""
    make.wespeaker(folder / "source.pt", make.centres(classes))
    convert.write(convert.read(folder / "source.pt"), folder / "there", name, world_size=8)
    return [folder / "there" / NAMES[name].format(rank) for rank in range(8)]


@EVERY
def test_swapped_shards_of_one_size_are_named(tmp_path, name):
    paths = written(tmp_path, name)
    convert.read(paths[0].parent, num_classes=24)
    paths[2].rename(tmp_path / "aside")
    paths[5].rename(paths[2])
    (tmp_path / "aside").rename(paths[5])
    words = re.escape(str(paths[2])), re.escape(paths[5].name), "swapped"
    refused(paths[0].parent, *words, num_classes=24)


@EVERY
def test_a_missing_last_shard_is_named(tmp_path, name):
    paths = written(tmp_path, name)
    paths[7].unlink()
    (tmp_path / "there" / "rank_7_softmax_weight_mom.pt").unlink(missing_ok=True)
    refused(paths[0].parent, re.escape(paths[7].name), "missing", num_classes=21)


@EVERY
def test_shards_written_over_since_are_read(tmp_path, name):
    """Training that goes on in the folder changes rows, and may be on fewer processes."""
    paths = written(tmp_path, name)
    folder = paths[0].parent
    for path in paths:
        path.unlink()
    for path in folder.glob("*_mom.pt"):
        path.unlink()
    weight = make.centres(21) + 1
    getattr(make, name)(tmp_path / "trained", weight, 7)
    for path in (tmp_path / "trained").iterdir():
        path.rename(folder / path.name)
    found = convert.read(folder, num_classes=21)
    assert torch.equal(found.weight.read(0, 21), weight)


def test_a_damaged_note_of_the_order(tmp_path):
    paths = written(tmp_path, "insightface")
    (paths[0].parent / "fastmargin_shards.json").write_text("[")
    refused(paths[0].parent, "fastmargin_shards.json is damaged", "remove it")


@EVERY
def test_rows_against_the_rule_are_named(tmp_path, name):
    paths = shards_of(tmp_path, name)
    change(paths[4], lambda weight: weight[:-1])
    refused(
        tmp_path,
        re.escape(paths[4].name) if name != "cvlface" else "num_classes",
        num_classes=25 if name != "cvlface" else 26,
    )


@EVERY
def test_a_copy_of_a_shard_is_named(tmp_path, name):
    paths = shards_of(tmp_path, name)
    shutil.copy(paths[3], paths[6])
    refused(tmp_path, re.escape(str(paths[6])), re.escape(paths[3].name), "copy", num_classes=26)


def test_shards_that_share_their_first_and_last_row_are_no_copies(tmp_path):
    weight = torch.cat([make.centres(5)] * 2)
    weight[6] += 1
    make.kappaface(tmp_path, weight, 2)
    assert convert.read(tmp_path).num_classes == 10
    weight[5:] = weight[:5]
    make.kappaface(tmp_path, weight, 2)
    refused(tmp_path, "rank_1_softmax_weight.pt")


@EVERY
def test_pad_rows_of_zeros_are_no_copies(tmp_path, name):
    make.pml(tmp_path / "loss.pth", make.centres(3))
    convert.write(convert.read(tmp_path / "loss.pth"), tmp_path / "out", name, world_size=8)
    assert convert.read(tmp_path / "out", num_classes=3).num_classes == 3


@EVERY
def test_other_widths_and_dtypes_are_named(tmp_path, name):
    paths = shards_of(tmp_path, name)
    change(paths[2], lambda weight: weight[:, :5].clone())
    refused(tmp_path, re.escape(str(paths[2])), "5 columns", "of 6", num_classes=26)
    change(paths[2], lambda weight: torch.ones(len(weight), 6).half())
    refused(tmp_path, re.escape(str(paths[2])), "float16", "float32", num_classes=26)
    change(paths[2], lambda weight: weight.long())
    refused(tmp_path, re.escape(str(paths[2])), "int64", num_classes=26)
    change(paths[2], lambda weight: weight.float()[0])
    refused(tmp_path, re.escape(str(paths[2])), r"\(6,\)", num_classes=26)


@EVERY
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_shard_is_named(tmp_path, name, share):
    paths = shards_of(tmp_path, name)
    os.truncate(paths[5], int(paths[5].stat().st_size * share))
    refused(tmp_path, re.escape(str(paths[5])), "empty" if share == 0 else "short", num_classes=26)


@EVERY
def test_a_rank_that_is_there_twice(tmp_path, name):
    paths = shards_of(tmp_path, name)
    shutil.copy(paths[1], tmp_path / NAMES[name].format("01"))
    refused(tmp_path, re.escape(paths[1].name), re.escape(NAMES[name].format("01")), num_classes=26)


@pytest.mark.parametrize("key, other", [("epoch", 2), ("global_step", 1233)])
def test_shards_of_different_times(tmp_path, key, other):
    paths = shards_of(tmp_path, "insightface")
    content = torch.load(paths[4])
    torch.save({**content, key: other}, paths[4])
    refused(tmp_path, re.escape(str(paths[4])), key)


def test_statistics_of_different_times(tmp_path):
    paths = shards_of(tmp_path, "cvlface")
    content = torch.load(paths[4])
    content["partial_fc.batch_std"] += 1
    torch.save(content, paths[4])
    refused(tmp_path, re.escape(str(paths[4])), "statistics", num_classes=26)


def test_momentum_of_some_ranks_only(tmp_path):
    shards_of(tmp_path / "k", "kappaface")
    moment = tmp_path / "k" / "rank_2_softmax_weight_mom.pt"
    torch.save(torch.zeros(2, 6), moment)
    refused(tmp_path / "k", re.escape(str(moment)), r"\(2, 6\)")
    moment.unlink()
    refused(tmp_path / "k", re.escape(str(moment)), "missing")
    paths = shards_of(tmp_path / "i", "insightface")
    content = torch.load(paths[6])
    content["state_optimizer"]["state"] = {}
    torch.save(content, paths[6])
    refused(tmp_path / "i", re.escape(str(paths[6])), "momentum")


def test_a_shard_without_its_key(tmp_path):
    paths = shards_of(tmp_path, "insightface")
    torch.save({"state_dict_softmax_fc": {}}, paths[0])
    refused(tmp_path, re.escape(str(paths[0])), r"state_dict_softmax_fc\.weight")
    torch.save([1], paths[0])
    refused(tmp_path, re.escape(str(paths[0])), "state_dict_softmax_fc")


def test_pad_rows_need_the_number_of_classes(tmp_path):
    shards_of(tmp_path, "cvlface")
    refused(tmp_path, "--num-classes", "25 to 32")
    for classes in (24, 33):
        refused(tmp_path, "num_classes", num_classes=classes)
    assert convert.read(tmp_path, num_classes=25).num_classes == 25


@pytest.mark.parametrize("name", ["adaface", "npt", "pml", "wespeaker"])
def test_single_files_compare_the_number_of_classes(tmp_path, name):
    getattr(make, name)(tmp_path / "c.pt", make.centres(9))
    refused(tmp_path / "c.pt", "9 classes", "num_classes is 10", num_classes=10)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", [*NAMES, "pml"])
def test_code_in_a_file_is_not_run(tmp_path, name):
    if name == "pml":
        paths = [tmp_path / "loss.pt"]
        torch.save({"W": make.centres(6), "more": Runs(tmp_path / "ran")}, paths[0])
    else:
        paths = shards_of(tmp_path, name)
        torch.save({"more": Runs(tmp_path / "ran")}, paths[0])
    refused(paths[0], re.escape(str(paths[0])), "mkdir", "trust", num_classes=26)
    assert not (tmp_path / "ran").exists()


def test_what_is_not_allowed_is_named_beside_what_is(tmp_path):
    with make._torchvision() as transforms:
        torch.save({"a": transforms.ToTensor(), "b": Runs(tmp_path / "ran")}, tmp_path / "n.pth")
    with pytest.raises(ConvertError, match=r"\(posix\.mkdir\)"):
        convert.read(tmp_path / "n.pth", "npt")


def checkpoint(folder):
    head = fm.MarginHead(6, 9, fm.AdaFace())
    fm.checkpoint.save(folder, {"head": head})
    return next(folder.glob("version-*"))


def test_code_in_the_index_of_a_checkpoint_is_not_run(tmp_path):
    version = checkpoint(tmp_path / "c")
    (version / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    refused(tmp_path / "c", r"\.metadata", "mkdir")
    version = checkpoint(tmp_path / "d")
    torch.save({"format": 1, "objects": Runs(tmp_path / "ran")}, version / "structure.pt")
    refused(tmp_path / "d", r"structure\.pt", "mkdir")
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoints_are_named(tmp_path):
    data = checkpoint(tmp_path / "c") / "__0_0.distcp"
    os.truncate(data, data.stat().st_size // 2)
    refused(tmp_path / "c", re.escape(str(data)), "cut short")
    data.unlink()
    refused(tmp_path / "c", re.escape(str(data)), "missing")
    version = checkpoint(tmp_path / "d")
    os.truncate(version / ".metadata", 30)
    refused(tmp_path / "d", r"\.metadata", "damaged")
    checkpoint(tmp_path / "e")
    refused(tmp_path / "e", "num_classes is 10", num_classes=10)
    refused(tmp_path / "e", "--head", "'other'", head="other")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "current").write_text("nonsense")
    refused(tmp_path / "f", "no checkpoint")


def test_damaged_safetensors_are_named(tmp_path):
    path = tmp_path / "c.safetensors"
    head = fm.MarginHead(6, 9, fm.ArcFace())
    head.export_centers(path=path)
    whole = path.read_bytes()
    for size in (0, 5, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, re.escape(str(path)), "cut short")
    path.write_bytes(whole[:8] + b"[" + whole[9:])
    refused(path, re.escape(str(path)), "header")
    path.write_bytes(whole.replace(b'"centers"', b'"others_"'))
    refused(path, "no tensor 'centers'", "others_")
    path.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    refused(path, "no matrix of floats")
    path.write_bytes(whole.replace(b"[9, 6]", b"[9, 7]"))
    refused(path, "damaged")


def test_formats_that_are_not_to_be_found_out(tmp_path):
    refused(tmp_path, "no known file", "--from", "insightface: ")
    shards_of(tmp_path, "insightface")
    shards_of(tmp_path, "kappaface")
    refused(tmp_path, "insightface and kappaface", "--from")
    assert convert.read(tmp_path, "kappaface").format == "kappaface"
    torch.save({"x": torch.ones(2, 2)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "no known file")
    refused(tmp_path / "x.pt", "x.pt has no 'W'", format="pml")
    refused(tmp_path, "a file", format="pml")
    refused(tmp_path / "x.pt", "a folder", format="insightface")
    refused(tmp_path, "none of fastmargin", format="arcface")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert.read(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert.read(tmp_path / "nowhere", "pml")
    torch.save({"W": torch.ones(2, 2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "torch 1.6")


def test_sub_centres_go_nowhere_but_where_they_belong(tmp_path):
    make.pml(tmp_path / "loss.pt", make.centres(12))
    refused(tmp_path / "loss.pt", "12 centres", "--sub-centers", sub_centers=5)
    found = convert.read(tmp_path / "loss.pt", sub_centers=3)
    for name, form in convert.FORMATS.items():
        if not form.sub_centers:
            with pytest.raises(ConvertError, match="3 centres for each class"):
                convert.write(found, tmp_path / "out", name)
            assert not (tmp_path / "out").exists()
    make.npt(tmp_path / "npt.pth", make.centres(12))
    refused(tmp_path / "npt.pth", "one row per class", sub_centers=3)


# ---- the destination ----


def everything(folder):
    """Names and bytes of all files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def found(tmp_path):
    make.cvlface(tmp_path / "source", make.centres(9), 2)
    return convert.read(tmp_path / "source", num_classes=9)


@pytest.mark.parametrize("target", convert.FORMATS)
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_the_destination_as_it_was(tmp_path, found, monkeypatch, target, there):
    path = tmp_path / "dest"
    if there:
        convert.write(found, path, target, backbone=tmp_path / "net.pt")
    before = everything(tmp_path)
    rows = found.weight.read

    def fails(self, start, stop):
        if stop == 9:
            raise OSError("the disk is gone")
        return rows(start, stop)

    monkeypatch.setattr(type(found.weight), "read", fails)
    with pytest.raises(OSError, match="gone"):
        convert.write(found, path, target, backbone=tmp_path / "net.pt", overwrite=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("target", convert.FORMATS)
def test_a_failure_of_the_backbone_leaves_everything(tmp_path, found, monkeypatch, target):
    convert.write(found, tmp_path / "dest", target)
    before = everything(tmp_path)
    save = files.save

    def fails(path, content):
        if "net.pt" in path.name:
            raise OSError("full")
        save(path, content)

    monkeypatch.setattr(files, "save", fails)
    with pytest.raises(OSError, match="full"):
        convert.write(
            found, tmp_path / "dest", target, backbone=tmp_path / "net.pt", overwrite=True
        )
    assert everything(tmp_path) == before


def test_a_rename_that_fails_is_taken_back(tmp_path, found, monkeypatch):
    convert.write(found, tmp_path / "dest", "kappaface", backbone=tmp_path / "net.pt")
    before, rename = everything(tmp_path), os.rename

    def fails(source, target):
        if str(target).endswith("net.pt"):
            monkeypatch.setattr(os, "rename", rename)
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        convert.write(
            found, tmp_path / "dest", "kappaface", backbone=tmp_path / "net.pt", overwrite=True
        )
    assert everything(tmp_path) == before


@pytest.mark.parametrize("target", convert.FORMATS)
def test_what_is_there_is_replaced_only_when_asked_for(tmp_path, found, target):
    path = tmp_path / "dest"
    convert.write(found, path, target)
    before = everything(path)
    with pytest.raises(ConvertError, match="--overwrite"):
        convert.write(found, path, target)
    assert everything(path) == before
    make.pml(tmp_path / "other.pt", make.centres(5))
    convert.write(convert.read(tmp_path / "other.pt"), path, target, overwrite=True)
    assert convert.read(path, target).num_classes == 5
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_folders_with_other_files_are_never_replaced(tmp_path, found):
    convert.write(found, tmp_path / "dest", "kappaface", world_size=2)
    (tmp_path / "dest" / "training.log").write_text("days of work")
    for target in convert.FORMATS:
        with pytest.raises(ConvertError, match=r"training\.log|rank_\d_soft"):
            convert.write(found, tmp_path / "dest", target, overwrite=True)
    assert (tmp_path / "dest" / "training.log").exists()


def test_the_source_is_never_replaced(tmp_path, found):
    with pytest.raises(ConvertError, match="is the source"):
        convert.write(found, tmp_path / "source", "cvlface", overwrite=True)
    make.pml(tmp_path / "loss.pt", make.centres(5))
    one = convert.read(tmp_path / "loss.pt")
    with pytest.raises(ConvertError, match="is the source"):
        convert.write(one, tmp_path / "loss.pt", "pml", overwrite=True)
    checkpoint(tmp_path / "c")
    with pytest.raises(ConvertError, match="is the source"):
        convert.write(convert.read(tmp_path / "c"), tmp_path / "c", "fastmargin", overwrite=True)


def test_options_that_do_not_fit(tmp_path, found):
    def refuses(words, *args, **options):
        before = everything(tmp_path)
        with pytest.raises(ConvertError, match=words):
            convert.write(found, *args, **options)
        assert everything(tmp_path) == before

    for name, form in convert.FORMATS.items():
        if not form.sharded:
            refuses("one file", tmp_path / "o", name, world_size=2)
    refuses("world_size must be", tmp_path / "o", "cvlface", world_size=0)
    refuses("none of fastmargin", tmp_path / "o", "onnx")
    refuses("--margin", tmp_path / "o", "fastmargin", margin="sphere")
    refuses("margin and sampler_seed", tmp_path / "o", "pml", margin="adaface")
    refuses("margin and sampler_seed", tmp_path / "o", "cvlface", sampler_seed=0)
    refuses("both", tmp_path / "o", "pml", backbone=tmp_path / "o")
    refuses("--overwrite", tmp_path / "o", "pml", backbone=tmp_path / "source" / "model.pt")
    make.pml(tmp_path / "loss.pt", make.centres(5))
    found = convert.read(tmp_path / "loss.pt")
    refuses("has none", tmp_path / "o", "npt", backbone=tmp_path / "b")
    for name in ("num_classes", "sub_centers"):
        with pytest.raises(ConvertError, match=f"{name} must be"):
            convert.read(tmp_path / "loss.pt", **{name: 0})
