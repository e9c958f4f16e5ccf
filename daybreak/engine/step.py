"""The engine: weights, optimizer state and activations in memory that is allocated once, and the steps over them.

    engine = Engine(EngineSpec(parse_shape("d12"), B=4, T=1024))
    engine.train_step(tokens, targets, lr=6e-4, step=0)
    engine.stats()["loss"]

passes.py has the calls that a step consists of. This is the engine, which owns the memory and runs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from daybreak.engine.arena import CONSTANT, FROZEN, LiveFrame, name_inputs
from daybreak.engine.capture import Graphs, Pending, Ring, Tapes
from daybreak.engine.collectives import Collectives
from daybreak.engine.device import check_fp8, missing_on
from daybreak.engine.formats import formats_of, in_formats
from daybreak.engine.params import draw_parameters
from daybreak.engine.passes import (
    PARTS,
    State,
    backward_pass,
    evaluate,
    forward_pass,
    head_pass,
    learned_part,
    micro_step,
    next_token,
    plan_engine,
    update,
)
from daybreak.engine.scales import HISTORY
from daybreak.engine.spec import EngineSpec
from daybreak.engine.wide import PLACES, set_places
from daybreak.errors import ConfigError
from daybreak.kernels import ON_HOST, acc_dtype
from daybreak.kernels.guard import STATS
from daybreak.kernels.held import dense, pack
from daybreak.kernels.optimizer import FLAT_CHUNK, exact, round_weights, set_exact
from daybreak.models.registry import build_model
from daybreak.parallel import ALONE, Group


def named_stats(pending: Pending) -> dict[str, float]:
    """The stats that `Engine.update` returned, by name: kernels.guard.STATS, and the number of matrices that saturated
    if the engine computes in fp8."""
    return dict(zip((*STATS, "saturated"), pending.values(), strict=False))


Ids = Tensor | NDArray[np.integer] | Sequence[Sequence[int]]


def _ids(name: str, values: Ids) -> Tensor:
    """Ids as a tensor, from whatever holds whole numbers. Raises ConfigError for rows of unlike lengths and others."""
    try:
        ids = values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be ids (b, t): a tensor, an array, or rows of equal length.") from None
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ConfigError(f"{name} are {str(ids.dtype).removeprefix('torch.')}; ids must be whole numbers.")
    return ids


def draw(spec: EngineSpec, seed: int) -> dict[str, Tensor]:
    """The initial weights, fp32 in host memory."""
    drawn: dict[str, Tensor] = {}
    draw_parameters(spec.parameters(build_model(spec.cfg))[0], seed, drawn.__setitem__)
    return drawn


def _chunks(parts: Iterable[tuple[slice, slice]]) -> Iterator[tuple[slice, slice]]:
    """The same pairs of slices, cut into chunks of at most FLAT_CHUNK elements. On a GPU, temporaries as large as a
    parameter would stay reserved, and the run would lack that memory."""
    for where, at in parts:
        for i in range(0, where.stop - where.start, FLAT_CHUNK):
            n = min(FLAT_CHUNK, where.stop - where.start - i)
            yield slice(where.start + i, where.start + i + n), slice(at.start + i, at.start + i + n)


class Engine:
    """A model and its optimizer in memory that was allocated once. Knows no files, loggers or flags."""

    def __init__(
        self, spec: EngineSpec, *, device: str | torch.device = "cpu", seed: int = 42, init: bool = True,
        group: Group = ALONE,
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        if self.device.type == "cuda":  # Triton, events and graphs use the current device
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
            # torch's own matmuls, where they are used, add up in fp32 too
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.spec = spec = replace(spec, device_type=self.device.type, missing=missing_on(self.device))
        if spec.eight and spec.train and self.device.type == "cuda":
            check_fp8(torch.cuda.get_device_capability(self.device), "this GPU", spec.eight_key, spec.missing)
        self.cfg, self.B, self.T, self.rows = spec.cfg, spec.B, spec.T, spec.rows
        self.seed = seed  # of the initial weights and of stochastic rounding
        # On CUDA drawing weights takes seconds, and so do loading and compiling kernels. They run side by side.
        drawing: Future[dict[str, Tensor]] | None = None
        if init and self.device.type == "cuda":
            spec.cfg.check()
            drawing = ThreadPoolExecutor(1).submit(draw, spec, seed)
        self.model, self.table, self.arena = plan_engine(spec, group)
        self.num_parameters = self.table.num_parameters
        frozen = sum(row.numel for row in self.table.frozen)  # save the matmul for their gradient: 2 of 6 FLOPs
        self.flops_per_token = self.model.flops_per_token(spec.T, self.num_parameters) - 2 * frozen
        self.comm = Collectives(self.arena.sharding, group)
        self.frame = LiveFrame(self.arena, self.table, spec.dtype, self.device, self.comm)
        formats = formats_of(spec, self.model)
        self.training = in_formats(self.frame, formats, self.model)
        self._measuring = in_formats(self.frame, formats, self.model, current=True)
        self.state: State = self.frame.state
        name_inputs(self.state)
        for name, value in self.model.constants().items():
            self.state[CONSTANT + name].copy_(value)
        if PLACES in self.state:
            set_places(self.state[PLACES], self.comm.sharding)
        on_host = any(self.arena.choices[name] == "torch" for name in ON_HOST)
        self.graphs = Graphs(self.device.type == "cuda" and not on_host and group.capturable)
        if group.world > 1:
            group.before_close.append(self.graphs.clear)
        wait = group.wait_for if group.world > 1 else None  # the device may wait for a rank that is gone
        self._hyper = Ring(tuple(self.state["hyper"].shape), torch.float64, self.device, wait)
        self._batch = Ring(tuple(self.state["batch"].shape), torch.int64, self.device, wait)
        self._stats = Ring(tuple(self.state["stats"].shape), torch.float64, self.device, wait)
        self._next = torch.zeros(2, spec.rows, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        # The reference kernel of decode reads the lengths on the host, so it has no graph.
        graphed = self.device.type == "cuda" and self.arena.choices["attention_decode"] != "torch"
        self._decoding: Graphs | Tapes = Graphs(True) if graphed else Tapes(self.frame)
        self._ids = Ring((spec.rows,), torch.int64, self.device)
        self._asked: tuple[list[int], list[int]] = [], []  # tokens and positions of the last decode
        self._ahead = False  # whether `read_ahead` began that decode, and `decode` has not returned its logits yet
        self._last: Pending | None = None
        self._measured = False  # whether late scales have a history
        self._past_fp8 = False  # whether the step under way comes after `fp8_steps`, so that it is in bf16
        if spec.train:  # before anything else asks for kernels, since the order may decide which are built
            self.prepare()
        if init:
            self.init(seed, drawing)

    def __repr__(self) -> str:
        return f"Engine({self.cfg.text()}, B={self.B}, T={self.T}, {self.device})"

    # ------------------------------------------------------------------------------------------------- weights

    def init(self, seed: int, drawing: Future[dict[str, Tensor]] | None = None) -> None:
        """New weights from `seed`, always drawn on the CPU, or already by `drawing`. Optimizer state and the guard's
        windows become zero.

        Master weights keep the digits that rounding takes from the weights. llm.c's start from the rounded weights, so
        that its first updates of large weights do nothing: they are below half of the last place (bench/NOTES.md)."""
        for e in self.arena.entries:
            if e.saved or e.name in ("weights", "masters"):
                self.state[e.name].zero_()
        self._measured = False
        if self.device.type == "cpu":
            draw_parameters(list(self.table.rows.values()), seed, self.set_exact)
        else:
            for name, value in (drawing.result() if drawing else draw(self.spec, seed)).items():
                self.set_exact(name, value)

    def prepare(self) -> None:
        """On CUDA: make every pass once without effect, so that everything is compiled, and capture its graphs."""
        if not self.graphs.enabled:
            return
        self.state["tokens"].zero_()
        self.state["targets"].fill_(-1)
        if self.spec.documents:
            torch.arange(self.B * self.T, out=self.state["learned"])
        for past_fp8 in (False, True) if self.spec.fp8_steps is not None else (False,):
            self._past_fp8 = past_fp8
            self._prepare()
        self.comm.stale = self._past_fp8 = False

    def _prepare(self) -> None:
        kinds = [(first, last) for last in ((True, False) if self.comm.active else (True,)) for first in (False, True)]
        parts = range(1, PARTS + 1) if self.spec.documents else (PARTS,)
        calls = {key: call for kind in kinds for part in parts for key, call in self._micro(*kind, part)}
        for call in calls.values():
            self.comm.stale = bool(self.comm.sharding.zero)  # so the first micro-step gathers weights, in its graph too
            call()
        self.state["loss"].fill_(math.nan)  # a step that the guard refuses: nothing is learned from it
        self._update()
        for key, call in calls.items():
            self.comm.stale = bool(self.comm.sharding.zero)
            self.graphs.capture(key, call)
        self.graphs.capture(("update", self._past_fp8), self._update)

    @property
    def _frame(self) -> LiveFrame:
        """The frame of the step under way: that of training has number formats, if there are any."""
        return self.frame if self._past_fp8 else self.training

    def _micro(self, first: bool, last: bool, part: int) -> list[tuple[Hashable, Callable[[], None]]]:
        """The keys of a micro-step's graphs, and what each runs. Packed rows have three graphs, since the head's number
        of rows changes. A graph has fixed shapes, so the head, which is a few calls, has one for each number."""
        given, past = (self.model, self._frame, self.state), self._past_fp8
        if not self.spec.documents:
            return [((first, last, past), partial(micro_step, *given, first=first, last=last))]
        return [
            (("forward", first, past), partial(forward_pass, *given, first=first)),
            (("head", first, part, past), partial(head_pass, *given, first=first, part=part)),
            (("backward", first, last, past), partial(backward_pass, *given, first=first, last=last)),
        ]

    def _update(self) -> None:
        update(self._frame, self.state, self.spec, self.seed)

    def _measure(self) -> None:
        """Before the first step of a run in fp8: find scales for it (engine/scales.py)."""
        if self._measured or self._past_fp8 or HISTORY not in self.state:
            return
        if not self.state[HISTORY].any():
            micro_step(self.model, self._measuring, self.state, first=True, last=False)
            self._measuring.note_amax()
            self._measuring.keep_amax()
        self._measured = bool(self.state[HISTORY].any())  # else there is no history yet, and the next step measures

    def names(self) -> list[str]:
        """Parameter names in forward order."""
        return list(self.table.rows)

    def param(self, name: str) -> Tensor:
        """A view of a weight, in the dtype that it is held in. For NF4 and fp8 it is a copy in compute dtype."""
        self.comm.need(name)
        stored = self.frame.weights[name]
        if not isinstance(stored, Tensor):
            return dense(stored, torch.empty(stored.shape, dtype=self.spec.dtype, device=self.device))
        return stored

    def exact_parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first element, 1-D tensor) of the parts of a weight that this rank saves, as exactly as the engine has them:
        in fp32, fp64, or bf16 without master weights. They are views. Split master weights give copies, one at a
        time."""
        masters, sharding, frozen = self.state.get("masters"), self.comm.sharding, self.state.get(FROZEN + name)
        if name not in self.table.offsets:  # frozen, so every rank has it; maybe a part of one in NF4
            if not sharding.rank:
                yield 0, (self.param(name) if frozen is None else frozen).view(-1)
            return
        weight = self.param(name).view(-1)
        for where, at in _chunks(sharding.within(name, sharding.shards())):
            yield where.start, exact(weight[where], None if masters is None else masters[at])

    def set_exact(self, name: str, value: Tensor) -> None:
        """Set a weight and its master weight from a tensor of its shape, of any float dtype and device."""
        self._ahead = False
        if not isinstance(stored := self.frame.weights[name], Tensor):
            pack(stored, value)
            return
        masters, weight, sharding = self.state.get("masters"), self.param(name).view(-1), self.comm.sharding
        value = value.reshape(-1)
        if masters is None:
            weight.copy_(value)
        if (wide := self.frame.wide.get(name)) is not None:  # bf16 weights without masters are the exact ones
            wide.copy_(weight if masters is None and self.spec.train else value)
        if masters is None:
            return
        if sharding.zero or name not in self.table.offsets:  # also the parts whose masters other ranks have
            for where, _ in _chunks([(slice(0, weight.numel()), slice(0, weight.numel()))]):
                round_weights(weight[where], value[where].to(self.device, torch.float32))
        for where, at in _chunks(sharding.within(name, sharding.held())):
            set_exact(weight[where], masters[at], value[where])

    def finish(self) -> None:
        """Gather the weights that other ranks updated. Collective. Call it before you read weights between steps."""
        if self.comm.stale:
            self.comm.gather(self.state["weights"])
        self.comm.finish()

    def grad(self, name: str) -> Tensor:
        """The gradient of a trainable parameter, a view."""
        grad = self.frame.grads[name]
        assert grad is not None, f"{name} is frozen"
        return grad

    def load_params(self, params: dict[str, Tensor]) -> None:
        """Set every weight from tensors of the table's names and shapes."""
        assert set(params) == set(self.table.rows), "load_params takes every parameter exactly once"
        for name, value in params.items():
            self.set_exact(name, value)

    # ------------------------------------------------------------------------------------------------- training

    def begin_step(self, *, lr: float, step: int, valid: int) -> None:
        """Set a step's device scalars: learning rate, number of the update, and 1 / number of valid targets in it."""
        self._past_fp8 = self.spec.fp8_steps is not None and not self.spec.in_fp8(step)
        slot, t = self._hyper.take(), step + 1
        for (optimizer, scale), part in self.table.hyper.items():
            for i, value in enumerate((lr * scale, t, 1.0 / max(valid, 1), *optimizer.scalars(t)), part.start):
                self._hyper.slots[slot][i] = value
        self._hyper.upload(slot, self.state["hyper"])

    def micro_step(
        self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None, *, first: bool, last: bool = True
    ) -> None:
        """Compute the gradients of one micro-batch, tokens and targets (B, T) of any integer dtype. Later ones add to
        the first. After the last one of a step they are the sum over all ranks.

        positions (B, T): of packed rows (EngineSpec.documents), the place of every token in its document.
        On CUDA it returns when the work is queued."""
        assert tokens.shape == targets.shape == (self.B, self.T), "a micro-batch is (B, T); copy_ would broadcast"
        assert (positions is not None) == self.spec.documents, "packed rows come with positions, and others without"
        slot = self._batch.take()
        parts = {"batch": self._batch.slots[slot]}
        name_inputs(parts)
        self._fill(parts, tokens, targets, positions)
        part = PARTS
        if self.spec.documents:
            part = learned_part(parts["targets"].view(-1).numpy(), parts["learned"].numpy())
        self._batch.upload(slot, self.state["batch"])
        if first:
            self._measure()
        for key, call in self._micro(first, last or not self.comm.active, part):
            self.graphs.run(key, call)
        self.comm.stale = self.comm.stale and not first

    @staticmethod
    def _fill(parts: State, tokens: Tensor, targets: Tensor, positions: Tensor | None) -> None:
        """Copy a batch into its parts. A document begins as many tokens back as the place of a token says."""
        parts["tokens"].copy_(tokens)
        parts["targets"].copy_(targets)
        if positions is not None:
            parts["positions"].copy_(positions)
            parts["lo"].copy_(torch.arange(positions.shape[1]) - positions)

    def update(self) -> Pending:
        """Apply the accumulated gradient, unless the guard says no. Returns the step's stats, to be read later."""
        self.graphs.run(("update", self._past_fp8), self._update)
        self.comm.stale, self._ahead = bool(self.comm.sharding.zero), False
        self._last = self._stats.download(self.state["stats"])
        return self._last

    def forward_backward(
        self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None, *, lr: float = 0.0, step: int = 0
    ) -> None:
        """Gradients of the mean loss over all valid targets of all ranks' tokens, targets (A, B, T): A micro-steps."""
        self.begin_step(lr=lr, step=step, valid=int(self.comm.group.numbers([int((targets >= 0).sum())])[0]))
        for i in range(tokens.shape[0]):
            places = None if positions is None else positions[i]
            self.micro_step(tokens[i], targets[i], places, first=i == 0, last=i == tokens.shape[0] - 1)

    def train_step(
        self, tokens: Tensor, targets: Tensor, positions: Tensor | None = None, *, lr: float, step: int
    ) -> None:
        """A whole step with this rank's tokens and targets (A, B, T), and positions of packed rows. step: from 0."""
        self.forward_backward(tokens, targets, positions, lr=lr, step=step)
        self.update()

    def stats(self) -> dict[str, float]:
        """The last update's loss, norm, clip_scale, skip (0 or 1), loss_z and norm_z. Waits for them."""
        assert self._last is not None, "no update yet"
        return named_stats(self._last)

    # ----------------------------------------------------------------------------------------------- evaluation

    def eval_losses(self, tokens: Ids, targets: Ids, positions: Tensor | None = None) -> Tensor:
        """Per-token losses (b, t) of tokens and targets (b, t), b <= B, t <= T. The next call overwrites the view.
        positions (b, t): of packed rows, if the engine has `documents`."""
        tokens, targets = _ids("tokens", tokens), _ids("targets", targets)
        # The front of the flat buffers, so that a smaller batch is contiguous too.
        names = ("tokens", "targets", *(() if positions is None else ("positions", "lo")))
        parts = {name: self._front(name, tokens.shape) for name in names}
        self._fill(parts, tokens, targets, positions)
        b, t = tokens.shape
        inputs = {k: v for k, v in self.state.items() if k not in ("positions", "lo")} | parts
        evaluate(self.model, self.frame, inputs, b, t)
        return self.state["losses"][: b * t].view(b, t)

    def _front(self, name: str, shape: Sequence[int]) -> Tensor:
        """The front of a buffer as (b, t). Raises ConfigError if the engine was made for fewer tokens."""
        if len(shape) != 2 or shape[1] > self.T or math.prod(shape) > self.B * self.T:
            room = f"this engine takes (b, t) of up to {self.B * self.T} tokens, and t up to {self.T}"
            raise ConfigError(f"tokens have the shape {tuple(shape)}, and {room}; load_engine(B=8) takes 8 such rows.")
        return self.state[name].view(-1)[: math.prod(shape)].view(*shape)

    def logits(self, tokens: Ids) -> Tensor:
        """Logits (b, t, V) in compute dtype at every position of tokens (b, t), b t <= B T. ConfigError for others."""
        tokens = _ids("tokens", tokens).long()
        inputs = self._front("tokens", tokens.shape)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.cfg.V:
            raise ConfigError(f"tokens are from {tokens.min()} to {tokens.max()}; ids are from 0 to {self.cfg.V - 1}.")
        inputs.copy_(tokens)
        hidden = self.model.forward(self.frame, inputs)
        n, V = hidden.shape[0], self.cfg.V
        result = torch.empty(n, V, dtype=hidden.dtype, device=self.device)
        step = self.model.head_rows(self.B * self.T, hidden.dtype)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            result[rows].copy_(self.model.head_logits(self.frame, hidden[rows])[:, :V])
        return result.view(*tokens.shape, V)

    def _next_logits(self, b: int) -> None:
        self.state["next_logits"][:b].copy_(self.frame.a("logits", b, self.cfg.Vp)[:, : self.cfg.V])

    def prefill(self, row: int, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (b, V) in fp32, on the device, that follow b sequences of any lengths. b times the longest is at most
        B T. Their keys and values stay in the cache's rows from `row` on, where `decode` continues. The next call
        overwrites the view."""
        b, t, self._ahead = len(texts), max(map(len, texts)), False
        inputs, last = self._front("tokens", (b, t)), self.state["last_hidden"][:b]
        inputs.copy_(torch.tensor([[*text, *[0] * (t - len(text))] for text in texts]))  # no token sees what follows it
        hidden = self.model.forward(self.frame, inputs, self.state["kv"][:, :, row : row + b]).view(b, t, -1)
        for i, text in enumerate(texts):
            last[i].copy_(hidden[i, len(text) - 1])
        self.model.head_logits(self.frame, last)
        self._next_logits(b)
        return self.state["next_logits"][:b]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits (b, V) in fp32, on the device, that follow one more token of each of the rows 0 to b - 1, at these
        positions (from 0).

        The caller knows the length of each row. For a row without a sequence it gives any token at position 0. The
        calls are recorded once for each b. The next call overwrites the view."""
        b, asked = len(tokens), (list(tokens), list(positions))
        ahead, self._asked, self._ahead = self._ahead and self._asked == asked, asked, False
        if not ahead:
            if self.device.type == "cuda":  # the copy of the last tokens is over
                torch.cuda.current_stream(self.device).synchronize()
            self._next.numpy()[:, :b] = asked
            self._decode(b, b, partial(self.state["next"].copy_, self._next, non_blocking=True))
        return self.state["next_logits"][:b]

    def _decode(self, key: Hashable, b: int, before: Callable[[], object]) -> None:
        write = partial(next_token, self.model, self.frame, self.state, b)
        self._decoding.run_or_record(key, before, write, partial(self._next_logits, b))

    def read_ahead(self, ids: Tensor) -> list[int]:
        """Read the tokens (b) that were chosen on the device from what `decode` gave. Meanwhile the device begins to
        decode them, each at the next position. Then `decode` has their logits, if it is the next call and asks for it.

        So the host's work between two tokens costs no time of the device. It overwrites `decode`'s view."""
        b, target = len(ids), self.state["next"][:, : len(ids)]
        target[0].copy_(ids)
        target[1].add_(1)
        pending = self._ids.download(self.state["next"][0])
        self._decode(("ahead", b), b, lambda: None)
        tokens = [int(i) for i in pending.values()[:b]]
        self._asked, self._ahead = (tokens, [place + 1 for place in self._asked[1]]), True
        return tokens

    # ------------------------------------------------------------------------------------------------- looking in

    def norms(self) -> Iterator[tuple[str, float, float]]:
        """(name, weight norm, gradient norm) of every parameter, from a pass over both. Collective."""
        sharding, sums = self.comm.sharding, self.state["shard" if self.comm.sharding.zero else "grads"]
        squares = []
        for name in self.table.rows:
            grads = [sums[at] for _, at in sharding.within(name, sharding.shards())]
            for parts in ((part for _, part in self.exact_parts(name)), grads):
                norms = (torch.linalg.vector_norm(part, dtype=acc_dtype(part.dtype)).item() for part in parts)
                squares.append(sum(norm**2 for norm in norms))
        found = iter(self.comm.group.numbers(squares))
        for name in self.table.rows:
            yield name, math.sqrt(next(found)), math.sqrt(next(found))
