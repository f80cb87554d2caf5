"""Triton's passes over the centres against the reference in float64: interpreted, or on a GPU.

The yardstick is the reference's own error with operands of the same type. Without a GPU the
interpreter cuts tiles of 16 rows, 32 classes and, above 32 columns, 32 columns of D, and splits
the classes over 6 "processors": small shapes reach every path.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import device_for
from triton_cases import (
    FLOOR,
    OPERANDS,
    Problem,
    check,
    check_topk,
    compare,
    moved,
    problem,
    solve,
    staged_in_pieces,
    through_index,
    yardstick,
)

import fastmargin as fm
from fastmargin.backends.reference import BACKEND as REFERENCE
from fastmargin.backends.triton import BACKEND as TRITON
from fastmargin.spec import SgdUpdate
from fastmargin.testing import REGIMES, relative_error


@pytest.fixture(autouse=True)
def device():
    return device_for("triton")


@pytest.mark.parametrize("rule", ["none", "curricular"])
@pytest.mark.parametrize("regime", [r for r in REGIMES if r != "repeated"])
def test_regimes(regime, rule):
    check(problem(regime, rule=rule))


@pytest.mark.parametrize("rule", ["mv_softmax", "filter"])
def test_other_hard_rules(rule):
    check(problem(rule=rule, class_start=1000))


# 84 is the last of these with plain sums, and 16 has sums far from overflow
@pytest.mark.parametrize("scale", [1.0, 16.0, 80.0, 100.0, 256.0])
@pytest.mark.parametrize("regime", ["random", "confident", "antipodal"])
def test_scales(scale, regime):
    check(problem(regime, scale=scale), floor=2e-5 * max(1, scale / 64))


# less than a matrix instruction's 16, just one, cut into columns, cut with a ragged rest
@pytest.mark.parametrize("dim", [3, 16, 40, 65])
@pytest.mark.parametrize("classes", [33, 64])  # 1 mod tile, and 0
def test_widths(dim, classes):
    check(problem("ragged" if classes == 33 else "random", batch=17, classes=classes, dim=dim))


@pytest.mark.parametrize("weight", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_operand_types(precision, weight):
    check(problem(dim=40 if weight == precision else 24, dtype=OPERANDS[weight]), precision)
    check(problem(dtype=OPERANDS[weight], rule="continuous", scale=100.0), precision)


@pytest.mark.parametrize("regime", ["confident", "antipodal", "zero_rows", "one_class"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_operand_types_where_training_ends(precision, regime):
    for weight in (torch.float32, OPERANDS[precision]):
        check(problem(regime, dtype=weight), precision)


@pytest.mark.parametrize("noise", [100.0, 3.0, 1.0, 0.7])
def test_error_of_half_precision_at_full_width(noise, monkeypatch):
    """At most 3e-4, at s = 64 and D = 512, from the start (noise 100) to very late in training.

    In the end 1 - p_y is 5e-8 and the gradient is what rows do to their own centres, whose tangent
    part fp16 operands would lose.
    """
    from fastmargin.backends.triton import centre_pass, stats_forward
    from fastmargin.backends.triton.configs import TileConfig

    if not torch.cuda.is_available():  # the interpreter is quick with few large tiles
        for module in (stats_forward, centre_pass):
            monkeypatch.setattr(module, "choose", lambda *_: TileConfig(16, 2048, 512, 512, 4, 1))
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8000, 512, generator=g)
    labels = torch.randint(0, len(weight), (16,), generator=g)
    x = F.normalize(weight[labels]) + noise * torch.randn(16, 512, generator=g) / 512**0.5
    p = Problem(F.normalize(x), weight, labels, d_lse=labels * 0.0, d_cos=labels * 0.0)
    stats, _ = solve(REFERENCE, p, "auto", torch.float64)
    miss = torch.sigmoid(stats.lse_neg - 64 * (stats.cos_y - 0.35))
    p = replace(p, d_lse=miss.float(), d_cos=-64 * miss.float())

    def d_x_hat(stats):
        own = F.normalize(weight[labels].double())
        return 64 * miss[:, None] * (stats.pull.double() - own)

    truth = solve(REFERENCE, p, "auto", torch.float64)
    ours = solve(TRITON, p, "fp16", torch.float32)
    assert relative_error(d_x_hat(ours[0]), d_x_hat(truth[0])) < 3e-4
    assert relative_error(ours[1], truth[1]) < 3e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("weight", [torch.float32, torch.float16])
def test_norms_of_the_centres_do_not_matter(precision, weight):
    p = problem(scale=32.0)
    length = torch.logspace(-2, 2, len(p.weight))[torch.randperm(len(p.weight))]
    p = replace(p, weight=(F.normalize(p.weight) * length[:, None]).to(weight))
    # what fp16 itself loses of short centres is the same on both sides, and d_weight ~ 1 / length
    check(p, precision)


@pytest.mark.parametrize("rule", ["none", "curricular"])
@pytest.mark.parametrize("scale", [32.0, 256.0])
def test_through_an_index(scale, rule):
    p = through_index(problem(dim=40, scale=scale, rule=rule, class_start=1000))
    check(p, floor=2e-5 * max(1, scale / 64))
    check(replace(p, weight=p.weight.t().contiguous().t()), floor=2e-5 * max(1, scale / 64))


@pytest.mark.parametrize("weight", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_operand_types_through_an_index(precision, weight):
    check(through_index(problem(dim=40, dtype=OPERANDS[weight])), precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiles of the interpreter are the same ones")
def test_an_index_gives_the_bits_of_a_copy():
    p = problem(dim=40)
    index = torch.randperm(len(p.weight))[:50]
    p = replace(p, labels=p.labels % 60)
    copy, indexed = replace(p, weight=p.weight[index]), replace(p, index=index)
    for precision in ("fp32", "fp16"):
        ours, own = (solve(TRITON, q, precision, torch.float32) for q in (indexed, copy))
        for name in ("lse_neg", "cos_y", "max_neg", "pull"):
            assert torch.equal(getattr(ours[0], name), getattr(own[0], name)), name
        assert torch.equal(ours[1], own[1])


def test_strided_inputs():
    p = problem(dim=40)
    transposed = replace(p, weight=p.weight.t().contiguous().t())
    wide = torch.cat([p.weight, p.weight], dim=1)
    gaps = replace(p, weight=wide[:, : p.weight.shape[1]])
    rows = replace(p, x_hat=p.x_hat.t().contiguous().t())
    for other in (transposed, gaps, rows):
        check(other)
    _, d_weight = solve(TRITON, transposed, "fp32", torch.float32)
    assert d_weight.is_contiguous()


def test_shards_add_up():
    p = problem(classes=75)
    truth = solve(REFERENCE, p, "auto", torch.float64)
    lse, cos_y, gradients = [], 0, []
    starts = (0, 10, 10, 42, 75)  # uneven, and one of them empty
    for start, stop in itertools.pairwise(starts):
        shard = replace(p, weight=p.weight[start:stop], class_start=start)
        stats, gradient = solve(TRITON, shard, "fp32", torch.float32, truth[0].lse_neg.float())
        lse.append(stats.lse_neg)
        cos_y = cos_y + stats.cos_y
        gradients.append(gradient)
    torch.testing.assert_close(torch.stack(lse).logsumexp(0), truth[0].lse_neg.float())
    torch.testing.assert_close(cos_y, truth[0].cos_y.float())
    assert relative_error(torch.cat(gradients), truth[1]) < 2e-5


@pytest.mark.parametrize(("batch", "classes"), [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_do(batch, classes):
    p = problem("all_ignored", batch=4, classes=5)
    p = replace(
        p,
        **{name: getattr(p, name)[:batch] for name in ("x_hat", "labels", "d_lse", "d_cos")},
        weight=p.weight[:classes],
    )
    stats, d_weight = solve(TRITON, p, "fp32", torch.float32)
    assert torch.isneginf(stats.lse_neg).all() and torch.isneginf(stats.max_neg).all()
    assert stats.cos_y.eq(0).all() and stats.pull.eq(0).all() and stats.pull.shape == (batch, 24)
    assert d_weight.eq(0).all() and d_weight.shape == p.weight.shape


def test_without_pull():
    p = problem(dim=40)
    with_pull, _ = solve(TRITON, p, "fp16", torch.float32)
    without, _ = solve(TRITON, p, "fp16", torch.float32, want_pull=False)
    assert without.pull.shape == (0, 40)
    torch.testing.assert_close(without.lse_neg, with_pull.lse_neg, rtol=1e-6, atol=1e-6)
    assert torch.equal(without.max_neg, with_pull.max_neg)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_bits_every_time(precision):
    p = problem(classes=130, dim=40)
    first, second = (solve(TRITON, p, precision, torch.float32) for _ in range(2))
    for name in ("lse_neg", "cos_y", "max_neg", "pull"):
        assert torch.equal(getattr(first[0], name), getattr(second[0], name)), name
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("rule", ["none", "curricular"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scale", [16.0, 256.0])
def test_centres_in_pieces(precision, scale, rule, monkeypatch):
    staged_in_pieces(monkeypatch)
    floor = FLOOR[precision] * max(1, scale / 64)
    for dim, dtype in ((40, torch.float32), (24, OPERANDS[precision])):
        p = problem(dim=dim, dtype=dtype, scale=scale, rule=rule, class_start=1000)
        check(p, precision, floor=floor)
        check(through_index(p), precision, floor=floor)


@pytest.mark.parametrize("want_pull", [True, False])
def test_pieces_are_the_whole(want_pull, monkeypatch):
    p = problem(classes=100, dim=40)
    whole = solve(TRITON, p, "fp32", torch.float32, want_pull=want_pull)
    staged_in_pieces(monkeypatch)
    pieces = solve(TRITON, p, "fp32", torch.float32, want_pull=want_pull)
    torch.testing.assert_close(pieces[0].lse_neg, whole[0].lse_neg, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pieces[0].max_neg, whole[0].max_neg, rtol=1e-6, atol=1e-6)
    assert torch.equal(pieces[0].cos_y, whole[0].cos_y)
    assert pieces[0].pull.shape == whole[0].pull.shape
    torch.testing.assert_close(pieces[0].pull, whole[0].pull, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-5, atol=1e-6)


def test_what_is_staged_does_not_grow_with_the_classes(monkeypatch):
    from fastmargin.backends.triton import centres

    monkeypatch.setattr(centres, "STAGED_BYTES", 4096)
    weight = torch.randn(1000, 24, device=device_for("triton"))
    for precision in ("fp32", "fp16"):
        parts = list(centres.centres_of(weight, None, precision))
        assert sum(len(part.inverse) for part in parts) == 1000
        sizes = {part.operand.untyped_storage().nbytes() for part in parts}
        assert len(sizes) == 1 and max(sizes) <= 4096
        assert not any(part.gaps for part in parts)


UPDATES = {
    "plain": SgdUpdate(0.1, 0.0, 0.0, False),
    "decay": SgdUpdate(0.1, 0.0, 0.3, False),
    "momentum": SgdUpdate(0.1, 0.9, 0.3, False),
    "nesterov": SgdUpdate(0.1, 0.9, 0.3, True),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("dtype", "block_d"), [("fp32", 128), ("fp16", 128), ("fp32", 32)])
def test_a_step_in_place(dtype, block_d, indexed, update, monkeypatch):
    """Tiles of whole rows, finished in parts, or cut; in pieces of the centres. The rest stays."""
    from fastmargin.backends.composed import Composed
    from fastmargin.backends.triton import centre_pass
    from fastmargin.backends.triton.configs import TileConfig

    tile = TileConfig(16, 16, 128, block_d, 4, 1)
    monkeypatch.setattr(centre_pass, "choose", lambda *_: tile)
    monkeypatch.setattr(Composed, "centre_step", None)  # it must be the kernel's own
    staged_in_pieces(monkeypatch)
    update = UPDATES[update]
    p = problem("some_ignored", dim=100, dtype=OPERANDS[dtype], class_start=7)
    p = through_index(p) if indexed else p
    stats, d_weight = solve(REFERENCE, p, "auto", torch.float64)
    rows = p.index[p.index >= 0] if indexed else torch.arange(len(p.weight))
    gradient = d_weight[p.index >= 0] if indexed else d_weight
    buffer = torch.randn(p.weight.shape) if update.momentum else None
    truth = [p.weight.double(), *([] if buffer is None else [buffer.double()])]
    parts = [t[rows] for t in truth]
    update.apply_(*parts, gradient)
    for whole, part in zip(truth, parts, strict=True):
        whole[rows] = part

    on = device_for("triton")
    weight, state = p.weight.to(on, copy=True), None if buffer is None else buffer.to(on, copy=True)
    part = moved(p, TRITON, torch.float32).factors(stats.lse_neg.float().to(on), "fp32")
    TRITON.centre_step(weight, state, update, part)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(weight.cpu().double(), truth[0], **tolerance)
    if state is not None:
        torch.testing.assert_close(state.cpu().double(), truth[1], rtol=1e-5, atol=2e-5)
    others = torch.ones(len(p.weight), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(weight.cpu()[others], p.weight[others])


@pytest.mark.parametrize("indexed", [False, True])
def test_nothing_is_read_past_the_last_column(indexed, monkeypatch):
    """A width of whole parts that does not fill its tile; behind each row and the last lie NaN."""
    from fastmargin.backends.triton import centre_pass
    from fastmargin.backends.triton.configs import TileConfig

    monkeypatch.setattr(centre_pass, "choose", lambda *_: TileConfig(16, 16, 128, 128, 4, 1))
    p = problem("random", dim=96)
    p = through_index(p) if indexed else p
    expected = solve(REFERENCE, p, "auto", torch.float64)[1]
    for gap in (0, 32):
        around = torch.full((len(p.weight) + 1, 96 + gap), math.nan)
        around[:-1, :96] = p.weight
        weight = around[:-1, :96]
        if gap == 0:
            weight = around.flatten()[: p.weight.numel()].view(-1, 96)
        found = solve(TRITON, replace(p, weight=weight), "fp32", torch.float32)[1]
        assert relative_error(found, expected) < 1e-5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page of memory")
@pytest.mark.parametrize(("dim", "dtype"), [(30, "float32"), (27, "float16"), (24, "bfloat16")])
def test_a_step_in_place_reads_nothing_past_the_centres(dim, dtype):
    """Behind the last of them lies memory that nobody may touch, so the process would end."""
    device_for("triton")
    if torch.cuda.is_available():
        pytest.skip("memory of the host")
    code = f"""
import ctypes, mmap, torch
from fastmargin.backends.triton import BACKEND
from fastmargin.spec import GradientFactors, SgdUpdate
page, dtype = mmap.PAGESIZE, torch.{dtype}
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
count = 5 * {dim}
start = page - count * dtype.itemsize
weight = torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(5, {dim})
weight.copy_(torch.randn(5, {dim}))
x, each, labels = torch.randn(3, {dim}), torch.ones(3), torch.arange(3)
rows = dict(d_lse=each, d_cos=each, lse_neg=each, labels=labels)
part = GradientFactors(x_hat=torch.nn.functional.normalize(x), scale=4.0, **rows)
BACKEND.centre_step(weight, None, SgdUpdate(0.1, 0.0, 0.0, False), part)
print(bool(weight.isfinite().all()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["True"], done.stderr[-1000:]


@pytest.mark.parametrize(("precision", "most"), [("fp16", 2e-3), ("fp32", 2e-6)])
def test_the_gradient_is_square_to_the_centres(precision, most, monkeypatch):
    """Of whole rows, as far as operands are exact, where all centres and rows point one way."""
    from fastmargin.backends.triton import centre_pass
    from fastmargin.backends.triton.configs import TileConfig

    monkeypatch.setattr(centre_pass, "choose", lambda *_: TileConfig(16, 16, 64, 64, 4, 1))
    p = problem(dim=64)
    way = torch.ones(64) / 2
    x_hat = F.normalize(p.x_hat + way, dim=1)
    p = replace(p, x_hat=x_hat, weight=F.normalize(p.weight, dim=1) + way)
    _, d_weight = solve(TRITON, p, precision, torch.float32)
    along = (d_weight * F.normalize(p.weight, dim=1)).sum(1)
    assert along.norm() < most * d_weight.norm()


def test_too_many_rows_for_a_launch_are_refused(monkeypatch):
    from fastmargin.backends.triton import stats_forward

    device_for("triton")
    monkeypatch.setattr(stats_forward, "MOST_ROW_PROGRAMS", 1)
    with pytest.raises(ValueError, match=r"x has too many rows .* \(40\).*split the batch"):
        solve(TRITON, problem(batch=40, dim=24), "fp32", torch.float32)


def test_no_step_in_place_where_addresses_differ():
    from fastmargin.backends.triton import centre_pass

    weight, momentum = torch.randn(9, 24), torch.zeros(9, 24)
    assert centre_pass.steps_in_place(weight, momentum)
    assert centre_pass.steps_in_place(weight, None)
    across = weight.t().contiguous().t()
    assert not centre_pass.steps_in_place(across, momentum)
    assert not centre_pass.steps_in_place(weight, across)


@pytest.mark.parametrize("processors", [1, 64])
def test_any_number_of_splits(processors, monkeypatch):
    from fastmargin.backends.triton import stats_forward, topk
    from fastmargin.backends.triton.launch import chip

    p = problem(classes=97)
    for module in (stats_forward, topk):
        monkeypatch.setattr(
            module, "chip", lambda device: replace(chip(device), processors=processors)
        )
    for scale in (32.0, 256.0):
        check(replace(p, scale=scale), floor=1e-4)
        check(through_index(replace(p, scale=scale)), floor=1e-4)
    check_topk(p, 3)
    check_topk(through_index(p), 3)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e8])
def test_upstream_gradients_of_any_size(factor):
    """A loss scale, or a tiny weight of the loss, must not leave fp16's range."""
    p = problem()
    _, plain = solve(TRITON, p, "fp16", torch.float32)
    scaled = replace(p, d_lse=p.d_lse * factor, d_cos=p.d_cos * factor)
    _, d_weight = solve(TRITON, scaled, "fp16", torch.float32)
    # the power of two that it is brought to need not be the same one
    assert relative_error(d_weight.double() / factor, plain) < 2e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_are_not_swallowed(bad, precision):
    """GradScaler looks for them in the gradient."""
    p = problem()
    d_lse = p.d_lse.clone()
    d_lse[3] = bad
    _, d_weight = solve(TRITON, replace(p, d_lse=d_lse), precision, torch.float32)
    assert not torch.isfinite(d_weight).all()
    x_hat = p.x_hat.clone()
    x_hat[5] = math.nan
    stats, _ = solve(TRITON, replace(p, x_hat=x_hat), precision, torch.float32)
    assert stats.lse_neg.isnan().nonzero().flatten().tolist() == [5]
    assert stats.pull[5].isnan().all() and stats.pull[6].isfinite().all()


def test_more_columns_than_can_be_numbered_are_refused():
    weight = torch.zeros(1, 1, device=device_for("triton")).expand(2**30 + 1, 8)
    x, labels = torch.randn(2, 8, device=weight.device), torch.tensor([0, 1], device=weight.device)
    with pytest.raises(ValueError, match="weight: the Triton kernels take at most 1,073,741,824"):
        fm.margin_loss(x, weight, labels, fm.ArcFace(), backend="triton")


def test_a_planted_error_shows():
    p = problem()
    truth, own = solve(REFERENCE, p, "auto", torch.float64), yardstick(p, "fp32")
    stats, d_weight = solve(TRITON, p, "fp32", torch.float32)
    compare((stats, d_weight), own, truth)
    for wrong in (
        (replace(stats, lse_neg=stats.lse_neg * (1 + 1e-4)), d_weight),
        (replace(stats, cos_y=stats.cos_y + 1e-5), d_weight),
        (replace(stats, pull=stats.pull.roll(1, 0)), d_weight),
        (replace(stats, pull=stats.pull * math.nan), d_weight),
        (stats, d_weight * (1 + 1e-3)),
        (stats, -d_weight),
    ):
        with pytest.raises(AssertionError):
            compare(wrong, own, truth)
