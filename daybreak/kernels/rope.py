"""Rotary position embedding (Su et al. 2021): queries and keys turn by angles that grow with their place in the text.

Elements j and j + R/2 of a head are a point in a plane, R/2 planes in all, as in Hugging Face's layout. The point of
the token at place p turns by the angle a = p freq[j]:

y1 = x1 cos a - x2 sin a,   y2 = x2 cos a + x1 sin a

Elements of a head from R on pass unchanged. Backward is the same turn by -a, so nothing is kept for it.
"""

from __future__ import annotations

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
