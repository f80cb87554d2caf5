"""The training run: network, head, optimisers, checkpoints, validation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmargin as fm
from fastmargin.checkpoint import folder
from fastmargin.data.written_whole import written_whole
from fastmargin.progress import NoProgress, RichProgress
from fastmargin.train.backbones import load_pretrained, new_backbone
from fastmargin.train.images import Epochs, open_faces
from fastmargin.train.place import Place
from fastmargin.train.settings import Settings, TrainError, new_margin
from fastmargin.train.validation import open_validation

CHECK_EVERY = 50
"""Steps between two readings of the loss, each of which waits for the GPU."""

Figures = dict[str, Any]


class Training:
    """A run of ``fastmargin train`` on this process.

    Raises:
        TrainError: the options, the data or a checkpoint cannot be used; nothing was written.
    """

    def __init__(self, settings: Settings, place: Place) -> None:
        settings.check()
        self.settings, self.place = settings, place
        self.checkpoint = settings.out / "checkpoint"
        exists = folder.current_version(self.checkpoint) is not None
        if exists and not settings.resume:
            raise TrainError(
                f"{self.checkpoint} exists: continue it with --resume, or choose another --out"
            )
        try:
            self.faces = open_faces(settings.data, settings.image_size)
            self.classes = self.faces.num_classes
            self.faces[0]  # whether images can be decoded at all
            self.validations = {
                str(path): open_validation(path, settings.image_size)
                for path in settings.validation
                if place.first
            }
        except (ImportError, OSError, ValueError) as error:
            raise TrainError(str(error)) from error
        pinned = place.device.type == "cuda"
        split = settings.batch, settings.seed, place.rank, place.world, settings.workers, pinned
        self.epochs = Epochs(self.faces, *split)
        if not self.epochs.steps:
            raise TrainError(
                f"{settings.data} has {len(self.faces)} images, fewer than one batch for each of "
                f"{place.world} processes: lower --batch"
            )
        self._build()
        self.epoch, self.first = 0, 0
        if exists:
            self._resume()

    def _build(self) -> None:
        settings, place = self.settings, self.place
        torch.manual_seed(settings.seed)
        self.backbone = new_backbone(
            settings.backbone, settings.embedding_size, settings.image_size
        )
        if settings.pretrained is not None:
            load_pretrained(self.backbone, settings.pretrained)
        self.backbone.to(place.device, memory_format=torch.channels_last)
        margin = new_margin(settings.margin, settings.margin_settings, self.faces.class_counts)
        try:
            self.head = fm.MarginHead(
                settings.embedding_size,
                self.classes,
                margin,
                settings.sample_rate,
                group="world" if place.world > 1 else None,
                device=place.device,
                sparse_grad=settings.sample_rate < 1,
                batch_size=settings.batch,
                seed=settings.seed,
            )
        except ValueError as error:
            raise TrainError(str(error)) from error
        self.network: nn.Module = self.backbone
        if place.world > 1:
            self.network = DistributedDataParallel(self.backbone, broadcast_buffers=False)
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        rule = {"momentum": settings.momentum, "weight_decay": settings.weight_decay}
        self.optimizer = torch.optim.SGD(trained, lr=0.0, **rule)
        self.head_optimizer = fm.optim.RowSGD(self.head.parameters(), lr=0.0, fused=True, **rule)

    def run(self, progress: RichProgress | NoProgress, report: Callable[[Figures], None]) -> None:
        """Trains to the end; ``report`` gets the figures of every epoch, on the first process.

        Raises:
            TrainError: the loss is no longer finite; the last checkpoint stays.
            OSError, ProcessError: a checkpoint could not be written; the one before stays.
        """
        for epoch in range(self.epoch, self.settings.epochs):
            figures = self._train_epoch(epoch, progress)
            if isinstance(self.head.margin, fm.KappaFace):
                self.head.margin.end_epoch()
            self._save(epoch + 1, 0)
            if self.place.first:
                self._write_backbone()
                figures["validation"] = self._validated(progress)
                with open(self.settings.out / "log.jsonl", "a") as log:
                    log.write(json.dumps(figures) + "\n")
                report(figures)

    def _train_epoch(self, epoch: int, progress: RichProgress | NoProgress) -> Figures:
        settings, steps, first = self.settings, self.epochs.steps, self.first
        self.network.train()
        self.first = 0  # only the epoch in which training resumes starts in the middle
        progress.begin(f"epoch {epoch + 1} of {settings.epochs}", steps)
        progress.advance(first)
        total = torch.zeros((), device=self.place.device)
        readings, start = [], time.perf_counter()
        for step, images, labels, mirrored in self.epochs.batches(epoch, first):
            total += self._step(epoch + step / steps, images, labels, mirrored)
            done = step + 1
            if done % CHECK_EVERY == 0 or done == steps or done % settings.save_every == 0:
                self._check_finite(total, epoch, step)
                readings.append({name: value.item() for name, value in self.head.metrics.items()})
            if done % settings.save_every == 0 and done < steps:
                self._save(epoch, done)
            progress.advance()
        seconds, count = time.perf_counter() - start, steps - first
        rows = settings.batch * self.place.world
        means = {key: sum(r[key] for r in readings) / len(readings) for key in readings[0]}
        return {
            "epoch": epoch + 1,
            "steps": count,
            "loss": total.item() / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": count * rows / seconds,
            **{key: means[key] for key in ("top1", "target_cosine", "norm_mean")},
        }

    def _step(self, progress: float, images: Tensor, labels: Tensor, mirrored: Tensor) -> Tensor:
        """One training step after ``progress`` epochs; the loss, still on the device."""
        device = self.place.device
        images, labels, mirrored = (
            part.to(device, non_blocking=True) for part in (images, labels, mirrored)
        )
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        rate = self.settings.rate(self.settings.batch * self.place.world, progress)
        for optimizer in (self.optimizer, self.head_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        loss = self.head(self._embed(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.backbone.parameters(), self.settings.clip)
        self.optimizer.step()
        self.head_optimizer.step()
        return loss.detach()

    def _embed(self, images: Tensor) -> Tensor:
        """Raw embeddings in float32; on a GPU the network runs in bfloat16."""
        images = images.to(self.place.device, memory_format=torch.channels_last)
        network = self.network if self.network.training else self.backbone
        on_gpu = self.place.device.type == "cuda"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=on_gpu):
            return network(images).float()

    def _check_finite(self, total: Tensor, epoch: int, step: int) -> None:
        # the loss is that of all processes, so all of them stop in the same step
        if not math.isfinite(total.item()):
            raise TrainError(
                f"the loss is no longer finite at step {step + 1} of epoch {epoch + 1}: lower --lr "
                "or give --warm-up, and start again or from the last checkpoint with --resume"
            )

    # ---- files ----

    def _objects(self) -> dict[str, Any]:
        names = "network", "head", "optimizer", "head_optimizer"
        return {name: getattr(self, name) for name in names}

    def _save(self, epoch: int, step: int) -> None:
        """Writes a checkpoint from which ``step`` of ``epoch`` is the next."""
        seen = step * self.settings.batch * self.place.world
        values = {"epoch": epoch, "seen": seen, "recipe": self.settings.recipe()}
        fm.checkpoint.save(self.checkpoint, self._objects() | values)

    def _resume(self) -> None:
        try:
            before = fm.checkpoint.load(self.checkpoint, {}, strict=False)
            for name, value in self.settings.recipe().items():
                if before["recipe"].get(name) != value:
                    raise TrainError(
                        f"--resume: {name} was {before['recipe'].get(name)!r} and is now {value!r}:"
                        " give the same options, or another --out"
                    )
            fm.checkpoint.load(self.checkpoint, self._objects())
        except (KeyError, ValueError) as error:
            raise TrainError(f"{self.checkpoint} does not fit: {error}") from error
        self.epoch = before["epoch"]
        rows = self.settings.batch * self.place.world
        self.first = min(before["seen"] // rows, self.epochs.steps - 1)

    def _write_backbone(self) -> None:
        state = {name: value.cpu() for name, value in self.backbone.state_dict().items()}
        with written_whole(self.settings.out / "backbone.pt") as file:
            torch.save(state, file)

    def _validated(self, progress: RichProgress | NoProgress) -> dict[str, dict[str, float]]:
        """Figures of every validation set."""
        if not self.validations:
            return {}
        self.network.eval()
        progress.begin("validation", len(self.validations))
        found = {}
        for name, validation in self.validations.items():
            found[name] = validation(self._embed, self.settings.batch, self.settings.workers)
            progress.advance()
        return found
