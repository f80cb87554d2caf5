"""KappaFace's classifier and concentrations: recorded values, the training loop, differences."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pfc_cases import (
    Recorded,
    close,
    compare,
    compare_centres,
    describe,
    everywhere,
    load_rows,
    merged,
    names,
    own_rows,
    place,
    read,
)
from processes import run_world
from torch import nn

import fastmargin as fm
from fastmargin.compat.kappaface import (
    CosFace,
    KappaFace,
    LatentMemory,
    MomentumCalcHead,
    PartialFC,
    get_loss,
)

DTYPES = [torch.float64, torch.float32]


def made(margin, classes, dim, rows, dtype, rate=1.0, **options):
    """The classifier on this process, in a dtype: its centres are plain tensors."""
    rank, ranks = place()
    torch.set_default_dtype(dtype)
    try:
        return PartialFC(
            rank, 0, ranks, rows, False, margin, classes, rate, dim, device="cpu", **options
        )
    finally:
        torch.set_default_dtype(torch.float32)


def recorded_steps(group, name, faithful, dtype):
    file, meta, records = read(name)
    hyper, dim = meta["hyper"], file["weight"].shape[1]
    rows = len(own_rows(records[0]["labels"]))
    head = made(
        KappaFace(hyper["s"], hyper["m"]), meta["num_classes"], dim, rows, dtype, faithful=faithful
    )
    load_rows(head.weight, file)
    optimiser = torch.optim.SGD(head.parameters(), 0.1, 0.9)
    found = []
    for record in records:
        x = own_rows(record["embeddings"]).to(dtype).requires_grad_()
        features = F.normalize(x)
        weights = torch.from_numpy(file["class_weights"]).to(dtype)
        optimiser.zero_grad()
        x_grad, loss = head.forward_backward(
            own_rows(record["labels"]), features, optimiser, weights
        )
        features.backward(x_grad)
        found.append({"loss": loss, "d_x": x.grad, "d_weight": head.sub_weight.grad, "state": {}})
    return found


@pytest.mark.dist
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", names("kappaface_pfc"))
def test_recorded_values(name, faithful, dtype):
    if not faithful and "__w1" not in name:
        pytest.skip("weights are looked up by the global label here: tested below")
    _, _, records = read(name)
    for found, record in zip(
        merged(everywhere(name, recorded_steps, faithful, dtype)), records, strict=True
    ):
        compare(found, record, dtype)


@pytest.mark.dist
@pytest.mark.parametrize("name", names("kappaface_pfc"))
def test_weights_by_global_label(name):
    file, meta, (record,) = read(name)
    (found,) = merged(everywhere(name, recorded_steps, False, torch.float64))
    margin = fm.KappaFace(meta["hyper"]["m"], meta["hyper"]["s"], guard="none")
    x = record["embeddings"].requires_grad_()
    w = torch.from_numpy(file["weight"]).requires_grad_()
    margin.bind(*w.shape)
    margin.double()
    margin.class_weights.copy_(torch.from_numpy(file["class_weights"]))
    loss = fm.margin_loss(x, w, record["labels"], margin)
    loss.backward()
    close(found["loss"], loss.detach(), torch.float64)
    close(found["d_x"], x.grad, torch.float64)
    close(found["d_weight"], w.grad, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("kappaface_loss"))
def test_margin_module_on_dense_cosines(name, dtype):
    """With the official NaN where a cosine is 1 or -1."""
    file, meta, (record,) = read(name)
    if meta.get("guard") and dtype == torch.float32:
        pytest.skip("whether a cosine of 1 is above 1 is decided by rounding")
    margin = KappaFace(meta["hyper"]["s"], meta["hyper"]["m"])
    x = record["embeddings"].to(dtype).requires_grad_()
    w = torch.from_numpy(file["weight"]).to(dtype).requires_grad_()
    weights = torch.from_numpy(file["class_weights"]).to(dtype)
    cosine = F.linear(F.normalize(x), F.normalize(w))
    if meta.get("guard") == "exact":
        # the record has them at exactly 1, which the product may miss by a rounding
        cosine = exact_ends(cosine)
    logits = margin(cosine, record["labels"], weights)
    loss = F.cross_entropy(logits, record["labels"])
    loss.backward()
    if meta.get("guard") == "exact":
        odd = ~record["grad_embeddings"].isfinite().all(1)
        assert odd.any() and not x.grad[odd].isfinite().all(1).any()
        assert x.grad[~odd].isfinite().all()
        close(x.grad[~odd], record["grad_embeddings"][~odd], dtype)
        return
    if meta.get("guard"):  # 1 / sin(theta) multiplies the rounding of the record, too
        error = (x.grad - record["grad_embeddings"]).norm(dim=1)
        assert (error <= 1e-5 * record["grad_embeddings"].norm(dim=1)).all()
        return
    if "logits" in record:
        close(logits, record["logits"], dtype)
    close(loss, record["loss"], dtype)
    close(x.grad, record["grad_embeddings"], dtype)
    compare_centres(w.grad, record, dtype)


def exact_ends(cosine):
    ends = cosine.detach().sign()
    near = (cosine.detach() - ends).abs() < 1e-12
    return torch.where(near, cosine + (ends - cosine).detach(), cosine)


HEADS = {"kappaface_memory": LatentMemory, "kappaface_momentumhead": MomentumCalcHead}


def concentrations(name, faithful):
    """The module of a recorded case, in float64, and a function that feeds it an epoch."""
    file, meta = describe(name)
    counts = file["class_counts"].tolist()
    dim = file["ep0_features"].shape[1]
    hyper = dict(meta["hyper"])
    torch.set_default_dtype(torch.float64)
    try:
        if meta["family"] == "kappaface_memory":
            head = LatentMemory(sum(counts), dim, counts, faithful=faithful, **hyper, device="cpu")
            head.lat_memory.copy_(torch.from_numpy(file["memory_initial"]))
        else:
            head = MomentumCalcHead(dim, counts, faithful=faithful, **hyper, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    labels = torch.from_numpy(file["labels"])

    def feed(epoch):
        features = torch.from_numpy(file[f"{epoch}_features"])
        for index in torch.from_numpy(file[f"{epoch}_order"]).split(meta["batch_size"]):
            head(features[index], labels[index], index)

    return head, feed, {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("name", names(*HEADS))
def test_recorded_concentrations(name, faithful):
    """Two epochs; a class of one sample has the official numbers with ``faithful`` only."""
    head, feed, record = concentrations(name, faithful)
    for epoch in ("ep0", "ep1"):
        feed(epoch)
        torch.testing.assert_close(head.class_sums, record[f"{epoch}_class_sums"])
        if "memory_initial" in record:
            torch.testing.assert_close(head.lat_memory, record[f"{epoch}_memory_after"])
        kappa = head.update_kappa()
        assert (head.class_sums == 0).all()
        weights = head.update_weights()
        assert torch.equal(weights, head.m_weights)
        if "single" in name and not faithful:
            assert 0 < kappa.max() < 1e4 and weights.isfinite().all()
            assert kappa[-1] == kappa[:-1].max()
            continue
        single = "single" in name  # 1 / (1 - r^2) of rounding noise: the sign and the size
        expected = record[f"{epoch}_kappa"]
        assert kappa.shape == ((len(expected), 1) if faithful else expected.shape)
        torch.testing.assert_close(
            kappa.flatten()[: -1 if single else None], expected[: -1 if single else None]
        )
        if not single:
            torch.testing.assert_close(head.get_kappa_weights(), record[f"{epoch}_kappa_weights"])
            torch.testing.assert_close(
                weights, record[f"{epoch}_class_weights"], rtol=1e-6, atol=1e-6
            )
        torch.testing.assert_close(
            head.get_sample_weights().double(),
            record[f"{epoch}_sample_weights"],
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", [n for n in names("kappaface_momentumhead") if "single" in n])
def test_one_official_class_flattens_the_others(name):
    """r of a class of one sample a rounding beside 1, as recorded; the sum is put in by hand."""
    for faithful in (True, False):
        head, feed, record = concentrations(name, faithful)
        feed("ep0")
        head.class_sums[-1] = 0
        head.class_sums[-1, 0] = record["ep0_resultant_length"][-1]
        head.update_kappa()
        spread = head.get_kappa_weights()[:-1].std()
        if faithful:
            if "exact" not in name:
                assert spread < 1e-6
            weights = head.update_weights()
            torch.testing.assert_close(weights, record["ep0_class_weights"], rtol=1e-6, atol=1e-6)
        else:
            others = head.kappa[:-1]  # the last one stays out of mean and deviation
            z = (others - others.mean()) / others.std()
            expected = 1 - torch.sigmoid(head.T * z)
            torch.testing.assert_close(head.get_kappa_weights()[:-1], expected)


def test_state_dict_of_the_concentrations():
    buffers = ["kappa", "norm_constant", "m_weights"]
    memory = LatentMemory(30, 8, [10] * 3, device="cpu")
    assert sorted(memory.state_dict()) == sorted([*buffers, "lat_memory"])
    assert memory.lat_memory.shape == (30, 8) and memory.class_sums.shape == (3, 8)
    assert (memory.m_weights == 0.5).all()
    # N(-a, (2 a)^2) with a = 1 / sqrt(D / 3)
    wide = LatentMemory(4000, 8, [10] * 3, device="cpu").lat_memory
    a = 1 / math.sqrt(8 / 3)
    assert abs(wide.mean() + a) < 0.05 and abs(wide.std() - 2 * a) < 0.05
    head = MomentumCalcHead(8, [10] * 3, device="cpu")
    assert list(head.state_dict()) == buffers
    assert head.vmf_vectors.norm(dim=1).allclose(torch.ones(3))
    unit = F.normalize(torch.randn(30, 8))
    labels = torch.arange(3).repeat(10)
    memory(unit, labels, torch.arange(30))
    memory.update_kappa()
    LatentMemory(30, 8, [10] * 3, device="cpu").load_state_dict(memory.state_dict())


def test_concentrations_divide_by_what_was_seen():
    """A duplicated sample counts twice; there r passes 1 and kappa turns negative."""
    unit = F.normalize(torch.randn(6, 8) + 4)
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    kappas = []
    for faithful in (False, True):
        head = MomentumCalcHead(8, [2, 2], faithful=faithful, device="cpu")
        head(unit, labels)
        kappas.append(head.update_kappa().flatten())
    assert kappas[0].min() > 0 and kappas[1][1] < 0
    torch.testing.assert_close(kappas[0][0], kappas[1][0], rtol=1e-5, atol=0)


def test_a_class_that_was_not_seen_keeps_its_kappa():
    head = MomentumCalcHead(8, [3, 3, 3], device="cpu")
    before = head.kappa.clone()
    head(F.normalize(torch.randn(6, 8)), torch.tensor([0, 0, 0, 2, 2, 2]))
    after = head.update_kappa()
    assert after[1] == before[1] and after[0] != before[0]
    with pytest.raises(RuntimeError, match="no feature was seen"):
        head.update_kappa()


def two_steps(group, margin, rate, faithful):
    """Steps under sampling; with one weight for all, as the lookup differs by default."""
    _, ranks = place()
    head = made(margin, 23, 6, 5, torch.float64, rate, faithful=faithful)
    g = torch.Generator().manual_seed(3)
    whole = torch.randn(23, 6, generator=g, dtype=torch.float64)
    head.weight.copy_(whole[head.class_start : head.class_start + head.num_local])
    optimiser = torch.optim.SGD(head.parameters(), 0.1, 0.9, weight_decay=5e-4)
    found = []
    for _ in range(2):
        index = torch.randperm(23, generator=g)[:12]
        x = F.normalize(torch.randn(5 * ranks, 6, generator=g, dtype=torch.float64))
        labels = torch.randint(0, 23, (5 * ranks,), generator=g)
        if rate < 1:
            index = torch.cat([index, labels]).unique()
            head._sampler = Recorded(index, head.class_start, head.num_local)
        weights = torch.full((23,), 0.7, dtype=torch.float64)
        rows = own_rows(x)
        x_grad, loss = head.forward_backward(own_rows(labels), rows, optimiser, weights)
        tangent = x_grad - (x_grad * rows).sum(1, keepdim=True) * rows
        optimiser.step()
        head.update()
        optimiser.zero_grad()
        found.append((loss, tangent, head.weight.clone(), head.weight_mom.clone()))
    return found


@pytest.mark.dist
@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("margin", [KappaFace(16.0, 0.8), CosFace(20.0, 0.3)])
def test_fused_equals_plain(margin, ranks, rate):
    both = [
        [two_steps(None, margin, rate, faithful)]
        if ranks == 1
        else run_world(ranks, two_steps, margin, rate, faithful)
        for faithful in (False, True)
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)


def official_loop(group, folder, faithful, momentum):
    """Two epochs of the loop of ``train.py``, in small."""
    rank, ranks = place()
    classes, per_class, dim, batch = 9, 8, 6, 12
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 10, generator=g)
    images = (centres[:, None] + 0.5 * torch.randn(classes, per_class, 10, generator=g)).flatten(
        0, 1
    )
    every_label = torch.arange(classes).repeat_interleave(per_class)
    samples = [per_class] * classes

    torch.manual_seed(0)
    backbone = nn.Linear(10, dim)
    encoder = nn.Linear(10, dim)
    encoder.load_state_dict(backbone.state_dict())
    backbone = nn.parallel.DistributedDataParallel(backbone)
    calc_head = None
    if rank == 0:
        if momentum:
            calc_head = MomentumCalcHead(
                dim, samples, T=0.4, gamma=0.7, faithful=faithful, device="cpu"
            )
        else:
            calc_head = LatentMemory(
                len(images), dim, samples, T=0.4, faithful=faithful, device="cpu"
            )
    margin_softmax = get_loss("kappaface", SimpleNamespace(m=0.8))
    margin_softmax.s = 16.0
    torch.manual_seed(rank)
    module_partial_fc = PartialFC(
        rank=rank,
        local_rank=rank,
        world_size=ranks,
        resume=False,
        batch_size=batch,
        margin_softmax=margin_softmax,
        num_classes=classes,
        sample_rate=1,
        embedding_size=dim,
        prefix=folder,
        faithful=faithful,
        device="cpu",
    )
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    opt_backbone = torch.optim.SGD([{"params": backbone.parameters()}], **settings)
    opt_pfc = torch.optim.SGD([{"params": module_partial_fc.parameters()}], **settings)
    weights, losses = torch.ones(classes), []
    for epoch in range(2):
        order = torch.randperm(len(images), generator=g)
        for index in order.split(batch * ranks):
            indexes = index.chunk(ranks)[rank].contiguous()
            label = every_label[indexes]
            features = F.normalize(backbone(images[indexes]))
            x_grad, loss_v = module_partial_fc.forward_backward(label, features, opt_pfc, weights)
            features.backward(x_grad)
            torch.nn.utils.clip_grad_norm_(backbone.parameters(), max_norm=5, norm_type=2)
            opt_backbone.step()
            opt_pfc.step()
            module_partial_fc.update()
            opt_backbone.zero_grad()
            opt_pfc.zero_grad()
            losses.append(loss_v.item())
            if momentum:
                with torch.no_grad():
                    for q, k in zip(backbone.parameters(), encoder.parameters(), strict=True):
                        k.mul_(0.9).add_(q, alpha=0.1)
                    features = F.normalize(encoder(images[indexes]))
            gathered = []
            for own in (features.detach(), label, indexes):
                parts = [torch.empty_like(own) for _ in range(ranks)]
                torch.distributed.all_gather(parts, own)
                gathered.append(torch.cat(parts))
            if rank == 0:
                calc_head(*gathered)
        if rank == 0:
            kappas = calc_head.update_kappa()
            weights = calc_head.update_weights()
            assert kappas.max().item() > kappas.min().item() > 0
        else:
            weights = torch.ones(classes) * -1.0
        total_weights = [torch.zeros(classes) for _ in range(ranks)]
        torch.distributed.all_gather(total_weights, weights)
        total_weights = torch.cat(total_weights)
        weights = total_weights[total_weights != -1]
        assert len(weights) == classes
        module_partial_fc.save_params()
        if epoch == 0:
            first = weights.clone()
    return losses, first, module_partial_fc.weight


@pytest.mark.dist
@pytest.mark.parametrize("momentum", [True, False])
def test_the_training_loop(momentum, tmp_path):
    both = [
        run_world(2, official_loop, str(tmp_path), faithful, momentum) for faithful in (False, True)
    ]
    fused, plain = ([losses for losses, *_ in ranks] for ranks in both)
    assert fused[0] == fused[1] and len(fused[0]) == 6
    # in the first epoch all weights are 1, so that it matters nothing where they are looked up
    torch.testing.assert_close(fused[0][:3], plain[0][:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[0][0][1], both[1][0][1], rtol=1e-3, atol=1e-4)
    assert abs(fused[0][3] - plain[0][3]) > 1e-4  # and then it does
    names = {path.name for path in tmp_path.iterdir()}
    assert {"rank_0_softmax_weight.pt", "rank_1_softmax_weight_mom.pt"} <= names


def test_misuse():
    head = PartialFC(0, 0, 1, 2, False, KappaFace(), 10, 1.0, 4, device="cpu")
    optimiser = torch.optim.SGD(head.parameters(), 0.1)
    x, label = F.normalize(torch.randn(2, 4)), torch.tensor([1, 2])
    for weights in (torch.ones(9), None):
        with pytest.raises(ValueError, match=r"weights must be a tensor of shape \(10,\)"):
            head.forward_backward(label, x, optimiser, weights)
    with pytest.raises(TypeError, match="KappaFace or CosFace"):
        PartialFC(0, 0, 1, 2, False, fm.KappaFace(), 10)
    with pytest.raises(ValueError, match="'cosface' or 'kappaface'"):
        get_loss("arcface", None)
    with pytest.raises(ValueError, match="cls_positive is empty"):
        MomentumCalcHead(4, [], device="cpu")
    with pytest.raises(ValueError, match="batch_samples must have shape"):
        MomentumCalcHead(4, [1, 1], device="cpu")(torch.randn(2, 5), label - 1)
