"""Embedding forward, and a backward without atomics. The tokens alone decide the order of its sums.

Row v of dwte is the sum of the rows of dout at the places where token v occurs. Backward sorts the places of the batch
by token, so that equal tokens become one run. Then it adds up the runs:

    tokens   5 2 5 7 5 2                                places 0 1 2 3 4 5 in the batch
    sorted   2 2 | 5 5 | 5 7                            chunks of CHUNK places, here 2
    places   1 5 | 0 2 | 4 3
    sums     dwte[2] += 1 + 5     a run inside one chunk goes to dwte directly
             tail[1]  = 0 + 2     the run of 5 begins in chunk 1 and continues in the next chunk
             head[2]  = 4         the run of 5 came from the chunk before
             dwte[7] += 3
             dwte[5] += tail[1] + head[2]               added by a second kernel

One program of `_runs_kernel` adds up one chunk in fp32, so many programs share a very frequent token. A program of
`_long_runs_kernel` adds the partial sums of the run that begins in its chunk. Each row of dwte is rounded once.

The sort is a radix sort with the least significant digit first. A digit has DIGIT_BITS bits, so GPT-2's vocabulary
needs two passes. Each pass has two kernels. The first counts how often each digit occurs in each block of SORT_BLOCK
keys. The second moves every key to its new place:

    new place = number of keys with a smaller digit
              + number of keys with the same digit in earlier blocks
              + number of keys with the same digit before it in its own block

Keys with equal digits keep their order. So each pass keeps the order of the pass before, and equal tokens stay in the
order of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import tl, triton

MAX_COLS = 2048  # of one program of forward
SORT_BLOCK, SORT_WARPS = 512, 8  # keys of one program of the sort, and its warps
DIGIT_BITS = 8
CHUNK = 32  # sorted places whose rows one program adds up
RUN_COLS = 256  # columns of one program of one warp: 16 bytes of bf16 a thread
PARTS = 16  # partial sums, or rows of the table of counts, that are read at a time
POSITION_ROWS, POSITION_COLS = 8, 1024


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def _forward_kernel(
    out, tokens, positions, wte, wpe, T, C,
    GIVEN: tl.constexpr, PLACED: tl.constexpr, SCALE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row of out. Its position is its place in a sequence of T, or is read from `positions` if GIVEN.
    Without PLACED there is no wpe.

    The cache hints keep rows of wte and wpe, which are read again, but not out.
    """
    t, b = tl.program_id(0), tl.program_id(1)
    row = b * T + t
    place = t.to(tl.int64)
    if GIVEN:
        place = tl.load(positions + row)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    mask = cols < C
    x = tl.load(wte + tl.load(tokens + row) * C + cols, mask=mask, other=0.0, eviction_policy="evict_last")
    x = x.to(tl.float32) * SCALE
    if PLACED:
        p = tl.load(wpe + place * C + cols, mask=mask, other=0.0, eviction_policy="evict_last")
        x += p.to(tl.float32)
    tl.store(out + row.to(tl.int64) * C + cols, x.to(out.dtype.element_ty), mask=mask, cache_modifier=".cs")


def _forward_launch(C: int) -> tuple[int, int]:
    """Columns and warps of one program of forward: a thread has at most 16 values."""
    cols = min(triton.next_power_of_2(C), MAX_COLS)
    return cols, max(cols // 512, 1)


def _forward(
    out: Tensor, tokens: Tensor, positions: Tensor | None, wte: Tensor, wpe: Tensor | None, scale: float
) -> None:
    T, C = tokens.shape[-1], out.shape[1]
    cols, warps = _forward_launch(C)
    _forward_kernel[(T, out.shape[0] // T, triton.cdiv(C, cols))](
        out, tokens, tokens if positions is None else positions, wte, wte if wpe is None else wpe, T, C,
        GIVEN=positions is not None, PLACED=wpe is not None, SCALE=scale, COLS=cols, num_warps=warps,
    )  # fmt: skip


@backend("triton")
def embedding_forward(out: Tensor, tokens: Tensor, wte: Tensor, wpe: Tensor | None, *, scale: float = 1.0) -> None:
    """out (B*T, C) = scale * wte[tokens] + wpe[:T], if given; tokens (B <= 65,535, T) int64; in fp32, rounded once."""
    _forward(out, tokens, None, wte, wpe, scale)


@backend("triton")
def embedding_decode(
    out: Tensor, tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor | None, *, scale: float = 1.0
) -> None:
    """out (b, C) = scale * wte[tokens] + wpe[positions] for tokens, positions (b) int64; in fp32, rounded once."""
    _forward(out, tokens, positions, wte, wpe, scale)


# --------------------------------------------------------------------------------------------- backward: the positions


@triton.jit
def _positions_kernel(
    dwpe, dout, B, T, C,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dwpe[t] = or += the sum over b of dout[b T + t]. Rows from t = T on get zero: no token was there."""
    t = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = cols < C
    acc = tl.zeros((COLS,), tl.float32)
    for start in range(0, tl.where(t < T, B, 0), ROWS):
        b = start + tl.arange(0, ROWS)
        at = (b.to(tl.int64) * T + t)[:, None] * C + cols[None, :]
        acc += tl.sum(tl.load(dout + at, mask=(b < B)[:, None] & mask[None, :], other=0.0).to(tl.float32), 0)
    here = dwpe + t.to(tl.int64) * C + cols
    if ACCUMULATE:
        acc += tl.load(here, mask=mask, other=0.0).to(tl.float32)
    tl.store(here, acc.to(dwpe.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------------------- backward: the sort


@triton.jit
def _digit_counts_kernel(table, keys, n, SHIFT: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """table[block] (DIGITS) = how often each digit occurs among the keys of this block: first half of a pass."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    digit = (tl.load(keys + at, mask=at < n, other=0).to(tl.int32) >> SHIFT) & (DIGITS - 1)
    counts = tl.histogram(digit, DIGITS, mask=at < n)
    tl.store(table + block * DIGITS + tl.arange(0, DIGITS), counts)


@triton.jit
def _scatter_kernel(
    keys_out, rows_out, keys, rows, table, n, blocks,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr, TABLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Second half of a pass: move the keys of one block, and their rows, to their new places (see the module).

    FIRST: in the first pass the row of a key is its place in the batch.
    """
    block = tl.program_id(0)
    digits = tl.arange(0, DIGITS)
    total = tl.zeros((DIGITS,), tl.int32)
    before = tl.zeros((DIGITS,), tl.int32)
    for start in range(0, blocks, TABLE_ROWS):
        r = start + tl.arange(0, TABLE_ROWS)
        counts = tl.load(table + r[:, None] * DIGITS + digits[None, :], mask=(r < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((r < block)[:, None], counts, 0), 0)
    base = tl.cumsum(total, 0) - total + before  # keys of smaller digits, and of the same digit in earlier blocks
    start = block * BLOCK
    lanes = tl.arange(0, BLOCK)
    at = start + lanes
    mask = at < n
    key = tl.load(keys + at, mask=mask, other=0).to(tl.int32)
    digit = (key >> SHIFT) & (DIGITS - 1)
    rank = tl.zeros((BLOCK,), tl.int32)
    for j in range(tl.minimum(BLOCK, n - start)):
        other = (tl.load(keys + start + j).to(tl.int32) >> SHIFT) & (DIGITS - 1)
        rank += ((digit == other) & (j < lanes)).to(tl.int32)
    to = tl.gather(base, digit, 0) + rank
    row = at
    if not FIRST:
        row = tl.load(rows + at, mask=mask, other=0)
    tl.store(keys_out + to, key, mask=mask)
    tl.store(rows_out + to, row, mask=mask)


def _sort(tokens: Tensor, pairs: list[Tensor], table: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """The tokens (n) < V in ascending order, and the place of each in the batch (see the module).

    pairs: keys and rows, twice. Passes alternate between the two pairs, and the result is the pair written last.
    """
    n, blocks = tokens.numel(), table.shape[0]
    keys, rows = tokens, pairs[0]
    for turn, shift in enumerate(range(0, max(1, (V - 1).bit_length()), DIGIT_BITS)):
        _digit_counts_kernel[(blocks,)](
            table, keys, n, SHIFT=shift, DIGITS=1 << DIGIT_BITS, BLOCK=SORT_BLOCK, num_warps=SORT_WARPS
        )
        keys_out, rows_out = pairs[2 * (turn % 2)], pairs[2 * (turn % 2) + 1]
        _scatter_kernel[(blocks,)](
            keys_out, rows_out, keys, rows, table, n, blocks, FIRST=turn == 0,
            SHIFT=shift, DIGITS=1 << DIGIT_BITS, BLOCK=SORT_BLOCK, TABLE_ROWS=PARTS, num_warps=SORT_WARPS,
        )  # fmt: skip
        keys, rows = keys_out, rows_out
    return keys, rows


# -------------------------------------------------------------------------------------------------- backward: the sums


@triton.jit
def _runs_kernel(
    dwte, part, keys, rows, dout, n, chunks, C, SCALE: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr
):
    """The sums of one chunk of the sorted list. part (2, chunks, C) in fp32 holds the partial sums.

    part[0] (head) is for a run that came from the chunk before, even if it fills this chunk and continues. part[1]
    (tail) is for a run that began here and continues in the next chunk. Rows are loaded ahead of their addition.
    """
    chunk = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = cols < C
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, n)
    head = part + chunk.to(tl.int64) * C + cols
    tail = part + (chunks + chunk).to(tl.int64) * C + cols
    key = tl.load(keys + first)
    came = (tl.load(keys + first - 1, mask=first > 0, other=-1) == key).to(tl.int32)
    acc = tl.zeros((COLS,), tl.float32)
    following = tl.load(dout + tl.load(rows + first).to(tl.int64) * C + cols, mask=mask, other=0.0)
    row = tl.load(rows + first + 1, mask=first + 1 < last, other=0)
    for p in range(first, last):
        acc += following.to(tl.float32)
        following = tl.load(dout + row.to(tl.int64) * C + cols, mask=mask & (p + 1 < last), other=0.0)
        row = tl.load(rows + p + 2, mask=p + 2 < last, other=0)
        after = tl.load(keys + p + 1, mask=p + 1 < n, other=-1)
        if after != key:
            if came != 0:
                tl.store(head, acc, mask=mask)
            else:
                here = dwte + key.to(tl.int64) * C + cols
                old = tl.load(here, mask=mask, other=0.0).to(tl.float32)
                tl.store(here, (old + acc * SCALE).to(dwte.dtype.element_ty), mask=mask)
        ended = after != key
        acc = tl.where(ended, 0.0, acc)
        came = tl.where(ended, 0, came)
        key = after
    if tl.load(keys + last, mask=last < n, other=-1) == tl.load(keys + last - 1):
        if came != 0:
            tl.store(head, acc, mask=mask)
        else:
            tl.store(tail, acc, mask=mask)


@triton.jit
def _long_runs_kernel(
    dwte, part, keys, n, chunks, C,
    SCALE: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of the run that begins in this chunk and ends in a later one, if there is one."""
    chunk = tl.program_id(0)
    first, last = chunk * CHUNK, (chunk + 1) * CHUNK
    key = tl.load(keys + last - 1, mask=last < n, other=-2)
    continues = tl.load(keys + last, mask=last < n, other=-1) == key
    begins = tl.load(keys + first - 1, mask=first > 0, other=-1) != key
    if continues & begins:
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        mask = cols < C
        acc = tl.zeros((PARTS, COLS), tl.float32)
        start = chunk + 1
        more = 1
        while more > 0:
            k = start + tl.arange(0, PARTS)
            same = tl.load(keys + k * CHUNK, mask=k < chunks, other=-1) == key
            at = k.to(tl.int64)[:, None] * C + cols[None, :]
            acc += tl.load(part + at, mask=same[:, None] & mask[None, :], other=0.0)
            more = tl.min(same.to(tl.int32), 0)
            start += PARTS
        total = tl.load(part + (chunks + chunk).to(tl.int64) * C + cols, mask=mask, other=0.0) + tl.sum(acc, 0)
        here = dwte + key.to(tl.int64) * C + cols
        old = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        tl.store(here, (old + total * SCALE).to(dwte.dtype.element_ty), mask=mask)


def backward_temps(dwte: Tensor | None, dwpe: Tensor | None, dout: Tensor, *_: object, **__: object) -> Temps:
    """Sorted tokens and their places in the batch, twice; the counts of digits; the partial sums of the chunks."""
    n, C = dout.shape
    table = ((triton.cdiv(n, SORT_BLOCK), 1 << DIGIT_BITS), torch.int32)
    return [*[((n,), torch.int32)] * 4, table, ((2, triton.cdiv(n, CHUNK), C), torch.float32)]


@backend("triton", temps=backward_temps)
def embedding_backward(
    dwte: Tensor | None, dwpe: Tensor | None, dout: Tensor, tokens: Tensor,
    *, accumulate: bool, tied: bool = True, scale: float = 1.0, scratch: Scratch,
) -> None:  # fmt: skip
    """dwte (Vp, C) += scale * the rows of dout (B*T, C) by `tokens` (B, T), or = if neither `tied` nor `accumulate`;
    dwpe[:T] = or += their sum over B."""
    (B, T), (n, C) = tokens.shape, dout.shape
    *pairs, table, part = scratch(backward_temps(dwte, dwpe, dout))
    cols = min(triton.next_power_of_2(C), POSITION_COLS)
    if dwpe is not None:
        _positions_kernel[(T if accumulate else dwpe.shape[0], triton.cdiv(C, cols))](
            dwpe, dout, B, T, C, ACCUMULATE=accumulate, ROWS=POSITION_ROWS, COLS=cols, num_warps=max(cols // 256, 1)
        )
    if dwte is None:
        return
    if not (tied or accumulate):
        dwte.zero_()
    keys, rows = _sort(tokens, pairs, table, dwte.shape[0])
    chunks = part.shape[1]
    grid, how = (chunks, triton.cdiv(C, RUN_COLS)), {"SCALE": scale, "CHUNK": CHUNK, "COLS": RUN_COLS}
    _runs_kernel[grid](dwte, part, keys, rows, dout, n, chunks, C, **how, num_warps=1)
    _long_runs_kernel[grid](dwte, part, keys, n, chunks, C, PARTS=PARTS, **how, num_warps=4)
