"""The answers of `plan` for a step on many GPUs: the exchange by hand, and the table by number of GPUs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from test_plan import on

from daybreak.cli import plan as command
from daybreak.cli.main import main
from daybreak.config import resolve
from daybreak.engine import DTYPES
from daybreak.engine.collectives import Sharding
from daybreak.engine.moments import final_moments
from daybreak.engine.params import ParamTable
from daybreak.models.registry import build_model
from daybreak.parallel import Group
from daybreak.report.gpus import SEVERAL_GPUS
from daybreak.report.plan import plan
from daybreak.report.scaling import NETWORK, bandwidth, exposed_gradients, exposed_weights, scaling
from daybreak.shapes import GPT2Config


def test_model_of_the_exchange_by_hand() -> None:
    """2 ranks, three buckets of which the middle one waits for the first, the last for its own gradient."""
    model = build_model(GPT2Config(L=2, C=128, NH=2, max_T=128, V=256))
    table = ParamTable(model.rows())
    sharding = Sharding(table, final_moments(model, table), Group(0, 2), 1, 1)
    block, embedding = 12 * 128 * 128, (256 + 128) * 128
    vectors = 2 * 13 * 128 + 2 * 128
    assert [sharding.size(k) * 2 for k in sharding.order] == [block, embedding, block, vectors]
    rate = 2.0 * block  # bytes a second; a block's shard, 2 bytes an element, goes in half a second
    last = 9.0 + 0.1 + 0.5 + 0.1 + 0.5 * vectors / block
    assert exposed_gradients(sharding, 2, {0: 1.0, 1: 1.25, 2: 9.0}, 9.0, rate, 0.1) == pytest.approx(last - 9.0)
    early = 1.0 + 0.6 + 0.1 + 0.5 * embedding / block + 0.6 + 0.1 + 0.5 * vectors / block
    flat = {0: 1.0, 1: 1.25, 2: 1.25}
    assert exposed_gradients(sharding, 2, flat, 1.25, rate, 0.1) == pytest.approx(early - 1.25)
    first = 0.1 + 0.5 * vectors / block  # the weights: what forward wants first, then the rest beside it
    rest = 2 * 0.6 + 0.1 + 0.5 * embedding / block
    assert exposed_weights(sharding, 2, 9.0, rate, 0.1) == pytest.approx(first)
    assert exposed_weights(sharding, 2, 1.0, rate, 0.1) == pytest.approx(first + rest - 1.0)


def test_steps_on_many_cards() -> None:
    config = resolve("gpt2-1558M")[0]
    one, eight, many = scaling(config, "h100", (1, 8, 512))
    assert one.seconds == one.alone == pytest.approx(1048576 / 56367)
    assert one.exposed == one.exchange == 0
    p = on("gpt2-1558M", gpus=8)
    assert eight.exchange == pytest.approx(2 * 2 * p.parameters * 7 / 8 / (0.73 * 450e9), rel=0.01)
    assert eight.alone / eight.seconds == pytest.approx(SEVERAL_GPUS, abs=0.001)  # nearly all of it is hidden
    assert (eight.B, eight.micro_steps, many.B, many.micro_steps) == (16, 8, 2, 1)
    assert many.exposed > many.alone  # 2 rows are over before their gradients are sent
    assert bandwidth("h100", 8) == bandwidth("h100", 16, 100) == 0.73 * 450e9
    assert bandwidth("h100", 16) == 0.73 * 400e9
    wide = scaling(config.override({"parallel.bucket_bytes": 1 << 28}), "h100", (512,))[0]
    assert wide.exposed < many.exposed / 2  # fewer buckets, fewer turns of the ring
    third = scaling(config.override({"parallel.zero": 2}), "h100", (8,))[0]
    assert third.exchange == pytest.approx(eight.exchange * (8 + 1) / 2, rel=0.01)
    assert third.mib < eight.mib


def test_the_table_rests_on_the_speed_of_the_line_above_it() -> None:
    """In fp8 one GPU is faster there too."""
    for compute in ("bf16", "fp8"):
        config = resolve("gpt2-1558M")[0].override({"precision.compute": compute})
        (eight,) = scaling(config, "h100", (8,))
        rate, _ = on("gpt2-1558M", gpus=8, precision__compute=compute).tok_s
        assert eight.alone == pytest.approx(SEVERAL_GPUS * 1_048_576 / rate)


@pytest.mark.parametrize(
    ("target", "gpu", "keys"),
    [
        ("gemma3-270m", "h100", {"batch.B": 4, "batch.T": 1024}),
        ("gpt2-124M", "t4", {"batch.B": 4}),
        ("d12", "h100", {"precision.compute": "fp32"}),
        ("d12", "h100", {"lora.rank": 16}),
        ("d12", "h100", {"kernels.attention": "torch"}),
    ],
)
def test_steps_of_unknown_speed_have_their_memory_and_exchange(target: str, gpu: str, keys: dict[str, Any]) -> None:
    """A size of heads, a GPU, a precision, adapters and kernels that nobody measured."""
    config = resolve(target, {"batch.total_tokens": 1 << 21, **keys})[0]
    for gpus, row in zip((8, 64), scaling(config, gpu, (8, 64)), strict=True):
        p = plan(config, gpu=gpu, gpus=gpus)
        assert (row.alone, row.seconds, row.exposed) == (None, None, None)
        assert row.mib == (p.nbytes + p.outside) // (1 << 20)
        sent = p.arena.sharding.volume(DTYPES[p.compute], p.micro_steps)
        assert row.exchange == sent / bandwidth(gpu, gpus)
        assert row.micro_steps == (1 << 21) // (config.batch.B * config.T * gpus)


def test_unknown_speed_and_a_number_that_does_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "nanochat-d12", "--gpu", "h100", "--gpus", "8,16"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" +(8|16) ", line)]
    assert [row[:3] + row[5:9] for row in rows] == [["8", "32", "1", *["n/a"] * 4], ["16", "16", "1", *["n/a"] * 4]]
    assert main(["plan", "gpt2-1558M", "--gpu", "h100", "--gpus", "8,24"]) == 2
    out, err = capsys.readouterr()
    assert out == ""  # no half of a plan
    assert "--gpus 24: batch.total_tokens = 1048576 is not a multiple" in err
    assert "take 16 or 32 in its place." in err


def test_steps_on_many_cards_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124M", "--gpu", "h100", "--gpus", "1,8,32", "--steps", "1000"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ +\d+\*? +\d+ ", line)]
    assert [row[:3] for row in rows] == [["1", "64", "8"], ["8", "64", "1"], ["32", "16", "1"]]
    assert rows[0][6:8] == ["616,334", "100.0%"]
    assert "73% of 450 GB/s inside a host of 8 and of 400 between hosts" in out
    (network,) = (o.default for o in command.plan.params if o.name == "network")  # stands twice
    assert network == NETWORK
