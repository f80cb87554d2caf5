"""The glyph benchmark, with Latin, Greek and Cyrillic letters of DejaVu: no CJK font is needed."""

# ruff: noqa: E402, for what may not be installed

from __future__ import annotations

import io
import json
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("PIL", reason="pip install 'fastmargin[demo]'")
matplotlib = pytest.importorskip("matplotlib", reason="pip install 'fastmargin[demo]'")

from matplotlib.ft2font import FT2Font
from rich.console import Console

import fastmargin as fm
from benchmarks.glyphs import __main__ as command
from benchmarks.glyphs import classes as class_lists
from benchmarks.glyphs import fonts, heads, identification, memory, run
from benchmarks.glyphs.classes import Classes, cached_classes, find_classes
from benchmarks.glyphs.data import Split, draw_split
from benchmarks.glyphs.drawing import INK_SHARE, Pen, has_glyph
from benchmarks.glyphs.fonts import Font, FontsMissingError, find_faces
from benchmarks.glyphs.heads import HEADS, MARGINS
from benchmarks.glyphs.report import print_report
from benchmarks.glyphs.training import Learner, Recipe, largest_gap, train_in_step
from fastmargin.demo.network import FaceNet

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS = Font("Sans", "DejaVu Sans", "DejaVuSans.ttf", "fonts-dejavu-core")
BOLD = Font("Bold", "DejaVu Sans", "DejaVuSans-Bold.ttf", "fonts-dejavu-core")
SERIF = Font("Serif", "DejaVu Serif", "DejaVuSerif.ttf", "fonts-dejavu-core")
MONO = Font("Mono", "DejaVu Sans Mono", "DejaVuSansMono.ttf", "fonts-dejavu-mono")
LETTERS = (SANS, BOLD, SERIF, MONO)
GREEK, THAI = range(0x370, 0x400), range(0xE00, 0xE20)  # Greek with gaps; DejaVu has no Thai
LATIN = range(ord("A"), ord("Z") + 1)
TINY = Recipe(epochs=2, batch_size=26, learning_rate=0.05, widths=(4, 8))


@pytest.fixture(scope="module")
def faces():
    return find_faces(LETTERS, [DEJAVU])


@pytest.fixture(scope="module")
def split(faces) -> Split:
    return draw_split(faces, find_classes(faces, [LATIN]), MONO)


# ---- fonts ---------------------------------------------------------------------------------


def test_fonts_are_found_in_folders_inside(tmp_path):
    inside = tmp_path / "truetype" / "dejavu"
    inside.mkdir(parents=True)
    for font in LETTERS:
        shutil.copy(DEJAVU / font.file, inside)
    found = find_faces(LETTERS, [tmp_path / "nowhere", tmp_path])
    assert [face.font for face in found] == list(LETTERS)
    assert {face.path.parent for face in found} == {inside}
    assert found[2].open(20).getname() == ("DejaVu Serif", "Book")


def test_missing_fonts_name_their_packages_and_no_others(tmp_path):
    with pytest.raises(FontsMissingError) as error:
        find_faces((*fonts.SMALL, *fonts.NOTO), [tmp_path])
    assert str(error.value).endswith(
        "apt install fonts-wqy-zenhei fonts-wqy-microhei fonts-arphic-uming fonts-unifont "
        "fonts-arphic-ukai fonts-noto-cjk"
    )
    shutil.copy(DEJAVU / SANS.file, tmp_path)
    with pytest.raises(FontsMissingError, match=r"Mono \(DejaVuSansMono.ttf\)") as error:
        find_faces([SANS, MONO], [tmp_path])
    assert str(error.value).endswith("apt install fonts-dejavu-mono")


def test_a_file_of_that_name_with_another_font_does_not_count(tmp_path):
    shutil.copy(DEJAVU / SERIF.file, tmp_path / SANS.file)
    (tmp_path / MONO.file).write_bytes(b"no font")
    with pytest.raises(FontsMissingError, match=r"Sans .*Mono"):
        find_faces([SANS, MONO], [tmp_path])


def test_a_face_of_a_collection(tmp_path):
    ttlib = pytest.importorskip("fontTools.ttLib")
    collection = ttlib.TTCollection()
    collection.fonts = [ttlib.TTFont(DEJAVU / font.file) for font in (SANS, SERIF)]
    collection.save(tmp_path / "both.ttc")
    (face,) = find_faces([Font("Serif", SERIF.family, "both.ttc", "")], [tmp_path])
    assert face.index == 1
    assert face.open(20).getname() == ("DejaVu Serif", "Book")


# ---- characters ----------------------------------------------------------------------------


@pytest.mark.parametrize("font", LETTERS, ids=lambda font: font.name)
def test_has_glyph_is_the_font_s_own_table(font):
    (face,) = find_faces([font], [DEJAVU])
    has, table = has_glyph(face), FT2Font(str(face.path)).get_charmap()
    points = [*GREEK, *THAI, *range(0x400, 0x460)]
    found = [has(chr(point)) for point in points]
    assert found == [point in table for point in points]
    assert True in found and False in found
    assert not has(" ")  # in the table, but nothing to see


def test_classes_are_what_enough_fonts_have(faces):
    tables = [FT2Font(str(face.path)).get_charmap() for face in faces]
    for fewest in (1, 3, 4):
        found = find_classes(faces, [GREEK, THAI], fewest)
        counts = {point: sum(point in table for table in tables) for point in [*GREEK, *THAI]}
        expected = [point for point, count in counts.items() if count >= fewest]
        assert found.code_points.tolist() == expected
        has = [[point in table for table in tables] for point in expected]
        assert found.has.tolist() == has
    assert 0 < len(expected) < len(GREEK)


def test_classes_are_found_once_for_the_same_fonts(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(class_lists, "HAN_AND_HANGUL", (GREEK,))
    monkeypatch.setattr(find_classes, "__defaults__", ((GREEK,), 4, lambda: None))
    steps = []
    found = cached_classes(tmp_path / "out", faces, lambda: steps.append(1))
    assert len(found.code_points) > 50
    monkeypatch.setattr(class_lists, "find_classes", None)
    again = cached_classes(tmp_path / "out", faces, lambda: steps.append(1))
    assert again.code_points.tolist() == found.code_points.tolist()
    assert again.has.tolist() == found.has.tolist()
    assert len(steps) == 2 * len(faces)
    with pytest.raises(TypeError):  # another list of fonts: it would be found anew
        cached_classes(tmp_path / "out", faces[:3])


def test_some_classes():
    everything = Classes(np.arange(100, 200), np.eye(100, 4, dtype=bool))
    some = everything.some(20)
    points = some.code_points.tolist()
    assert points == sorted(set(points)) and len(points) == 20
    assert points == everything.some(20).code_points.tolist()
    assert points != everything.some(20, seed=1).code_points.tolist()
    assert [p for p, row in zip(points, some.has, strict=True) if row.any()] == [
        p for p in points if p < 104
    ]
    with pytest.raises(ValueError, match=r"1 to 100.*got 101.*--noto"):
        everything.some(101)


# ---- glyphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["I", "-", "W", "g", "."])
def test_ink_is_centred_as_large_as_fits_and_whole(faces, character):
    side = 40
    drawn = Pen(faces[0], side).draw(character)
    image = np.frombuffer(drawn, dtype=np.uint8).reshape(side, side)
    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    extent = [int(places[-1] - places[0] + 1) for places in (rows, columns)]
    assert abs(max(extent) - INK_SHARE * side) <= 2
    for places in (rows, columns):
        assert abs(places[0] - (side - 1 - places[-1])) <= 1
    font = FT2Font(str(faces[0].path))
    font.set_size(200, 72)
    box = font.load_char(ord(character)).bbox  # left, bottom, right, top
    shape = (box[3] - box[1]) / (box[2] - box[0])
    assert extent[0] / extent[1] == pytest.approx(shape, rel=0.15)
    assert image.max() > 200


def test_split_holds_out_one_font(faces, split):
    assert split.num_classes == 26
    assert split.unseen.labels.tolist() == list(range(26))
    assert sorted(split.training.labels.tolist()) == sorted(3 * list(range(26)))
    letters = string.ascii_uppercase
    for row in (0, 7, 25):
        assert bytes(split.unseen.pixels[row].flatten().tolist()) == Pen(faces[3], 32).draw(
            letters[row]
        )
        assert bytes(split.training.pixels[26 + row].flatten().tolist()) == Pen(faces[1], 32).draw(
            letters[row]
        )
    images = split.training.images(slice(3))
    assert images.shape == (3, 1, 32, 32) and images.dtype == torch.float32
    assert images.max() == split.training.pixels[:3].max() / 255


def test_a_font_draws_only_what_it_has(faces):
    has = np.array([[1, 1, 0, 1], [0, 1, 1, 0]], dtype=bool)
    split = draw_split(faces, Classes(np.array([65, 66]), has), MONO)
    assert split.unseen.labels.tolist() == [0]
    assert split.training.labels.tolist() == [0, 0, 1, 1]  # Sans, Bold, Bold, Serif


def test_split_refuses_what_cannot_be_trained_or_tested(faces):
    points = np.array([65, 66])
    with pytest.raises(ValueError, match="Mono, is not among"):
        draw_split(faces[:3], Classes(points, np.ones((2, 3), dtype=bool)), MONO)
    with pytest.raises(ValueError, match="Mono has none"):
        draw_split(faces, Classes(points, np.array(2 * [[1, 1, 1, 0]], dtype=bool)), MONO)
    with pytest.raises(ValueError, match="in Mono only"):
        draw_split(faces, Classes(points, np.array([[1, 1, 1, 1], [0, 0, 0, 1]], bool)), MONO)


# ---- figures -------------------------------------------------------------------------------


def test_figures_by_brute_force(monkeypatch):
    monkeypatch.setattr(identification, "ROWS", 7)  # several parts, the last one short
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(15, 6, generator=generator))
    labels = torch.randint(0, 15, (40,), generator=generator)
    unit = F.normalize(gallery[labels] + 0.7 * torch.randn(40, 6, generator=generator))
    cosines = unit @ gallery.T
    right = [int(max(range(15), key=lambda j: cosines[i, j])) == labels[i] for i in range(40)]
    assert identification.rank_one(unit, labels, gallery) == pytest.approx(sum(right) / 40)

    genuine = [float(cosines[i, labels[i]]) for i in range(40)]
    impostor = [float(cosines[i, j]) for i in range(40) for j in range(15) if j != labels[i]]
    for far in (0.0, 0.01, 0.1):
        shares = [
            sum(g >= threshold for g in genuine) / 40
            for threshold in [*genuine, 2.0]
            if sum(i >= threshold for i in impostor) <= far * len(impostor)
        ]
        assert identification.tar_at_far(unit, labels, gallery, far) == pytest.approx(max(shares))
    assert 0 < max(shares) < 1 and 0 < sum(right) < 40


def test_class_means():
    unit = F.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, 0]]))
    means = identification.class_means(unit, torch.tensor([0, 0, 2, 1]), 3)
    half = 0.5**0.5
    torch.testing.assert_close(means, torch.tensor([[half, half], [-1, 0], [half, half]]))


# ---- training ------------------------------------------------------------------------------


def train_both(split, margin, rate, recipe=TINY, **others):
    def maker(head):
        return lambda size, classes: head(size, classes, MARGINS[margin](), rate)

    every = HEADS | others
    return train_in_step({name: maker(head) for name, head in every.items()}, split, recipe, 0)


@pytest.mark.parametrize("rate", [1.0, 0.9])
@pytest.mark.parametrize("margin", MARGINS)
def test_both_heads_follow_the_same_curve(split, margin, rate):
    trained = train_both(split, margin, rate)
    plain, fused = trained["plain"], trained["fastmargin"]
    assert len(plain.losses) == 2 * 3 == len(fused.head_seconds)
    assert plain.losses[0] != plain.losses[-1]
    # later steps make more of rounding: a slope of PReLU that turns over
    assert largest_gap(fused.losses, plain.losses, 3) < 5e-6
    assert largest_gap(fused.losses, plain.losses, 6) < 1e-3
    for name, buffer in fused.head.margin.named_buffers():
        own = plain.head.margin.get_buffer(name)
        torch.testing.assert_close(buffer, own, rtol=1e-3, atol=1e-4)
    centres = fused.head.export_centers(normalized=False)
    torch.testing.assert_close(centres, plain.head.weight.detach(), rtol=1e-3, atol=1e-4)
    assert (fused.head.sampler is None) == (rate == 1.0)
    assert fused.head.weight.grad.is_sparse == (rate < 1.0)
    if margin == "KappaFace":  # it has seen the end of an epoch
        assert fused.head.margin.class_weights.std() > 1e-3


def test_a_step_with_the_head_apart_is_an_ordinary_step(split):
    def new_head(size, classes):
        return heads.PlainHead(size, classes, MARGINS["ArcFace"](), 1.0)

    learner, whole = (Learner(new_head, split, TINY, 0, 10) for _ in range(2))
    views, labels = split.training.images(slice(20)), split.training.labels[:20]
    learner.step(views, labels)
    whole.head(whole.network(views), labels).backward()
    for optimiser in (whole.backbone_optimiser, whole.head_optimiser):
        optimiser.step()
    moved = 0
    torch.manual_seed(0)
    first = FaceNet(TINY.widths, image_size=(32, 32))
    for own, other, before in zip(
        learner.network.parameters(), whole.network.parameters(), first.parameters(), strict=True
    ):
        torch.testing.assert_close(own, other)
        moved += not torch.equal(own, before)
    assert moved == len(list(first.parameters()))
    torch.testing.assert_close(learner.head.weight, whole.head.weight)


def test_only_the_first_epoch_of_some(split):
    def maker(head):
        return lambda size, classes: head(size, classes, MARGINS["ArcFace"](), 1.0)

    every = {"plain": maker(heads.PlainHead), "nudged": maker(heads.NudgedHead)}
    trained = train_in_step(every, split, TINY, 0, ("nudged",))
    assert len(trained["plain"].losses) == 6 and len(trained["nudged"].losses) == 3
    assert largest_gap(trained["nudged"].losses, trained["plain"].losses, 3) < 1e-3


def test_nudged_head_starts_one_bit_apart():
    first = []
    for head in (heads.PlainHead, heads.NudgedHead, heads.FusedHead):
        torch.manual_seed(0)
        first.append(head(8, 20, MARGINS["ArcFace"](), 1.0).weight.detach())
    plain, nudged, fused = first
    assert torch.equal(plain, fused)
    assert torch.equal(nudged, torch.nextafter(plain, torch.tensor(torch.inf)))


def test_largest_gap_is_relative_and_of_the_first_steps():
    losses, reference = torch.tensor([2.0, 4.4, 9.0]), torch.tensor([2.0, 4.0, 1.0])
    assert largest_gap(losses, reference, 2) == pytest.approx(0.1)
    assert largest_gap(losses, reference, 3) == pytest.approx(8)


def test_plain_draw_takes_positives_and_as_many_others_as_asked():
    labels = torch.tensor([7, 3, 7, 50])
    index, column = heads.draw_by_sorting(labels, 60, 20)
    assert len(index) == 20 == len(index.unique())
    assert torch.equal(index[column], labels)
    index, column = heads.draw_by_sorting(labels, 60, 2)
    assert index.tolist() == [3, 7, 50] and torch.equal(index[column], labels)


# ---- the whole -----------------------------------------------------------------------------


class Hungry(heads.PlainHead):
    """Takes 48 MB in every step."""

    def forward(self, embeddings, labels):
        return super().forward(embeddings, labels) + torch.ones(12_000_000).sum()


PEAKS = """
import json
from benchmarks.glyphs import heads, memory
from test_glyphs import Hungry

memory.HEADS = {"plain": heads.PlainHead, "hungry": Hungry}
task = memory.Task(64, 8, [], "cpu", 1)
print(json.dumps([memory.peak_bytes(name, "ArcFace", 1.0, task) for name in memory.HEADS]))
"""


def test_peak_memory_sees_what_a_step_takes():
    """In a process of its own: this one may have 48 MB left over from other tests."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = os.environ | memory.ENVIRONMENT | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True
    )
    plain, hungry = json.loads(done.stdout.splitlines()[-1])
    assert 47e6 < hungry < 60e6
    assert plain < 10e6


@pytest.fixture
def letters(monkeypatch):
    """The benchmark on Greek letters."""
    monkeypatch.setattr(run, "SMALL", LETTERS)
    monkeypatch.setattr(run, "HELD_OUT", MONO)
    monkeypatch.setattr(class_lists, "HAN_AND_HANGUL", (GREEK,))
    monkeypatch.setattr(find_classes, "__defaults__", ((GREEK,), 4, lambda: None))


def tiny(out, **more):
    settings = {"classes": 60, "margins": ("ArcFace",), "rates": (1.0, 0.5), "epochs": 2}
    return run.Settings(**settings | {"out": out, "fonts": DEJAVU, **more})


def test_the_whole_benchmark(letters, tmp_path):
    figures = run.run(tiny(tmp_path))
    written = json.loads((tmp_path / "glyphs.json").read_text())
    assert written == json.loads(json.dumps(figures))
    assert {file.name for file in tmp_path.iterdir()} == {
        *("glyphs.json", "curves.png", "accuracy.png", "classes.npz")
    }
    assert [(row["margin"], row["rate"]) for row in written["runs"]] == [
        ("ArcFace", 1.0),
        ("ArcFace", 0.5),
    ]
    for row in written["runs"]:
        assert row["first_epoch_gap"] < 1e-4
        assert row["time_ratio"] == row["fastmargin"]["head_ms"] / row["plain"]["head_ms"]
        for name in HEADS:
            assert row[name]["head_ms"] > 0 and row[name]["peak_bytes"] > 0
            assert len(row[name]["loss"]) == 2 * row["first_epoch_steps"] == 4
            assert 0 <= row[name]["rank_1_centres"] <= 1
    assert written["versions"]["torch"] and written["machine"]["threads"] > 0
    assert written["commit"] and written["date"]

    text = io.StringIO()
    print_report(Console(file=text, width=80), written, "there")
    assert "ArcFace" in text.getvalue() and "…" not in text.getvalue()
    assert all(len(line) <= 80 for line in text.getvalue().splitlines())


def test_one_bit_to_the_end(split, monkeypatch):
    def ends(one_bit):
        return run.compare("ArcFace", 0.5, split, TINY, 0, one_bit=one_bit)

    row, without = ends(True), ends(False)
    assert "one_bit_apart" not in without
    shared = ("first_epoch_steps", "first_epoch_gap", "first_epoch_gap_of_one_bit")
    assert [row[key] for key in shared] == [without[key] for key in shared]
    nudged, plain = row["one_bit_apart"], row["plain"]
    assert set(nudged) == set(plain)
    assert len(nudged["loss"]) == len(plain["loss"]) == 6
    assert nudged["loss"][:3] == pytest.approx(plain["loss"][:3], rel=1e-3)
    assert nudged["final_loss"] != plain["final_loss"]

    monkeypatch.setattr(run, "NudgedHead", heads.PlainHead)  # nothing apart: the same to the end
    same = ends(True)
    for key in ("final_loss", "loss", "rank_1_centres", "rank_1_means", "tar_at_far_1e-4"):
        assert same["one_bit_apart"][key] == same["plain"][key]


class Wrong(heads.FusedHead):
    def forward(self, embeddings, labels):
        return 1.001 * super().forward(embeddings, labels)


def test_no_number_on_a_wrong_loss(letters, tmp_path, monkeypatch):
    monkeypatch.setitem(heads.HEADS, "fastmargin", Wrong)
    with pytest.raises(run.BenchmarkError, match=r"ArcFace at rate 1: .*first step differ by 1.0e"):
        run.run(tiny(tmp_path, rates=(1.0,)))
    assert not (tmp_path / "glyphs.json").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"margins": ("ArcFice",)}, "--margins .*ArcFice"),
        ({"rates": (1.0, 0.0)}, "--rates"),
        ({"epochs": 0}, "--epochs"),
        ({"classes": 10**6}, "--classes must be 1 to"),
        ({"noto": True}, "apt install fonts-noto-cjk"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_met(letters, tmp_path, settings, message):
    with pytest.raises((run.BenchmarkError, ValueError, FontsMissingError), match=message):
        run.run(tiny(tmp_path, **settings))


def test_options_of_the_command(capsys, monkeypatch, tmp_path):
    quick = command.settings_of(command.parse(["--quick", "--rates", "0.5", "--seed", "3"]))
    assert quick.classes == 500 and quick.rates == (0.5,) and quick.seed == 3
    default = command.settings_of(command.parse([]))
    assert default == run.Settings()
    assert command.settings_of(command.parse(["--one-bit"])).one_bit
    monkeypatch.setattr("sys.argv", ["glyphs", "--fonts", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1
    assert "apt install fonts-wqy-zenhei" in " ".join(capsys.readouterr().err.split())


def test_curves_are_thinned_evenly():
    losses = [float(i) for i in range(12)]
    assert run._thinned(losses) == losses
    thinned = run._thinned([float(i) for i in range(600)])
    assert len(thinned) == 60 and thinned[0] == 4.5 and thinned[-1] == 594.5


def test_every_margin_of_the_library_is_there():
    kinds = {type(make()) for make in MARGINS.values()}
    assert kinds == {fm.CosFace, fm.ArcFace, fm.AdaFace, fm.KappaFace, fm.ElasticFace, fm.NPT}
