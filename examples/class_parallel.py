"""Classes shared out among processes, a sample of them in every step, and a checkpoint.

    torchrun --nproc-per-node 2 examples/class_parallel.py --checkpoint run
    python examples/class_parallel.py

Data: noisy copies of one random image per class. Started again with the same ``--checkpoint`` and
more ``--epochs``, on any number of processes, it goes on where it stopped.
"""

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmargin as fm

PIXELS, SIZE = 64, 32


def batches(faces, args, epoch, rank, world):
    """Labels and images of one epoch on this process; the last batch is smaller."""
    generator = torch.Generator().manual_seed(1000 * epoch + rank)
    for rows in torch.arange(args.images // world).split(args.batch):
        labels = torch.randint(0, args.classes, rows.shape, generator=generator)
        noise = torch.randn(len(rows), PIXELS, generator=generator)
        yield (faces[labels] + 0.7 * noise).to(args.device), labels.to(args.device)


def train(args, rank, world):
    torch.manual_seed(0)
    faces = torch.randn(args.classes, PIXELS)
    layers = nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, SIZE)
    backbone = nn.Sequential(*layers).to(args.device)
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is not None:
        backbone = DistributedDataParallel(backbone)
    head = fm.MarginHead(  # outside DDP: every process has other classes
        SIZE,
        args.classes,
        fm.CosFace(m=0.2, s=32.0),
        sample_rate=0.3,
        group=group,
        sparse_grad=True,
        batch_size=args.batch,
        device=args.device,
    )
    sgd = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    row_sgd = fm.optim.RowSGD(head.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    start, objects = 0, {"backbone": backbone, "head": head, "sgd": sgd, "row_sgd": row_sgd}
    if args.checkpoint and (args.checkpoint / "current").exists():
        start = fm.checkpoint.load(args.checkpoint, objects)["epoch"]
    for epoch in range(start, args.epochs):
        for images, labels in batches(faces, args, epoch, rank, world):
            loss = head(backbone(images), labels)  # the mean over the rows of all processes
            for optimizer in (sgd, row_sgd):
                optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
            for optimizer in (sgd, row_sgd):
                optimizer.step()
        top1 = accuracy(backbone, head, faces, args, rank, world)
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.2f}, top-1 {top1:.2f}", flush=True)
        if args.checkpoint:
            fm.checkpoint.save(args.checkpoint, {**objects, "epoch": epoch + 1})


@torch.no_grad()
def accuracy(backbone, head, faces, args, rank, world):
    """Share of this process's rows whose nearest centre, of all, is their own."""
    images, labels = next(batches(faces, args, -1, rank, world))
    return (head.predict(backbone(images)).label[:, 0] == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1000, help="of which 0.3 are in a step")
    parser.add_argument("--images", type=int, default=20_000, help="per epoch, on all processes")
    parser.add_argument("--batch", type=int, default=128, help="rows of each process")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoint", type=Path, help="folder to resume from and to save to")
    args = parser.parse_args()
    cuda, rank, world = torch.cuda.is_available(), 0, 1
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if "RANK" in os.environ:  # started by torchrun
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo")
        rank, world = dist.get_rank(), dist.get_world_size()
    train(args, rank, world)
    if dist.is_initialized():
        gc.collect()  # device meshes: gloo threads that outlive them can abort the process
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
