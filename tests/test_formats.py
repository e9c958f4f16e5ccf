"""Number formats for matmuls: made-up ones, in plain torch, train a GPT-2 through the whole engine.

Every kernel of a made-up backend widens its Operands into scratch, calls the plain-torch reference there, and writes
its outputs in their format. `EXACT` holds fp32 values over a power of two. So it must not change one bit of training,
whatever part is read in place of another, too early or too late. `E4M3` is 8 bits wide, and rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_engine import gradients
from test_memory import allocations
from torch import Tensor

from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.arena import Entry
from daybreak.kernels import OPS, Temps, all_ops, backend
from daybreak.kernels.operand import Format, Operand
from daybreak.parallel import ALONE, Group
from daybreak.shapes import GPT2Config

F32 = torch.float32
CFG, B, T = GPT2Config(L=3, C=64, NH=4, max_T=32, V=61), 4, 16
LARGEST = 448.0  # of e4m3
EXACT, E4M3 = Format("exact", F32), Format("e4m3", torch.float8_e4m3fn)
MATMULS = ("h.*.ln?", "h.*.gelu", "h.*.att", "h.*.d_*", "h.*.*w", "wte")
V, TR = ("value", "scale"), ("transposed", "scale")
READS = {  # the parts that each operation reads: the table in kernels/operand.py
    "layernorm_forward": {},
    "layernorm_backward": {},
    "matmul_forward": {"x": V, "w": V},
    "matmul_gelu_forward": {"x": V, "w": V},
    "matmul_backward_input": {"dout": V, "w": TR},
    "matmul_gelu_backward": {"dout": V, "w": TR},
    "matmul_backward_weight": {"dout": TR, "x": TR},
}


def shape_of(x: Operand) -> tuple[int, ...]:
    return tuple(x.value.shape)


def quantise(out: Operand, x: Tensor, *, scratch: Callable[[Temps], list[Tensor]]) -> None:
    """Current scaling: the largest value becomes the format's largest. An exact format is scaled by 2^-3."""
    (wide,) = scratch([(tuple(x.shape), F32)])
    if out.format is EXACT:
        out.scale.fill_(0.125)
    else:
        torch.amax(torch.abs(x, out=wide), (0, 1), out=out.scale)
        out.scale.div_(LARGEST).clamp_(min=1e-30)
    out.value.copy_(torch.div(x, out.scale, out=wide))
    assert out.transposed is not None
    out.transposed.copy_(out.value.t())


def made(name: str, reads: dict[str, tuple[str, ...]]) -> tuple[Callable[..., None], Callable[..., Temps]]:
    """An operation for Operands, from its reference: the function and its scratch."""
    plain, names, writes = OPS[name].impls["torch"], OPS[name].parameters, OPS[name].writes

    def temps(*args, **kwargs) -> Temps:
        own = [(shape_of(x), F32) for x in args if isinstance(x, Operand)]
        stand_ins = [torch.empty(shape_of(x), device="meta") if isinstance(x, Operand) else x for x in args]
        return [*own, *own, *(plain.temps(*stand_ins, **kwargs) if plain.temps else ())]

    def run(*args, scratch: Callable[[Temps], list[Tensor]], **kwargs) -> None:
        pieces = scratch(temps(*args, **kwargs))
        operands = [(argument, x) for argument, x in zip(names, args, strict=False) if isinstance(x, Operand)]
        wide = dict(zip((argument for argument, _ in operands), pieces, strict=False))
        for argument, x in operands:
            if argument not in writes:
                part = x.value if "value" in reads[argument] else x.transposed.t()
                wide[argument].copy_(part).mul_(x.scale)
        rest = {"scratch": lambda _: pieces[2 * len(operands) :]} if plain.temps else {}
        plain.fn(*(wide.get(argument, x) for argument, x in zip(names, args, strict=False)), **kwargs, **rest)
        for i, (argument, x) in enumerate(operands):
            if argument in writes:
                quantise(x, wide[argument], scratch=lambda _, i=i: [pieces[len(operands) + i]])

    run.__name__ = name
    return run, temps


@pytest.fixture(autouse=True, scope="module")
def _backends() -> Iterator[None]:
    """Both formats have kernels while this module's tests run."""
    all_ops()
    for format in (EXACT, E4M3):
        backend(format.backend, temps=lambda out, x: [(tuple(x.shape), F32)])(quantise)
        for name, reads in READS.items():
            fn, temps = made(name, reads)
            backend(format.backend, temps=temps, parts=reads)(fn)
    yield
    for operation in OPS.values():
        for format in (EXACT, E4M3):
            operation.impls.pop(format.backend, None)


def batch(step: int, A: int = 2) -> tuple[Tensor, Tensor]:
    """A chain: each token leads to one of two."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(CFG.V, (A, B, T), generator=g)
    return tokens, (3 * tokens + torch.randint(2, (A, B, T), generator=g)) % CFG.V


def poisoned(**options) -> Engine:
    """An engine whose memory is NaN in every dtype, but for what lasts from step to step."""
    engine = Engine(EngineSpec(CFG, B=B, T=T, **options))
    for name in {"activations", "scratch", "operands"} & engine.frame.buffers.keys():
        engine.frame.buffers[name].fill_(0xFF)
    return engine


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
def test_an_exact_format_changes_not_one_bit(recompute: int) -> None:
    """Three steps of two micro-steps, each after evaluation and generation, which share memory with training."""
    engines = [poisoned(recompute=recompute, formats=formats) for formats in ({}, dict.fromkeys(MATMULS, EXACT))]
    for step in range(3):
        tokens, targets = batch(step)
        found = []
        for engine in engines:
            engine.train_step(tokens, targets, lr=1e-2, step=step)
            values = [engine.stats()["loss"], *gradients(engine).values(), engine.state["weights"]]
            values += [engine.eval_losses(tokens[0], targets[0]), engine.logits(tokens[0, :2, :7])]
            values += [engine.prefill(0, [[1, 2, 3]]), engine.decode([4], [3])]
            found.append([torch.as_tensor(x).clone() for x in values])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
            assert torch.isfinite(a).all()


def test_eight_bits_learn_as_fp32_does() -> None:
    """e4m3 has 3 bits behind the point: a value is rounded by at most 2^-4 of itself, 2.6 % in the mean of squares, and
    a product of two such values by 3.7 %. A gradient comes out of a chain of them. Errors are independent, so those of
    eight in a row are 10 % of its norm."""
    eight, exact = (poisoned(formats=formats) for formats in (dict.fromkeys(MATMULS, E4M3), {}))
    losses = []
    for step in range(25):
        for engine in (eight, exact):
            engine.train_step(*batch(step), lr=3e-3, step=step)
        losses.append((eight.stats()["loss"], exact.stats()["loss"]))
        if step == 0:
            for name, want in gradients(exact).items():
                error = ((eight.grad(name) - want).norm() / want.norm()).item()
                assert 0.01 < error < 0.1, f"{name}: {error:.3f}"
    assert max(abs(a - b) for a, b in losses) < 0.02
    assert losses[-1][1] < losses[0][1] - 1.5  # of log 61 = 4.1; the chain's own is log 2


def entries(group: Group = ALONE, **options) -> dict[str, Entry]:
    return {e.name: e for e in plan_engine(EngineSpec(CFG, B=B, T=T, **options), group)[2].entries}


def test_the_plan_counts_the_parts_and_is_what_is_used(tmp_path: Path) -> None:
    chosen = {"h.*.ln1": E4M3, "h.*.qkvw": E4M3, "h.*.d_qkv": E4M3}
    engine, plain, n, C = poisoned(formats=chosen), entries(), B * T, CFG.C
    found = {e.name: e for e in engine.arena.entries}
    parts = {name: e for name, e in found.items() if name not in plain}
    shapes = {"ln1": (n, C), "qkvw": (3 * C, C), "d_qkv": (n, 3 * C)}
    assert {name: (e.shape, e.nbytes) for name, e in parts.items()} == {
        f"h.{l}.{name}.{part}": want
        for l in range(CFG.L)
        for name, (rows, columns) in shapes.items()
        for part, want in {
            "value": ((rows, columns), rows * columns),
            "scale": ((), 4),
            "transposed": ((columns, rows), rows * columns),
        }.items()
    }
    assert {name for name, e in parts.items() if e.buffer != "activations"} == {n for n in parts if ".qkvw." in n}
    assert found.keys() >= plain.keys()  # evaluation reads plain tensors
    # Backward reads the transposed copy only. So the row-major one of a layer is gone when the next one's is made.
    assert parts["h.0.ln1.value"].last < parts["h.1.ln1.value"].first < parts["h.0.ln1.transposed"].last
    allocated = {name: buffer.untyped_storage().nbytes() for name, buffer in engine.frame.buffers.items()}
    assert allocated == engine.arena.sizes()

    data = batch(0)
    engine.train_step(*data, lr=1e-3, step=0)
    engine.stats()
    made = allocations(tmp_path / "trace", lambda: engine.train_step(*data, lr=1e-3, step=1))
    assert max(made) < n * C  # not one matrix in 8 bits (torch transposes in blocks of 60 x 60)


def test_the_first_pattern_that_fits_counts_and_ranks_plan_the_same() -> None:
    formats = {"h.0.*": EXACT, "h.1.fcw": E4M3, "h.?.fcw": EXACT}
    stage2 = {"group": Group(rank=1, world=2), "zero": 2, "bucket_bytes": 1 << 12}
    for options in ({}, stage2):
        found = entries(formats=formats, **options)
        dtypes = [found[f"h.{l}.fcw.value"].dtype for l in range(3)]
        assert dtypes == [F32, torch.float8_e4m3fn, F32]
        assert "h.0.gelu.value" in found
        assert "h.1.gelu.value" not in found
    assert not any(".value" in name for name in entries(formats=formats, train=False))


def test_a_format_without_a_kernel_is_refused_by_name() -> None:
    with pytest.raises(AssertionError, match="matmul_gelu_forward has no kernel for int8"):
        plan_engine(EngineSpec(CFG, B=B, T=T, formats={"h.*.gelu": Format("int8", torch.int8)}))
    with pytest.raises(AssertionError, match="matmul_forward has no kernel for e4m3, exact"):
        plan_engine(EngineSpec(CFG, B=B, T=T, formats={"h.*.ln1": E4M3, "h.*.qkvw": EXACT}))
