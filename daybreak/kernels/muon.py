"""The element-wise parts of Muon's update of matrices. optimizers/muon.py has the whole update, in order.

muon_momentum   M = mu M + (1 - mu) g;  U = (1 - mu) g + mu M;  X = U, each row divided by its norm and by 1.01 sqrt(r)
muon_sums       s = the sums of squares of each row of X, or of each column where these are more
muon_update     v = b2 v + (1 - b2) s / sum(s);  f = v^-1/2 sqrt(min(r, c) / sum(s / v))
                u = f X;  p -= lr sqrt(max(1, r / c)) (u + wd p [u p >= 0])

g, M, p are of one matrix (r, c). X begins as U, and has become nearly orthogonal before muon_sums. Momentum is
Nesterov's. Rows of one norm are MuonEq's (arXiv 2603.28254). Their matrix has the norm 1 / 1.01, so no singular value
is above that. s and v are NorMuon's (arXiv 2510.05491): one value for each row of a tall or square matrix, and for each
column of a wide one. f gives u the norm of an orthogonal matrix, sqrt(min(r, c)). The bracket is 1 or 0: weight decay
is cautious (arXiv 2510.12402), and acts only where the update makes the weight smaller too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks
from daybreak.kernels.optimizer import close_exact, layout_temps, open_exact, read_too, scaled

ABOVE = 1.01  # singular values start this factor below 1
LEAST = 1e-30  # of sums of squares: a row of zeros stays zero
LEAST_SECOND = 1e-10  # of the second moment


def momentum_temps(x: Tensor, momentum: Tensor, *_: object) -> Temps:
    """A chunk of rows, and their norms."""
    r, c = x.shape
    n = chunk_rows(r, c)
    return [((n, c), momentum.dtype), ((n, 1), momentum.dtype)]


@op("x", "momentum", temps=momentum_temps, adds=("momentum",))
def muon_momentum(
    x: Tensor, momentum: Tensor, grads: Tensor, stats: Tensor, hyper: Tensor, *, scratch: Scratch
) -> None:
    """x (r, c, compute dtype) and momentum (r, c, fp32 or fp64), from grads (r, c). See the top of the file.

    stats: as for AdamW. A skipped update leaves momentum, and x as it happens to be. hyper[3] is mu."""
    if stats[3].item() != 0.0:
        return
    wide, norms = scratch(momentum_temps(x, momentum))
    mu, (r, c) = hyper[3].item(), x.shape
    for rows in row_chunks(r, c):
        n = rows.stop - rows.start
        g, m = scaled(wide[:n], grads[rows], stats), momentum[rows]
        m.lerp_(g, 1.0 - mu)
        torch.linalg.vector_norm(g.lerp_(m, mu), dim=1, keepdim=True, out=norms[:n])
        g.div_(norms[:n].clamp_(min=math.sqrt(LEAST)).mul_(ABOVE * math.sqrt(r)))
        x[rows].copy_(g)


def sums_temps(sums: Tensor, x: Tensor) -> Temps:
    """A chunk of rows, and its sums."""
    _, r, c = x.shape
    n = chunk_rows(r, c)
    return [((n, c), sums.dtype), ((max(n, c),), sums.dtype)]


@op("sums", temps=sums_temps)
def muon_sums(sums: Tensor, x: Tensor, *, scratch: Scratch) -> None:
    """sums (n, max(r, c), fp32 or fp64) = the sums of squares of rows of x (n, r, c), or of columns if c is above r."""
    wide, part = scratch(sums_temps(sums, x))
    n, r, c = x.shape
    for i in range(n):
        for rows in row_chunks(r, c):
            square = torch.square(wide[: rows.stop - rows.start].copy_(x[i, rows]), out=wide[: rows.stop - rows.start])
            if r >= c:
                torch.sum(square, 1, out=sums[i, rows])
            elif rows.start:
                sums[i].add_(torch.sum(square, 0, out=part[:c]))
            else:
                torch.sum(square, 0, out=sums[i])


def update_temps(weights: Tensor, masters: Tensor | None, second: Tensor, sums: Tensor, x: Tensor, *_: object,
                 **__: object) -> Temps:  # fmt: skip
    """A chunk of u, which entries decay, and decay; the values for rounding; v^-1/2 and what it is made of."""
    r, c = x.shape
    N, acc = chunk_rows(r, c) * c, acc_dtype(weights.dtype)
    values = [((N,), acc), ((N,), torch.bool), ((N,), acc), (second.shape, acc), (second.shape, acc)]
    return [*values, *layout_temps(weights, masters, acc, N)]


@op("weights", "masters", "second", "sums", temps=update_temps, adds=lambda given: (*read_too(given), "second", "sums"))
def muon_update(
    weights: Tensor, masters: Tensor | None, second: Tensor, sums: Tensor, x: Tensor, stats: Tensor, hyper: Tensor,
    *, beta2: float, weight_decay: float, seed: int, offset: int, scratch: Scratch,
) -> None:  # fmt: skip
    """Update one matrix: weights and masters (r c), as AdamW's are kept, and second (max(r, c)), from x (r, c).

    sums (max(r, c)): from `muon_sums`, and then f. stats, hyper, seed, offset: as for AdamW. hyper[4] is a factor of
    weight_decay.
    """
    if stats[3].item() != 0.0:
        return
    u_, decays_, decay_, root, squares, *temps = scratch(update_temps(weights, masters, second, sums, x))
    (r, c), lr = x.shape, hyper[0].item()
    weight_decay *= hyper[4].item()
    lr *= math.sqrt(max(1.0, r / c))
    total = sums.sum().clamp_(min=LEAST)
    second.lerp_(torch.div(sums, total, out=squares), 1.0 - beta2)
    torch.rsqrt(root.copy_(second).clamp_(min=LEAST_SECOND), out=root)
    now = torch.mul(sums, root, out=squares).mul_(root).sum().clamp_(min=LEAST)
    torch.mul(root, (min(r, c) / now).sqrt(), out=sums)
    factor = sums.view(-1, 1) if r >= c else sums.view(1, -1).expand(r, c)
    for rows in row_chunks(r, c):
        part = slice(rows.start * c, rows.stop * c)
        u, decays, decay = (t[: part.stop - part.start] for t in (u_, decays_, decay_))
        u.view(-1, c).copy_(x[rows]).mul_(factor[rows])
        p = open_exact(weights, masters, part, temps)
        torch.ge(torch.mul(u, p, out=decay), 0.0, out=decays)
        u.add_(torch.mul(p, decays, out=decay), alpha=weight_decay)
        p.add_(u, alpha=-lr)
        close_exact(weights, masters, part, p, temps, offset, seed, hyper)
