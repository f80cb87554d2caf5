"""RecordIO files: the bytes, both readers, and what is refused."""

from __future__ import annotations

import os
import pickle
import random
import struct
import threading
from pathlib import Path

import pytest
import torch
from fastmargin._host import records as compiled_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmargin.data import (
    ImageRecord,
    RecordError,
    RecordFile,
    RecordWriter,
    pack,
    plain_records,
    record_file,
    unpack,
    write_index,
)

MAGIC = bytes.fromhex("0a23d7ce")
READERS = {"compiled": compiled_records, "plain": plain_records}

anything = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# magic numbers in every position, whole and in pieces
payloads = st.lists(
    st.one_of(
        st.just(MAGIC), st.sampled_from([b"\0", MAGIC[:1], MAGIC[1:]]), st.binary(max_size=9)
    ),
    max_size=12,
).map(b"".join)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=READERS)
def reader(request, monkeypatch):
    """The one that RecordFile uses in this test."""
    monkeypatch.setattr(record_file, "reader", lambda: READERS[request.param])
    return READERS[request.param]


def dmlc_bytes(payload: bytes) -> bytes:
    """A record as dmlc-core's ``WriteRecord`` writes it, word by word."""
    out, start = b"", 0
    for i in range(0, len(payload) // 4 * 4, 4):
        if payload[i : i + 4] == MAGIC:
            kind = 1 if start == 0 else 2
            out += MAGIC + struct.pack("<I", kind << 29 | i - start) + payload[start:i]
            start = i + 4
    kind = 3 if start else 0
    out += MAGIC + struct.pack("<I", kind << 29 | len(payload) - start) + payload[start:]
    return out + bytes(-len(payload) % 4)


def write(folder: Path, contents: list[bytes]) -> Path:
    path = folder / "train.rec"
    for old in (path, path.with_suffix(".idx")):
        old.unlink(missing_ok=True)
    with RecordWriter(path) as writer:
        for payload in contents:
            writer.write(payload)
    return path


def outcome(function, *arguments):
    """What a reader returns, or what it says."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error.args


def both(function: str, *arguments):
    """The result or complaint of both readers, which is the same."""
    compiled, plain = (outcome(getattr(r, function), *arguments) for r in READERS.values())
    assert compiled == plain
    return plain


# ---- what is written is read ----


def test_bytes_of_a_small_file(tmp_path, reader):
    path = write(tmp_path, [b"abcde", b"", b"wxyz" + MAGIC + b"q"])
    assert path.read_bytes() == (
        MAGIC + b"\x05\0\0\0" + b"abcde\0\0\0"
        + MAGIC + b"\0\0\0\0"
        + MAGIC + b"\x04\0\0\x20" + b"wxyz" + MAGIC + b"\x01\0\0\x60" + b"q\0\0\0"
    )  # fmt: skip
    assert path.with_suffix(".idx").read_bytes() == b"0\t0\n1\t16\n2\t24\n"
    assert not (tmp_path / "property").exists()
    with RecordFile(path) as records:
        assert len(records) == 3 and records[2] == b"wxyz" + MAGIC + b"q" and records[1] == b""


@anything
@given(contents=st.lists(payloads, max_size=8), seed=st.integers(0, 99), indexed=st.booleans())
def test_round_trip(tmp_path, reader, contents, seed, indexed):
    path = write(tmp_path, contents)
    assert path.read_bytes() == b"".join(map(dmlc_bytes, contents))
    if not indexed:
        path.with_suffix(".idx").unlink()
    some = random.Random(seed).choices(range(len(contents)), k=12 * bool(contents))
    with RecordFile(path) as records:
        assert list(records.items()) == list(enumerate(contents))
        assert records.read(some) == [contents[key] for key in some]
        assert [records[key] for key in some] == [contents[key] for key in some]


def test_records_longer_than_what_is_read_ahead(tmp_path, reader):
    generator = random.Random(0)
    sizes = [700_000, 3, 2_500_000, 0, 1 << 20, 400_001, 600_000, 5]
    contents = [
        generator.randbytes(size // 2) + MAGIC + generator.randbytes(size) for size in sizes
    ]
    path = write(tmp_path, contents)
    path.with_suffix(".idx").unlink()
    with RecordFile(path) as records:
        assert [payload for _, payload in records.items()] == contents
        assert records.read([6, 2, 5]) == [contents[key] for key in (6, 2, 5)]


def test_an_index_in_any_order_and_of_some_records(tmp_path, reader):
    contents = [bytes([i]) * (3 * i) for i in range(9)]
    path = write(tmp_path, contents)
    lines = path.with_suffix(".idx").read_text().splitlines()
    chosen = [7, 0, 4, 3]
    text = "\r\n\n".join(f"{100 - i}  {lines[i].split()[1]}" for i in chosen)
    path.with_suffix(".idx").write_text(text)
    with RecordFile(path) as records:
        assert list(records) == records.keys.tolist() == [100 - i for i in chosen]
        assert [records[100 - i] for i in chosen] == [contents[i] for i in chosen]
        assert [key for key, _ in records.items()] == [100, 97, 96, 93]
        assert 97 in records and 98 not in records and 0 not in records
        with pytest.raises(KeyError, match=r"train\.rec.*no record 98"):
            records.read([97, 98])


@anything
@given(
    label=st.one_of(
        st.floats(width=32, allow_nan=False),
        st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4).map(tuple),
    ),
    ids=st.tuples(*[st.sampled_from([0, 7, 2**64 - 1, int.from_bytes(2 * MAGIC, "little")])] * 2),
    image=payloads,
)
def test_image_records(tmp_path, reader, label, ids, image):
    record = ImageRecord(label, image, *ids)
    path = write(tmp_path, [b"", pack(record), b"x"])
    with RecordFile(path) as records:
        assert unpack(records[1]) == record
        assert records.first_labels([1]).tolist() == [record.first_label]


def test_bytes_of_image_records():
    assert pack(ImageRecord(5.0, b"jpg", 3)) == struct.pack("<IfQQ", 0, 5, 3, 0) + b"jpg"
    several = struct.pack("<IfQQff", 2, 0, 3, 4, 1.5, 9) + b"jpg"
    assert pack(ImageRecord((1.5, 9.0), b"jpg", 3, 4)) == several
    assert unpack(several).first_label == 1.5


def test_first_labels_come_in_the_order_asked(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(record_file, "BATCH", 4)
    path = write(tmp_path, [pack(ImageRecord(float(i), b"z" * i)) for i in range(11)])
    with RecordFile(path) as records:
        assert records.first_labels([10, 2, 2, 7, 0, 9]).tolist() == [10, 2, 2, 7, 0, 9]
        assert records.first_labels().tolist() == list(range(11))
        assert records.first_labels([]).tolist() == []


def test_offsets_beyond_32_bits(tmp_path, reader):
    path, offset = tmp_path / "train.rec", (5 << 30) + 12
    payload = pack(ImageRecord(8.0, b"far" + MAGIC))
    with open(path, "wb") as file:
        file.truncate(offset)  # a hole
        file.seek(offset)
        file.write(dmlc_bytes(payload) + dmlc_bytes(b"end"))
    path.with_suffix(".idx").write_text(f"0\t{offset}\n1\t{offset + len(dmlc_bytes(payload))}\n")
    with RecordFile(path) as records:
        assert records.read([1, 0]) == [b"end", payload]
        assert records.first_labels([0]).tolist() == [8.0]
        assert records.offset_of(0) == offset
    path.with_suffix(".idx").unlink()
    with pytest.raises(RecordError, match="offset 0: no record here: 0x00000000"):
        RecordFile(path)


def test_an_empty_file(tmp_path, reader):
    path = write(tmp_path, [])
    for _ in range(2):
        with RecordFile(path) as records:
            assert len(records) == 0 and list(records.items()) == [] and 0 not in records
        path.with_suffix(".idx").unlink(missing_ok=True)


# ---- processes and threads ----


def test_pickled(tmp_path, reader):
    path = write(tmp_path, [b"abc", b"d"])
    with RecordFile(path) as records:
        path.with_suffix(".idx").unlink()  # is taken along
        copy = pickle.loads(pickle.dumps(records))
    assert copy[1] == b"d" and copy.keys.tolist() == [0, 1]
    with pytest.raises(ValueError, match="closed"):
        records[1]
    raw = pickle.dumps(copy)
    with open(path, "ab") as file:
        file.write(dmlc_bytes(b""))
    with pytest.raises(RecordError, match="has 32 bytes and had 24"):
        pickle.loads(raw)


def test_errors_survive_pickling():
    error = RecordError.at(Path("a.rec"), 3, 8, "breaks off")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.rec: record 3: offset 8: breaks off"
    assert (copy.path, copy.key, copy.offset) == (Path("a.rec"), 3, 8)


def test_threads_share_a_file(tmp_path, reader):
    contents = [random.Random(i).randbytes(i * 37 % 2000) for i in range(300)]
    records, wrong = RecordFile(write(tmp_path, contents)), []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(60):
            keys = generator.choices(range(300), k=20)
            if records.read(keys) != [contents[key] for key in keys]:
                wrong.append(keys)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forked_processes_share_a_descriptor(tmp_path, reader):
    contents = [bytes([i]) * 999 for i in range(200)]
    records = RecordFile(write(tmp_path, contents))

    def right() -> bool:
        return all(records[key] == contents[key] for _ in range(5) for key in range(200))

    child = os.fork()
    if not child:
        os._exit(0 if right() else 1)
    assert right()
    assert os.waitpid(child, 0)[1] == 0


# ---- what is refused ----


def test_a_file_cut_off_anywhere(tmp_path, reader):
    contents = [b"abcde", b"", b"wxyz" + MAGIC + b"q" + MAGIC, MAGIC, b"last one"]
    path = write(tmp_path, contents)
    whole, offsets = path.read_bytes(), RecordFile(path).offsets.tolist()
    index = path.with_suffix(".idx").read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        path.with_suffix(".idx").write_bytes(index)
        with pytest.raises(RecordError) as caught:
            RecordFile(path)
        assert caught.value.key is not None and caught.value.offset == offsets[caught.value.key]
        path.with_suffix(".idx").unlink()
        if size in offsets:  # between records nothing shows
            assert len(RecordFile(path)) == offsets.index(size)
        else:
            with pytest.raises(RecordError, match=rf"ends at byte {size}, inside this record"):
                RecordFile(path)


WRONG = {
    "magic": (0, b"\x0b\x23\xd7\xce", "no record here: 0xced7230b instead of 0xced7230a"),
    "kind": (4, b"\x04\0\0\x80", "unknown kind of part 4"),
    "middle": (4, b"\x04\0\0\x40", "a later part of a record, not its start"),
    "breaks off": (16, b"\0\0\0\0", "breaks off: another record starts before its last part"),
    "long": (12, MAGIC + b"\x01\0\0\x61", "the file ends at byte 36, inside this record"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_record(tmp_path, reader, what):
    path = write(tmp_path, [b"wxyz" + MAGIC + b"q", b"good"])
    at, replacement, problem = WRONG[what]
    raw = bytearray(path.read_bytes())
    raw[at : at + len(replacement)] = replacement
    path.write_bytes(raw)
    with RecordFile(path) as records:
        assert records[1] == b"good"
        for read in (
            lambda: records[0],
            lambda: records.read([1, 0]),
            lambda: list(records.items()),
        ):
            with pytest.raises(RecordError, match=rf"train\.rec: record 0: offset 0: {problem}"):
                read()
    path.with_suffix(".idx").unlink()
    with pytest.raises(RecordError, match=rf"train\.rec: offset 0: {problem}"):
        RecordFile(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("5\t-4", "record 5: offset -4: outside the file of 28 bytes"),
        ("5\t28", "record 5: offset 28: outside the file of 28 bytes"),
        ("5\t9000000000", "record 5: offset 9000000000: outside"),
        ("5\t18", "record 5: offset 18: records start at multiples of 4"),
        ("5\t24", "record 5: offset 24: the file ends at byte 28, inside this record"),
        ("5\t20", "record 5: offset 20: no record here: 0x00000004"),
        ("5", "line 2: expected two integers"),
        ("5 six", "line 2: expected two integers"),
        ("5 6 7", "line 2: expected two integers"),
        ("5 1.5", "line 2: expected two integers"),
        ("5 99999999999999999999", "line 2: expected two integers"),
        ("0 16", r"train\.idx: key 0 is there twice"),
    ],
)
def test_a_wrong_index(tmp_path, reader, line, problem):
    path = write(tmp_path, [b"abcde", b"good"])
    path.with_suffix(".idx").write_text(f"0\t0\n{line}\n")
    with pytest.raises(ValueError, match=problem):
        RecordFile(path)


def test_missing_files(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match=r"train\.rec"):
        RecordFile(tmp_path / "train.rec")
    path = write(tmp_path, [b"abc"])
    with pytest.raises(FileNotFoundError, match=r"other\.idx"):
        RecordFile(path, tmp_path / "other.idx")


def test_no_image_record(tmp_path, reader):
    path = write(tmp_path, [b"x" * 23, struct.pack("<IfQQ", 1, 0, 0, 0), b""])
    with RecordFile(path) as records:
        for key, problem in enumerate(["has 23 bytes, the header 24", "24 .* 28", "0 .* 24"]):
            with pytest.raises(RecordError, match=f"record {key}.*{problem}"):
                records.first_labels([key])
            with pytest.raises(ValueError, match=problem):
                unpack(records[key])


def test_the_file_becomes_shorter(tmp_path, reader):
    for size in (100, 5 << 20):  # more than is read ahead
        path = write(tmp_path, [b"abc", b"d" * size])
        with RecordFile(path) as records:
            os.truncate(path, size // 2)
            assert records[0] == b"abc"
            with pytest.raises(RecordError, match="record 1: offset 12: the file became shorter"):
                records[1]


def test_a_descriptor_that_cannot_be_read():
    for reader in READERS.values():
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.read(10**6, 100, [0], [8])


# ---- both readers are one ----


@anything
@given(
    contents=st.lists(payloads, min_size=1, max_size=5),
    damage=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 30),
    ends=st.lists(st.integers(-5, 300), min_size=80, max_size=80),
)
def test_readers_agree_on_damaged_files(tmp_path, contents, damage, cut, ends):
    raw = bytearray(b"".join(map(dmlc_bytes, contents)))
    for at, value in damage:
        raw[at % len(raw)] = value
    path = tmp_path / "damaged.rec"
    path.write_bytes(raw[: max(len(raw) - cut, 0)])
    with open(path, "rb") as file:
        of = file.fileno(), os.path.getsize(path)
        both("scan", *of)
        for offset in range(-4, of[1] + 8, 2):
            both("read", *of, [offset], [ends[offset % 80]])
            both("first_labels", *of, [offset])
        good = [o for o in range(0, of[1], 4) if isinstance(both("read", *of, [o], [0])[0], bytes)]
        both("read", *of, good, [ends[o % 80] for o in good])


@anything
@given(
    text=st.lists(
        st.sampled_from(
            [b"0", b"17", b"-3", b"\t", b" ", b"\n", b"\r\n", b"x", b"+", b"9" * 18, b"-"]
        )
        | st.binary(max_size=2),
        max_size=20,
    ).map(b"".join)
)
def test_readers_agree_on_an_index(text):
    both("parse_index", text)


def test_the_compiled_reader_is_the_default():
    assert record_file.reader() is compiled_records


# ---- around the records ----


def test_write_index(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(record_file, "BATCH", 2)
    path = write(tmp_path, [b"abc", MAGIC, b"", b"defgh", b"i"])
    index = path.with_suffix(".idx")
    expected = index.read_bytes()
    index.write_bytes(b"old")
    assert write_index(path) == 5
    assert index.read_bytes() == expected
    assert write_index(path, tmp_path / "b.idx") == 5
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RecordError, match="inside this record"):
        write_index(path)
    assert index.read_bytes() == expected == (tmp_path / "b.idx").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_prefetch_takes_any_keys(tmp_path):
    path = write(tmp_path, [bytes(5000)] * 100)
    with RecordFile(path) as records:
        asked = []
        records.prefetch([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "posix_fadvise", lambda *a: asked.append(a[1:3]), raising=False)
            records.prefetch(range(10, 20))
            records.prefetch(torch.tensor([99]))
            records.prefetch([0, 99])  # far apart
        assert asked == [(50_080, 50_080), (99 * 5008, 5008)]
        with pytest.raises(KeyError):
            records.prefetch([100])
