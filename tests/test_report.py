"""`daybreak bench` and `daybreak doctor`: what they count and what they say, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import daybreak
import daybreak.report.bench as report
from daybreak.cli.main import main
from daybreak.engine import Engine, EngineSpec
from daybreak.kernels import FILES, OPS
from daybreak.report.bench import Bench, Cost, meter, nbytes_of, print_bench
from daybreak.report.doctor import machine
from daybreak.shapes import GPT2Config

SHAPE = GPT2Config(L=2, C=32, NH=2, max_T=16, V=200)


def test_bytes_of_a_call() -> None:
    x = torch.zeros(4, 8)  # 128 bytes
    assert nbytes_of(OPS["matmul_forward"], {"out": x, "x": x.clone()}) == 256
    given = {"dw": x, "dout": x, "x": x, "accumulate": True}
    assert nbytes_of(OPS["matmul_backward_weight"], given) == 512  # dw is read and written
    assert nbytes_of(OPS["classifier"], {"logits": x, "backward": True}) == 256
    assert nbytes_of(OPS["classifier"], {"logits": x, "backward": False}) == 128
    given = {"dx": x, "dw": x, "again": x, "accumulate_dx": True, "accumulate": False}
    assert nbytes_of(OPS["layernorm_backward"], given) == 512
    given = {"weights": x.bfloat16(), "grads": x.bfloat16(), "m": x, "v": x}  # 32 elements
    assert nbytes_of(OPS["adamw_update"], given | {"masters": x.to(torch.int16)}) == 32 * 26
    assert nbytes_of(OPS["adamw_update"], given | {"masters": x}) == 32 * 28  # weights are only written
    assert nbytes_of(OPS["adamw_update"], given | {"masters": None}) == 32 * 22


def test_flops_of_a_call() -> None:
    x, w, out = torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(4, 16)
    assert OPS["matmul_forward"].flops({"out": out, "x": x, "w": w}) == 2 * 4 * 8 * 16
    assert OPS["matmul_backward_input"].flops({"dx": x, "dout": out, "w": w}) == 2 * 4 * 8 * 16
    assert OPS["matmul_backward_weight"].flops({"dw": w, "dout": out, "x": x}) == 2 * 4 * 8 * 16
    q = torch.zeros(2, 3, 5, 7)  # B, T, NH, HS: 6 pairs of a query and a key it sees, two products
    assert OPS["attention_forward"].flops({"q": q}) == 2 * 2 * (2 * 5 * 7 * 6)
    assert OPS["layernorm_forward"].flops({"x": x}) == 0


def test_every_call_of_a_step_is_metered() -> None:
    engine = Engine(EngineSpec(SHAPE, B=2, T=16))
    costs = meter(engine)
    calls = [call.name for call in engine.arena.calls]
    assert {name: c.calls for name, c in costs.items()} == {name: calls.count(name) for name in set(calls)}
    assert all(c.seconds > 0 and c.nbytes > 0 and c.backend == "torch" for c in costs.values())
    L, n, C = SHAPE.L, 32, SHAPE.C
    blocks, head = 2 * n * 12 * C * C * L, 2 * n * SHAPE.Vp * C
    products = sum(c.flops for name, c in costs.items() if name.startswith("matmul"))
    assert products == 3 * (blocks + head)
    assert set(costs) <= set(OPS)
    assert torch.isfinite(engine.state["stats"][:2]).all()  # the engine works on


def test_packed_rows_are_benched_as_one_document_each(capsys: pytest.CaptureFixture[str]) -> None:
    """`finetune` on chats has such rows. They compute the same as plain rows, so the losses are equal."""
    losses = []
    for documents in (False, True):
        engine = Engine(EngineSpec(SHAPE, B=2, T=16, documents=documents), seed=1)
        engine.begin_step(lr=0.0, step=0, valid=32)
        part = report.inputs(engine, 3)[2]
        assert [tuple(x.shape) for x in part] == [(2, 16)] * (3 if documents else 2)
        assert torch.equal(part[0][:, 1:], part[1][:, :-1])
        engine.micro_step(*part, first=True)
        losses.append(engine.update().values()[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    flags = "--model.L 1 --model.C 16 --model.NH 2 --model.max_T 16 --model.V 200 --batch.B 2 --batch.total_tokens 64"
    packed = "--data.packed true --lora.rank 2 --run.device cpu --seconds 0.01"
    assert main(["bench", "d12", *flags.split(), *packed.split()]) == 0
    assert "lora_forward" in capsys.readouterr().out


def test_step_times_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only advances with the updates, 10 ms each, then 20: the first five steps do not count."""
    engine, now, step = Engine(EngineSpec(SHAPE, B=2, T=16)), [0.0], [0]
    update = engine.update

    def timed_update():
        step[0] += 1
        now[0] += 0.02 if step[0] > report.WARM_STEPS else 0.01
        return update()

    monkeypatch.setattr(engine, "update", timed_update)
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    assert report.time_steps(engine, 1, 0.09) == pytest.approx([0.02] * 5)


def test_the_table_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {
        "gelu_forward": Cost("torch", 3, 0.004, 2_000_000_000, 0),
        "matmul_forward": Cost("torch", 2, 0.01, 1, 10**10),
    }
    print_bench(Bench("a card", 1000, 2, [0.4, 0.5, 0.9], 77, 1e12, 2e12, 0.25, costs))
    out = " ".join(capsys.readouterr().out.split())
    assert "500.0 ms a step of 1,000 tokens (2 micro-steps), 2,000 tok/s, MFU 25.0 %, 77 MiB" in out
    assert "│ gelu_forward │ torch │ 3 │ 4.00 │ 2.00 │ 2.00x │ 0.50 │ │" in out
    assert "│ matmul_forward │ torch │ 2 │ 10.00 │ 5.00 │ 2.00x │ 0.00 │ 1 │" in out
    assert "│ all │ │ │ 14.00 │ 7.00 │ 2.00x │" in out
    assert "copy 1.000 TB/s, matmul 2.0 TFLOP/s" in out
    print_bench(Bench("cpu", 1000, 2, [0.4, 0.5, 0.9], 77, 2e9, 3e10, None, costs))  # in TB/s all would be 0.00
    out = " ".join(capsys.readouterr().out.split())
    assert "copy 2.000 GB/s, matmul 30.0 GFLOP/s" in out
    assert "┃ GB/s ┃ GFLOP/s ┃" in out
    assert "│ matmul_forward │ torch │ 2 │ 10.00 │ 333.33 │ 0.03x │ 0.00 │ 1000 │" in out


def test_bench_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--model.L 1 --model.C 16 --model.NH 2 --model.max_T 16 --model.V 200 --batch.B 2 --batch.total_tokens 64"
    assert main(["bench", "d12", *flags.split(), "--run.device", "cpu", "--seconds", "0.01"]) == 0
    assert "2 micro-steps" in capsys.readouterr().out
    assert main(["bench", "d12", *flags.split(), "--run.device", "cpu", "--tune", "."]) == 2
    assert "run.device must be a CUDA device" in capsys.readouterr().err


def products_of_gpt2(B: int, C: int) -> set[str]:
    """The products of a step in bf16 with T = 1024 and GPT-2's vocabulary, written down from the layers."""
    n, rows, Vp = B * 1024, 8192, 50304  # rows: of one chunk of logits
    found = {
        f"tn m{3 * C} n{n} k{C} bias beta0", f"tn m{C} n{n} k{C} bias add", f"tn m{4 * C} n{n} k{C} gelu beta0",
        f"tn m{C} n{n} k{4 * C} bias add", f"tn m{Vp} n{rows} k{C} plain beta0", f"nn m{C} n{rows} k{Vp} plain beta0",
        f"nn m{C} n{n} k{3 * C} plain beta0", f"nn m{C} n{n} k{C} plain beta0", f"nn m{C} n{n} k{4 * C} plain beta0",
        f"nn m{4 * C} n{n} k{C} dgelu beta0",
    }  # fmt: skip
    for mode in ("beta0", "beta1"):  # the first micro-step writes a weight's gradient, others add to it
        sides = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
        found |= {f"nt m{i} n{o} k{n} plain {mode}" for i, o in sides} | {f"nt m{C} n{Vp} k{rows} plain {mode}"}
    return {f"bf16 {product}" for product in found}


@pytest.mark.parametrize(("shape", "B", "C"), [("d48", 16, 1600), ("d12", 64, 768)])
@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_the_tuner_gets_every_product_of_a_step(shape: str, B: int, C: int, recompute: int) -> None:
    flags = {"batch.B": B, "batch.recompute": recompute, "precision.compute": "bf16"}
    keys = report.step_products(daybreak.Config.from_target(shape).override(flags), torch.device("cuda"))
    assert {str(key) for key in keys} == products_of_gpt2(B, C)


@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_the_tuner_gets_every_product_of_a_step_in_fp8(recompute: int) -> None:
    """The matmuls of blocks read fp8, sum over neighbours, and take the slow sum for weights. The head's are bf16's."""
    n, C = 16384, 1600
    flags = {"batch.B": 16, "batch.recompute": recompute, "precision.compute": "fp8"}
    keys = report.step_products(daybreak.Config.from_target("d48").override(flags), torch.device("cuda"))
    sides = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    forward = {f"e4m3 tn m{o} n{n} k{i} bias {'add' if o == C else 'beta0'}" for i, o in sides}
    inputs = {f"e5m2 tn m{i} n{n} k{o} plain beta0" for i, o in sides}
    weights = {f"e5m2slow tn m{i} n{o} k{n} plain {mode}" for i, o in sides for mode in ("beta0", "beta1")}
    head = {key for key in products_of_gpt2(16, C) if "50304" in key}
    assert {str(key) for key in keys} == forward | inputs | weights | head


def test_the_tuner_is_called_for_the_products_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench --tune` from the configuration to the table; of the card only its answers are missing."""
    from daybreak.kernels.cuda import tune

    given: list[object] = []
    monkeypatch.setattr(report, "pick_device", torch.device)
    monkeypatch.setattr(report, "missing_on", lambda device: {})
    monkeypatch.setattr(report, "set_precision", lambda config, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", given.append)
    monkeypatch.setattr(tune, "search", lambda *asked: given.extend(asked))
    flags = {"batch.B": 64, "precision.compute": "bf16", "run.device": "cuda"}
    report.tune_products(daybreak.Config.from_target("d12").override(flags), "tables")
    assert given[0] == torch.device("cuda")
    assert {str(key) for key in given[1]} == products_of_gpt2(64, 768)
    assert given[2] == Path("tables")


def test_doctor_names_the_backends() -> None:
    lines = machine()
    assert lines[0].startswith(f"daybreak {daybreak.__version__}, Python ")
    assert lines[-1].startswith("Ready: trains on ")
    assert lines[-1].endswith(". To try it out for two minutes: daybreak doctor --check")
    if not torch.cuda.is_available():
        assert "GPU: none that torch can use" in lines
        assert lines[-1].startswith(f"Ready: trains on the CPU with {torch.get_num_threads()} threads. ")
        assert [line.split() for line in lines if line.startswith("  ")] == [[g, "torch"] for g in sorted(FILES)]
