"""Data sets of faces, loaders over them, and the order in which samples come."""

from __future__ import annotations

import io
import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastmargin.data import (
    BlockShuffleSampler,
    FolderFaces,
    ImageRecord,
    RecordError,
    RecordFaces,
    RecordFile,
    RecordWriter,
    pack,
    plain_records,
    record_file,
    to_tensor,
    unpack,
)

Image = pytest.importorskip("PIL.Image")

SIZES = [3, 1, 5, 2]  # images per identity
LABELS = [label for label, count in enumerate(SIZES) for _ in range(count)]


@pytest.fixture(params=["compiled", "plain"])
def reader(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(record_file, "reader", lambda: plain_records)


def picture(number: int, mode: str = "RGB") -> bytes:
    """A PNG of 6 x 4 pixels, all (number, 100, 200); grey: number."""
    colour = (number, 100, 200) if mode == "RGB" else number
    file = io.BytesIO()
    Image.new(mode, (4, 6), colour).save(file, "PNG")
    return file.getvalue()


def number_of(image: torch.Tensor) -> int:
    return round(float(image[0, 0, 0] * 127.5 + 127.5))


def flat(folder):
    """All records are samples; image i is picture(i)."""
    with RecordWriter(folder / "train.rec", image_size=(6, 4)) as writer:
        for i, label in enumerate(LABELS):
            writer.add(picture(i), label)
    return folder


def with_identities(folder, **changes):
    """As insightface's face2rec2: a first record about all, samples, records about identities.

    Image i is picture(i) and has key i + 1.
    """
    n = len(LABELS)
    about = {"first": n + 1.0, "labels": LABELS, "image": b""} | changes
    with RecordWriter(folder / "train.rec") as writer:
        head = (about["first"], float(n + 1 + len(SIZES)))
        writer.write(pack(ImageRecord(head, about["image"])))
        for i, label in enumerate(about["labels"]):
            writer.write(pack(ImageRecord(float(label), picture(i), i + 1)))
        start = 1
        for count in SIZES:
            writer.write(pack(ImageRecord((float(start), float(start + count)), b"")))
            start += count
    return folder


def folders(folder):
    for i, label in enumerate(LABELS):
        path = folder / f"p{label}" / f"{i:02}.{'PNG' if i % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(i))
    return folder


MAKE = {
    "flat": lambda folder: RecordFaces(flat(folder)),
    "identities": lambda folder: RecordFaces(with_identities(folder)),
    "folders": lambda folder: FolderFaces(folders(folder)),
}


@pytest.fixture(params=MAKE)
def faces(request, tmp_path):
    return MAKE[request.param](tmp_path)


# ---- what all data sets do ----


def test_samples(faces, reader):
    assert len(faces) == len(LABELS) and faces.num_classes == len(SIZES)
    for i, label in enumerate(LABELS):
        image, found = faces[i]
        assert (number_of(image), found) == (i, label) and type(found) is int
        assert image.shape == (3, 6, 4) and image.dtype == torch.float32
    assert number_of(faces[-1][0]) == len(LABELS) - 1
    for i in (len(LABELS), -len(LABELS) - 1):
        with pytest.raises(IndexError):
            faces[i]


def test_labels_without_images(faces, reader, monkeypatch):
    monkeypatch.setattr(type(faces), "_sample", None)
    assert faces.labels.tolist() == LABELS and faces.labels.dtype == torch.int64
    assert faces.labels is faces.labels
    assert faces.class_counts().tolist() == SIZES


def test_a_batch(faces, reader):
    some = [4, 9, 0, 4, 7]
    batch = faces.__getitems__(some)
    assert [number_of(image) for image, _ in batch] == some
    assert [label for _, label in batch] == [LABELS[i] for i in some]


def own_transform(image):
    return image.mode, image.size, image.getpixel((0, 0))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_transform_replaces_everything(make, tmp_path):
    faces = make(tmp_path)
    faces = type(faces)(tmp_path, transform=own_transform)
    assert faces[3] == (("RGB", (4, 6), (3, 100, 200)), LABELS[3])


@pytest.mark.parametrize("start", ["fork", "spawn", None])
def test_loader(faces, start):
    workers = {"num_workers": 2, "multiprocessing_context": start} if start else {}
    sampler = BlockShuffleSampler(faces, block=2, window=6)
    loader = DataLoader(faces, 3, sampler=sampler, **workers)
    for epoch in range(1 if start == "spawn" else 2):  # starting takes seconds
        sampler.set_epoch(epoch)
        expected, seen = list(sampler), []
        for images, labels in loader:
            numbers = [number_of(image) for image in images]
            assert labels.tolist() == [LABELS[number] for number in numbers]
            seen += numbers
        assert seen == expected and sorted(seen) == list(range(len(LABELS)))


def test_to_tensor():
    image = Image.new("RGB", (5, 2))
    values = [(i * 5, 255 - i, 77) for i in range(10)]
    image.putdata(values)
    tensor = to_tensor(image)
    expected = torch.tensor(values).T.reshape(3, 2, 5) / 255 * 2 - 1
    torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert tensor.is_contiguous() and tensor[1, 0, 0] == 1
    assert to_tensor(Image.new("RGB", (1, 1), (0, 0, 0))).tolist() == [[[-1]], [[-1]], [[-1]]]


# ---- records ----


def test_property_file(tmp_path):
    faces = RecordFaces(flat(tmp_path) / "train.rec")
    assert faces.image_size == (6, 4) and faces.num_classes == len(SIZES)
    assert "labels" not in faces.__dict__  # the number of classes was not worth reading all headers
    (tmp_path / "property").write_text("9, 96, 80")
    faces = RecordFaces(tmp_path)
    assert (faces.num_classes, faces.image_size) == (9, (96, 80))
    assert faces.class_counts().tolist() == [*SIZES, 0, 0, 0, 0, 0]
    (tmp_path / "property").unlink()
    faces = RecordFaces(tmp_path)
    assert (faces.num_classes, faces.image_size) == (len(SIZES), None)
    (tmp_path / "property").write_text("many")
    with pytest.raises(ValueError, match=r"property: expected 'num_classes,height,width'.*'many'"):
        RecordFaces(tmp_path)


def test_without_an_index(tmp_path, reader):
    with_identities(tmp_path)
    (tmp_path / "train.idx").unlink()
    faces = RecordFaces(tmp_path)
    assert faces.labels.tolist() == LABELS and number_of(faces[4][0]) == 4


def test_a_first_record_with_several_labels_and_an_image_is_a_sample(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.add(picture(0), [2, 0.25, 0.75])
        writer.add(picture(1), [1, 0.25, 0.75])
    faces = RecordFaces(tmp_path)
    assert [label for _, label in faces.__getitems__([0, 1])] == [2, 1]
    assert faces.labels.tolist() == [2, 1]


def test_keys_need_not_start_at_0(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        for i in range(3):
            writer.write(pack(ImageRecord(float(i), picture(i))), key=10 * i + 5)
    faces = RecordFaces(tmp_path)
    assert faces.keys.tolist() == [5, 15, 25] and faces[2][1] == 2


@pytest.mark.parametrize(
    ("first", "problem"),
    [
        (13.0, "the samples are 1 to 12"),  # these are records, of identities
        (17.0, "the samples are 1 to 16, but the index lacks 16"),
        (1e30, "but the index lacks 16"),
        (2.5, "before key 2.5"),
        (-1.0, r"before key -1"),
        (float("nan"), "before key nan"),
    ],
)
def test_a_first_record_that_does_not_fit(tmp_path, reader, first, problem):
    with_identities(tmp_path, first=first)
    if first == 13:
        lines = (tmp_path / "train.idx").read_text().splitlines()
        (tmp_path / "train.idx").write_text("\n".join(lines[:5] + lines[6:]))
        problem += ", but the index lacks 5"
    with pytest.raises(RecordError, match=r"train\.rec: record 0: offset 0: .*" + problem):
        RecordFaces(tmp_path)


@pytest.mark.parametrize("label", [0.5, -1.0, 4.0, float("nan"), float("inf")])
def test_a_wrong_label(tmp_path, reader, label):
    with_identities(tmp_path, labels=[*LABELS[:5], label, *LABELS[6:]])
    (tmp_path / "property").write_text("4,6,4\n")
    faces = RecordFaces(tmp_path)
    where = rf"record 6: offset {faces.records.offset_of(6)}: label {label} is not a whole number"
    with pytest.raises(RecordError, match=where + ".* below the 4 classes"):
        faces[5]
    with pytest.raises(RecordError, match=where):
        faces.class_counts()
    assert faces[4][1] == LABELS[4]
    (tmp_path / "property").unlink()
    faces = RecordFaces(tmp_path)
    if label == 4:
        assert faces[5][1] == 4 and faces.num_classes == 5
    else:
        with pytest.raises(RecordError, match=where):
            faces[5]
        with pytest.raises(RecordError, match=where):
            faces.class_counts()


@pytest.mark.parametrize("image", [b"", b"no image", picture(0)[:40]])
def test_a_broken_image(tmp_path, image):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.add(picture(0), 0)
        writer.add(image, 1)
    faces = RecordFaces(tmp_path)
    problem = rf"record 1: offset \d+: the image \({len(image)} bytes\) cannot be decoded"
    with pytest.raises(RecordError, match=problem):
        faces.__getitems__([0, 1])
    loader = DataLoader(faces, 2, num_workers=1)
    with pytest.raises(RecordError, match=problem):  # also from a worker
        next(iter(loader))


def test_no_image_record_among_samples(tmp_path):
    with RecordWriter(tmp_path / "train.rec") as writer:
        writer.add(picture(0), 0)
        writer.write(b"short")
    faces = RecordFaces(tmp_path)
    with pytest.raises(RecordError, match=r"record 1: .*has 5 bytes, the header 24"):
        faces[1]
    with pytest.raises(RecordError, match=r"record 1: .*has 5 bytes, the header 24"):
        faces.class_counts()


def test_no_records(tmp_path):
    RecordWriter(tmp_path / "train.rec").close()
    with pytest.raises(ValueError, match="no samples"):
        RecordFaces(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.train\.rec"):
        RecordFaces(tmp_path / "nowhere")


# ---- folders ----


def test_other_files_are_passed_over(tmp_path):
    folders(tmp_path)
    for name in ("p1/notes.txt", "p1/.03.png", "p1/Thumbs.db", "readme.md"):
        (tmp_path / name).write_text("no image")
    (tmp_path / ".cache").mkdir()
    faces = FolderFaces(tmp_path)
    assert faces.classes == ["p0", "p1", "p2", "p3"] and len(faces) == len(LABELS)
    assert faces.path(3) == tmp_path / "p1" / "03.PNG" and faces.path(0).name == "00.png"
    with pytest.raises(ValueError, match=r"4 folders of .* have no images \(\.gif\).* is p0"):
        FolderFaces(tmp_path, extensions=[".gif"])


def test_grey_images_and_odd_names(tmp_path):
    (tmp_path / "José").mkdir()
    name = os.fsdecode(b"caf\xe9 \xf0.png")  # not UTF-8
    (tmp_path / "José" / name).write_bytes(picture(50, "L"))
    faces = FolderFaces(tmp_path)
    image, _ = faces[0]
    assert faces.path(0).name == name
    torch.testing.assert_close(image, torch.full((3, 6, 4), 50 / 127.5 - 1))


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        FolderFaces(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no folders: expected .*<identity>/<image>"):
        FolderFaces(tmp_path)
    folders(tmp_path)
    (tmp_path / "p15").mkdir()
    with pytest.raises(ValueError, match=r"1 folders of .* the first is p15"):
        FolderFaces(tmp_path)
    (tmp_path / "p15" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"p15/x\.jpg: the image \(8 bytes\) cannot be decoded"):
        FolderFaces(tmp_path)[4]


def test_folders_to_records(tmp_path):
    """The recipe of docs/data.md."""
    faces = FolderFaces(folders(tmp_path))
    with RecordWriter(tmp_path / "packed" / "train.rec", image_size=(6, 4)) as writer:
        for i, label in enumerate(faces.labels.tolist()):
            writer.add(faces.path(i).read_bytes(), label)
    packed = RecordFaces(tmp_path / "packed")
    assert packed.labels.tolist() == LABELS
    for i in range(len(faces)):
        assert torch.equal(packed[i][0], faces[i][0])


# ---- order ----


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 300),
    block=st.integers(1, 40),
    more=st.integers(0, 200),
    replicas=st.integers(1, 5),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_sample_comes(n, block, more, replicas, drop_last, epoch):
    orders = []
    for rank in range(replicas):
        sampler = BlockShuffleSampler(
            range(n), block, block + more, 7, replicas, rank, drop_last=drop_last
        )
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler)
        assert orders[-1] == list(sampler)
    together = [i for order in orders for i in order]
    counts = torch.bincount(torch.tensor(together, dtype=torch.int64), minlength=n)
    if drop_last:
        assert len(together) == n // replicas * replicas and (counts <= 1).all()
    else:
        assert len(together) == -(-n // replicas) * replicas and (counts >= 1).all()
        assert counts.sum() - n < replicas


def test_seeds_and_epochs_are_different_orders():
    def order(seed, epoch):
        sampler = BlockShuffleSampler(range(500), 16, 64, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_a_window_is_a_few_blocks_mixed():
    block, window, n = 8, 64, 1600
    order = list(BlockShuffleSampler(range(n), block, window))
    for start in range(0, n, window):
        samples = order[start : start + window]
        blocks = {sample // block for sample in samples}
        assert len(blocks) == window // block
        assert samples != sorted(samples)
        neighbours = sum(b == a + 1 for a, b in itertools.pairwise(samples))
        assert neighbours < 10
    firsts = [order[start] // window for start in range(0, n, window)]
    assert firsts != sorted(firsts)


def test_what_is_fetched_ahead_is_what_comes():
    class Recorded(list):
        def prefetch(self, start, stop):
            assert 0 <= start < stop <= len(self) and stop - start <= 10
            self.fetched.update(range(start, stop))
            self.most = max(self.most, stop - start)

    for rank in range(3):
        data = Recorded(range(403))
        data.fetched, data.most = set(), 0
        sampler = BlockShuffleSampler(data, 10, 50, num_replicas=3, rank=rank)
        seen = set()
        for i, sample in enumerate(sampler):
            assert sample in data.fetched
            seen.add(sample)
            assert len(data.fetched) <= i + 50 + 2 * 10
        assert seen == data.fetched and data.most > 5


def test_prefetch_of_records(tmp_path, monkeypatch):
    faces, asked = RecordFaces(with_identities(tmp_path)), []
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: asked.append(a[1:]), raising=False)
    faces.prefetch(2, 5)
    start, stop = faces.records.offset_of(3), faces.records.offset_of(6)
    assert asked == [(start, stop - start, os.POSIX_FADV_WILLNEED)]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"block": 0}, "block must be 1 or more, got 0"),
        ({"block": 9, "window": 8}, "window must be at least block = 9, got 8"),
        ({"rank": 1}, "rank must be in .*got 1"),
        ({"rank": -1, "num_replicas": 2}, "rank must be in"),
        ({"num_replicas": 0}, "rank must be in"),
    ],
)
def test_samplers_that_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        BlockShuffleSampler(range(10), **arguments)


# ---- what is not there ----


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ({}):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def test_without_compiled_code(tmp_path):
    flat(tmp_path)
    code = HIDE.format("'fastmargin._host',") + (
        "from fastmargin.data import RecordFaces, record_file\n"
        "faces = RecordFaces(sys.argv[1])\n"
        "assert record_file.reader().__name__.endswith('plain_records')\n"
        "print([faces[i][1] for i in range(len(faces))], faces.labels.tolist())"
    )
    assert run(code, str(tmp_path)).strip() == f"{LABELS} {LABELS}"


def test_without_pillow(tmp_path):
    flat(tmp_path)
    code = HIDE.format("'PIL', 'numpy'") + (
        "import fastmargin as fm\n"
        "faces = fm.data.RecordFaces(sys.argv[1])\n"
        "print(faces.class_counts().tolist())\n"
        "try:\n"
        "    faces[0]\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    out = run(code, str(tmp_path)).splitlines()
    assert out == [str(SIZES), "images are decoded by Pillow: pip install pillow"]


def test_import_is_light():
    code = "import sys, fastmargin.data; print({'PIL', 'fastmargin._host'} & set(sys.modules))"
    assert run(code).strip() == "set()"


def test_random_records_beside_the_index(tmp_path, reader):
    """A shuffled file with its index in the order of keys, as rec2shufrec and im2rec leave it."""
    order = list(range(40))
    random.Random(1).shuffle(order)
    with RecordWriter(tmp_path / "train.rec") as writer:
        for i in order:
            writer.add(picture(i), i)
    offsets = RecordFile(tmp_path / "train.rec").offsets.tolist()
    lines = sorted((i, offsets[place]) for place, i in enumerate(order))
    (tmp_path / "train.idx").write_text("".join(f"{i}\t{offset}\n" for i, offset in lines))
    faces = RecordFaces(tmp_path)
    assert faces.labels.tolist() == list(range(40))
    assert [number_of(image) for image, _ in faces.__getitems__(order)] == order
    assert [unpack(p).label for _, p in faces.records.items()] == order
