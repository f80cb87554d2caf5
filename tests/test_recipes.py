"""The recipes of docs/distributed.md: on several processes they are what one process computes."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from processes import run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastmargin as fm
from fastmargin.sampling import Sample

pytestmark = pytest.mark.dist

PIXELS, DIM, CLASSES = 6, 8, 41
# rows of each process in each step: the last batch is uneven, and one process has none of it
ROWS = {1: (12, 12, 7), 2: (6, 6, (5, 2)), 3: (4, 4, (4, 3, 0))}
STEPS = 3


def batch(step: int, group=None, many: int = 1):
    """Images (rows, PIXELS), labels (rows,) of this process: all rows where it is alone.

    ``many``: how many times the rows; labels are all valid there.
    """
    generator = torch.Generator().manual_seed(step)
    rows = ROWS[1][step] * many
    images = torch.randn(rows, PIXELS, generator=generator).double()
    labels = torch.randint(0 if many > 1 else -1, CLASSES, (rows,), generator=generator)
    if group is None:
        return images, labels
    n, rank = group.size(), group.rank()
    sizes = ROWS[n][step]
    sizes = [size * many for size in ((sizes,) * n if isinstance(sizes, int) else sizes)]
    return images.split(sizes)[rank], labels.split(sizes)[rank]


def backbone() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(PIXELS, 16), nn.Tanh(), nn.Linear(16, DIM)).double()


def make_head(group=None, margin=None, **options) -> fm.MarginHead:
    """A head in float64, of the same centres for any number of processes."""
    torch.manual_seed(2)
    margin = fm.CosFace(m=0.2, s=8.0) if margin is None else margin
    head = fm.MarginHead(DIM, CLASSES, margin, group=group, **options).double()
    head.weight.data.mul_(100)
    return head


def replicated(net: nn.Module, group, **options) -> nn.Module:
    return net if group is None else DistributedDataParallel(net, process_group=group, **options)


def record_draws(head: fm.MarginHead) -> list[torch.Tensor]:
    """The classes of every draw from now on, as global ids."""
    drawn, draw = [], head.sampler.draw

    def recorded(*args):
        sample = draw(*args)
        drawn.append(sample.index[sample.index >= 0] + head.sampler.class_start)
        return sample

    head.sampler.draw = recorded
    return drawn


def replay_draws(head: fm.MarginHead, draws: list[list[torch.Tensor]]) -> None:
    """Makes a head with all classes draw what several processes drew, step by step."""
    steps = iter([torch.cat(parts) for parts in zip(*draws, strict=True)])

    def replayed(labels, *_):
        index = next(steps)
        column = torch.full((CLASSES + 1,), -1).scatter_(0, index, torch.arange(len(index)))
        assert (column[labels[labels >= 0]] >= 0).all()
        return Sample(index, column[labels], torch.tensor(0))

    head.sampler.draw = replayed


def outcome(net: nn.Module, *heads: fm.MarginHead, **more) -> dict:
    """What must not depend on the number of processes."""
    net = getattr(net, "module", net)
    values = {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in net.named_parameters()
    }
    for head in heads:
        fm.deferred.settle(head.weight)
    return {"net": values, "weights": [head.weight.detach() for head in heads], **more}


def compare(found: list[dict], whole: dict, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """What every process has, beside one process with all rows and classes."""
    close = functools.partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    for own in found:
        for name, value in whole["net"].items():
            close(own["net"][name.replace("_orig_mod.", "")], value)
        for name in whole.keys() - {"net", "weights", "drawn"}:
            close(own[name], whole[name], msg=lambda text, name=name: f"{name}: {text}")
    for i, weight in enumerate(whole["weights"]):
        close(torch.cat([own["weights"][i] for own in found]), weight)
    start = backbone().state_dict()
    assert not torch.equal(whole["net"]["0.weight"], start["0.weight"])


def train(net, head, optimizers, group=None, steps=range(STEPS), loss_of=None) -> dict:
    """The plain loop."""
    losses = []
    for step in steps:
        images, labels = batch(step, group)
        loss = head(net(images), labels) if loss_of is None else loss_of(images, labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return outcome(net, head, loss=torch.stack(losses))


def sgd(module: nn.Module, kind=torch.optim.SGD):
    return kind(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


# ---- the backbone in DDP or FSDP2, the head outside ----


def ddp(group):
    net, head = replicated(backbone(), group), make_head(group)
    return train(net, head, [sgd(net), sgd(head)], group)


@pytest.mark.parametrize("n", [2, 3])
def test_ddp(n):
    compare(run(n, ddp), ddp(None))


def fsdp(group):
    net, head = backbone(), make_head(group)
    if group is not None:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in net:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return train(net, head, [sgd(net), sgd(head)], group)


@pytest.mark.parametrize("n", [2, 3])
def test_fsdp(n):
    compare(run(n, fsdp), fsdp(None))


def whole_in_ddp(group):
    """As Lightning and accelerate do it: the module with the head inside goes into DDP."""

    class Training(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = backbone(), make_head(group, sample_rate=0.3, sparse_grad=True)
            own = [*self.head.named_parameters(), *self.head.named_buffers()]
            self._ddp_params_and_buffers_to_ignore = [f"head.{name}" for name, _ in own]

        def forward(self, images, labels):
            return self.training_step((images, labels))

        def training_step(self, batch):
            images, labels = batch
            return self.head(self.net(images), labels)

        def configure_optimizers(self):
            return [sgd(self.net), sgd(self.head, fm.optim.RowSGD)]

    training = Training()
    module = replicated(training, group)
    drawn = record_draws(training.head)
    found = train(
        training.net, training.head, training.configure_optimizers(), group, loss_of=module
    )
    return {**found, "drawn": drawn}


@pytest.mark.parametrize("n", [2, 3])
def test_a_lightning_style_module_in_ddp(n):
    found = run(n, whole_in_ddp)
    net, head = backbone(), make_head(sample_rate=0.3)
    replay_draws(head, [own["drawn"] for own in found])
    compare(found, train(net, head, [sgd(net), sgd(head)]))


# ---- gradient accumulation ----


def micro_batches(step: int, group, n: int):
    """Two a step; where a process is alone, each has the rows that n processes have in theirs."""
    images, labels = batch(step, many=2)
    of_process = zip(images.chunk(n), labels.chunk(n), strict=True)
    halves = [list(zip(x.chunk(2), y.chunk(2), strict=True)) for x, y in of_process]
    if group is not None:
        return halves[group.rank()]
    return [tuple(map(torch.cat, zip(*half, strict=True))) for half in zip(*halves, strict=True)]


def accumulate(group, n: int, options: dict, optimizer, draws=None):
    """Each micro-batch's loss is divided by their number; the last one's backward communicates."""
    net, head = replicated(backbone(), group), make_head(group, **options)
    optimizers, drawn = [sgd(net), sgd(head, optimizer)], None
    if draws:
        replay_draws(head, draws)
    elif options:
        drawn = record_draws(head)
    for step in range(2):
        parts = micro_batches(step, group, n)
        for i, (images, labels) in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or group is None else net.no_sync():
                (head(net(images), labels) / len(parts)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return outcome(net, head, drawn=drawn)


def test_gradient_accumulation_is_the_large_batch():
    net, head = backbone(), make_head()
    optimizers = [sgd(net), sgd(head)]
    for step in range(2):
        images, labels = batch(step, many=2)
        for optimizer in optimizers:
            optimizer.zero_grad()
        head(net(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
    whole = outcome(net, head)
    for n in (2, 3):
        compare(run(n, accumulate, n, {}, torch.optim.SGD), whole)


@pytest.mark.parametrize("unsampled", ["dense", "lazy"])
def test_gradient_accumulation_with_sampling(unsampled):
    """Every micro-batch draws classes of its own; the gradient has the rows of all of them."""
    options = {"sample_rate": 0.3, "sparse_grad": True}
    optimizer = functools.partial(fm.optim.RowSGD, unsampled=unsampled)
    found = run(2, accumulate, 2, options, optimizer)
    draws = [own["drawn"] for own in found]
    assert not torch.equal(draws[0][0], draws[0][1])
    compare(found, accumulate(None, 2, {"sample_rate": 0.3}, torch.optim.SGD, draws))


# ---- clipping, and the norm of all gradients ----


def clip(group, of_all: bool):
    """Of the backbone alone as in public code, or by the norm over backbone and centres."""
    net, head = replicated(backbone(), group), make_head(group)
    optimizers, norms = [sgd(net), sgd(head)], []
    for step in range(STEPS):
        images, labels = batch(step, group)
        for optimizer in optimizers:
            optimizer.zero_grad()
        head(net(images), labels).backward()
        if of_all:
            norms.append(fm.total_norm(net, head))
            for module in (net, head):
                nn.utils.clip_grads_with_norm_(module.parameters(), 0.5, norms[-1])
        else:
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
        for optimizer in optimizers:
            optimizer.step()
    return outcome(net, head, norms=torch.stack(norms))


@pytest.mark.parametrize("of_all", [False, True])
def test_clipping(of_all):
    whole = clip(None, of_all)
    assert (whole["norms"] > 0.5).all()
    compare(run(3, clip, of_all), whole)


MARGINS = {"cosface": lambda: fm.CosFace(s=8.0), "npt": lambda: fm.NPT(delta=3.0, top_k=3)}


def norms(group, margin: str, layout: str, sparse_grad: bool):
    """The norm over a backbone and two heads, one of them with the class centres of both."""
    net, mesh = backbone(), group
    if layout == "replicas":
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    if layout == "fsdp":
        fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
    elif group is not None:
        net = replicated(net, group)
    head = make_head(mesh, MARGINS[margin](), sparse_grad=sparse_grad)
    unused = make_head(mesh, MARGINS[margin]())
    rows = {2: (7, 5), 3: (5, 0, 7), 4: (1, 3, 6, 2)}
    images, labels = batch(0)
    if group is not None:
        sizes, rank = rows[group.size()], group.rank()
        images, labels = images.split(sizes)[rank], labels.split(sizes)[rank]
    for _ in range(2):  # the second time adds to what is there
        head(net(images), labels).backward()
    return fm.total_norm(net, nn.ModuleList([head, unused]), head)


@pytest.mark.parametrize("layout, n", [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("replicas", 4)])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_total_norm(margin, layout, n, sparse_grad):
    net, head = backbone(), make_head(None, MARGINS[margin]())
    images, labels = batch(0)
    (2 * head(net(images), labels)).backward()
    whole = nn.utils.get_total_norm([p.grad for p in [*net.parameters(), *head.parameters()]])
    torch.testing.assert_close(norms(None, margin, "", sparse_grad), whole)
    # means of the norm in float32 on the way through the mesh's replicas
    for found in run(n, norms, margin, layout, sparse_grad):
        torch.testing.assert_close(found, whole)


def test_total_norm_adds_up_rows_listed_twice(monkeypatch):
    """Whatever the chunks in which it goes through the rows."""
    weight = nn.Module()
    weight.rows = nn.Parameter(torch.zeros(9, 4))
    index, values = torch.tensor([[3, 8, 3, 0, 3, 8]]), torch.randn(6, 4)
    weight.rows.grad = torch.sparse_coo_tensor(index, values, (9, 4), check_invariants=True)
    expected = weight.rows.grad.to_dense().norm()
    for size in (1 << 20, 48, 32, 16):
        monkeypatch.setattr("fastmargin.optim.row_chunks.CHUNK_BYTES", size)
        torch.testing.assert_close(fm.total_norm(weight), expected)
    weight.rows.grad = weight.rows.grad.coalesce()
    torch.testing.assert_close(fm.total_norm(weight), expected)
    weight.rows.grad = None
    assert fm.total_norm(weight) == 0
    with pytest.raises(ValueError, match="needs modules with parameters"):
        fm.total_norm(nn.Tanh())


# ---- gradient scaling ----


def scaled(group, sparse_grad: bool, autocast: bool, broken: int | None = None):
    """A step as insightface's train_v2.py makes it: one optimiser for everything."""
    net, head = backbone(), make_head(group, sparse_grad=sparse_grad)
    if autocast:
        net, head = net.float(), head.float()
    net = replicated(net, group)
    groups = [{"params": net.parameters()}, {"params": head.parameters()}]
    kind = fm.optim.RowSGD if sparse_grad else torch.optim.SGD
    optimizer = kind(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scales = []
    for step in range(STEPS):
        images, labels = batch(step, group)
        if step == broken and (group is None or group.rank() == 0):
            images[0, 0], labels[0] = torch.inf, 1
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            embeddings = net(images.float() if autocast else images)
        loss = head(embeddings, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return outcome(net, head, scales=torch.tensor(scales))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_scaler(sparse_grad, autocast):
    whole = scaled(None, False, autocast)
    assert whole["scales"].tolist() == [2**12, 2**13, 2**13]
    close = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    compare(run(2, scaled, sparse_grad, autocast), whole, **close)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_gradient_scaler_skips_a_step_on_all_processes(sparse_grad):
    """An infinity in one process's rows is in every shard's gradient: the scales stay alike."""
    whole = scaled(None, sparse_grad, False, broken=1)
    assert whole["scales"].tolist() == [2**12, 2**11, 2**11]
    compare(run(3, scaled, sparse_grad, False, 1), whole)


# ---- other models and optimisers ----


def two_heads(group):
    """Identities and, say, hair colours on the same embeddings."""
    net, head = replicated(backbone(), group), make_head(group)
    torch.manual_seed(3)
    other = fm.MarginHead(DIM, 5, fm.ArcFace(s=4.0), group=group).double()
    other.weight.data.mul_(100)
    optimizers = [sgd(net), sgd(head), sgd(other)]

    def loss_of(images, labels):
        embeddings = net(images)
        return head(embeddings, labels) + 0.5 * other(embeddings, labels.clamp_max(4))

    found = train(net, head, optimizers, group, loss_of=loss_of)
    return {**found, "weights": [*found["weights"], other.weight.detach()]}


def checkpointed(group):
    """Activations of the backbone are computed again in the backward; the head is not wrapped."""

    class Checkpointed(nn.Sequential):
        def forward(self, images):
            return checkpoint(super().forward, images, use_reentrant=False)

    net, head = replicated(Checkpointed(*backbone()), group), make_head(group)
    return train(net, head, [sgd(net), sgd(head)], group)


def compiled(group):
    """The backbone compiled, the head not: it talks to the other processes by itself."""
    torch._dynamo.reset()
    net, head = backbone(), make_head(group)
    forward = torch.compile(replicated(net, group), backend="aot_eager", dynamic=True)
    return train(
        net,
        head,
        [sgd(net), sgd(head)],
        group,
        loss_of=lambda images, labels: head(forward(images), labels),
    )


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("recipe", [two_heads, checkpointed, compiled])
def test_other_models(recipe, n):
    compare(run(n, recipe), recipe(None))


def adamw(group, options: dict, optimizer, draws=None):
    net, head = replicated(backbone(), group), make_head(group, sample_rate=0.3, **options)
    drawn = record_draws(head) if draws is None else replay_draws(head, draws)
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1),
        optimizer(head.parameters(), lr=1e-2, weight_decay=0.1),
    ]
    return {**train(net, head, optimizers, group), "drawn": drawn}


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_adamw(sparse_grad):
    """torch's on the dense gradient of sampled classes, and the one over rows."""
    optimizer = torch.optim.AdamW
    if sparse_grad:
        optimizer = functools.partial(fm.optim.RowAdamW, unsampled="dense")
    found = run(2, adamw, {"sparse_grad": sparse_grad}, optimizer)
    draws = [own["drawn"] for own in found]
    compare(found, adamw(None, {}, torch.optim.AdamW, draws))


def test_a_sampling_head_in_one_graph():
    """Without a group and with a dense gradient, backbone and head compile together."""
    results = []
    for compile in (False, True):
        torch._dynamo.reset()
        net, head = backbone(), make_head(sample_rate=0.3)

        def loss_of(images, labels, net=net, head=head):
            return head(net(images), labels)

        if compile:
            loss_of = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        results.append(train(net, head, [sgd(net), sgd(head)], loss_of=loss_of))
        assert head.sampler.step == STEPS
    compare(results[1:], results[0])
