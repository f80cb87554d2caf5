"""RecordIO files that are written: what is there when, and what is refused."""

from __future__ import annotations

import pytest

from fastmargin.data import ImageRecord, RecordFile, RecordWriter, unpack


def test_nothing_is_there_before_the_end(tmp_path):
    path = tmp_path / "new" / "train.rec"
    with RecordWriter(path, image_size=(96, 80)) as writer:
        assert writer.add(b"image", 41) == 0
        assert writer.add(b"image", [7, 0.5]) == 1
        assert writer.write(b"other", key=10) == 10
        assert not any(file.suffix in (".rec", ".idx") for file in path.parent.iterdir())
    assert sorted(file.name for file in path.parent.iterdir()) == [
        *("property", "train.idx", "train.rec"),
    ]
    assert (path.parent / "property").read_text() == "42,96,80\n3\n"
    with RecordFile(path) as records:
        assert unpack(records[0]) == ImageRecord(41.0, b"image", 0)
        assert unpack(records[1]) == ImageRecord((7.0, 0.5), b"image", 1)
        assert records.keys.tolist() == [0, 1, 10]
    for name in ("train.rec", "train.idx", "property"):
        with pytest.raises(FileExistsError, match="is there"):
            RecordWriter(path)
        (path.parent / name).unlink()
    writer.close()  # again
    RecordWriter(path).discard()
    assert list(path.parent.iterdir()) == []


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), RecordWriter(tmp_path / "a.rec") as writer:
        writer.add(b"image", 0)
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"")


@pytest.mark.parametrize("label", [-1, 0.5, 2**24 + 1, float("nan"), float("inf"), [], [0.5, 1]])
def test_labels_that_float32_or_a_class_cannot_be(tmp_path, label):
    with RecordWriter(tmp_path / "a.rec") as writer:
        with pytest.raises(ValueError, match="label"):
            writer.add(b"image", label)
        assert writer.add(b"image", 2**24) == 0
    assert len(RecordFile(tmp_path / "a.rec")) == 1


def test_keys_ascend(tmp_path):
    with RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(b"", key=3)
        for key in (3, 0, -1):
            with pytest.raises(ValueError, match=f"got {key}, want 4 or more"):
                writer.write(b"", key=key)
        assert writer.write(b"") == 4


def test_too_long_for_a_record(monkeypatch, tmp_path):
    from fastmargin.data import record_format

    monkeypatch.setattr(record_format, "MAX_LENGTH", 100)
    with RecordWriter(tmp_path / "a.rec") as writer:
        with pytest.raises(ValueError, match="101 bytes, a record takes 100"):
            writer.write(b"x" * 101)
        writer.write(b"x" * 100)
