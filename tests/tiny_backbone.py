"""A network for ``fastmargin train --backbone tiny_backbone:make``."""

from torch import nn


def make(embedding_size):
    layers = nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 4 * 4, embedding_size))


def not_a_module(embedding_size):
    return embedding_size


def without_parameters(embedding_size):
    return nn.Flatten()


def frozen(embedding_size):
    return make(embedding_size).requires_grad_(False)


def with_dropout(embedding_size):
    return nn.Sequential(nn.Dropout(0.3), make(embedding_size))


def without_norms(embedding_size):
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 4, 2), nn.Flatten(), nn.Linear(8 * 4 * 4, embedding_size)
    )


def takes_nothing():
    return nn.Flatten()


def of_16(embedding_size):
    return make(16)
