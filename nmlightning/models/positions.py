"""Where in its sentence a token is, as a vector (Vaswani et al. 2017, section 3.5)."""

import math

import torch
from torch import Tensor

LONGEST_WAVE = 10_000  # in units of 2π positions


def sinusoids(first: int, last: int, width: int, device: torch.device) -> Tensor:
    """Return the vectors of the positions `first` … `last` − 1, (last − first, width) float32.

        p[t, 2i] = sin(t · 10000^(−2i / width)),    p[t, 2i + 1] = cos(t · 10000^(−2i / width))

    They are computed where they are needed: there is no longest sentence, and nothing that half
    precision could round before the sine is taken. https://arxiv.org/abs/1706.03762
    """
    positions = torch.arange(first, last, device=device, dtype=torch.float32)
    even = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    angles = positions[:, None] * torch.exp(even * (-math.log(LONGEST_WAVE) / width))
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)
