"""Softmax cross-entropy over the vocabulary, with the gradient written over the logits.

loss = logsumexp(z) - z[t];  dz = (softmax(z) - onehot(t)) * scale. A negative target (-1) counts nothing. Columns
V..Vp are padding: they take no part in the softmax and get gradient zero. fp32 (or fp64) whatever the logits are.

With a soft-cap c (Gemma 2, nanochat), c tanh(z / c) takes the place of z, and dz is multiplied by 1 - tanh^2(z / c).
With a z-loss w (PaLM), dz is the gradient of loss + w logsumexp(z)^2: softmax(z) is multiplied by 1 + 2 w logsumexp(z).
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks


def classifier_temps(
    losses: Tensor, logits: Tensor, *_: object, V: int, backward: bool, softcap: float = 0.0, z_loss: float = 0.0,
    **__: object,
) -> Temps:  # fmt: skip
    rows, acc = chunk_rows(*logits.shape), acc_dtype(logits.dtype)
    wide = ([((rows, V), acc)] if softcap and backward else []) + ([] if logits.dtype == acc else [((rows, V), acc)])
    wide += [((rows, 1), acc)] if z_loss and backward else []
    return [*[((rows, 1), acc)] * 3, ((rows, 1), torch.int64), ((rows, 1), torch.bool), *wide]


@op("losses", "logits", temps=classifier_temps, adds=("logits",))
def classifier(
    losses: Tensor, logits: Tensor, targets: Tensor, scale: Tensor,
    *, V: int, backward: bool, softcap: float = 0.0, z_loss: float = 0.0, scratch: Scratch,
) -> None:  # fmt: skip
    """losses (n) of logits (n, Vp) for targets (n) int64; with `backward`, logits become d_logits.

    scale is a device scalar, 1 / valid targets of the whole step, so that summing over micro-steps gives the mean.
    softcap: 0 = none. z_loss: its weight in the gradient; losses are without it. Without `backward` the logits are left
    in an unspecified state.
    """
    temps = scratch(classifier_temps(losses, logits, V=V, backward=backward, softcap=softcap, z_loss=z_loss))
    (m_, total_, picked_, index_, ignored_), wide_ = temps[:5], temps[5:]
    slope_ = wide_.pop(0) if softcap and backward else None
    factor_ = wide_.pop() if z_loss and backward else None
    for rows in row_chunks(*logits.shape):
        n = logits[rows].shape[0]
        m, total, picked, index, ignored = m_[:n], total_[:n], picked_[:n], index_[:n], ignored_[:n]
        z = logits[rows, :V] if not wide_ else wide_[0][:n].copy_(logits[rows, :V])
        if softcap:
            z.div_(softcap).tanh_()
            if slope_ is not None:
                torch.mul(z, z, out=slope_[:n]).neg_().add_(1)
            z.mul_(softcap)
        torch.lt(targets[rows, None], 0, out=ignored)
        torch.clamp(targets[rows, None], min=0, out=index)
        torch.amax(z, 1, keepdim=True, out=m)
        z.sub_(m)
        torch.gather(z, 1, index, out=picked)
        torch.sum(z.exp_(), 1, keepdim=True, out=total)
        if factor_ is not None:
            torch.log(total, out=factor_[:n]).add_(m).mul_(2 * z_loss).add_(1)
        torch.log(total, out=m)
        losses[rows, None].copy_(m.sub_(picked).masked_fill_(ignored, 0.0))
        if not backward:
            continue
        torch.div(scale, total, out=total)
        if factor_ is not None:
            total.mul_(factor_[:n])
        z.mul_(total.masked_fill_(ignored, 0.0))
        picked.copy_(scale.expand_as(picked)).neg_().masked_fill_(ignored, 0.0)
        z.scatter_add_(1, index, picked)  # one index a row, so the order does not matter
        if slope_ is not None:
            z.mul_(slope_[:n])
        if wide_:
            logits[rows, :V].copy_(z)
        logits[rows, V:].zero_()


def cap_temps(logits: Tensor, **_: object) -> Temps:
    """Less than the classifier needs for as many rows, so that every plan has room for it."""
    acc, few = acc_dtype(logits.dtype), chunk_rows(*logits.shape) * logits.shape[1] // 4
    return [] if logits.dtype == acc else [((few,), acc)]


@op("logits", temps=cap_temps, adds=("logits",))
def cap_logits(logits: Tensor, *, cap: float, scratch: Scratch) -> None:
    """logits (r, Vp) become cap tanh(logits / cap), as `classifier` takes them: for generating."""
    wide, flat = scratch(cap_temps(logits)), logits.view(-1)
    step = len(wide[0]) if wide else len(flat)
    for start in range(0, len(flat), step):
        z = flat[start : start + step]
        z.copy_((wide[0][: len(z)].copy_(z) if wide else z).div_(cap).tanh_().mul_(cap))


def sum_temps(total: Tensor, losses: Tensor, *_: object, **__: object) -> Temps:
    return [(tuple(losses.shape), total.dtype), ((), total.dtype)]


@op("total", temps=sum_temps)
def loss_sum(total: Tensor, losses: Tensor, scale: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """total (scalar, fp64) = sum(losses) * scale, added to it if `accumulate`: the step's mean loss so far."""
    wide, part = scratch(sum_temps(total, losses))
    torch.sum(wide.copy_(losses), 0, out=part).mul_(scale)
    if accumulate:
        total.add_(part)
    else:
        total.copy_(part)
