"""Draws docs/margins.svg and docs/guards.svg: what each margin does to the target cosine."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

import fastmargin as fm
from fastmargin.spec import GUARDS

HERE = Path(__file__).parent
THETA = torch.linspace(0.001, math.pi - 0.001, 600, dtype=torch.double)
# the same drawing for the same code, and legible on light and dark pages
STYLE = {"svg.hashsalt": "fastmargin", "svg.fonttype": "none", "font.size": 10}


def psi(margin, norm=20.0):
    """Target cosine after the margin, over THETA."""
    norms = torch.full_like(THETA, norm)
    return margin(THETA.cos(), norms, torch.zeros(len(THETA), dtype=torch.int64)).detach()


def slope(margin, norm=20.0):
    """d psi / d cos over THETA."""
    cos = THETA.cos().requires_grad_()
    norms = torch.full_like(THETA, norm)
    value = margin(cos, norms, torch.zeros(len(THETA), dtype=torch.int64))
    return torch.autograd.grad(value.sum(), cos)[0]


def adaface(z):
    margin = fm.AdaFace(m=0.4, h=0.333)
    margin.batch_mean.fill_(20)
    margin.batch_std.fill_(4)
    return psi(margin, norm=20 + z * 4 / 0.333)


def kappaface(w):
    margin = fm.KappaFace(m=0.62)
    margin.bind(1, 2)
    margin.class_weights.fill_(w)
    return psi(margin)


def axes(ax, title, ylabel):
    ax.set_title(title)
    ax.set_xlabel("angle to the own centre, degrees")
    ax.set_ylabel(ylabel)
    ax.set_xlim(0, 180)
    ax.set_xticks(range(0, 181, 30))
    ax.grid(alpha=0.3)


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / name, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def draw_margins():
    degrees = THETA.rad2deg()
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    lines = {
        "no margin": THETA.cos(),
        "CosFace m=0.4": psi(fm.CosFace(0.4)),
        "ArcFace m=0.5": psi(fm.ArcFace(0.5)),
    }
    for label, value in lines.items():
        panels[0].plot(degrees, value, label=label)
    for z in (-1, 0, 1):
        panels[1].plot(
            degrees, adaface(z), label=f"z={z}" + {-1: " (low norm)", 1: " (high)"}.get(z, "")
        )
    for w in (0.2, 0.6, 1.0):
        panels[2].plot(degrees, kappaface(w), label=f"w={w}")
    titles = "CosFace and ArcFace", "AdaFace m=0.4, by norm", "KappaFace m=0.62, by class weight"
    for ax, title in zip(panels, titles, strict=True):
        axes(ax, title, "psi, the target cosine after the margin" if ax is panels[0] else "")
        ax.legend(loc="lower left")
    save(figure, "margins.svg")


def draw_guards():
    degrees = THETA.rad2deg()
    figure, (values, slopes) = plt.subplots(1, 2, figsize=(11, 4.2))
    for guard in GUARDS:
        margin = fm.ArcFace(0.5, guard=guard)
        values.plot(degrees, psi(margin), label=guard)
        slopes.plot(degrees, slope(margin), label=guard)
    slopes.axhline(1, color="black", linestyle=":", label="straight_through")
    axes(values, "ArcFace m=0.5: value by guard", "psi")
    axes(slopes, "derivative by guard", "d psi / d cos")
    slopes.set_ylim(-1, 3)
    for ax in (values, slopes):
        ax.axvline(math.degrees(math.pi - 0.5), color="grey", linewidth=0.8)
        ax.legend()
    save(figure, "guards.svg")


if __name__ == "__main__":
    with plt.rc_context(STYLE):
        draw_margins()
        draw_guards()
