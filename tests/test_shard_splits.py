"""Who holds which classes, under both ways of sharing them out."""

from __future__ import annotations

import itertools

import pytest
import torch
from processes import run

from fastmargin.distributed.shard import ClassShard, bounds

SIZES = {
    ("chunk", 10, 3): [4, 4, 2],
    ("even", 10, 3): [4, 3, 3],
    ("chunk", 5, 4): [2, 2, 1, 0],
    ("even", 5, 4): [2, 1, 1, 1],
    ("chunk", 2, 4): [1, 1, 0, 0],
    ("even", 2, 4): [1, 1, 0, 0],
    ("even", 9, 3): [3, 3, 3],
}


@pytest.mark.parametrize("case", SIZES)
def test_bounds(case):
    split, classes, ranks = case
    ends = [bounds(classes, ranks, rank, split) for rank in range(ranks)]
    assert [stop - start for start, stop in ends] == SIZES[case]
    assert ends[0][0] == 0 and ends[-1][1] == classes
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


def shards(group, split, classes):
    shard = ClassShard.of(classes, group, "cpu", split)
    rows = torch.arange(shard.start, shard.stop).double()[:, None].expand(-1, 2)
    everybody = [shard.bounds(rank) for rank in range(shard.ranks)]
    assert everybody[shard.rank] == (shard.start, shard.stop)
    larger = shard.resized(classes + 3)
    assert (larger.start, larger.stop) == bounds(classes + 3, shard.ranks, shard.rank, split)
    if split != "chunk":
        with pytest.raises(ValueError, match="gather them"):
            shard.to_dtensor(rows)
    else:
        assert shard.to_dtensor(rows).shape == (classes, 2)
    return shard.gather_classes(rows)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("classes", [2, 5, 10])
@pytest.mark.parametrize("split", ["chunk", "even"])
def test_gathering(split, classes, ranks):
    expected = torch.arange(classes).double()[:, None].expand(-1, 2)
    for gathered in run(ranks, shards, split, classes):
        assert torch.equal(gathered, expected)
