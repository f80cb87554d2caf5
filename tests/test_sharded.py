"""Classes shared out among processes: N processes are one process, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import MARGINS
from processes import run
from safetensors.torch import load_file
from test_golden import Curricular
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastmargin as fm
from fastmargin import testing
from fastmargin.distributed import collectives
from fastmargin.distributed.shard import bounds

pytestmark = pytest.mark.dist

MARGINS = {
    **MARGINS,
    "adaface_local": lambda: fm.AdaFace(t_alpha=0.5, stats="local"),
    "curricular": lambda: Curricular(0.5, 32.0, 0.3),
}
# rows of each process: uneven, and one with none
ROWS = {1: (23,), 2: (9, 14), 3: (14, 0, 9), 4: (2, 12, 3, 6)}
BATCH, DIM = 23, 8


def batch_of(classes: int, step: int = 0):
    case = testing.make_case("some_ignored", BATCH, classes, DIM, seed=step)
    return case.x * 3, case.weight, case.labels


def own_rows(n: int, rank: int) -> slice:
    start = sum(ROWS[n][:rank])
    return slice(start, start + ROWS[n][rank])


def own_classes(classes: int, n: int, rank: int) -> slice:
    return slice(*bounds(classes, n, rank))


def steps(head, rows: slice, count: int = 2, reduction="mean", optimiser=torch.optim.SGD):
    """A few steps on some rows of the batches; all that may be compared."""
    found = {"loss": [], "d_x": [], "metrics": []}
    optimiser = optimiser(head.parameters(), lr=0.5)
    for step in range(count):
        x, _, labels = batch_of(head.num_classes, step)
        x = x[rows].clone().requires_grad_()
        loss = head(x, labels[rows], reduction)
        optimiser.zero_grad()
        (
            loss * torch.linspace(0.5, 1.5, BATCH)[rows] if reduction == "none" else loss
        ).sum().backward()
        optimiser.step()
        found["loss"].append(loss.detach())
        found["d_x"].append(x.grad)
        found["metrics"].append(head.metrics)
    found["weight"] = head.weight.detach()
    found["state"] = dict(head.margin.named_buffers())
    return found


def head_of(margin: str, classes: int, group=None, **options):
    head = fm.MarginHead(DIM, classes, MARGINS[margin](), group=group, **options).double()
    whole = batch_of(classes)[1]
    start, stop = (0, classes) if head.shard is None else (head.shard.start, head.shard.stop)
    head.weight.data.copy_(whole[start:stop])
    if margin == "kappaface":
        head.margin.class_weights.copy_(torch.linspace(0.2, 1, classes))
    return head


def sharded_steps(group, margin: str, classes: int, reduction="mean", options=()):
    head = head_of(margin, classes, group, **dict(options))
    return steps(head, own_rows(group.size(), group.rank()), reduction=reduction)


def compare(found: list[dict], whole: dict, margin: str, classes: int, factor: float) -> None:
    """What N processes found, beside one."""
    n = len(found)
    per_class = MARGINS[margin]().per_class
    # float32 state of AdaFace and KappaFace
    close = {"rtol": 2e-6, "atol": 1e-9} if "face" in margin else {"rtol": 1e-9, "atol": 1e-11}
    for rank, own in enumerate(found):
        rows, here = own_rows(n, rank), own_classes(classes, n, rank)
        for step in range(len(whole["loss"])):
            expected = whole["loss"][step]
            expected = expected[rows] if expected.dim() else expected
            torch.testing.assert_close(own["loss"][step], expected, **close)
            expected = whole["d_x"][step][rows] * factor
            torch.testing.assert_close(own["d_x"][step], expected, **close)
            for name, value in own["metrics"][step].items():
                torch.testing.assert_close(value, whole["metrics"][step][name], **close)
        torch.testing.assert_close(own["weight"], whole["weight"][here], **close)
        assert own["state"].keys() == whole["state"].keys()
        for name, value in own["state"].items():
            expected = whole["state"][name]
            expected = expected[here] if name in per_class else expected
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("classes, n", [(507, 4), (5, 4), (70, 3), (70, 2), (70, 1)])
@pytest.mark.parametrize("margin", [name for name in MARGINS if name != "adaface_local"])
def test_many_processes_are_one(margin, classes, n):
    whole = steps(head_of(margin, classes), slice(None))
    compare(run(n, sharded_steps, margin, classes), whole, margin, classes, n)


@pytest.mark.parametrize("margin", ["arcface", "npt_3", "no_form"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions(margin, reduction):
    whole = steps(head_of(margin, 70), slice(None), reduction=reduction)
    options = (("grad_reduce", "sum"),)
    compare(run(3, sharded_steps, margin, 70, reduction, options), whole, margin, 70, 1)


def test_adaface_with_statistics_of_each_process():
    """Every process's rows follow its own batch; the first one's statistics are kept."""
    x, _, labels = batch_of(70)
    alone = [head_of("adaface_local", 70) for _ in range(2)]
    rows = [own_rows(2, rank) for rank in range(2)]
    losses = [h(x[r], labels[r], reduction="sum") for h, r in zip(alone, rows, strict=True)]
    loss = sum(losses).detach() / (labels >= 0).sum()
    after = steps(head_of("adaface_local", 70), rows[0])["state"]
    assert not torch.equal(alone[0].margin.batch_mean, alone[1].margin.batch_mean)
    for found in run(2, sharded_steps, "adaface_local", 70):
        torch.testing.assert_close(found["loss"][0], loss, rtol=1e-6, atol=0)
        for name in ("batch_mean", "batch_std"):
            torch.testing.assert_close(found["state"][name], after[name])


# ---- sampled classes ----


def sampled_step(group, margin: str, classes: int, options: dict):
    head = head_of(margin, classes, group, **options)
    rows = own_rows(group.size(), group.rank())
    x, _, labels = batch_of(classes)
    x = x[rows].clone().requires_grad_()
    drawn = []
    draw = head.sampler.draw
    head.sampler.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    loss = head(x, labels[rows])
    loss.backward()
    (sample,) = drawn
    index = sample.index[sample.index >= 0] + head.shard.start
    weights = torch.where(
        torch.arange(len(sample.index)) < sample.num_positives, 0.0, head.sampler.log_weight(sample)
    )[sample.index >= 0]
    return loss.detach(), x.grad, head.weight.grad, index, weights


@pytest.mark.parametrize("classes, n", [(507, 4), (5, 4), (70, 3), (70, 1)])
@pytest.mark.parametrize("margin", ["arcface", "adaface", "kappaface", "npt_3", "curricular"])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_sampled_classes_are_the_loss_on_those_classes(margin, classes, n, sparse_grad):
    options = {"sample_rate": 0.3, "sparse_grad": sparse_grad}
    found = run(n, sampled_step, margin, classes, options)
    index = torch.cat([own[3] for own in found])
    assert len(index.unique()) == len(index)
    x, weight, labels = batch_of(classes)
    assert set(labels[labels >= 0].tolist()) <= set(index.tolist())
    if classes > 100:
        sizes = [stop - start for start, stop in (bounds(classes, n, r) for r in range(n))]
        positives = [
            len(set(labels[(labels >= 0)].tolist()) & set(range(*bounds(classes, n, r))))
            for r in range(n)
        ]
        want = sum(max(int(0.3 * s), p) for s, p in zip(sizes, positives, strict=True))
        assert len(index) == want

    # the plain loss, with every class that was not drawn pushed out of the sum
    head = head_of(margin, classes)
    if margin == "kappaface":
        head.margin.class_weights.copy_(torch.linspace(0.2, 1, classes))
    place = torch.full((classes + 1,), -1)
    place[index] = torch.arange(len(index))
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    small = SubsetMargin(head.margin, index)
    loss = fm.margin_loss(x, weight[index], place[labels], small)
    loss.backward()
    close = {"rtol": 2e-6, "atol": 1e-9}
    for rank, own in enumerate(found):
        torch.testing.assert_close(own[0], loss.detach(), **close)
        torch.testing.assert_close(own[1], x.grad[own_rows(n, rank)] * n, **close)
        assert own[2].is_sparse == sparse_grad
        grad = own[2].to_dense() if sparse_grad else own[2]
        torch.testing.assert_close(grad, weight.grad[own_classes(classes, n, rank)], **close)


def SubsetMargin(margin, index):
    """The margin told about the classes ``index`` only, under their places in it."""
    if isinstance(margin, fm.KappaFace):
        subset = fm.KappaFace(m=margin.m)
        subset.bind(len(index), DIM)
        subset.class_weights.copy_(margin.class_weights[index])
        return subset
    return margin


@pytest.mark.parametrize("n", [1, 3])
def test_corrected_sampling_is_a_weighted_sum(n):
    options = {"sample_rate": 0.3, "correct_sampling": True}
    found = run(n, sampled_step, "cosface", 70, options)
    index, log_weight = (torch.cat([own[i] for own in found]) for i in (3, 4))
    x, weight, labels = batch_of(70)
    x.requires_grad_()
    weight = weight.requires_grad_()
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight[index]).t()
    own = labels[:, None] == index
    logits = 64 * (cos - 0.4 * own) + torch.where(own, 0.0, log_weight.double())
    rows = logits.logsumexp(1) - (logits * own).sum(1)
    loss = (rows * (labels >= 0)).sum() / (labels >= 0).sum()
    loss.backward()
    assert float(log_weight.max()) > 0.5
    for rank, own in enumerate(found):
        torch.testing.assert_close(own[0], loss.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(own[1], x.grad[own_rows(n, rank)] * n, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            own[2], weight.grad[own_classes(70, n, rank)], rtol=1e-6, atol=1e-9
        )


def test_corrected_sampling_is_right_on_average():
    """The mean of the sum of exponentials over many draws is that over all classes."""
    torch.manual_seed(0)
    head = fm.MarginHead(4, 40, fm.CosFace(s=3), sample_rate=0.25, correct_sampling=True)
    plain = fm.MarginHead(4, 40, fm.CosFace(s=3))
    plain.load_state_dict(head.state_dict(), strict=False)
    x, labels = torch.randn(6, 4), torch.arange(6)

    def odds(head):  # sum over negatives / exp(target): exp(loss) - 1
        return head(x, labels, reduction="none").detach().double().exp() - 1

    draws = torch.stack([odds(head) for _ in range(2000)])
    deviation = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - odds(plain)).abs() < 4 * deviation).all()
    head.correct_sampling = False
    assert (torch.stack([odds(head) for _ in range(50)]).mean(0) < 0.6 * odds(plain)).all()


def test_sample_rate_of_one_and_eval_are_the_full_softmax():
    x, _, labels = batch_of(70)
    heads = [head_of("arcface", 70), head_of("arcface", 70, sample_rate=0.1).eval()]
    heads.append(head_of("arcface", 70, num_sampled=70))
    losses = [head(x, labels) for head in heads]
    assert losses[0] == losses[1] and heads[0].sampler is None
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-12, atol=0)
    assert head_of("arcface", 70, num_sampled=7).sampler.num_sampled == 7


# ---- meshes ----


def mesh_steps(group, margin: str, options: dict):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    head = head_of(margin, 71, mesh, **options)
    return steps(head, own_rows(4, dist.get_rank()))


def test_replicas_keep_the_same_statistics():
    first, *others = run(4, mesh_steps, "adaface_local", {})
    assert first["state"]["batch_mean"] != 20
    for own in others:
        torch.testing.assert_close(own["state"], first["state"], rtol=0, atol=0)


@pytest.mark.parametrize("margin", ["arcface", "adaface", "curricular", "npt", "no_form"])
def test_classes_shared_out_in_a_node_and_repeated_over_nodes(margin):
    found = run(4, mesh_steps, margin, {})
    whole = steps(head_of(margin, 71), slice(None))
    for rank, own in enumerate(found):
        for step in range(2):
            torch.testing.assert_close(own["loss"][step], whole["loss"][step], rtol=2e-6, atol=0)
            expected = whole["d_x"][step][own_rows(4, rank)] * 4
            torch.testing.assert_close(own["d_x"][step], expected, rtol=2e-6, atol=1e-9)
        here = own_classes(71, 2, rank % 2)
        torch.testing.assert_close(own["weight"], whole["weight"][here], rtol=2e-6, atol=1e-9)
        for name, value in own["state"].items():
            torch.testing.assert_close(value, whole["state"][name], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("margin", ["arcface", "npt_3"])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_replicas_draw_the_same_classes(margin, sparse_grad):
    found = run(4, mesh_steps, margin, {"sample_rate": 0.4, "sparse_grad": sparse_grad})
    for rank in (0, 1):
        assert torch.equal(found[rank]["weight"], found[rank + 2]["weight"])
    assert not torch.equal(found[0]["weight"], head_of(margin, 71).weight[:36])


# ---- inference, and another set of classes ----


def inference(group, classes: int):
    head = head_of("arcface", classes, group)
    x = batch_of(classes)[0][own_rows(group.size(), group.rank())]
    many = min(20, classes)
    return head.logits(x), head.predict(x, 3), head.predict(x, many), head.export_centers()


@pytest.mark.parametrize("classes, n", [(70, 3), (5, 4)])
def test_inference(classes, n):
    head, x = head_of("arcface", classes), batch_of(classes)[0]
    few, many = head.predict(x, 3), head.predict(x, min(20, classes))
    for rank, own in enumerate(run(n, inference, classes)):
        rows = own_rows(n, rank)
        torch.testing.assert_close(own[0], head.logits(x)[rows])
        for found, whole in ((own[1], few), (own[2], many)):
            torch.testing.assert_close(found.cosine, whole.cosine[rows])
            assert torch.equal(found.label, whole.label[rows])
        torch.testing.assert_close(own[3], head.export_centers()[own_classes(classes, n, rank)])


def fresh_centres(group):
    head = fm.MarginHead(DIM, 2500, fm.ArcFace(), group=group)
    return head.weight.detach()


def test_centres_do_not_depend_on_the_number_of_processes():
    torch.manual_seed(0)
    whole = fm.MarginHead(DIM, 2500, fm.ArcFace()).weight.detach()
    for n in (1, 3):
        assert torch.equal(torch.cat(run(n, fresh_centres)), whole)
    assert len(whole.unique(dim=0)) == 2500


def changed(group, change: str):
    torch.manual_seed(1)
    head = head_of("kappaface", 70, group)
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    steps(head, rows, 1)
    head.margin.end_epoch()
    steps(head, rows, 1)
    before = head.weight
    if change == "extend":
        head.extend_classes(9)
    elif change == "extend with":
        head.extend_classes(2, torch.arange(2.0 * DIM).view(2, DIM))
    else:
        head.select_rows(torch.tensor([69, 3, 0, 41, 40, 39, 12]))
    assert head.weight is not before and head.weight.requires_grad
    state = dict(head.margin.named_buffers())
    x, _, labels = batch_of(70)
    labels = labels.clamp_max(head.num_classes - 1)
    loss = head(x[rows], labels[rows])
    loss.backward()
    head.margin.end_epoch()
    return head.weight.detach(), state, loss.detach(), head.margin.class_weights


@pytest.mark.parametrize("change", ["extend", "extend with", "select"])
def test_another_set_of_classes(change):
    weight, state, loss, weights = changed(None, change)
    old = steps(head_of("kappaface", 70), slice(None), 0)["weight"]
    if change == "extend":
        assert weight.shape[0] == 79 and 0.005 < weight[70:].std() < 0.015
    elif change == "extend with":
        torch.testing.assert_close(weight[70:], torch.arange(2.0 * DIM).view(2, DIM).double())
        assert state["class_weights"][70:].tolist() == [1, 1]
    else:
        assert weight.shape[0] == 7
        # one small step away from where they were
        torch.testing.assert_close(weight, old[[69, 3, 0, 41, 40, 39, 12]], rtol=0, atol=2.0)
    for n in (2, 3):
        found = run(n, changed, change)
        torch.testing.assert_close(torch.cat([own[0] for own in found]), weight)
        for own in found:
            torch.testing.assert_close(own[1]["class_weights"], state["class_weights"])
            torch.testing.assert_close(own[2], loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(own[3], weights, rtol=1e-4, atol=1e-6)
        for name in ("class_sums", "class_seen"):
            torch.testing.assert_close(torch.cat([own[1][name] for own in found]), state[name])


def exported(group, path: str):
    return head_of("arcface", 70, group).export_centers(path=path)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_export_to_safetensors(n, tmp_path, monkeypatch):
    path = tmp_path / "centers.safetensors"
    path.write_text("an older file")
    if n:
        run(n, exported, str(path))
    else:
        monkeypatch.setattr("fastmargin.export.PIECE", 16)
        exported(None, path)
    whole = head_of("arcface", 70).export_centers()
    torch.testing.assert_close(load_file(path)["centers"], whole, rtol=1e-14, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_freeze():
    head = head_of("arcface", 70)
    x, _, labels = batch_of(70)
    head.freeze()
    head(x.requires_grad_(), labels).backward()
    assert head.weight.grad is None and x.grad is not None
    head.freeze(False)
    head(x, labels).backward()
    assert head.weight.grad is not None


def whole_state(group):
    head = head_of("kappaface", 70, group)
    steps(head, own_rows(group.size(), group.rank()), 1)
    whole = {
        k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in head.state_dict().items()
    }
    other = fm.MarginHead(DIM, 70, MARGINS["kappaface"](), group=group).double()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    other.reset_parameters()
    other.load_state_dict(whole)
    assert torch.equal(other.weight, head.weight)
    assert torch.equal(other.margin.class_sums, head.margin.class_sums)
    assert other.weight.shape[0] < 70
    short = fm.MarginHead(DIM, 60, MARGINS["kappaface"](), group=group)
    for state in (whole, head.state_dict()):
        try:
            short.load_state_dict(state)
        except ValueError as error:
            assert "weight has 70 rows to load, the head 60 classes" in str(error)
        else:
            raise AssertionError("loaded 70 classes into 60")
    return whole


def test_state_dict_of_shards_is_that_of_the_whole():
    head = head_of("kappaface", 70)
    steps(head, slice(None), 1)
    for whole in run(3, whole_state):
        assert whole.keys() == head.state_dict().keys()
        for name, value in head.state_dict().items():
            torch.testing.assert_close(whole[name], value, rtol=1e-5, atol=1e-7)
        fm.MarginHead(DIM, 70, MARGINS["kappaface"]()).double().load_state_dict(whole)


def of_a_dtensor(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    x, weight, labels = batch_of(70)
    rows = own_rows(group.size(), group.rank())
    x = x[rows].clone().requires_grad_()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    loss = fm.margin_loss(x, weight, labels[rows], fm.ArcFace())
    loss.backward()
    try:
        fm.margin_loss(x, weight.redistribute(placements=[Replicate()]), labels[rows], fm.ArcFace())
    except ValueError as error:
        assert "redistribute it to" in str(error)
    else:
        raise AssertionError("took a replicated DTensor")
    return loss.detach(), x.grad, weight.grad.full_tensor()


def test_weight_may_be_a_dtensor():
    x, weight, labels = batch_of(70)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = fm.margin_loss(x, weight, labels, fm.ArcFace())
    loss.backward()
    for rank, own in enumerate(run(3, of_a_dtensor)):
        torch.testing.assert_close(own[0], loss.detach())
        torch.testing.assert_close(own[1], x.grad[own_rows(3, rank)] * 3)
        torch.testing.assert_close(own[2], weight.grad)


# ---- epochs of KappaFace ----


def epoch(group, features: str):
    margin = fm.KappaFace(features=features, num_samples=BATCH if features == "memory" else None)
    fm.MarginHead(DIM, 70, margin, group=group)  # tells it the classes and processes
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    for step in range(3):
        x, _, labels = batch_of(70, step)
        x, labels = x[rows].float(), (labels // 8)[rows]
        index = (torch.arange(BATCH).roll(step)[rows],) if features == "memory" else ()
        margin.accumulate(x, labels, *index)
    margin.end_epoch()
    return margin.class_weights, margin.kappa


@pytest.mark.parametrize("features", ["momentum", "memory"])
def test_kappaface_takes_features_of_all_processes(features):
    weights, kappa = epoch(None, features)
    assert len(weights.unique()) > 3
    for own in run(4, epoch, features):
        torch.testing.assert_close(own[0], weights, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own[1], kappa, rtol=1e-3, atol=1e-4)


# ---- bad input ----


def refused(group, what: str):
    head = head_of("arcface", 70, group, batch_size=3 if what == "too many rows" else None)
    before = head.weight.clone()
    x, _, labels = batch_of(70)
    x, labels = x[:6], labels[:6].clamp_min(0)
    if group.rank() == 1:
        if what == "label":
            labels[2] = 70
        elif what == "dtype":
            head, x = head.float(), x.float()
        elif what == "dim":
            x = x[:, :4]
    if what == "nobody":
        x, labels = x[:0], labels[:0]
    try:
        head(x, labels)
    except Exception as error:
        assert torch.equal(head.weight.double(), before)
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize(
    "what, at_fault, others",
    [
        ("label", "labels must be in [-1, 70)", "input of process 1 of the group was refused"),
        ("dim", "embeddings have 4 dimensions", "input of process 1 of the group was refused"),
        ("dtype", "the rows of different processes differ", "rows of different processes differ"),
        ("nobody", "an empty batch on every process", "an empty batch on every process"),
        ("too many rows", "made for batch_size=3", "made for batch_size=3"),
    ],
)
def test_bad_input_of_one_process_ends_the_step_of_all(what, at_fault, others):
    for rank, found in enumerate(run(3, refused, what)):
        assert found is not None, f"process {rank} went on"
        assert (at_fault if rank == 1 else others) in found[1]


class Learnable(fm.SoftmaxMargin):
    """One learnable margin for each class."""

    def __init__(self):
        super().__init__(8.0)
        self.m = torch.nn.Parameter(torch.full((70,), 0.2))

    def forward(self, cos_y, norm, labels):
        return cos_y - self.m[labels.clamp_min(0)]


def learnable(group, meshed: bool):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2)) if meshed else group
    head = fm.MarginHead(DIM, 70, Learnable(), group=mesh).double()
    head.weight.data.mul_(100)
    x, _, labels = batch_of(70)
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    try:
        head(x[rows], labels[rows]).backward()
    except ValueError as error:
        return str(error)
    return head.margin.m.grad


def test_parameters_of_a_margin():
    """Every shard sees all rows, so it has their whole gradient; replicas would not."""
    expected = learnable(None, False)
    assert (expected != 0).sum() > 5
    for found in run(3, learnable, False):
        torch.testing.assert_close(found, expected)
    for found in run(4, learnable, True):
        assert "share the classes out among all processes" in found


def test_batch_size_spares_the_exchange_before():
    """The same numbers, with one gathering and one sum of (B, 2), besides the metrics' maximum."""
    whole = steps(head_of("arcface", 70), slice(None))
    compare(run(2, counted, 14), whole, "arcface", 70, 2)


def counted(group, batch_size: int):
    calls = []

    def counting(name, inner):
        def outer(first, *args, **kwargs):
            calls.append((name, tuple(first.shape)))
            return inner(first, *args, **kwargs)

        return outer

    head = head_of("arcface", 70, group, batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (collectives, "_all_gather"),
            (collectives, "_reduce_scatter"),
            (dist, "all_reduce"),
        ):
            patch.setattr(module, name, counting(name, getattr(module, name)))
        found = steps(head, own_rows(2, group.rank()))
    row_bytes = DIM * 8 + 8
    step = [
        ("_all_gather", (2 * batch_size * row_bytes,)),
        ("all_reduce", (2 * batch_size, 2)),
        ("all_reduce", (2 * batch_size,)),
        ("_reduce_scatter", (batch_size, DIM)),
    ]
    assert calls == step * 2, calls
    return found


def test_logits_too_large_for_plain_sums():
    found = run(2, too_large)
    assert all("use a smaller s" in text for text in found)


def too_large(group):
    head = fm.MarginHead(DIM, 7, fm.ArcFace(s=708.0), group=group)
    x, labels = torch.randn(3, DIM), torch.arange(3)
    try:
        head(x, labels)
    except ValueError as error:
        return str(error)
    return ""


# ---- optimisers over rows ----


def trained(group, margin: str, options: dict, optimiser: str, unsampled: str = ""):
    """A head that learned from 12 batches with a schedule and two micro-batches a step."""
    head = head_of(margin, 71, group, seed=3, **options)
    rows = slice(None) if group is None else own_rows(group.size(), group.rank())
    rule = getattr(fm.optim, optimiser, None) or getattr(torch.optim, optimiser)
    settings = {"lr": 0.3, "momentum": 0.9} if "SGD" in optimiser else {"lr": 0.02, "eps": 1e-30}
    settings |= {"unsampled": unsampled} if unsampled else {}
    optimiser = rule(head.parameters(), weight_decay=0.02, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 12)
    for step in range(12):
        for part in range(2):
            x, _, labels = batch_of(71, 2 * step + part)
            head(x[rows], labels[rows]).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return head.state_dict(keep_vars=False)["weight"], head.export_centers(normalized=False)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("margin", ["arcface", "npt"])
@pytest.mark.parametrize("unsampled", ["lazy", "dense"])
def test_rows_learn_as_from_a_dense_gradient(n, kind, margin, unsampled):
    """Sampled classes, sparse gradients and lazy rows: torch's optimiser on the same draws."""
    options = {"sample_rate": 0.2}

    def learned(*args):
        return [trained(None, margin, *args)] if n == 0 else run(n, trained, margin, *args)

    dense = learned(options, kind)
    rows = learned(options | {"sparse_grad": True}, f"Row{kind}", unsampled)
    for own, expected in zip(rows, dense, strict=True):
        close = {"rtol": 1e-6, "atol": 1e-9}  # each row's last change may be tiny
        torch.testing.assert_close(own[1], expected[1], **close)
        saved = own[0].to_local() if n else own[0]
        assert torch.equal(saved, own[1])
    whole = torch.cat([own[1] for own in rows])
    assert not torch.isclose(whole, batch_of(71)[1]).all(1).any()
