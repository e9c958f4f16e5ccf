"""TensorBoard and W&B (offline) get what metrics.jsonl has, by their own readers; a failing one stops nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

import daybreak
from daybreak.cli.main import main
from daybreak.config import Config
from daybreak.manifest import read_id
from daybreak.training import sinks

SMALL = {"model.L": 1, "model.C": 16, "model.NH": 2, "model.max_T": 16, "model.V": 257, "data.name": "my",
         "data.tokenizer": "bytes", "batch.B": 2, "eval.tokens": 64, "eval.every": 2, "eval.sample_tokens": 4,
         "run.steps": 4, "run.device": "cpu"}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("What a run tells, it tells to all who listen.\n" * 50)
    assert main(["prepare", "my.txt", "--tokenizer", "bytes"]) == 0
    return tmp_path


def train(**keys: Any) -> daybreak.Run:
    return daybreak.train(
        Config().override({**SMALL, "run.name": "x", **{k.replace("__", "."): v for k, v in keys.items()}})
    )


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """The history rows of an offline run: a file of LevelDB log records in 32 kB blocks, each a protobuf of wandb's."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, rows, at, record = file.read_bytes(), [], 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the rest of a block is padding
            at += 32768 - at % 32768
        _crc, size, kind = struct.unpack_from("<IHB", data, at)
        record = (record if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            message = wandb_internal_pb2.Record.FromString(record)
            if message.WhichOneof("record_type") == "history":
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in message.history.item})
    return rows


def test_both_hold_what_the_metrics_hold(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(log__sinks="tensorboard,wandb")
    steps, vals = run.metrics("step"), run.metrics("val")
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [
        (r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in steps
    ]
    assert [(e.step, e.value) for e in board.Scalars("val/bpb")] == [
        (r["step"], pytest.approx(r["bpb"], rel=1e-6)) for r in vals
    ]
    assert "train/mfu" not in board.Tags()["scalars"]  # unknown on a CPU
    rows = wandb_history(run.path)
    assert [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r] == [(r["step"], r["loss"]) for r in steps]
    assert [(r["step"], r["val/loss"]) for r in rows if "val/loss" in r] == [(r["step"], r["loss"]) for r in vals]
    assert [r["sample"] for r in rows if "sample" in r] == [r["text"] for r in run.metrics("sample")]
    # W&B links to its logs outside of the run. The run resumes all the same, and is the same run for W&B.
    assert any(path.is_symlink() for path in run.path.glob("wandb/*/logs/*"))
    longer = run.config.override({"run.steps": 6, "optim.horizon": 6})
    assert daybreak.train(longer, resume=run.path).metrics("step")[-1]["step"] == longer.run.steps
    assert {path.stem for path in run.path.glob("wandb/*/run-*.wandb")} == {f"run-{read_id(run.path)}"}


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_a_failing_sink_stops_neither_the_run_nor_the_others(here: Path, monkeypatch, when: str) -> None:
    calls: list[str] = []

    def fail(*_: Any) -> None:
        calls.append(when)
        raise OSError("disk full")

    seen: list[int] = []
    monkeypatch.setitem(sinks.OPEN, "wandb", lambda c, f: (lambda step, *_: seen.append(step), lambda: seen.append(-1)))
    opened = {"write": lambda *_: (fail, lambda: None), "close": lambda *_: (lambda *_: None, fail), "open": fail}
    monkeypatch.setitem(sinks.OPEN, "tensorboard", opened[when])
    run = train(log__sinks="tensorboard,wandb")
    assert run.metrics("step")[-1]["step"] == 4
    assert len(calls) == 1  # it is not asked again
    assert {1, 2, 3, 4} <= set(seen)
    assert seen[-1] == -1


def test_a_missing_package_is_said_before_the_run(here: Path, monkeypatch) -> None:
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        daybreak.Error, match=r"log.sinks = 'wandb' needs the package wandb; pip install -e '.\[wandb\]'"
    ):
        train(log__sinks="wandb")
    assert not (here / "runs").exists()
