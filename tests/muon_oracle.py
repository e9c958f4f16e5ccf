"""Muon written out plainly, in fp64 and by singular values, to hold the engine's against. It imports nothing of ours.

Sources: Nesterov momentum and the scale by shape (Jordan et al. 2024), Polar Express (arXiv 2505.16932, algorithm 1 for
five steps with cushion and safety), rows of one norm (arXiv 2603.28254), the norm of an orthogonal matrix
(arXiv 2602.21545), the second moment (arXiv 2510.05491), cautious weight decay (arXiv 2510.12402).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

POLYNOMIALS = (  # of the paper's appendix: x -> a x + b x^3 + c x^5
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def strengths(s: Tensor) -> Tensor:
    """Singular values after the five steps."""
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    return s


def rows_alike(u: Tensor) -> Tensor:
    """u (r, c) with rows of their mean norm, and of norm 1 / 1.01 as a whole."""
    mean = u.norm() / math.sqrt(len(u))
    x = u * torch.stack([mean / row.norm() if row.norm() > 0 else row.norm() for row in u])[:, None]
    return x / (1.01 * mean * math.sqrt(len(u)))


def orthogonal(x: Tensor) -> Tensor:
    """x with all singular values near 1."""
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    return left @ torch.diag(strengths(s)) @ right


def rescaled(o: Tensor, second: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """o with the norm of an orthogonal matrix, each row (or column, if there are more) over the root of its second
    moment, and the same norm again; and the new second moment."""
    r, c = o.shape
    o = o * (math.sqrt(min(r, c)) / o.norm())
    along = 1 if r >= c else 0
    second = beta2 * second + (1 - beta2) * (o * o).mean(along)
    scaled = o / second.sqrt().unsqueeze(along)
    return scaled * (o.norm() / scaled.norm()), second


class Muon:
    """params: weights by name. sizes: the rows of each matrix of those that are several in one."""

    def __init__(
        self, params: dict[str, Tensor], sizes: Mapping[str, Sequence[int]], *, beta2: float, weight_decay: float
    ) -> None:
        self.params, self.sizes, self.beta2, self.weight_decay = params, sizes, beta2, weight_decay
        self.momentum = {name: torch.zeros_like(p) for name, p in params.items()}
        self.second: dict[str, list[Tensor]] = {
            name: [p.new_zeros(max(rows, p.shape[1])) for rows in sizes.get(name, [len(p)])]
            for name, p in params.items()
        }

    def step(self, grads: Mapping[str, Tensor], lr: float, mu: float) -> None:
        """Update the parameters in place. grads: clipped. mu: the momentum of this step."""
        for name, p in self.params.items():
            m = self.momentum[name]
            m.copy_(mu * m + (1 - mu) * grads[name])
            nesterov = mu * m + (1 - mu) * grads[name]
            at = 0
            for i, rows in enumerate(self.sizes.get(name, [len(p)])):
                part = slice(at, at + rows)
                at += rows
                o = orthogonal(rows_alike(nesterov[part]))
                u, self.second[name][i] = rescaled(o, self.second[name][i], self.beta2)
                decay = self.weight_decay * p[part] * (u * p[part] >= 0)
                p[part] -= lr * math.sqrt(max(1.0, rows / p.shape[1])) * (u + decay)
