"""What was converted trains on in any number of processes; converting takes little memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import convert_files as make
import pytest
import torch
from fresh_processes import run_fresh

import fastmargin as fm
from fastmargin import convert
from fastmargin.distributed.shard import bounds

DIM, CLASSES = 6, 26


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, DIM, generator=generator), torch.tensor([0, 9, 25, 3])


def loaded(path, margin, group=None, row_sgd=False, **options):
    """A head, and its optimiser, from a checkpoint."""
    head = fm.MarginHead(DIM, CLASSES, margin, group=group, **options)
    objects = {"head": head}
    if row_sgd:
        objects["optimizer"] = fm.optim.RowSGD(head.parameters(), lr=0.1, momentum=0.9)
    fm.checkpoint.load(path, objects, process_group=group)
    return head, objects.get("optimizer")


def _train(group, path):
    """Logits, the local rows after two steps, and the statistics, of one process."""
    head, optimiser = loaded(path, fm.AdaFace(), group, row_sgd=True)
    x, labels = batch()
    with torch.no_grad():
        before = head.logits(x)
    for _ in range(2):
        optimiser.zero_grad()
        head(x, labels).backward()
        optimiser.step()
    fm.deferred.settle(head.weight)
    return before, head.weight.detach(), head.margin.batch_mean.clone()


@pytest.fixture(scope="module")
def adaface(tmp_path_factory):
    """A checkpoint of AdaFace's, its centres and momentum."""
    folder = tmp_path_factory.mktemp("adaface")
    weight = make.centres(CLASSES)
    buffer = make.adaface(folder / "last.ckpt", weight)
    convert.write(convert.read(folder / "last.ckpt"), folder / "c", "fastmargin", world_size=2)
    return folder / "c", weight, buffer


def test_a_head_continues(adaface):
    path, weight, buffer = adaface
    head, optimiser = loaded(path, fm.AdaFace(), row_sgd=True)
    assert torch.equal(head.weight, weight)
    assert head.margin.batch_mean.tolist() == [18.25] and head.margin.batch_std.tolist() == [4.5]
    assert torch.equal(optimiser.state[head.weight]["momentum_buffer"], buffer)
    assert optimiser.param_groups[0]["lr"] == 0.1 and optimiser.param_groups[0]["momentum"] == 0.9
    twin = torch.nn.Parameter(weight.clone())
    sgd = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    sgd.state[twin]["momentum_buffer"] = buffer.clone()
    twin.grad = torch.zeros_like(twin)  # momentum alone moves
    sgd.step()
    head.weight.grad = torch.zeros_like(head.weight)
    optimiser.step()
    torch.testing.assert_close(head.weight.detach(), twin.detach())


@pytest.mark.dist
def test_three_processes_have_the_logits_of_one(adaface):
    path, weight, _ = adaface
    before, rows, mean = _train(None, path)
    outcomes = run_fresh(3, _train, path)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    for rank, (logits, local, its_mean) in enumerate(outcome.value for outcome in outcomes):
        start, stop = bounds(CLASSES, 3, rank)
        torch.testing.assert_close(logits, before)
        assert local.shape == (stop - start, DIM)
        # all three saw the batch, and the loss is the mean over the rows of all
        torch.testing.assert_close(local, rows[start:stop], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(its_mean, mean)
    assert not torch.equal(rows, weight)


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("name", ["insightface", "kappaface", "cvlface"])
def test_shards_of_others_load(tmp_path, name, ranks):
    weight = make.centres(CLASSES)
    getattr(make, name)(tmp_path / "source", weight, 8)
    found = convert.read(tmp_path / "source", num_classes=CLASSES)
    convert.write(found, tmp_path / "c", "fastmargin", world_size=ranks)
    margin = fm.AdaFace() if name == "cvlface" else fm.ArcFace()
    head, optimiser = loaded(tmp_path / "c", margin, row_sgd=name != "cvlface")
    assert torch.equal(head.weight, weight)
    if optimiser is not None:
        rows = found.momentum.tensor(0, CLASSES)
        assert torch.equal(optimiser.state[head.weight]["momentum_buffer"], rows)
    assert len(list((tmp_path / "c").glob("version-*/*.distcp"))) == ranks


@pytest.mark.parametrize(
    "name", ["adaface", "arcface", "cosface", "elasticface", "kappaface", "npt"]
)
def test_any_margin_can_go_on(tmp_path, name):
    margins = {margin.lower(): getattr(fm, margin) for margin in fm.__all__ if "Face" in margin}
    margins["npt"] = fm.NPT
    make.pml(tmp_path / "loss.pt", make.centres(CLASSES))
    convert.write(convert.read(tmp_path / "loss.pt"), tmp_path / "c", "fastmargin", margin=name)
    head, _ = loaded(tmp_path / "c", margins[name]())
    fresh = fm.MarginHead(DIM, CLASSES, margins[name]())
    for key, value in fresh.margin.state_dict().items():
        if key != "seed":
            assert torch.equal(head.margin.state_dict()[key], value), key
    x, labels = batch()
    head(x, labels).backward()


def test_adaface_may_go_on_as_another_margin(tmp_path):
    make.adaface(tmp_path / "last.ckpt", make.centres(CLASSES), momentum=False)
    found = convert.read(tmp_path / "last.ckpt")
    left = convert.write(found, tmp_path / "c", "fastmargin", margin="cosface")
    assert any("batch_mean" in line and "cosface" in line for line in left)
    head, _ = loaded(tmp_path / "c", fm.CosFace())
    assert torch.equal(head.weight, make.centres(CLASSES))


def test_a_head_that_samples_draws_from_the_seed(tmp_path):
    make.pml(tmp_path / "loss.pt", make.centres(CLASSES))
    found = convert.read(tmp_path / "loss.pt")
    convert.write(found, tmp_path / "c", "fastmargin", sampler_seed=11)
    head, _ = loaded(tmp_path / "c", fm.ArcFace(), sample_rate=0.5)
    fresh = fm.MarginHead(DIM, CLASSES, fm.ArcFace(), sample_rate=0.5, seed=11)
    fresh.load_state_dict({"weight": make.centres(CLASSES)})
    x, labels = batch()
    for _ in range(2):
        assert torch.equal(head(x, labels), fresh(x, labels))


# ---- memory ----

SIZE = 200 << 20
CONVERTS = """
    import sys, threading, time, torch
    from pathlib import Path
    import fastmargin.convert as convert
    import torch.distributed.checkpoint  # what is imported anyway is not what is measured
    import fastmargin.checkpoint.storage

    def resident():
        words = dict(line.split(":", 1) for line in Path("/proc/self/status").open())
        return int(words["VmRSS"].split()[0]) << 10

    peak = before = resident()
    done = threading.Event()

    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    threading.Thread(target=watch, daemon=True).start()
    source, dest, target, ranks = sys.argv[1:]
    convert.write(convert.read(source), dest, target, world_size=int(ranks))
    done.set()
    print(peak - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    rows = torch.arange(SIZE // 2048, dtype=torch.float32)[:, None].expand(-1, 512)
    for rank, part in enumerate((rows + torch.rand(512)).chunk(2)):
        torch.save(part.clone(), folder / f"rank_{rank}_softmax_weight.pt")
    torch.save({"W": (rows + torch.rand(512)).t().contiguous()}, folder / "loss.pt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, target, ranks, copies",
    [(".", "safetensors", 1, 0.85), (".", "fastmargin", 3, 1.1), ("loss.pt", "wespeaker", 1, 1.6)],
)
def test_centres_are_never_twice_in_memory(large, tmp_path, source, target, ranks, copies):
    command = [sys.executable, "-c", textwrap.dedent(CONVERTS)]
    arguments = [str(large / source), str(tmp_path / "out"), target, str(ranks)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) < copies * SIZE, f"{int(done.stdout) / SIZE:.2f} times the centres"
