"""Small files as other code bases make them, for the tests of ``fastmargin.convert``."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def centres(classes: int, dim: int = 6, seed: int = 0, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(classes, dim, generator=generator).to(dtype)


def insightface_bounds(classes: int, ranks: int, rank: int) -> tuple[int, int]:
    """As PartialFC_V2 has ``class_start`` and ``num_local``."""
    share, more = classes // ranks, classes % ranks
    start = share * rank + min(rank, more)
    return start, start + share + int(rank < more)


def _module(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        if name.startswith("batch"):
            module.register_buffer(name, tensor)
        else:
            setattr(module, name, nn.Parameter(tensor))
    return module


def _backbone() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))


def insightface(folder: Path, weight: Tensor, ranks: int, momentum: bool = True) -> Tensor | None:
    """Returns the momentum of all rows."""
    folder.mkdir(parents=True, exist_ok=True)
    buffers = []
    for rank in range(ranks):
        start, stop = insightface_bounds(len(weight), ranks, rank)
        backbone, head = _backbone(), _module(weight=weight[start:stop].clone())
        optimiser = torch.optim.SGD(
            [{"params": backbone.parameters()}, {"params": head.parameters()}], lr=0.1, momentum=0.9
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 5)
        if momentum:
            for parameter in [*backbone.parameters(), head.weight]:
                buffer = centres(parameter.shape[0], 6, seed=100 + rank)
                buffer = buffer if parameter is head.weight else torch.zeros_like(parameter)
                optimiser.state[parameter]["momentum_buffer"] = buffer
            buffers.append(optimiser.state[head.weight]["momentum_buffer"])
        torch.save(
            {
                "epoch": 3,
                "global_step": 1234,
                "state_dict_backbone": backbone.state_dict(),
                "state_dict_softmax_fc": head.state_dict(),
                "state_optimizer": optimiser.state_dict(),
                "state_lr_scheduler": scheduler.state_dict(),
            },
            folder / f"checkpoint_gpu_{rank}.pt",
        )
    return torch.cat(buffers) if momentum else None


def kappaface(folder: Path, weight: Tensor, ranks: int, momentum: bool = True) -> Tensor | None:
    folder.mkdir(parents=True, exist_ok=True)
    buffer = centres(*weight.shape, seed=7).to(weight.dtype) if momentum else None
    for rank in range(ranks):
        start, stop = insightface_bounds(len(weight), ranks, rank)
        torch.save(weight[start:stop].clone(), folder / f"rank_{rank}_softmax_weight.pt")
        if momentum:
            torch.save(buffer[start:stop].clone(), folder / f"rank_{rank}_softmax_weight_mom.pt")
    torch.save(_backbone().state_dict(), folder / "backbone.pth")
    return buffer


def cvlface(folder: Path, weight: Tensor, ranks: int, statistics: bool = True) -> None:
    """Pad rows are drawn, as those of a new PartialFC."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = len(weight) // ranks * ranks
    rounded += ranks if rounded < len(weight) else 0
    rows = torch.cat([weight, centres(rounded - len(weight), weight.shape[1], 9).to(weight)])
    for rank, part in enumerate(rows.split(rounded // ranks)):
        more = {"batch_mean": torch.tensor([21.5]), "batch_std": torch.tensor([7.25])}
        classifier = nn.Module()
        classifier.partial_fc = _module(weight=part.clone(), **(more if statistics else {}))
        torch.save(classifier.state_dict(), folder / f"classifier_rank{rank}.pt")
        (folder / f"classifier_rank{rank}.yaml").write_text("name: partial_fc\n")
    torch.save(_backbone().state_dict(), folder / "model.pt")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")


def adaface(
    path: Path, weight: Tensor, momentum: bool = True, statistics: bool = True
) -> Tensor | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer = nn.Module()
    trainer.model = _backbone()
    more = {"batch_mean": torch.tensor([18.25]), "batch_std": torch.tensor([4.5])}
    trainer.head = _module(kernel=weight.t().clone(), **(more if statistics else {}))
    if statistics:
        trainer.head.register_buffer("t", torch.zeros(1))
    linear, norm = trainer.model
    optimiser = torch.optim.SGD(
        [
            {"params": [*linear.parameters(), trainer.head.kernel], "weight_decay": 5e-4},
            {"params": [*norm.parameters()]},
        ],
        lr=0.1,
        momentum=0.9,
    )
    buffer = centres(*weight.shape, seed=8).to(weight.dtype)
    if momentum:
        optimiser.state[trainer.head.kernel]["momentum_buffer"] = buffer.t().clone()
    torch.save(
        {
            "epoch": 2,
            "global_step": 99,
            "pytorch-lightning_version": "1.8.6",
            "state_dict": trainer.state_dict(),
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'val_acc'}": {"best_model_score": None}},
            "optimizer_states": [optimiser.state_dict()],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {"arch": "ir_50", "head": "adaface", "m": 0.4},
        },
        path,
    )
    return buffer if momentum else None


@contextmanager
def _package(module: str, *classes: str):
    """A module of that name, and those above it, with classes to pickle."""
    names = [module[:end] for end in (*(i for i, c in enumerate(module) if c == "."), None)]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    for name in classes:
        setattr(sys.modules[module], name, type(name, (nn.Module,), {"__module__": module}))
    try:
        yield sys.modules[module]
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def _torchvision():
    """The transforms that NPT's script pickles."""
    names = ("Compose", "CenterCrop", "Normalize", "RandomHorizontalFlip", "ToTensor")
    return _package("torchvision.transforms.transforms", *names)


def of_old_lightning(path: Path) -> None:
    """Makes a file of :func:`adaface` one of Lightning before 1.5: a class is a key in it."""
    content = torch.load(path)
    with _package("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint") as module:
        content["callbacks"] = {module.ModelCheckpoint: {"monitor": "val_acc"}}
        torch.save(content, path)


def npt(path: Path, weight: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _torchvision() as transforms:
        compose = transforms.Compose()
        compose.transforms = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        torch.save(
            {
                "train_trans": compose,
                "val_trans": transforms.CenterCrop(),
                "num_classes": len(weight),
                "model_name": "resnet",
                "Param": {"lr": 0.1, "top_k": 2},
                "epoch": 1,
                "weight": nn.DataParallel(_backbone()).state_dict(),
                "optim_state": {"state": {}, "param_groups": []},
                "sch_state": {"last_epoch": 1},
                "head_fc": nn.Parameter(weight.clone()),
            },
            path,
        )


def pml(path: Path, weight: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(OrderedDict(W=weight.t().clone()), path)


def wespeaker(path: Path, weight: Tensor, ddp: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    model = _backbone()
    model.add_module("projection", _module(weight=weight.clone()))
    state = model.state_dict()
    torch.save({("module." if ddp else "") + key: value for key, value in state.items()}, path)
