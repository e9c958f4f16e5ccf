"""LoRA (Hu et al. 2021): a linear layer whose frozen weight has an adapter, two narrow matrices of rank r.

y = x w^T + scale (x a^T) b^T, with a (r, I), b (O, r) and, for each row of x, u = a x in between. With the gradient dy:

du = scale dy b,  db = scale dy^T u,  da = du^T x,  dx = dy w + du a

A packed layer, such as queries, keys and values in one matrix, has one adapter for each of its parts. Their a lie one
below the other, and so do their b. `columns` says where each part's outputs are in y, first and last + 1:

    x (n, I) -> u = | u of q | u of v |  (n, 2 r)      columns = ((0, 8), (12, 16))
                        |         |                    between them k has no adapter
    y        += | b of q     | k | b of v  |

The matmuls with w are the layer's own (matmul.py). All sums are in fp32 or wider, and rounded once into y, u or du.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import op

Columns = tuple[tuple[int, int], ...]


def each_part(y: Tensor, u: Tensor, b: Tensor, columns: Columns) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each part: its columns of y (n, O) and of u (n, r parts), and its rows of b (all parts' outputs, r)."""
    at, r = 0, b.shape[1]
    for i, (first, stop) in enumerate(columns):
        yield y[:, first:stop], u[:, i * r : i * r + r], b[at : at + stop - first]
        at += stop - first


def _flops(given: Mapping[str, Any]) -> int:
    return int(2 * given["u"].shape[0] * given["b"].numel())


def _all_flops(given: Mapping[str, Any]) -> int:
    return _flops(given) + int(2 * given["x"].shape[0] * given["a"].numel())


@op("y", "u", adds=("y",), flops=_all_flops)
def lora_forward(y: Tensor, u: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scale: float, columns: Columns) -> None:
    """u (n, r parts) = x (n, I) @ a (r parts, I)^T; y (n, O) += scale u @ b^T, in the columns of each part."""
    torch.mm(x, a.t(), out=u)
    for out, u_part, b_part in each_part(y, u, b, columns):
        out.addmm_(u_part, b_part.t(), alpha=scale)


@op("du", "db", adds=("db",), flops=lambda given: 2 * _flops(given))
def lora_backward(
    du: Tensor, db: Tensor, dy: Tensor, u: Tensor, b: Tensor, *, scale: float, columns: Columns, accumulate: bool
) -> None:
    """du (n, r parts) = scale dy @ b; db (as b) = scale dy^T @ u, added to db if `accumulate`."""
    beta = 1 if accumulate else 0  # with 0 the old values are not read, NaN or not
    for (grad, du_part, b_part), (_, u_part, db_part) in zip(
        each_part(dy, du, b, columns), each_part(dy, u, db, columns), strict=True
    ):
        torch.addmm(du_part, grad, b_part, beta=0, alpha=scale, out=du_part)
        db_part.addmm_(grad.t(), u_part, beta=beta, alpha=scale)


@op("dx", adds=("dx",), flops=lambda given: int(2 * given["du"].shape[0] * given["a"].numel()))
def lora_backward_input(dx: Tensor, du: Tensor, a: Tensor) -> None:
    """dx (n, I) += du (n, r parts) @ a (r parts, I)."""
    dx.addmm_(du, a)


@op("da", adds=("da",), flops=lambda given: int(2 * given["du"].shape[0] * given["da"].numel()))
def lora_backward_weight(da: Tensor, du: Tensor, x: Tensor, *, accumulate: bool) -> None:
    """da (r parts, I) = du (n, r parts)^T @ x (n, I), added to da if `accumulate`."""
    da.addmm_(du.t(), x, beta=1 if accumulate else 0)
