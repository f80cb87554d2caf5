"""What the tests of checkpoints share: trainings, and comparisons of their state."""

from __future__ import annotations

import pytest
import torch
from fresh_processes import run_fresh
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmargin as fm

DIM, BATCH = 8, 12


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def row_sgd(parameters):
    return fm.optim.RowSGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def row_adamw(parameters):
    return fm.optim.RowAdamW(parameters, lr=0.01)


# name -> classes, margin, options of the head, optimiser
CASES = {
    "adaface": (507, lambda: fm.AdaFace(t_alpha=0.5), {}, sgd),
    "curricularface": (70, lambda: fm.CurricularFace(alpha=0.5), {}, sgd),
    "kappaface": (5, lambda: fm.KappaFace(), {}, adamw),
    "sampled": (507, lambda: fm.CosFace(), {"sample_rate": 0.3, "seed": 7}, adamw),
    "row_sgd": (300, lambda: fm.ElasticFace(), {"sample_rate": 0.5, "sparse_grad": True}, row_sgd),
    "row_adamw": (5, lambda: fm.ArcFace(), {"num_sampled": 1, "sparse_grad": True}, row_adamw),
}


class Training:
    """A backbone, heads on it, and what trains them."""

    def __init__(self, group=None, cases=CASES) -> None:
        self.net = nn.Sequential(nn.Linear(6, DIM), nn.LayerNorm(DIM))
        if group is not None:
            self.net = DistributedDataParallel(self.net, process_group=group)
        self.optimisers = [adamw(self.net.parameters())]
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimisers[0], 2)
        self.objects = {
            "net": self.net,
            "net optimiser": self.optimisers[0],
            "schedule": self.schedule,
        }
        self.heads = {}
        for name, (classes, margin, options, optimiser) in cases.items():
            self.heads[name] = fm.MarginHead(DIM, classes, margin(), group=group, **options)
            self.optimisers.append(optimiser(self.heads[name].parameters()))
            self.objects[name] = self.heads[name]
            self.objects[f"{name} optimiser"] = self.optimisers[-1]

    def loss(self, number: int, rows: slice = slice(None)) -> torch.Tensor:
        """Of some rows of a batch."""
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(BATCH, 6, generator=generator)
        features, total = self.net(x[rows]), 0
        for head in self.heads.values():
            labels = torch.randint(head.num_classes, (BATCH,), generator=generator)
            total = total + head(features, labels[rows])
        return total

    def step(self, number: int, rows: slice = slice(None)) -> None:
        loss = self.loss(number, rows)
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
        self.schedule.step()

    def trained(self, steps: int = 3, rows: slice = slice(None)) -> Training:
        for number in range(steps):
            self.step(number, rows)
        return self

    def rows(self) -> dict[str, tuple[int, int]]:
        """Which classes of every head are here."""
        return {name: (head.shard.start, head.shard.stop) for name, head in self.heads.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that counts, by name; of split tensors the rows that are here."""
        found = {}

        def add(name, value):
            if isinstance(value, dict):
                for key, part in value.items():
                    add(f"{name}.{key}", part)
            elif isinstance(value, (list, tuple)):
                add(name, dict(enumerate(value)))
            elif isinstance(value, torch.Tensor):
                value = value.to_local() if hasattr(value, "placements") else value
                found[name] = value.detach().clone()
            elif isinstance(value, (int, float)):
                found[name] = torch.tensor(value, dtype=torch.float64)

        # optimisers first: taking their state settles rows
        for name in sorted(self.objects, key=lambda name: "optimiser" not in name):
            thing = self.objects[name]
            thing = thing.module if isinstance(thing, DistributedDataParallel) else thing
            add(name, thing.state_dict())
        # where a lazy optimiser stands; it starts anew when nothing is owed
        return {name: value for name, value in found.items() if not name.endswith("last_step")}


def per_class(name: str, value: torch.Tensor) -> bool:
    """Whether this part of a state has a row for every class that is here."""
    owner, *_, last = name.split(".")
    case, _, optimiser = owner.partition(" ")
    if case not in CASES:
        return False
    return value.dim() > 0 if optimiser else last in ("weight", "class_sums", "class_seen")


def assert_same(found: dict, expected: dict, rows=None) -> None:
    """To the bit. rows: name of a case -> which of its rows ``found`` has; None: all."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        whole = expected[name]
        if rows is not None and per_class(name, value):
            whole = whole[slice(*rows[name.split(".")[0].split()[0]])]
        assert value.dtype == whole.dtype and value.equal(whole), name


def small_chunks() -> None:
    """Tensors of tests have several chunks."""
    from fastmargin.checkpoint import storage

    storage.CHUNK_BYTES = 1000


@pytest.fixture(autouse=True)
def chunks():
    small_chunks()


def fresh(n: int, function, *args, **options) -> list:
    """What a function returns on n processes, none of which fails."""
    outcomes = run_fresh(n, function, *args, **options)
    assert [outcome[1:] for outcome in outcomes] == [(None, None)] * n
    return [outcome.value for outcome in outcomes]


def small(classes=20, dim=DIM, margin=fm.AdaFace, optimiser=adamw, **options):
    head = fm.MarginHead(dim, classes, margin(), **options)
    return {"head": head, "optimiser": optimiser(head.parameters())}


def stepped(objects, number=0):
    head, optimiser = objects["head"], objects["optimiser"]
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, head.embedding_size, generator=generator)
    head(x, torch.arange(6)).backward()
    optimiser.step()
    optimiser.zero_grad()
    return objects


def snapshot(objects) -> dict:
    training = Training(cases={})
    training.objects = {name: thing for name, thing in objects.items() if name != "value"}
    return training.state()
