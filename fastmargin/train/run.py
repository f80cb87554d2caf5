"""The training run: network, head, optimisers, checkpoints, validation."""

from __future__ import annotations

import math
import pickle
import time
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmargin as fm
from fastmargin.checkpoint import folder
from fastmargin.data import FolderFaces
from fastmargin.distributed import agreement
from fastmargin.progress import Progress
from fastmargin.train.backbones import check_backbone, load_pretrained, new_backbone
from fastmargin.train.images import Batch, Epochs, open_faces
from fastmargin.train.out import Figures, Out
from fastmargin.train.place import Place
from fastmargin.train.settings import Settings, TrainError, last_line, new_margin
from fastmargin.train.validation import Validation, open_validation

CHECK_EVERY = 50
"""Steps between two readings of the loss, each of which waits for the GPU."""
BROKEN = (OSError, ValueError, RuntimeError, LookupError, EOFError, pickle.UnpicklingError)
"""What a damaged checkpoint raises, or one of something else."""
METRICS = ("top1", "target_cosine", "norm_mean")


class Training:
    """A run of ``fastmargin train`` on this process; all processes make one.

    Raises:
        TrainError: the options, the data or a checkpoint cannot be used; nothing was overwritten.
        ProcessError: another process cannot start.
    """

    def __init__(self, settings: Settings, place: Place) -> None:
        settings.check()
        self.settings, self.place = settings, place
        self.checkpoint = settings.out / "checkpoint"
        self._group = agreement.channel(None)
        self.validations: dict[str, Validation] = {}
        self.out: Out | None = None  # on the first process
        self.epoch, self.first, self._pending = 0, 0, None
        self._together("reading the data", self._open)
        self._build()
        try:
            self._together("opening --out", self._open_out)
            if self._exists:
                self._resume()
        except Exception:
            self.close()
            raise

    def _together(self, what: str, function) -> None:
        """Runs it on all processes; if it fails on one, all raise."""
        agreement.all_or_none(what, function, self._group)

    def _open(self) -> None:
        settings, place = self.settings, self.place
        try:
            self._exists = folder.current_version(self.checkpoint) is not None
            self.faces = open_faces(settings.data, settings.image_size)
            self.faces[0]  # whether images can be decoded at all
            if place.first:
                for path in settings.validation:
                    self.validations[str(path)] = open_validation(path, settings.image_size)
        except (ImportError, OSError, ValueError) as error:
            raise TrainError(str(error)) from error
        if self.faces.num_classes < 2:
            raise TrainError(f"{settings.data} has one identity: its loss is always 0")
        pinned = place.device.type == "cuda"
        split = settings.batch, settings.seed, place.rank, place.world, settings.workers, pinned
        self.epochs = Epochs(self.faces, *split)
        if not self.epochs.steps:
            raise TrainError(
                f"{settings.data} has {len(self.faces)} images, fewer than one batch for each of "
                f"{place.world} processes: lower --batch"
            )

    def _build(self) -> None:
        settings, place = self.settings, self.place
        torch.manual_seed(settings.seed)
        self.backbone = new_backbone(
            settings.backbone, settings.embedding_size, settings.image_size
        )
        if settings.pretrained is not None and not self._exists:
            load_pretrained(self.backbone, settings.pretrained)
        self.backbone.to(place.device, memory_format=torch.channels_last)
        self.network: nn.Module = self.backbone
        size = settings.image_size
        check_backbone(self.backbone, self._embed, (2, 3, size, size), settings.embedding_size)
        margin = new_margin(settings.margin, settings.margin_settings, self.faces.class_counts)
        self.head = fm.MarginHead(
            settings.embedding_size,
            self.faces.num_classes,
            margin,
            settings.sample_rate,
            group="world" if place.world > 1 else None,
            device=place.device,
            sparse_grad=settings.sample_rate < 1,
            batch_size=settings.batch,
            seed=settings.seed,
        )
        if place.world > 1:
            self.network = DistributedDataParallel(self.backbone, broadcast_buffers=False)
        trained = [p for p in self.backbone.parameters() if p.requires_grad]
        rule = {"momentum": settings.momentum, "weight_decay": settings.weight_decay}
        self.optimizer = torch.optim.SGD(trained, lr=0.0, **rule)
        self.head_optimizer = fm.optim.RowSGD(self.head.parameters(), lr=0.0, fused=True, **rule)

    def _open_out(self) -> None:
        if self.place.first:
            self.out = Out(self.settings.out)
        # again, now that no other run can write one
        self._exists = folder.current_version(self.checkpoint) is not None
        if self._exists and not self.settings.resume:
            raise TrainError(
                f"{self.checkpoint} exists: continue it with --resume, or choose another --out"
            )
        if self.out and self.out.epochs() and not self._exists:
            raise TrainError(
                f"{self.settings.out}/log.jsonl is of a run whose checkpoint is gone: choose "
                "another --out, or remove it"
            )

    def close(self) -> None:
        """Lets other runs write to the folder."""
        if self.out:
            self.out.close()

    # ---- training ----

    def run(self, progress: Progress) -> list[Figures]:
        """Trains to the end; the figures of all epochs, on the first process.

        Raises:
            TrainError: the loss is no longer finite, or an image cannot be decoded; the last
                checkpoint stays.
            OSError, ProcessError: a checkpoint could not be written; the one before stays.
        """
        if self._pending and self.place.first:
            self._make_up(progress)
        for epoch in range(self.epoch, self.settings.epochs):
            self._pending = self._train_epoch(epoch, progress)
            if isinstance(self.head.margin, fm.KappaFace):
                self.head.margin.end_epoch()
            self._save(epoch + 1, 0)
            if self.place.first:
                self._publish(progress)
            self._pending = None
        return self.out.epochs() if self.place.first else []

    def _train_epoch(self, epoch: int, progress: Progress) -> Figures:
        settings, steps, first = self.settings, self.epochs.steps, self.first
        self.first = 0  # only the epoch in which training resumes starts in the middle
        self.network.train()
        name = f"epoch {epoch + 1} of {settings.epochs}"
        progress.begin(name, steps)
        progress.advance(first)
        total = torch.zeros((), device=self.place.device)
        readings, start = [], time.perf_counter()
        for batch in self.epochs.batches(epoch, first):
            total += self._step(epoch + batch.step / steps, batch)
            done = batch.step + 1
            if done % CHECK_EVERY == 0 or done == steps or done % settings.save_every == 0:
                readings.append(self._read(total, f"step {done} of {name}"))
                loss = f"{name}, loss {readings[-1][0] / (done - first):.3f}"
                progress.describe(loss)
            if done % settings.save_every == 0 and done < steps:
                self._save(epoch, done)
                progress.note(f"{loss}, step {done:,} of {steps:,}: saved")
            progress.advance()
        seconds, count = time.perf_counter() - start, steps - first
        means = torch.tensor(readings).mean(0).tolist()[1:]
        return {
            "epoch": epoch + 1,
            "steps": count,
            "loss": readings[-1][0] / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": count * settings.batch * self.place.world / seconds,
            **dict(zip(METRICS, means, strict=True)),
        }

    def _step(self, progress: float, batch: Batch) -> Tensor:
        """One training step after ``progress`` epochs; the loss, still on the device."""
        torch.manual_seed(batch.seed)  # of dropout: resumed training drops the same
        batch = batch.to(self.place.device)
        images = torch.where(
            batch.mirrored[:, None, None, None], batch.images.flip(3), batch.images
        )
        rate = self.settings.rate(self.settings.batch * self.place.world, progress)
        for optimizer in (self.optimizer, self.head_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        loss = self.head(self._embed(images), batch.labels)
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

    def _read(self, total: Tensor, where: str) -> list[float]:
        """Sum of the losses, and metrics of the last step; waits for the device once."""
        metrics = self.head.metrics
        found = torch.stack([total, *(metrics[name].to(total) for name in METRICS)]).tolist()
        # the loss is that of all processes, so all of them stop in the same step
        if not math.isfinite(found[0]):
            raise TrainError(
                f"the loss is no longer finite at {where}: start again, or continue from the last "
                "checkpoint with --resume, with a lower --lr or with --warm-up; if the loss was "
                "already rising at the checkpoint, start again"
            )
        return found

    # ---- files ----

    def _objects(self) -> dict[str, Any]:
        names = "network", "head", "optimizer", "head_optimizer"
        return {name: getattr(self, name) for name in names}

    def _recipe(self) -> dict[str, Any]:
        """What must be the same when training is resumed."""
        people = None
        if isinstance(self.faces, FolderFaces):
            people = zlib.crc32("\n".join(self.faces.classes).encode())
        margin = self.head.margin
        return self.settings.recipe() | {
            "margin": f"{type(margin).__name__}({margin.extra_repr()})",
            "number of images": len(self.faces),
            "names of the folders": people,
        }

    def _save(self, epoch: int, step: int) -> None:
        """Writes a checkpoint from which ``step`` of ``epoch`` is the next."""
        seen = step * self.settings.batch * self.place.world
        values = {"epoch": epoch, "seen": seen, "recipe": self._recipe()}
        values["figures"] = self._pending
        fm.checkpoint.save(self.checkpoint, self._objects() | values)

    def _resume(self) -> None:
        try:
            before = fm.checkpoint.load(self.checkpoint, {}, strict=False)
            for name, value in self._recipe().items():
                if before["recipe"].get(name) != value:
                    raise TrainError(
                        f"--resume: {name} was {before['recipe'].get(name)!r} and is now {value!r}:"
                        " give the same options, or another --out"
                    )
            fm.checkpoint.load(self.checkpoint, self._objects())
        except TrainError:
            raise
        except BROKEN as error:
            raise TrainError(f"{self.checkpoint} does not fit or is damaged: {error}") from error
        self.epoch, self._pending = before["epoch"], before["figures"]
        rows = self.settings.batch * self.place.world
        self.first = min(before["seen"] // rows, self.epochs.steps - 1)

    def _make_up(self, progress: Progress) -> None:
        """Writes what a stop right after the checkpoint has left out."""
        if all(line["epoch"] != self._pending["epoch"] for line in self.out.epochs()):
            self._publish(progress)
        elif not self.out.backbone.exists():
            self.out.write_backbone(self.backbone.state_dict())

    def _publish(self, progress: Progress) -> None:
        """Writes network, validation and log of an epoch that is in the checkpoint."""
        figures = self._pending
        self.out.write_backbone(self.backbone.state_dict())
        figures["validation"] = self._validated(progress)
        self.out.add(figures)
        shown = ", ".join(f"{key} {figures[key]:.4g}" for key in ("loss", "top1", "target_cosine"))
        progress.note(f"epoch {figures['epoch']}: {shown}")

    def _validated(self, progress: Progress) -> dict[str, dict[str, float]]:
        """Figures of every validation set."""
        found = {}
        self.network.eval()
        for name, validation in self.validations.items():
            progress.begin(f"validation: {name}", 1)
            try:
                found[name] = validation(self._embed, self.settings.batch, self.settings.workers)
            except (OSError, ValueError) as error:
                raise TrainError(f"--validation {name}: {last_line(error)}") from error
            progress.advance()
        return found
