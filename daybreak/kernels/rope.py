"""Rotary position embedding (Su et al. 2021): queries and keys turn by angles that grow with their place in the text.

Elements j and j + R/2 of a head are a point in a plane, R/2 planes in all, as in Hugging Face's layout. The point of
the token at place p turns by the angle a = p freq[j]:

y1 = x1 cos a - x2 sin a,   y2 = x2 cos a + x1 sin a

Elements of a head from R on pass unchanged. Backward is the same turn by -a, so nothing is kept for it.

With QK-norm, `rope_norm_forward` also divides a head by its root mean square, in the same pass: y = turn(x) r with
r = 1 / sqrt(mean(x^2) + eps). A turn keeps the root of the mean square, so the order of both is of no account, and the
result is rounded once. Backward, with g = dy turned back and xhat = x r:  dx = r (g - xhat mean(g xhat)).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, acc_dtype, chunk_rows, op, row_chunks


def rope_temps(x: Tensor, freq: Tensor, positions: Tensor | None = None, **_: object) -> Temps:
    places, half, acc = max(x.shape[1], 1 if positions is None else x.shape[0]), freq.numel(), acc_dtype(x.dtype)
    chunk = ((chunk_rows(places, x.shape[2] * half), x.shape[2], half), acc)
    return [((places,), acc), ((half,), acc), *[((places, 1, half), acc)] * 2, *[chunk] * 4]


@op("x", temps=rope_temps, adds=("x",))
def rope(
    x: Tensor, freq: Tensor, positions: Tensor | None = None,
    *, attention: float = 1.0, back: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """Turn x (B, T, heads, HS) in place; it may be strided. freq (R/2) fp32: radians from a token to the next one.

    positions (B) int64 are the places of the rows of T = 1; without them, token t of each row is at place t.
    `attention` multiplies sines and cosines. `back` turns the other way: the gradient. Angles are in fp32 or wider.
    """
    place, wide, cos, sin, *chunks = scratch(rope_temps(x, freq, positions))
    if positions is None:
        torch.arange(len(place), out=place)
    else:
        place.copy_(positions)
        x = x.transpose(0, 1)
    half = freq.numel()
    torch.mul(place[:, None, None], wide.copy_(freq), out=cos)
    torch.sin(cos, out=sin).mul_(-attention if back else attention)
    cos.cos_().mul_(attention)
    for row in x:
        for rows in row_chunks(len(row), row.shape[1] * half):
            first, second, c, s = row[rows, :, :half], row[rows, :, half : 2 * half], cos[rows], sin[rows]
            x1, x2, y1, y2 = (chunk[: len(first)] for chunk in chunks)
            x1.copy_(first)
            x2.copy_(second)
            first.copy_(torch.mul(x1, c, out=y1).sub_(torch.mul(x2, s, out=y2)))
            second.copy_(torch.mul(x2, c, out=y2).add_(x1.mul_(s)))


def rope_norm_temps(y: Tensor, x: Tensor, freq: Tensor, *_: object, **__: object) -> Temps:
    (n, heads, HS), half, acc = x.shape, freq.numel(), acc_dtype(x.dtype)
    rows = chunk_rows(n, heads * HS)
    angles = [((rows,), acc), ((half,), acc), *[((rows, 1, half), acc)] * 2]
    return [*angles, *[((rows, heads, half), acc)] * 5, *[((rows, heads, 1), acc)] * 3]


def _some(
    x: Tensor, freq: Tensor, positions: Tensor | None, T: int, buffers: list[Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor]]]:
    """Some of the tokens at a time: which, the cosines and sines (r, 1, half) of their places, and room for halves of
    their heads."""
    place, wide, cosines, sines, *room = buffers
    wide.copy_(freq)
    for rows in row_chunks(len(x), x[0].numel()):
        at, cos, sin, *parts = (z[: len(x[rows])] for z in (place, cosines, sines, *room))
        if positions is None:
            torch.arange(rows.start, rows.stop, out=at).remainder_(T)
        else:
            at.copy_(positions[rows])
        torch.mul(at[:, None, None], wide, out=cos)
        torch.sin(cos, out=sin)
        yield rows, cos.cos_(), sin, parts


def _mean(mean: Tensor, part: Tensor, product: Tensor, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
    """The mean (r, heads, 1) of the products of x and y, which are two halves of heads each."""
    torch.sum(torch.mul(x[0], y[0], out=product), -1, keepdim=True, out=mean)
    torch.sum(torch.mul(x[1], y[1], out=product), -1, keepdim=True, out=part)
    return mean.add_(part).div_(2 * product.shape[-1])


@op("out", temps=rope_norm_temps)
def rope_norm_forward(
    out: Tensor, x: Tensor, freq: Tensor, positions: Tensor | None = None, *, T: int, eps: float, scratch: Scratch
) -> None:
    """out (n, heads, HS) = the heads x (n, heads, HS), turned and divided by their root mean squares, rounded once.

    Tokens may lie apart. freq (HS/2) fp32. Token i is at place i % T, or positions[i] if positions (n) are given."""
    half = freq.numel()
    for rows, u, v, parts in _some(x, freq, positions, T, scratch(rope_norm_temps(out, x, freq))):
        x1, x2, y1, y2, t, r, part, _ = parts
        x1.copy_(x[rows, :, :half])
        x2.copy_(x[rows, :, half:])
        torch.rsqrt(_mean(r, part, t, (x1, x2), (x1, x2)).add_(eps), out=r)
        torch.mul(x1, u, out=y1).sub_(torch.mul(x2, v, out=t))
        torch.mul(x2, u, out=y2).add_(x1.mul_(v))
        out[rows, :, :half].copy_(y1.mul_(r))
        out[rows, :, half:].copy_(y2.mul_(r))


@op("d", temps=rope_norm_temps, adds=("d",))
def rope_norm_backward(
    d: Tensor, x: Tensor, freq: Tensor, positions: Tensor | None = None, *, T: int, eps: float, scratch: Scratch
) -> None:
    """d (n, heads, HS), the gradient of the output, becomes that of x in place. Tokens of both may lie apart."""
    half = freq.numel()
    for rows, u, v, parts in _some(x, freq, positions, T, scratch(rope_norm_temps(d, x, freq))):
        x1, x2, g1, g2, t, r, part, c = parts
        x1.copy_(d[rows, :, :half])  # first they hold the gradient
        x2.copy_(d[rows, :, half:])
        torch.mul(x1, u, out=g1).add_(torch.mul(x2, v, out=t))
        torch.mul(x2, u, out=g2).sub_(x1.mul_(v))
        x1.copy_(x[rows, :, :half])
        x2.copy_(x[rows, :, half:])
        torch.rsqrt(_mean(r, part, t, (x1, x2), (x1, x2)).add_(eps), out=r)
        x1.mul_(r)
        x2.mul_(r)
        _mean(c, part, t, (g1, g2), (x1, x2))
        d[rows, :, :half].copy_(g1.sub_(x1.mul_(c)).mul_(r))
        d[rows, :, half:].copy_(g2.sub_(x2.mul_(c)).mul_(r))
