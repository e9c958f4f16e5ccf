"""Memory is planned, exact, and all of it: nothing is allocated after the first step."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from snapshots import FACTS
from torch.profiler import ProfilerActivity, profile

from daybreak.config_keys import GuardConfig
from daybreak.data.loader import Loader
from daybreak.data.shards import read_header
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.device import cpu_has_bf16
from daybreak.evaluate.validation import validate
from daybreak.generate import Sampling, Text, write_all
from daybreak.kernels import matmul
from daybreak.kernels.optimizer import FLAT_CHUNK
from daybreak.models.gpt2 import GPT2
from daybreak.parallel import Group
from daybreak.shapes import GPT2Config, parse_shape
from daybreak.state.checkpoint import save_checkpoint
from daybreak.state.restore import Staging, snapshot
from daybreak.state.run_folder import RunFolder
from daybreak.state.safetensors_io import SafetensorsFile, create_safetensors, fill_safetensors
from daybreak.state.saver import Saver

SHAPE = GPT2Config(L=3, C=64, NH=4, max_T=64, V=257)
SCALAR = 64  # bytes: torch wraps Python numbers in tensors of a few bytes for the length of one call


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("recompute", [0, 1, 2])
@pytest.mark.parametrize("train", [True, False])
def test_training_allocates_exactly_the_plan(compute: str, recompute: int, train: bool) -> None:
    spec = EngineSpec(SHAPE, B=4, T=48, compute=compute, recompute=recompute, train=train)
    _, table, arena = plan_engine(spec)
    engine = Engine(spec)
    assert engine.arena.entries == arena.entries
    allocated = {name: buffer.untyped_storage().nbytes() for name, buffer in engine.frame.buffers.items()}
    assert allocated == arena.sizes()
    assert sum(allocated.values()) == arena.nbytes
    # by hand: what the flat buffers must hold
    width = {"fp32": 4, "bf16": 2, "fp64": 8}[compute]
    assert arena.sizes()["weights"] == table.numel * width
    assert arena.sizes().get("masters", 0) == (table.numel * 4 if compute == "bf16" and train else 0)
    assert arena.sizes().get("v", 0) == (table.numel * max(width, 4) if train else 0)


def test_tensors_alive_together_never_overlap() -> None:
    for recompute in (0, 1, 2):
        _, _, arena = plan_engine(EngineSpec(SHAPE, B=4, T=48, recompute=recompute))
        sizes = arena.sizes()
        for e in arena.entries:
            assert e.offset % 256 == 0
            assert e.offset + e.nbytes <= sizes[e.buffer]
        for a, b in combinations(arena.entries, 2):
            if a.buffer == b.buffer and a.first <= b.last and b.first <= a.last:
                assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset, (a, b)


def test_recompute_and_sharing_save_what_they_should() -> None:
    """d12, B=4 T=1024 in bf16 against llm.c's formula (spec of its activations), which shares nothing by lifetime."""
    llmc = {0: 1590, 1: 1326, 2: 1182}
    for level, mib in llmc.items():
        _, _, arena = plan_engine(EngineSpec(parse_shape("d12"), B=4, T=1024, compute="bf16", recompute=level))
        assert arena.sizes()["activations"] / 2**20 < mib


def allocations(path: Path, run: Any, library: tuple[str, ...] = ()) -> list[int]:
    """Bytes of every allocation of tensor memory while `run()` runs, those inside torch's own operators too.

    What happens inside the operators named in `library` is left out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    inside = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("name") in library]
    made = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]" and e["args"]["Bytes"] > 0]
    return [size for at, size in made if not any(a <= at <= b for a, b in inside)]


class AtOnce:
    """An executor without a thread."""

    def submit(self, fn: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args))
        return done


def test_the_meter_sees_temporaries(tmp_path: Path) -> None:
    x = torch.ones(1000)
    assert 4000 in allocations(tmp_path / "trace", lambda: torch.logsumexp(x + 1, 0))


@pytest.mark.parametrize("zero", [0, 1])
def test_one_of_two_ranks_saves_and_sets_split_masters_in_pieces(zero: int, tmp_path: Path) -> None:
    """On a GPU what both take stays reserved: a rank's whole fp32 weights were 254 MiB of GPT-2 124M on 2 GPUs."""
    shape, group = GPT2Config(L=1, C=64, NH=2, max_T=16, V=50257), Group(world=2)
    engine = Engine(EngineSpec(shape, B=1, T=8, compute="bf16", masters="split", zero=zero), group=group)
    taken = snapshot(engine, 0, {})
    create_safetensors(tmp_path / "model.safetensors", taken.model)
    parts, wte = taken.parts, torch.randn(engine.param("wte").shape, generator=torch.Generator().manual_seed(1))
    most = 4 * FLAT_CHUNK
    assert wte.nbytes > 2 * most
    sizes = allocations(tmp_path / "trace", lambda: engine.set_exact("wte", wte))
    assert 0 < max(sizes) <= most
    write = partial(fill_safetensors, tmp_path / "model.safetensors", {name: parts(name) for name in taken.model})
    assert 0 < max(allocations(tmp_path / "trace", write)) <= most
    written = torch.empty(wte.numel())
    SafetensorsFile(tmp_path / "model.safetensors").read("wte", written)
    for where, _ in engine.comm.sharding.within("wte", engine.comm.sharding.shards()):
        assert torch.equal(written[where], wte.view(-1)[where])


def test_onednns_products_take_pieces_of_eight_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one exception in fp32: what oneDNN returns on AMD's CPUs, for all three products of a linear layer."""
    monkeypatch.setattr(matmul, "onednn", lambda: torch.ops.mkldnn._linear_pointwise)
    x, w, dout = torch.ones(64, 1024), torch.ones(3072, 1024), torch.ones(64, 3072)
    wide = torch.ones(1024, 4096)
    for run in (
        lambda: matmul.matmul_forward(dout, x, w),
        lambda: matmul.matmul_forward(wide, torch.ones(1024, 64), torch.ones(4096, 64)),
        lambda: matmul.matmul_backward_input(x, dout, w),
        lambda: matmul.matmul_backward_weight(w, dout, x, accumulate=True),
    ):
        run()
        assert 0 < max(allocations(tmp_path / "trace", run)) <= 4 * matmul.PIECE


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("compute", ["fp32", "fp64", "bf16"])
def test_nothing_is_allocated_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str, recompute: int
) -> None:
    """Steps with accumulation, validation, sampling, both ways of saving: no allocation larger than a wrapped number.

    The saver's thread is this one here: the meter sees no other.
    """
    monkeypatch.setattr("daybreak.state.saver.ThreadPoolExecutor", lambda *_, **__: AtOnce())
    rng = np.random.Generator(np.random.PCG64(1))
    shard = tmp_path / "x.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 5000
    shard.write_bytes(header.tobytes() + rng.integers(0, 257, 5000).astype("<u2").tobytes())
    loader = Loader([read_header(shard)], 48, V=257)
    engine = Engine(EngineSpec(SHAPE, B=4, T=48, compute=compute, recompute=recompute, guard=GuardConfig(loss_z=3.0)))
    lengths = get_tokenizer("bytes").lengths(257)
    staging, saver = Staging(engine), Saver(RunFolder(tmp_path / "staged"), 1, 0)

    def everything(step: int) -> None:
        tokens, targets = map(torch.from_numpy, loader.batch(8 * step, 8))
        engine.begin_step(lr=1e-3, step=step, valid=8 * 48)
        for start in (0, 4):
            engine.micro_step(tokens[start : start + 4], targets[start : start + 4], first=start == 0)
        engine.update()
        engine.stats()
        validate(engine, loader, lengths, 48 * 6)  # the last batch is a partial one
        write_all(engine, [Text([256], Sampling(5, temperature=0.8, top_k=20))])
        save_checkpoint(tmp_path / "checkpoints", snapshot(engine, step, FACTS))
        saver.start(snapshot(engine, step, FACTS, staging), 0, time.perf_counter())
        assert saver.result(wait=True)

    # On CPUs with bf16 instructions oneDNN packs the operands of a bf16 product into workspace of its own.
    library = ("aten::mm", "aten::addmm", "aten::addmm_") if compute == "bf16" and cpu_has_bf16() else ()
    pointers = {name: buffer.data_ptr() for name, buffer in engine.frame.buffers.items()}
    everything(0)
    for step in (1, 2):
        made = allocations(tmp_path / "trace", lambda step=step: everything(step), library)  # type: ignore[misc]
        assert max(made, default=0) <= SCALAR, sorted(made)[-10:]
    assert pointers == {name: buffer.data_ptr() for name, buffer in engine.frame.buffers.items()}


def test_tensors_that_only_a_later_schedule_needs_together_share_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the logits may lie where the last residual did, unless decode reads both."""
    plain = GPT2.decode

    def head_of_the_residual(self, f, *args):
        return plain(self, f, *args[:-1], f.a("h.11.residual3", len(args[-1]), self.cfg.C))

    options = {"B": 4, "T": 1024, "compute": "bf16", "train": False, "device_type": "cuda"}

    def overlap() -> bool:
        entries = {e.name: e for e in plan_engine(EngineSpec(parse_shape("d12"), **options))[2].entries}
        a, b = entries["logits"], entries["h.11.residual3"]
        return a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes

    assert overlap()
    monkeypatch.setattr(GPT2, "decode", head_of_the_residual)
    assert not overlap()


def test_many_short_texts_fit_the_plan():
    """b texts of any length t with b t <= B T: the plan knows the scratch of each."""
    engine = Engine(EngineSpec(GPT2Config(L=2, C=64, NH=2, max_T=512, V=300), B=1, T=512, train=False, rows=4))
    for b, t in ((4, 128), (3, 170), (2, 256), (1, 512), (4, 5)):
        assert torch.isfinite(engine.prefill(0, [[1] * t] * b)).all()
