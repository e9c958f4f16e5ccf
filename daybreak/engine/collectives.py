"""Collectives between ranks: gradients are summed while backward still runs, updated weights gathered after it.

ZeRO stages (Rajbhandari et al. 2020) say who sums and who updates:

    stage 0   all-reduce: every rank has the sums of all gradients, and updates all weights
    stage 1   reduce-scatter: a rank has the sums of its shard, alone keeps master weights and optimizer state for it,
              and all ranks gather the updated weights
    stage 2   as 1, after every micro-step, into a wider shard: whole gradients never exist

`Sharding` cuts the flat buffers (params.py). A segment is a run of whole parameters that become final at one moment. A
bucket is sent in one go, and every rank owns an equal part of it. So its length is a multiple of ranks x ALIGN, and it
ends near the end of its segment. The few elements between the two ends go with the segment that is final later. Bucket
k belongs to segment k. With two ranks and two layers:

    parameters     | matrices of h.1     | matrices of h.0        | wpe, wte           | vectors    |
    final at       | moment 0            | moment 2               | moment 1           | moment 2   |
    buckets        | 0                | 1                          | 2              | 3         | pad |
    owners         | rank 0 | rank 1  | rank 0      | rank 1       | rank 0 | rank 1 | rank 0 | rank 1    |

    rank 1 keeps   | of 0    | of 1         | of 2   | of 3      |   in compact buffers of its own

So an element has two places. One is in the flat buffers, the other (`at`) in the compact buffers of its owner: master
weights, summed gradients, optimizer state. At stage 0 both are the same.

A model calls `f.final()` when it has finished some gradients (moments.py). Each call is a moment, and does three
things, as far as they are due:

    1 strips   stage 2: what lies between the ends of segment and bucket is copied to the neighbour's buffer
    2 start    the buckets that are final now are reduced, on a stream of NCCL's own
    3 finish   the oldest buckets are waited for: at stage 2 all but IN_FLIGHT, so that their memory can be used
               again; else none before the last moment
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from daybreak.engine.params import ALIGN, ParamTable, Span
from daybreak.parallel import ALONE, Group

if TYPE_CHECKING:
    from daybreak.engine.arena import StepFrame

IN_FLIGHT = 2  # stage 2: buckets that may be under way while backward fills the next


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the flat buffers, final at `moment`; this rank's shard is at `at` of its own."""

    start: int
    stop: int
    moment: int
    at: int


@dataclass(frozen=True)
class Launch:
    """Elements [start, stop) of the flat buffers that this rank updates by one launch of an optimizer.

    at: where their master weights and summed gradients begin. name: their parameter, if the optimizer takes whole ones.
    """

    start: int
    stop: int
    at: int
    span: Span
    name: str = ""


class Sharding:
    """The owner of each part, computed from the table alone; no process group is needed.

    moments: row name -> when its gradient is final (moments.final_moments). bucket_elements: neighbours that are final
    one after the other are joined up to this size. `numel` is the padded length of the flat buffers, and `shard` that
    of a rank's part.
    """

    def __init__(
        self, table: ParamTable, moments: Mapping[str, int], group: Group, zero: int, bucket_elements: int
    ) -> None:
        self.table, self.rank, self.world = table, group.rank, group.world
        self.zero = zero if group.world > 1 else 0
        unit = self.world * ALIGN
        self.numel = -(-table.numel // unit) * unit
        self.segments = _segments(table, moments, bucket_elements)  # (start, stop, moment) of whole rows
        cuts = [0]
        for left, right in pairwise(self.segments):
            cut = left[1] // unit * unit if left[2] < right[2] else -(-left[1] // unit) * unit
            cuts.append(max(cut, cuts[-1]))
        cuts.append(self.numel)
        # Bucket k belongs to segment k, and may be empty; it is final when every row that it touches is.
        self.buckets = [
            Bucket(a, b, max((m for c, d, m in self.segments if c < b and a < d), default=0), a // self.world)
            for a, b in pairwise(cuts)
        ]
        self.shard = self.numel // self.world
        filled = [k for k, b in enumerate(self.buckets) if b.stop > b.start]
        self.order = sorted(filled, key=lambda k: self.buckets[k].moment)
        self.last_moment = max(moment for _, _, moment in self.segments)
        self.whole = table.whole // self.world if self.zero else table.whole  # elements held of whole parameters
        self.segment_of = {
            name: k for k, (a, b, _) in enumerate(self.segments) for name, at in table.offsets.items() if a <= at < b
        }

    def size(self, k: int) -> int:
        """Elements of one rank's shard of bucket k."""
        return (self.buckets[k].stop - self.buckets[k].start) // self.world

    def shards(self) -> Iterator[tuple[int, int, int]]:
        """(start, stop, at) of this rank's shard of every bucket, in flat order. `at` is its place in the rank's own
        buffers, which are compact at stages 1 and 2. At every stage, these are the ranges that the rank saves."""
        if self.world == 1:
            yield 0, self.numel, 0
            return
        for k, b in enumerate(self.buckets):
            start = min(b.start + self.rank * self.size(k), self.table.numel)
            yield start, min(start + self.size(k), self.table.numel), b.at if self.zero else start

    def held(self) -> Iterator[tuple[int, int, int]]:
        """The same for all elements whose optimizer state the rank has: its shards, or at stage 0 everything."""
        yield from self.shards() if self.zero else [(0, self.table.numel, 0)]

    def launches(self) -> list[Launch]:
        """A part for each launch of an optimizer: the ranges held, cut where the group changes, or whole parameters."""
        found = []
        for span in self.table.spans:
            for name, start, stop in span.parts:
                for first, last, at in self.held():
                    low, high = max(first, start), min(last, stop)
                    if low < high:
                        found.append(Launch(low, high, at + low - first, span, name))
        return found

    def by_element(self, ranges: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        """The parts of such ranges whose optimizers work by element. Their `at` is a place in those optimizers' state,
        which begins behind all whole parameters."""
        for start, stop, at in ranges:
            low = max(start, self.table.whole)
            if low < stop:
                yield low, stop, at + low - start - self.whole

    def within(self, name: str, ranges: Iterator[tuple[int, int, int]]) -> Iterator[tuple[slice, slice]]:
        """For the parts of a row inside `ranges`: where they are in the flattened row and in the compact buffer. Frozen
        rows have none."""
        first = self.table.offsets.get(name, self.numel)
        for start, stop, at in ranges:
            low, high = max(start, first), min(stop, first + self.table.rows[name].numel)
            if low < high:
                yield slice(low - first, high - first), slice(at + low - start, at + high - start)

    # ---- stage 2: gradients live in one buffer a segment, until their bucket is reduced

    def buffer(self, k: int) -> tuple[int, int]:
        """The flat range that segment k's gradient buffer covers: its rows and its bucket."""
        (a, b, _), bucket = self.segments[k], self.buckets[k]
        return (min(a, bucket.start), max(b, bucket.stop)) if bucket.stop > bucket.start else (a, b)

    def strips(self, j: int) -> Iterator[tuple[int, int, int]]:
        """(bucket, start, stop) of what segment j's rows have to hand to other segments' buckets."""
        a, b, _ = self.segments[j]
        for k, bucket in enumerate(self.buckets):
            low, high = max(a, bucket.start), min(b, bucket.stop)
            if k != j and low < high:
                yield k, low, high

    def gaps(self, k: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of what no row covers in segment k's buffer: alignment, and the flat buffers' end."""
        a, b, _ = self.segments[k]
        rows = sorted((at, at + self.table.rows[name].numel) for name, at in self.table.offsets.items() if a <= at < b)
        yield from ((end, start) for (_, end), (start, _) in pairwise([(a, a), *rows, (b, b)]) if end < start)
        if k == len(self.segments) - 1 and b < self.buffer(k)[1]:
            yield b, self.buffer(k)[1]

    def volume(self, dtype: torch.dtype, micro_steps: int) -> float:
        """Bytes that a rank sends in a step, but for scalars. For P bytes of padded gradients and N ranks these are
        exactly 2 P (N-1)/N; at stage 2 with A = `micro_steps`, (A+1) P (N-1)/N."""
        trips = micro_steps + 1 if self.zero == 2 else 2
        return trips * self.numel * dtype.itemsize * (self.world - 1) / self.world


def _segments(table: ParamTable, moments: Mapping[str, int], limit: int) -> list[tuple[int, int, int]]:
    """(start, stop, moment) of each segment. Neighbours that are final at one moment share a segment. Those that are
    final one moment later join it, up to `limit` elements. A bucket of whole parameters is a segment, final with the
    last of them."""
    rows = sorted(table.offsets.items(), key=lambda item: item[1])
    runs = [(a, b, max(moments[name] for name, at in rows if a <= at < b)) for a, b in table.buckets]
    end = max(moments.values())  # nothing joins the rows of this moment, to wait for them
    for name, start in rows[sum(at < table.whole for _, at in rows) :]:
        stop = start + -(-table.rows[name].numel // ALIGN) * ALIGN
        moment = moments[name]
        first, _, before = runs[-1] if start > table.whole else (0, 0, -2)
        if moment == before or (before + 1 == moment < end and stop - first <= limit):
            runs[-1] = (first, stop, moment)
        else:
            runs.append((start, stop, moment))
    return runs


class Collectives:
    """Runs a `Sharding`'s collectives over a process group, and knows which are under way."""

    def __init__(self, sharding: Sharding, group: Group = ALONE) -> None:
        self.sharding, self.group = sharding, group
        self.active = group.world > 1
        self.last = True  # the micro-step under way is the step's last
        self.first = True
        self.moment = 0  # calls of f.final in the backward under way
        self.stale = False  # updated weights are still to be gathered
        self.flying: list[int] = []  # buckets started and not waited for, oldest first
        self._reducing: dict[int, Any] = {}
        self.gathering: dict[int, Any] = {}

    # ---- gradients

    def reduce(self, k: int, grads: Tensor, out: Tensor | None) -> None:
        """Start to sum bucket k's gradients: on all ranks, or this rank's shard into `out`."""
        self.group.progress += 1
        if out is None:
            self._reducing[k] = self.group.dist.all_reduce(grads, async_op=True)
        else:
            self._reducing[k] = self.group.reduce_scatter(out, grads)

    def wait(self, k: int) -> None:
        """Until bucket k's sum is there (on CUDA: for the stream, not for the host)."""
        self.group.progress += 1
        self._reducing.pop(k).wait()

    def sum_scalars(self, state: dict[str, Tensor]) -> None:
        """loss = the sum of all ranks' losses. norm = that of the whole gradient, from the norms of its shards."""
        sums = state["sums"]
        sums[0].copy_(state["loss"])
        torch.mul(state["norm"], state["norm"], out=sums[1])
        self.group.progress += 1
        self.group.dist.all_reduce(sums)
        state["loss"].copy_(sums[0])
        if self.sharding.zero:  # at stage 0 every rank has the whole gradient's, from the same bits
            torch.sqrt(sums[1], out=state["norm"])

    def largest(self, magnitudes: Tensor) -> None:
        """magnitudes (fp32, not negative) = the largest of all ranks. Their bits are compared as integers: these have
        the same order, and NaN is the largest."""
        self.group.progress += 1
        self.group.dist.all_reduce(magnitudes.view(torch.int32), op=self.group.dist.ReduceOp.MAX)

    # ---- weights

    def unite(self, bits: Tensor) -> None:
        """bits (int32) = their sum over all ranks. One rank at most has an element's bits, and the others have 0. So
        the sum is these bits, on every rank."""
        self.group.progress += 1
        self.group.dist.all_reduce(bits)

    def gather(self, weights: Tensor) -> None:
        """Start to gather all updated weights, in the order in which forward wants them. Call it if they are stale."""
        for k in reversed(self.sharding.order):
            b, size = self.sharding.buckets[k], self.sharding.size(k)
            mine = weights[b.start + self.sharding.rank * size :][:size]
            self.group.progress += 1
            self.gathering[k] = self.group.all_gather_into(weights[b.start : b.stop], mine)
        self.stale = False

    def need(self, name: str) -> None:
        """Wait for the buckets that hold a row's weights; a frozen one is in none."""
        first = self.sharding.table.offsets.get(name, self.sharding.numel)
        last = first + self.sharding.table.rows[name].numel
        for k in list(self.gathering):
            if self.sharding.buckets[k].start < last and first < self.sharding.buckets[k].stop:
                self.gathering.pop(k).wait()

    def finish(self) -> None:
        """Wait for all that is being gathered."""
        for k in list(self.gathering):
            self.gathering.pop(k).wait()


# ---- what `f.final()` does between ranks; planning records the same calls


def gradients_in(f: StepFrame, k: int, start: int, stop: int) -> Tensor:
    """Stage 2: elements [start, stop) of the flat gradients, in segment k's buffer. It is an activation, so its bytes
    serve other tensors before and after."""
    first, last = f.comm.sharding.buffer(k)
    return f.a(f"grads.{k}", last - first)[start - first : stop - first]


def gradient_of(f: StepFrame, name: str) -> Tensor:
    """Stage 2: a parameter's gradient, in its segment's buffer."""
    row, start = f.table.rows[name], f.table.offsets[name]
    return gradients_in(f, f.comm.sharding.segment_of[name], start, start + row.numel).view(row.shape)


def reduce_gradients(f: StepFrame) -> None:
    """A moment of backward: copy strips, start to reduce the buckets that are final now, finish the oldest."""
    c, sharding, moment = f.comm, f.comm.sharding, f.comm.moment
    c.moment += 1
    if not c.active or not (c.last or sharding.zero == 2):  # stage 2 sums every micro-step's gradients
        return
    if sharding.zero == 2:
        for j, segment in enumerate(sharding.segments):
            if segment[2] == moment:
                _copy_strips(f, j)
    for k in [k for k in sharding.order if sharding.buckets[k].moment == moment]:
        b, size = sharding.buckets[k], sharding.size(k)
        if sharding.zero == 2:
            whole, out = gradients_in(f, k, b.start, b.stop), f.a(f"reduced.{k}", size)
        else:
            whole, out = f.state["grads"][b.start : b.stop], None
            out = f.state["shard"][b.at : b.at + size] if sharding.zero else None
        name = "all_reduce" if out is None else "reduce_scatter"
        f.k.do(name, partial(c.reduce, k, whole, out), [whole if out is None else out], [whole])
        c.flying.append(k)
    keep = 0 if moment == sharding.last_moment else IN_FLIGHT if sharding.zero == 2 else len(sharding.order)
    while len(c.flying) > keep:
        _finish_bucket(f, c.flying.pop(0))


def _copy_strips(f: StepFrame, j: int) -> None:
    """Clear what no row covers of segment j's buffer, and copy what belongs to other buckets to their buffers."""
    for start, stop in f.comm.sharding.gaps(j):
        part = gradients_in(f, j, start, stop)
        f.k.do("clear", partial(part.zero_), [part], [])
    for k, start, stop in f.comm.sharding.strips(j):
        to, source = gradients_in(f, k, start, stop), gradients_in(f, j, start, stop)
        f.k.do("strip", partial(to.copy_, source), [to], [source])


def _finish_bucket(f: StepFrame, k: int) -> None:
    """Wait for bucket k's sum. Stage 2 adds it to this rank's, and the bucket's memory is free again."""
    c, sharding = f.comm, f.comm.sharding
    b, size = sharding.buckets[k], sharding.size(k)
    if sharding.zero < 2:
        grads = f.state["shard" if sharding.zero else "grads"]
        f.k.do("wait", partial(c.wait, k), [grads], [])
        return
    whole, found = gradients_in(f, k, *sharding.buffer(k)), f.a(f"reduced.{k}", size)
    sums = f.state["shard"][b.at : b.at + size]
    f.k.do("wait", partial(c.wait, k), [found], [whole])
    f.k.do("add_shard", partial(sums.copy_ if c.first else sums.add_, found), [sums], [found, sums])
