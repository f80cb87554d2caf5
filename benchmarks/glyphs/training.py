"""Networks that train in step: the same batches, views and first weights; other heads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastmargin as fm
from benchmarks.glyphs.data import Glyphs, Split
from benchmarks.glyphs.heads import new_optimiser
from fastmargin.demo.augment import Jitter, random_views
from fastmargin.demo.network import EMBEDDING_SIZE, FaceNet

NewHead = Callable[[int, int], nn.Module]
"""(embedding_size, num_classes) -> a head: forward(embeddings, labels), prepare(labels)."""


@dataclass(frozen=True)
class Recipe:
    """Training settings, common to all heads: SGD, with insightface's momentum and decay."""

    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warm_up: float = 0.2
    widths: tuple[int, ...] = (32, 64, 128)
    jitter: Jitter = field(
        default_factory=lambda: Jitter(rotation=8.0, zoom=0.12, shift=0.08, erase=0.0, mirror=0.0)
    )


@dataclass(frozen=True)
class Trained:
    """losses: [steps] on the CPU. head_seconds: [steps] of the head alone: forward, backward and
    its optimiser; sampling too."""

    network: FaceNet
    head: nn.Module
    losses: Tensor
    head_seconds: list[float]

    def head_ms(self) -> float:
        """Median milliseconds of a step, without those in which things are set up."""
        return 1e3 * statistics.median(self.head_seconds[min(3, len(self.head_seconds) - 1) :])


class Learner:
    """A network and a head with their optimisers."""

    def __init__(
        self, new_head: NewHead, split: Split, recipe: Recipe, seed: int, steps: int
    ) -> None:
        torch.manual_seed(seed)
        device = split.training.pixels.device
        side = tuple(split.training.pixels.shape[-2:])
        self.network = FaceNet(recipe.widths, image_size=side).to(
            device, memory_format=torch.channels_last
        )
        self.head = new_head(EMBEDDING_SIZE, split.num_classes).to(device)
        settings = {
            "lr": recipe.learning_rate,
            "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay,
        }
        self.backbone_optimiser = torch.optim.SGD(self.network.parameters(), **settings)
        self.head_optimiser = new_optimiser(self.head, **settings)
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                max_lr=recipe.learning_rate,
                total_steps=steps,
                pct_start=recipe.warm_up,
                cycle_momentum=False,
            )
            for optimiser in (self.backbone_optimiser, self.head_optimiser)
        ]
        # one by one they would lie between the logits in memory and keep it from being used again
        self.losses = torch.empty(steps, device=device)
        self.head_seconds: list[float] = []

    def step(self, views: Tensor, labels: Tensor) -> None:
        """One step of everything; the head's part on its own, so that it can be timed."""
        embeddings = self.network(views)
        leaf = embeddings.detach().requires_grad_()
        self.head.prepare(labels)
        start = _now(views.device)
        loss = self.head(leaf, labels)
        self.head_optimiser.zero_grad()
        loss.backward()
        self.head_optimiser.step()
        self.losses[len(self.head_seconds)] = loss.detach()
        self.head_seconds.append(_now(views.device) - start)
        self.backbone_optimiser.zero_grad()
        embeddings.backward(leaf.grad)
        self.backbone_optimiser.step()
        for schedule in self.schedules:
            schedule.step()

    def end_epoch(self) -> None:
        """Margins that look back on an epoch do so."""
        if isinstance(self.head.margin, fm.KappaFace):
            self.head.margin.end_epoch()

    def trained(self) -> Trained:
        losses = self.losses[: len(self.head_seconds)].cpu().double()
        return Trained(self.network, self.head, losses, self.head_seconds)


def train_in_step(
    heads: dict[str, NewHead],
    split: Split,
    recipe: Recipe,
    seed: int,
    first_epoch_only: tuple[str, ...] = (),
    after_epoch: Callable[[], None] = lambda: None,
) -> dict[str, Trained]:
    """Trains a network under each of the ``heads``, step by step in turns.

    A busy machine slows all of them. Those in ``first_epoch_only`` stop after the first epoch.
    """
    glyphs: Glyphs = split.training
    batch = min(recipe.batch_size, len(glyphs.labels))
    steps = len(glyphs.labels) // batch
    total = steps * recipe.epochs
    learners = {
        name: Learner(new_head, split, recipe, seed, total) for name, new_head in heads.items()
    }
    draws = torch.Generator().manual_seed(seed)
    active = list(learners.values())
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(glyphs.labels), generator=draws).to(glyphs.labels.device)
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            views = random_views(glyphs.images(rows), recipe.jitter, draws)
            labels = glyphs.labels[rows]
            # whoever comes second finds other caches
            for learner in active if step % 2 else reversed(active):
                learner.step(views, labels)
        for learner in active:
            learner.end_epoch()
        if epoch == 0:
            active = [learners[name] for name in learners if name not in first_epoch_only]
        after_epoch()
    return {name: learner.trained() for name, learner in learners.items()}


def largest_gap(losses: Tensor, reference: Tensor, steps: int) -> float:
    """Largest relative difference of two curves over their first ``steps`` steps."""
    reference = reference[:steps]
    return ((losses[:steps] - reference).abs() / reference.abs().clamp_min(1e-30)).max().item()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
