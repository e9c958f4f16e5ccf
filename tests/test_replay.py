"""Replay: the kernel calls, the memory and the buckets of many set-ups, held to stored values, and the loss curve.

What a GPU would run is among them, because planning needs no device. A refactoring keeps all of it equal. Where one
differs, `python tests/test_replay.py CASE` prints a recording: do so before and after the change, and compare the two.
After a change that is meant to alter them, `python tests/test_replay.py` stores them anew.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import learning_rate
from replay import Recording, live, planned, replaced
from torch import Tensor

from daybreak.config_keys import GuardConfig
from daybreak.engine import Engine, EngineSpec, arena, collectives, passes
from daybreak.engine.passes import update as engine_update
from daybreak.models.registry import Model, build_model
from daybreak.shapes import GPT2Config, parse_shape

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
PARTS = ("count", "calls", "memory", "buckets")
CURVE = GPT2Config(L=2, C=64, NH=4, max_T=32, V=61)
SMALL = GPT2Config(L=3, C=64, NH=4, max_T=32, V=61)
SHAPES = {  # shape, B, T: three blocks; odd sizes below max_T; one block, and V just over a multiple of 128
    "small": (SMALL, 2, 16),
    "odd": (GPT2Config(L=2, C=24, NH=3, max_T=8, V=127), 3, 7),
    "one": (GPT2Config(L=1, C=48, NH=6, max_T=9, V=129), 2, 5),
    "chunks": (GPT2Config(L=2, C=48, NH=3, max_T=256, V=50257), 8, 256),  # logits in two pieces on a CPU
    "d12": (parse_shape("d12"), 16, 1024),  # and here on a GPU
}
FP32, BF16 = {"compute": "fp32"}, {"compute": "bf16", "masters": "split", "device_type": "cuda"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "cpu fp32": FP32,
    "cpu fp64": {"compute": "fp64"},
    **{f"cpu bf16 {masters}": {"compute": "bf16", "masters": masters} for masters in ("fp32", "split", "none")},
    "cuda fp32": {"compute": "fp32", "device_type": "cuda"},
    **{f"cuda bf16 {masters}": {**BF16, "masters": masters} for masters in ("split", "fp32", "none")},
}
BOTH = {"cpu fp32": FP32, "cuda bf16 split": BF16}
ONE: dict[str, Any] = {"world": 3, "rank": 1, "zero": 2, "bucket_bytes": 1 << 12}  # the middle one of three ranks
KERNELS: dict[str, dict[str, Any]] = {
    "older libraries": {"missing": ("quack", "fa4")},
    "triton": {"kernels": {"matmul": "triton", "attention": "triton"}},
    "torch": {"kernels": dict.fromkeys(("matmul", "attention", "norm", "optimizer", "embedding"), "torch")},
}


def cases() -> Iterator[tuple[str, Callable[[], Recording]]]:
    """Every case's name, and what records it."""

    def case(name: str, of: str = "small", **options: Any) -> tuple[str, Callable[[], Recording]]:
        cfg, B, T = SHAPES[of]
        return f"{of}, {name}", lambda: planned(cfg, B=B, T=T, **options)

    for level in range(4):
        for name, precision in PRECISIONS.items():
            yield case(f"{name}, recompute {level}", rows=8, decode=(3,), recompute=level, **precision)
        for name, precision in BOTH.items():
            for shape in ("odd", "one"):
                yield case(f"{name}, recompute {level}", shape, recompute=level, **precision)
            yield case(f"{name}, recompute {level}, stage 2 in the middle of 3", recompute=level, **ONE, **precision)
    for name, precision in BOTH.items():
        yield case(f"{name}, no training", rows=8, decode=(3,), train=False, **precision)
        for world, zero in ((2, 0), (2, 1), (3, 1), (2, 2), (3, 2)):
            for rank in range(world):
                for size in (1 << 12, 1 << 17, 1 << 25):
                    where = {"world": world, "rank": rank, "zero": zero, "bucket_bytes": size}
                    yield case(f"{name}, stage {zero}, rank {rank} of {world}, buckets of {size}", **where, **precision)
    for masters in ("none", "fp32"):
        for zero in (0, 1, 2):
            where = {"world": 2, "rank": 1, "zero": zero, "bucket_bytes": 1 << 14}
            yield case(f"bf16 {masters}, stage {zero} on 2", **where, **PRECISIONS[f"cuda bf16 {masters}"])
    for name, kernels in KERNELS.items():
        yield case(f"cuda, {name}", rows=3, **BF16, **kernels)
    yield case("cpu fp32", "chunks", rows=2)
    for level in (0, 3):
        yield case(f"cuda bf16, recompute {level}", "d12", recompute=level, **BF16)
    yield "live", lambda: live(SMALL, use, B=2, T=16, rows=3)
    yield "readable_cpu_fp32", lambda: planned(CURVE, B=2, T=16)
    yield "readable_cuda_bf16", lambda: planned(CURVE, B=2, T=16, recompute=3, **ONE, **BF16)


def use(engine: Engine) -> None:
    """A step of three micro-steps and a shorter one, evaluation of a smaller batch, prefill and decoding."""
    for step, micro in enumerate((3, 1)):
        tokens = torch.arange(micro * 32).view(micro, 2, 16) % 61
        engine.train_step(tokens, tokens, lr=1e-3, step=step)
    engine.eval_losses(tokens[0, :1, :7], tokens[0, :1, :7])
    engine.logits(tokens[0])
    engine.prefill(0, [[1, 2, 3], [4]])
    engine.prefill(2, [[5, 6]])
    for b in (1, 2, 3, 3):
        engine.decode([7] * b, [3] * b)


CASES = dict(cases())
READABLE = [name for name in CASES if name.startswith("readable")]


@cache
def stored() -> dict[str, str]:
    return json.loads((GOLDEN / "replay.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_replay(name: str) -> None:
    recording = CASES[name]()
    if name in READABLE:  # first, as it shows the lines that differ
        assert recording.lines() == (GOLDEN / f"{name}.txt").read_text().splitlines()
    got, want = (dict(zip(PARTS, text.split(), strict=True)) for text in (recording.digest(), stored()[name]))
    assert got == want, f"compare: python tests/test_replay.py {name!r}"


def test_nothing_else_is_stored() -> None:
    assert stored().keys() == CASES.keys()


# --- it would fail


def differs(one: Recording, other: Recording) -> set[str]:
    """The parts in which two recordings differ."""
    found = zip(PARTS, one.digest().split(), other.digest().split(), strict=True)
    return {part for part, a, b in found if a != b}


@pytest.mark.parametrize("part", ["calls", "memory", "buckets"])
def test_one_line_that_changes_is_seen(part: str) -> None:
    """Any character of any line, a line that is missing, and two that changed places."""
    plain = planned(SMALL, B=2, T=16, **ONE)
    lines = getattr(plain, part)
    for i in range(0, len(lines) - 1, 7):
        for changed in ([*lines[:i], lines[i][:-1] + "~", *lines[i + 1 :]], [*lines[:i], *lines[i + 1 :]]):
            assert part in differs(plain, Recording(**{**vars(plain), part: changed}))
        if lines[i] != lines[i + 1]:
            swapped = [*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]
            assert differs(plain, Recording(**{**vars(plain), part: swapped})) == {part}


class Changed:
    """A model with one thing changed."""

    def __init__(self, model: Model, **methods: Any) -> None:
        self._model, self._methods = model, methods

    def __getattr__(self, name: str) -> Any:
        plain = getattr(self._model, name)
        changed = self._methods.get(name)
        return plain if changed is None else lambda *args, **kwargs: changed(plain, *args, **kwargs)


def with_model(**methods: Any) -> dict[str, Any]:
    return {"build_model": lambda *args: Changed(build_model(*args), **methods)}


def one_call_more(plain: Any, f: Any, tokens: Tensor, *rest: Any) -> Tensor:
    hidden = plain(f, tokens, *rest)
    f.k.layernorm_forward(hidden, *f.noted[-1][1][1:])
    return hidden


def other_strides(plain: Any, f: Any, tokens: Tensor, *rest: Any) -> Tensor:
    return plain(f, tokens.as_strided(tokens.shape, (1, tokens.shape[0])), *rest)


def always_adds(plain: Any, f: Any, tokens: Tensor, *, first: bool) -> None:
    plain(f, tokens, first=False)


def other_limit(f: Any, s: Any, spec: EngineSpec, seed: int) -> None:
    engine_update(f, s, replace(spec, guard=GuardConfig(loss_z=3.0)), seed)


CHANGES: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "a call is made twice": (passes, with_model(forward=one_call_more), {"count", "calls", "memory"}),
    "an argument's strides": (passes, with_model(forward=other_strides), {"calls"}),
    "gradients add where they should start": (passes, with_model(backward=always_adds), {"calls"}),
    "a scalar argument": (passes, {"update": other_limit}, {"calls"}),
    "an update is missing": (passes, {"update": lambda *_: None}, {"count", "calls", "memory"}),
    "a dtype": (passes, {"acc_dtype": lambda _: torch.float64}, {"calls", "memory"}),
    "offsets in the arena": (arena, {"ALIGN": 512}, {"memory"}),
    "buckets are waited for earlier": (collectives, {"IN_FLIGHT": 1}, {"calls", "memory"}),
    "unit of a bucket": (collectives, {"ALIGN": 256}, {"calls", "buckets"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_of_the_schedule_is_seen(change: str) -> None:
    where, values, parts = CHANGES[change]
    plain = planned(SMALL, B=2, T=16, **ONE)
    with replaced(where, **values):
        assert differs(plain, planned(SMALL, B=2, T=16, **ONE)) == parts
    assert differs(plain, planned(SMALL, B=2, T=16, **ONE)) == set()


def test_a_bucket_of_another_size_is_seen() -> None:
    plain, other = (planned(SMALL, B=2, T=16, **{**ONE, "bucket_bytes": size}) for size in (1 << 12, 1 << 18))
    assert "buckets" in differs(plain, other)


# --- the loss curve


def platform() -> str:
    """The causes of other bits: processor, torch's instruction set and torch's version."""
    info = dict.fromkeys(("model name", "cpu family", "model"), "?")
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() in info:
            info[name.strip()] = value.strip()
    cpu = f"{info['model name']}, family {info['cpu family']} model {info['model']}"
    return f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def synthetic_tokens(count: int, V: int, seed: int = 1234) -> Tensor:
    """A Markov chain in which every token has four successors, with probabilities 8, 4, 2 and 1 in 15."""
    rng = np.random.Generator(np.random.PCG64(seed))
    successors = (rng.random((V, 4)) * V).astype(np.int64)
    choices = np.searchsorted(np.array([8, 12, 14]) / 15, rng.random(count))
    tokens = [0]
    for choice in choices:
        tokens.append(int(successors[tokens[-1], choice]))
    return torch.tensor(tokens)


def recorded_curve() -> list[float]:
    """Losses of 50 fp32 steps, two micro-steps each, on the synthetic chain."""
    A, B, T = 2, 2, 32
    engine = Engine(EngineSpec(CURVE, B=B, T=T))
    stream, losses = synthetic_tokens(50 * A * B * T, CURVE.V), []
    for step in range(50):
        part = stream[step * A * B * T :][: A * B * T + 1]
        lr = learning_rate("cosine", step, peak=1e-2, warmup=5, horizon=50, final=0.1)
        engine.train_step(part[:-1].view(A, B, T), part[1:].view(A, B, T), lr=lr, step=step)
        losses.append(engine.stats()["loss"])
    return losses


def test_loss_curve():
    golden, got = json.loads((GOLDEN / "cpu_fp32_curve.json").read_text()), recorded_curve()
    if golden["recorded_on"] == platform():
        assert got == golden["losses"]
    assert got == pytest.approx(golden["losses"], rel=1e-4)
    assert got[0] == pytest.approx(math.log(CURVE.V), rel=0.05)
    assert got[-1] < 2.0


def store() -> None:
    """Write tests/golden anew."""
    recordings = {name: record() for name, record in CASES.items()}
    digests = {name: recording.digest() for name, recording in recordings.items()}
    (GOLDEN / "replay.json").write_text(json.dumps(digests, indent=0) + "\n")
    for name in READABLE:
        (GOLDEN / f"{name}.txt").write_text("\n".join(recordings[name].lines()) + "\n")
    curve = {"recorded_on": platform(), "losses": recorded_curve()}
    (GOLDEN / "cpu_fp32_curve.json").write_text(json.dumps(curve, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(*CASES[sys.argv[1]]().lines(), sep="\n")
    else:
        store()
