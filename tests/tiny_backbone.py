"""A network for ``fastmargin train --backbone tiny_backbone:make``."""

from torch import nn


def make(embedding_size):
    layers = nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 4 * 4, embedding_size))


def not_a_module(embedding_size):
    return embedding_size
