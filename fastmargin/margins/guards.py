"""Adding an angle to a cosine, and guards for theta + m outside [0, pi].

Written for autograd, as the specification of the kernels' closed forms. The field has no common
names for the guards; here they are called (``theta`` the angle, ``m`` the margin, both in radians):

- ``none``: ``cos(theta + m)``, which rises again past pi (insightface, CVLface, KappaFace,
  ElasticFace)
- ``clip``: ``cos(clip(theta + m, eps, pi - eps))``, zero gradient outside (AdaFace's repository)
- ``mm``: past pi ``cos(theta) - m*sin(m)``; discontinuous (HuangYG, TFace,
  pytorch-metric-learning, speechbrain)
- ``mmm``: past pi ``cos(theta) - 1 + cos(m)``; continuous (wespeaker, 3D-Speaker)
- ``easy``: the margin only where ``cos(theta) > 0``, else ``cos(theta)`` (MagFace, MV-Softmax)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def add_angle(
    cos: Tensor, m: Tensor, guard: str, grad: str, cos_eps: float = 0.0, angle_eps: float = 0.0
) -> Tensor:
    """``cos(theta + m)`` with a guard, (B,); cos and m (radians) are (B,).

    Args:
        guard: one of ``spec.GUARDS``, see above.
        grad: "straight_through" sets the derivative with respect to ``cos`` to 1 (insightface since
            2022); "exact" keeps the true one.
        cos_eps: clamps cos to ``+-(1 - cos_eps)``. angle_eps: eps of ``clip``, radians.
    """
    clamped = through = cos.clamp(-(1 - cos_eps), 1 - cos_eps)
    if grad == "straight_through":  # that of m stays
        clamped = clamped.detach()
    square = (1 - clamped) * (1 + clamped)
    # exact value of sqrt, but a bounded derivative where sin(theta) is rounding noise
    sloped = square.clamp_min(torch.finfo(cos.dtype).eps).sqrt()
    sin = square.detach().clamp_min(0).sqrt() + (sloped - sloped.detach())
    value = clamped * m.cos() - sin * m.sin()
    theta = torch.acos(clamped.detach())
    if guard == "clip":
        value = torch.where(theta + m < angle_eps, math.cos(angle_eps), value)
        value = torch.where(theta + m > math.pi - angle_eps, -math.cos(angle_eps), value)
    elif guard == "mm":
        value = torch.where(theta + m < math.pi, value, clamped - m * m.sin())
    elif guard == "mmm":
        value = torch.where(theta + m < math.pi, value, clamped - 1 + m.cos())
    elif guard == "easy":
        value = torch.where(clamped > 0, value, clamped)
    if grad == "straight_through":
        return value + (through - through.detach())
    return value
