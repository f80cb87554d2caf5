"""Stochastic rounding: right on average, the same everywhere, and a step that is not lost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import BACKENDS, ON_GPU, device_for
from fresh_processes import run_fresh
from fused_step_cases import batches, make_head

from fastmargin.optim import RowAdamW, RowSGD
from fastmargin.rounding import Rounding, narrowed, noise, stochastic

SIXTEEN = [torch.bfloat16, torch.float16]


def spread_of_sizes(dtype):
    """(N,) float32 between 16-bit numbers: all sizes, both signs, subnormal ones too."""
    low = -26 if dtype == torch.float16 else -140
    sizes = torch.exp2(torch.arange(low, 15).repeat_interleave(7).double())
    generator = torch.Generator().manual_seed(0)
    values = sizes * (1 + torch.rand(len(sizes), generator=generator, dtype=torch.float64))
    values = values.to(torch.float32)
    return torch.cat([values, -values])


def neighbours(values, dtype):
    """The 16-bit numbers below and above, away from zero."""
    nearest = values.to(dtype)
    raw = nearest.view(torch.int16)
    outside = nearest.float().abs() > values.abs()
    low = torch.where(outside, raw - 1, raw).view(dtype)
    high = torch.where(outside, raw, raw + 1).view(dtype)
    return low.float(), high.float()


def draws(values, dtype, count):
    rows = torch.arange(count)
    bits = noise(rows, len(values), Rounding(3).key(1))
    return stochastic(values.expand(count, -1), bits, dtype).float()


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_to_a_neighbour_with_odds_by_the_distance(dtype):
    values, count = spread_of_sizes(dtype), 4000
    low, high = neighbours(values, dtype)
    found = draws(values, dtype, count)
    assert ((found == low) | (found == high)).all()
    up = (found == high).double().mean(0)
    odds = ((values.double() - low) / (high.double() - low)).clamp(0, 1)
    # 13 bits decide for float16, and fewer where float32 itself has no more below float16's
    deviation = (odds * (1 - odds) / count).sqrt() + 2**-13
    assert ((up - odds).abs() < 5 * deviation).all()
    assert ((up - odds) / deviation).mean().abs() < 0.2


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_what_has_no_neighbours_stays(dtype):
    whole = spread_of_sizes(dtype).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).max], dtype=dtype)
    values = torch.cat([whole, special, torch.finfo(dtype).smallest_normal * special[:1] + special])
    found = draws(values.float(), dtype, 200)
    assert torch.equal(found, values.float().expand_as(found))
    # any payload: one that a carry would turn into a number, too
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32)
    assert draws(nans.view(torch.float32), dtype, 200).isnan().all()


def test_noise_is_even_and_does_not_repeat():
    keys = [Rounding(0).key(step) for step in range(1, 5)] + [Rounding(1).key(1)]
    assert len(set(keys)) == 5 and all(0 <= key < 1 << 31 for key in keys)
    found = torch.stack([noise(torch.arange(500), 64, key) for key in keys])
    bits = (found[..., None] >> torch.arange(32)) & 1
    assert (bits.double().mean((0, 1, 2)) - 0.5).abs().max() < 5 * 0.5 / (5 * 500 * 64) ** 0.5
    flat = (found & 0xFFFF).double().reshape(5, -1)
    assert (torch.corrcoef(flat) - torch.eye(5)).abs().max() < 5 / flat.shape[1] ** 0.5
    halves = torch.stack([found & 0xFFFF, (found >> 16) & 0xFFFF]).double().reshape(2, -1)
    assert torch.corrcoef(halves)[0, 1].abs() < 5 / halves.shape[1] ** 0.5
    for shift in (1, 64):  # the next column, the next row
        pair = torch.stack([flat[:, shift:].reshape(-1), flat[:, :-shift].reshape(-1)])
        assert torch.corrcoef(pair)[0, 1].abs() < 5 / pair.shape[1] ** 0.5
    rows = torch.tensor([7, 3, (1 << 31) + 5])
    assert torch.equal(noise(rows, 5, keys[0])[1], noise(rows[1:2], 9, keys[0])[0, :5])


def test_weight_and_state_round_apart():
    values = torch.full((400, 8), 1.0 + 2**-8)  # half way
    found = narrowed([values, values], [values.bfloat16()] * 2, torch.arange(400), 5)
    assert 0.4 < (found[0] == found[1]).double().mean() < 0.6
    plain = narrowed([values, values], [values.bfloat16(), values], torch.arange(400), None)
    assert torch.equal(plain[0], values.bfloat16()) and plain[1] is values


def test_the_triton_kernel_rounds_alike():
    """Bit for bit, of noise and of values of every size."""
    device = device_for("triton")
    from rounding_kernels import round_kernel

    key = Rounding(9).key(4)
    for dtype in SIXTEEN:
        values = spread_of_sizes(dtype)
        values = values[values.abs() >= 2.0**-126]  # the interpreter has no smaller bfloat16
        values = torch.cat([values, torch.tensor([0.0, torch.inf, -torch.inf])])
        values = torch.nn.functional.pad(values, (0, 4096 - len(values)), value=1 / 3)
        values = values.reshape(8, 512).to(device)
        rows = torch.arange(2**31 - 12, 2**31 - 4, device=device)
        out, bits = values.to(dtype), torch.empty_like(values, dtype=torch.int32)
        round_kernel[(1,)](values, out, bits, 2**31 - 12, key, 8, 512)
        assert torch.equal(bits, noise(rows, 512, key))
        assert torch.equal(out, stochastic(values, bits, dtype))


# ---- in the optimisers --------------------------------------------------------------------------

LOW = {"stochastic_rounding": True, "momentum_dtype": torch.bfloat16}


def low_head(backend, dtype, **options):
    head = make_head("arcface", backend, torch.float32, **options)
    with torch.no_grad():
        head.weight.mul_(4.0)
    return head.to(dtype)


@pytest.mark.parametrize("strides", ["rows", "columns"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fused_step_is_that_of_the_gradient(backend, dtype, sampled, strides):
    """Each number rounds the same way, but those whose gradient differs in the last places."""
    options = {"num_sampled": 30, "sparse_grad": True} if sampled else {}
    heads = [low_head(backend, dtype, **options) for _ in range(2)]
    rule = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, **LOW}
    optimizers = []
    for head, fused in zip(heads, (True, False), strict=True):
        if strides == "columns":
            head.weight.data = head.weight.data.t().contiguous().t()
        optimizers.append(RowSGD(head.parameters(), **rule, fused=fused))
    for x, labels in batches(1, heads[0].weight):
        for head, optimizer in zip(heads, optimizers, strict=True):
            head(x.float(), labels).backward()
            optimizer.step()
    states = [o.state[h.weight]["momentum_buffer"] for h, o in zip(heads, optimizers, strict=True)]
    assert states[0].dtype == torch.bfloat16
    for ours, plain in ((heads[0].weight, heads[1].weight), states):
        # the gradient of the second one was rounded to 16 bits on the way
        assert (ours == plain).double().mean() > 0.8
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_steps_arrive(backend, dtype, fused):
    """Steps far below the distance of neighbours: to nearest nothing moves, here the mean does."""
    head = low_head(backend, dtype)
    wide = copy.deepcopy(head).float()
    still = copy.deepcopy(head)
    rule = {"lr": 2e-4, "weight_decay": 0.5}
    pairs = [
        (head, RowSGD(head.parameters(), **rule, fused=fused, stochastic_rounding=True)),
        (still, RowSGD(still.parameters(), **rule, fused=fused)),
        (wide, RowSGD(wide.parameters(), **rule)),
    ]
    start = wide.weight.detach().clone()
    for x, labels in batches(6 if backend == "triton" else 40, wide.weight):
        for one, optimizer in pairs:
            optimizer.zero_grad()
            one(x, labels).backward()
            optimizer.step()
    moved = (wide.weight - start).detach().double()
    length = moved.square().sum()
    share = ((head.weight.double() - start.double()) * moved).sum() / length
    lost = ((still.weight.double() - start.double()) * moved).sum() / length
    assert abs(share - 1) < 0.3 and lost < 0.01


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
@pytest.mark.parametrize("unsampled", ["lazy", "dense"])
def test_small_decays_arrive(kind, unsampled):
    """Of rows without a gradient, in every step or when they are asked for."""
    weight = torch.nn.Parameter(torch.full((400, 8), 1.0, dtype=torch.bfloat16))
    optimizer = kind(
        [weight], lr=0.01, weight_decay=0.02, unsampled=unsampled, stochastic_rounding=True
    )
    nothing = torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 8, dtype=torch.bfloat16)
    for _ in range(20):
        weight.grad = torch.sparse_coo_tensor(*nothing, weight.shape, check_invariants=True)
        optimizer.step()
    optimizer.settle()
    expected = (1 - 0.01 * 0.02) ** 20
    mean = weight.detach().double().mean()
    assert abs(mean - expected) < 5 * 2**-8 / weight.numel() ** 0.5
    if unsampled == "lazy":  # rounded once
        assert weight.unique().numel() == 2


@pytest.mark.parametrize("sampled", [False, True])
def test_resumed_and_copied_runs_round_alike(sampled):
    """As one that is saved and goes on: with rows that are owed steps, saving rounds them."""
    options = {"num_sampled": 30, "sparse_grad": True} if sampled else {}
    runs = []
    for way in ("saved", "loaded", "pickled", "copied"):
        head = low_head("reference", torch.bfloat16, **options)

        def optimizer_of(head):
            return RowSGD(head.parameters(), lr=0.1, momentum=0.9, fused=True, seed=5, **LOW)

        optimizer = optimizer_of(head)
        for step, (x, labels) in enumerate(batches(6, head.weight)):
            if step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                if way == "loaded":
                    optimizer = optimizer_of(head)
                    optimizer.load_state_dict(saved)
                elif way == "pickled":
                    head, optimizer = pickle.loads(pickle.dumps((head, optimizer)))
                elif way == "copied":
                    head, optimizer = copy.deepcopy((head, optimizer))
            optimizer.zero_grad()
            head(x.float(), labels).backward()
            optimizer.step()
        optimizer.settle()
        runs.append((head.weight, optimizer.state[head.weight]["momentum_buffer"]))
    for weight, momentum in runs[1:]:
        assert torch.equal(weight, runs[0][0]) and torch.equal(momentum, runs[0][1])
    assert runs[0][1].dtype == torch.bfloat16


def test_other_seeds_round_otherwise():
    found = []
    for seed in (0, 1):
        head = low_head("reference", torch.bfloat16)
        optimizer = RowSGD(head.parameters(), lr=0.01, stochastic_rounding=True, seed=seed)
        x, labels = next(batches(1, head.weight))
        head(x.float(), labels).backward()
        optimizer.step()
        found.append(head.weight.detach())
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=2**-7, atol=0)


def test_parameters_of_one_optimiser_round_apart():
    weights = [torch.nn.Parameter(torch.ones(40, 8, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = RowSGD([weights[0]], lr=2**-9, stochastic_rounding=True)
    optimizer.add_param_group({"params": [weights[1]]})
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    same = (weights[0] == weights[1]).double().mean()
    assert 0.4 < same < 0.6


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_float64_weights_know_no_rounding(backend, dtype, fused):
    if backend in ON_GPU and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    found = []
    for low in (False, True):
        head = make_head("arcface", backend, dtype)
        optimizer = RowSGD(
            head.parameters(), lr=0.1, momentum=0.9, fused=fused, stochastic_rounding=low
        )
        x, labels = next(batches(1, head.weight))
        head(x, labels).backward()
        optimizer.step()
        found.append(head.weight.detach())
    assert torch.equal(*found)


def test_momentum_of_another_type():
    """Also beside float64 centres, and loaded from torch's optimiser."""
    for dtype in (torch.float32, torch.float64):
        head = make_head("arcface", "reference", dtype)
        twin = copy.deepcopy(head)
        ours = RowSGD(head.parameters(), lr=0.1, momentum=0.9, **LOW)
        torchs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        for x, labels in batches(2, head.weight):
            for one, optimizer in ((head, ours), (twin, torchs)):
                optimizer.zero_grad()
                one(x, labels).backward()
                optimizer.step()
        buffer = ours.state[head.weight]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16
        expected = torchs.state[twin.weight]["momentum_buffer"]
        assert (buffer - expected).norm() < 2**-7 * expected.norm()
        ours.load_state_dict(torchs.state_dict())
        buffer = ours.state[head.weight]["momentum_buffer"]
        assert buffer.dtype == torch.bfloat16 and torch.equal(buffer, expected.bfloat16())


def test_what_cannot_be_asked_for():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(TypeError, match="momentum_dtype must be one of"):
            RowSGD([weight], lr=0.1, momentum_dtype=dtype)
    for kind in (RowSGD, RowAdamW):
        for seed in (1.5, None, True):
            with pytest.raises(TypeError, match="seed must be an integer"):
                kind([weight], lr=0.1, stochastic_rounding=True, seed=seed)


def refuse_dtensors(group) -> bool:
    """In a process of its own: whether nothing has changed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    ones = torch.ones(4, 2, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (1,))
    weights = [ones.clone(), distribute_tensor(ones, mesh, [Shard(0)])]
    weights = [torch.nn.Parameter(weight) for weight in weights]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = RowSGD(weights, lr=0.1, stochastic_rounding=True)
    with pytest.raises(TypeError, match="stochastic_rounding takes no DTensor"):
        optimizer.step()
    still = torch.equal(weights[0], ones) and not optimizer.state
    RowSGD(weights, lr=0.1).step()
    return still and torch.equal(weights[0], weights[1].full_tensor())


def test_dtensors_are_refused_before_any_change():
    (found,) = run_fresh(1, refuse_dtensors)
    assert found.error is None and found.value is True


def test_the_triton_kernel_steps_in_place_with_low_precision_state(monkeypatch):
    """Not by way of chunks of gradients: of every type of centres, whole and sampled."""
    from fastmargin.backends.composed import Composed

    monkeypatch.setattr(Composed, "centre_step", None)
    for dtype in (torch.float32, *SIXTEEN):
        for options in ({}, {"num_sampled": 30, "sparse_grad": True}):
            head = low_head("triton", dtype, **options)
            optimizer = RowSGD(head.parameters(), lr=0.1, momentum=0.9, fused=True, **LOW)
            x, labels = next(batches(1, head.weight))
            head(x.float(), labels).backward()
            before = head.weight.detach().clone()
            optimizer.step()
            assert optimizer.state[head.weight]["momentum_buffer"].dtype == torch.bfloat16
            assert (head.weight != before).any() and head.weight.isfinite().all()
