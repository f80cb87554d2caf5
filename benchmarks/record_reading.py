"""Reading a RecordIO file: compiled reader against Python, and reading orders on a cold disk.

Records of random sizes, about those of a JPEG of 112 x 112 pixels. Both readers take turns reading
the same records in one process, from memory: all in file order, random batches, labels only, and a
scan without an index. Then random batches against ``BlockShuffleSampler``, each with the file
dropped from the page cache. Writes ``results/record_reading.json`` beside this file.

    python -m benchmarks.record_reading
    python -m benchmarks.record_reading --records 2000 --repeats 3 --output -
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.provenance import provenance
from fastmargin import _host
from fastmargin.data import (
    BlockShuffleSampler,
    ImageRecord,
    RecordFile,
    RecordWriter,
    pack,
    plain_records,
    record_file,
)

READERS = {"compiled": _host.records, "python": plain_records}


def make_file(path: Path, count: int, mean_bytes: int) -> None:
    """Writes records with sizes uniform between 0.5 and 1.5 times the mean."""
    generator = random.Random(0)
    with RecordWriter(path) as writer:
        for i in range(count):
            size = generator.randint(mean_bytes // 2, mean_bytes * 3 // 2)
            writer.write(pack(ImageRecord(float(i % 1000), generator.randbytes(size), i)))


def shuffled(count: int) -> list[int]:
    return torch.randperm(count).tolist()


def in_batches(records: RecordFile, keys: list[int], batch: int) -> None:
    for start in range(0, len(keys), batch):
        records.read(keys[start : start + batch])


def warm(path: Path, batch: int, repeats: int) -> dict[str, dict]:
    """Records per second, from memory."""
    records = RecordFile(path)
    count, whole = len(records), (records._file.fileno(), path.stat().st_size)
    tasks = {
        "in_file_order": lambda keys: sum(1 for _ in records.items()),
        "random_batches": lambda keys: in_batches(records, keys, batch),
        "first_labels": lambda keys: records.first_labels(),
        "scan": lambda keys: record_file.reader().scan(*whole),
    }
    found = {}
    for task, work in tasks.items():
        seconds = {name: [] for name in READERS}
        for _ in range(repeats):
            keys = shuffled(count)
            for name, reader in READERS.items():
                record_file.reader = lambda reader=reader: reader
                start = time.perf_counter()
                work(keys)
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        found[task] = {
            "records_per_second": {name: count / value for name, value in median.items()},
            "time_ratio_median": median["compiled"] / median["python"],
        }
    return found


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Neighbours:
    """The data set interface that BlockShuffleSampler needs."""

    def __init__(self, records: RecordFile) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def prefetch(self, start: int, stop: int) -> None:
        self.records.prefetch(range(start, stop))


def cold(path: Path, batch: int, repeats: int, block: int, window: int) -> dict:
    """Records per second from the disk, with the compiled reader."""
    record_file.reader = lambda: READERS["compiled"]
    records = RecordFile(path)
    sampler = BlockShuffleSampler(Neighbours(records), block, window)
    seconds = {"random_batches": [], "block_shuffle": []}
    for epoch in range(repeats):
        forget(path)
        start = time.perf_counter()
        in_batches(records, shuffled(len(records)), batch)
        seconds["random_batches"].append(time.perf_counter() - start)
        sampler.set_epoch(epoch)
        forget(path)
        start = time.perf_counter()
        for keys in torch.utils.data.BatchSampler(sampler, batch, drop_last=False):
            records.read(keys)
        seconds["block_shuffle"].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "block": block,
        "window": window,
        "records_per_second": {name: len(records) / value for name, value in median.items()},
        "time_ratio_median": median["block_shuffle"] / median["random_batches"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=8000, help="mean size of an image")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--window", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where to write the file; default: the temporary folder")
    parser.add_argument("--output", help="a file, or - to print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    command = " ".join(["python -m benchmarks.record_reading", *sys.argv[1:]])
    origin = provenance(command, torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "train.rec"
        make_file(path, arguments.records, arguments.bytes)
        from_memory = warm(path, arguments.batch, arguments.repeats)
        from_disk = cold(
            path, arguments.batch, arguments.repeats, arguments.block, arguments.window
        )
    for task, found in {**from_memory, "cold": from_disk}.items():
        rates = ", ".join(f"{k} {v:,.0f}/s" for k, v in found["records_per_second"].items())
        print(f"{task}: {rates}", file=sys.stderr)
    result = {
        "records": arguments.records,
        "mean_bytes": arguments.bytes,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "from_memory": from_memory,
        "from_disk": from_disk,
        **origin,
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output == "-":
        print(text, end="")
    else:
        Path(arguments.output or RESULTS / "record_reading.json").write_text(text)


if __name__ == "__main__":
    main()
