"""One training loop for all heads: same network, batches, views and seeds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastmargin as fm
from fastmargin.demo.augment import Jitter, random_views
from fastmargin.demo.faces import Faces
from fastmargin.demo.network import EMBEDDING_SIZE, FaceNet


@dataclass(frozen=True)
class Recipe:
    """Training settings, common to all heads."""

    epochs: int = 40
    batch_size: int = 30
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warm_up: float = 0.2
    jitter: Jitter = field(default_factory=Jitter)


@dataclass(frozen=True)
class Trained:
    """losses: [steps] on CPU; seconds_per_epoch: wall clock, mean over the epochs."""

    network: FaceNet
    head: nn.Module
    losses: Tensor
    seconds_per_epoch: float

    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        return self.losses[-max(1, len(self.losses) // 10) :].mean().item()


def train(
    new_head: Callable[[int, int], nn.Module],
    faces: Faces,
    recipe: Recipe,
    seed: int,
    after_epoch: Callable[[], None] = lambda: None,
) -> Trained:
    """Trains a new network with ``new_head(embedding_size, num_classes)`` on ``faces``.

    Runs on the device and in the dtype of ``faces.pixels``. The network is initialised before the
    head, so that all heads start from the same network; the views have their own generator.
    """
    device, dtype = faces.pixels.device, faces.pixels.dtype
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    network = FaceNet().to(device, dtype, memory_format=torch.channels_last).train()
    num_people = int(faces.people.max()) + 1
    head = new_head(EMBEDDING_SIZE, num_people).to(device, dtype).train()
    optimizer = torch.optim.AdamW(_groups(network, head, recipe), lr=recipe.learning_rate)
    batch = min(recipe.batch_size, len(faces.people))
    steps = len(faces.people) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.learning_rate,
        total_steps=recipe.epochs * steps,
        pct_start=recipe.warm_up,
    )
    losses = []
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(recipe.epochs):
        views = random_views(faces.pixels, recipe.jitter, draws)
        order = torch.randperm(len(faces.people), generator=draws).to(device)
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            loss = head(network(views[rows]), faces.people[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if isinstance(getattr(head, "margin", None), fm.KappaFace):
            head.margin.end_epoch()
        after_epoch()
    _wait_for(device)
    seconds = (time.perf_counter() - start) / recipe.epochs
    return Trained(network, head, torch.stack(losses).cpu(), seconds)


def _groups(network: nn.Module, head: nn.Module, recipe: Recipe) -> list[dict]:
    """Weight decay for the network's matrices only; not for norms and PReLU slopes, nor for the
    centres, whose length has no effect."""
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": [*vectors, *head.parameters()], "weight_decay": 0.0},
    ]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
