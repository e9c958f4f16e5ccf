"""Whole runs: what they write, that resuming changes nothing, that stopping loses nothing. Real files and processes."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import socket
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import daybreak
from daybreak.config import Config
from daybreak.errors import ConfigError
from daybreak.files import HOLDER
from daybreak.manifest import checksum
from daybreak.state import saver
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.metrics import MetricsWriter
from daybreak.state.run_folder import RunFolder
from daybreak.state.throughput import Throughput
from daybreak.training import loop
from daybreak.training.stop import Stop

V = 97


def write_shard(path: Path, tokens: np.ndarray[Any, Any]) -> None:
    """A token shard by hand, from the format's description: 256 little-endian int32, then uint16 tokens."""
    header = struct.pack("<256i", 20240520, 1, tokens.size, *[0] * 253)
    path.write_bytes(header + tokens.astype("<u2").tobytes())


def markov(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Tokens in which each is mostly its predecessor's fixed successor: learnable, and not by frequency alone."""
    rng = np.random.Generator(np.random.PCG64(seed))
    successor = np.random.Generator(np.random.PCG64(0)).permutation(V)
    jump, noise = rng.random(count) < 0.2, rng.integers(0, V, count)
    out = np.empty(count, np.int64)
    token = 0
    for i in range(count):
        token = int(noise[i]) if jump[i] else int(successor[token])
        out[i] = token
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "x_train_000000.bin", markov(3000, 1))
    write_shard(folder / "x_train_000001.bin", markov(1500, 2))
    write_shard(folder / "x_val_000000.bin", markov(1200, 3))
    return folder


def config(shards: Path, runs: Path, name: str, **values: Any) -> Config:
    """A tiny model; 4 samples of 16 tokens a micro-step, 2 micro-steps: an epoch is 280 samples, 35 steps."""
    keys = {
        "model.L": 2, "model.C": 32, "model.NH": 2, "model.max_T": 16, "model.V": 257,
        "data.train": str(shards / "*train*"),
        "data.val": str(shards / "*val*"), "data.tokenizer": "bytes", "batch.B": 4, "batch.total_tokens": 128,
        "optim.lr": 3e-3, "schedule.warmup": 1, "eval.every": 10, "eval.tokens": 512, "eval.sample_tokens": 8,
        "checkpoint.every": 0, "run.dir": str(runs), "run.name": name, "run.steps": 20, "run.device": "cpu",
    }  # fmt: skip
    dotted = {k.replace("__", "."): v for k, v in values.items()}
    return Config().override(keys | dotted)


def losses(run: daybreak.Run) -> list[tuple[int, float, float, float]]:
    return [(r["step"], r["loss"], r["norm"], r["lr"]) for r in run.metrics("step")]


def weights(run: daybreak.Run) -> dict[str, torch.Tensor]:
    newest = run.checkpoints[0]
    optimizer = load_file(newest / "optimizer-00000-of-00001.safetensors")
    return load_file(newest / "model.safetensors") | {f"optimizer.{k}": v for k, v in optimizer.items()}


def assert_same(a: daybreak.Run, b: daybreak.Run) -> None:
    assert losses(a) == losses(b)
    assert [r["loss"] for r in a.metrics("val")] == [r["loss"] for r in b.metrics("val")]
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    for name in wa:
        assert torch.equal(wa[name], wb[name]), name


@pytest.mark.parametrize(
    ("compute", "masters", "first", "total"),
    [
        ("fp32", "auto", 7, 20), ("fp32", "auto", 33, 40), ("bf16", "fp32", 7, 20), ("bf16", "split", 7, 20),
        ("bf16", "none", 7, 20), ("fp64", "auto", 7, 12),
    ],
)  # fmt: skip
def test_resuming_is_bit_identical_to_never_having_stopped(
    shards: Path, tmp_path: Path, compute: str, masters: str, first: int, total: int
) -> None:
    """20 = 7 + 13; 40 = 33 + 7 crosses the end of the epoch after step 35."""
    make = {"precision__compute": compute, "precision__masters": masters, "guard__loss_z": 3.0}
    make |= {"precision__moments": "bf16"} if masters == "none" else {}
    straight = daybreak.train(config(shards, tmp_path, "straight", run__steps=total, **make))
    part = config(shards, tmp_path, "parts", run__steps=first, optim__horizon=total, **make)
    run = daybreak.train(part)
    assert run.config.run.steps == first
    resumed = daybreak.train(run.config.override({"run.steps": total}), resume=run.path)
    wanted = [r for r in straight.metrics("val") if r["step"] != first]
    assert [r["loss"] for r in resumed.metrics("val") if r["step"] != first] == [r["loss"] for r in wanted]
    assert losses(resumed) == losses(straight)
    a, b = weights(straight), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == b.keys()
    assert len(losses(straight)) == total


def test_other_kernels_are_told(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run whose bits rest on other things than before says which, in one line; an equal one says nothing."""
    caplog.set_level(logging.WARNING, logger="daybreak")
    run = daybreak.train(config(shards, tmp_path, "a", run__steps=3, optim__horizon=9))
    daybreak.train(run.config.override({"run.steps": 4}), resume=run.path)
    assert [m for m in caplog.messages if not m.startswith("the schedule ended at step")] == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    daybreak.train(run.config.override({"run.steps": 5}), resume=run.path)
    assert caplog.messages[-1] == "from here on bits may differ from an uninterrupted run: threads 1 -> 7"
    caplog.clear()
    other = {"run.steps": 6, "batch.B": 2, "batch.recompute": 1}
    daybreak.train(run.config.override(other), resume=run.path)
    changed = "batch.B 4 -> 2, batch.recompute 0 -> 1"
    assert caplog.messages == [f"from here on bits may differ from an uninterrupted run: {changed}"]
    assert load_checkpoint(daybreak.Run(run.path).checkpoints[0]).manifest["kernels"]["ranks"] == "1"


def test_another_version_of_the_code_is_told(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In one line at the start, and in metrics.jsonl. Version 0.3.0 wrote no hash of its source into env.json."""
    run = daybreak.train(config(shards, tmp_path, "a", run__steps=3, optim__horizon=9))
    env = run.path / "env.json"
    now = json.loads(env.read_text())
    commit = re.sub(r"^(\w{7})\w+", r", commit \1", now["commit"] or "")  # none in an installed package
    here = f"{now['daybreak']}{commit}, source"
    made = {"daybreak": "0.3.0", "commit": f"9dd760d{'4' * 33}", "python": "3.11.7"}
    edited = now | {"source": "0123456789ab"}
    said = []
    for steps, was in enumerate((made, now, edited, {}), 4):
        env.write_text(json.dumps(was))
        caplog.clear()
        daybreak.train(run.config.override({"run.steps": steps}), resume=run.path)
        said.append([m for m in caplog.messages if m.startswith("daybreak changed since")])
        assert json.loads(env.read_text()).keys() == now.keys()
    before = ("0.3.0, commit 9dd760d", f"{here} 0123456789ab")
    details = [f"{was} -> {here} {now['source']}" for was in before]
    assert [bool(lines) for lines in said] == [True, False, True, False]
    assert [lines[0].split(": ", 1)[1].split(";")[0] for lines in said if lines] == details
    assert [(r["step"], r["detail"]) for r in run.metrics("event") if r["what"] == "code"] == [
        (3, details[0]), (5, details[1])
    ]  # fmt: skip


def test_a_run_that_another_process_holds_is_left_alone(shards: Path, tmp_path: Path) -> None:
    """Two starts that both found the name free: the one that comes second to the lock leaves nothing behind."""
    (tmp_path / "a").mkdir()
    folder, us = RunFolder(tmp_path / "a"), f"by process {os.getpid()} on {re.escape(socket.gethostname())}; wait or"
    with folder.locked():
        with pytest.raises(daybreak.Error, match=f"is being trained {us}"):
            daybreak.train(config(shards, tmp_path, "a"))
        for text in ("", "1 \x1b[31mred\n", "7 a b\n", f"{10**12} a\n", "\xff\n"):  # not written yet, or not by us
            (folder.path / HOLDER).write_text(text)
            with pytest.raises(daybreak.Error, match="by another process; wait"), RunFolder(folder.path).locked():
                pass
    assert not (tmp_path / "a/exit.json").exists()


def test_it_learns(shards: Path, tmp_path: Path) -> None:
    """The best possible loss is that of knowing the successor: about 1.7 nats; frequencies alone give ln 97 = 4.6."""
    run = daybreak.train(config(shards, tmp_path, "learn", run__steps=250, optim__lr=1e-2, eval__every=250))
    assert run.metrics("val")[0]["loss"] > 5.4
    assert run.metrics("val")[-1]["loss"] < 2.6


def test_the_run_folder(shards: Path, tmp_path: Path) -> None:
    run = daybreak.train(config(shards, tmp_path, "a", eval__sample_every=10, checkpoint__every=5, checkpoint__keep=2))
    assert json.loads((run.path / "exit.json").read_text())["code"] == 0
    assert [int(p.name[5:]) for p in run.checkpoints] == [20, 15]
    log = (run.path / "main.log").read_text().splitlines()
    assert [line.split()[0] for line in log if "tel" in line] == ["s:0", "s:10", "s:20"]
    assert [line.split()[0] for line in log if "trl" in line] == [f"s:{s}" for s in range(20)]
    for step, line in zip(run.metrics("step"), [line for line in log if "trl" in line], strict=True):
        assert line.endswith(f"trl:{step['loss']:.4f} lr:{step['lr']:.6f} norm:{step['norm']:.2f}")
    assert (run.path / "samples.txt").read_text().count("--- step") == 2
    steps = run.metrics("step")
    assert [s["tokens"] for s in steps] == [128 * (i + 1) for i in range(20)]
    assert {s["epoch"] for s in steps} == {0}
    assert run.config == daybreak.Run(run.path).config
    assert run.metrics("val")[-1]["tokens_evaluated"] == 512


def test_the_order_of_a_step(shards: Path, tmp_path: Path) -> None:
    """llm.c's: what is due after K updates is done in the order validation, sample, checkpoint, then update K + 1."""
    every = {"eval__every": 2, "eval__sample_every": 2, "checkpoint__every": 2, "checkpoint__background": False}
    run = daybreak.train(config(shards, tmp_path, "order", run__steps=4, **every))
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    kinds = [(r["kind"], r["step"]) for r in records if r["kind"] in ("val", "sample", "step", "checkpoint")]
    assert kinds == [
        ("val", 0), ("step", 1), ("step", 2), ("val", 2), ("sample", 2), ("checkpoint", 2), ("step", 3), ("step", 4),
        ("val", 4), ("sample", 4), ("checkpoint", 4),
    ]  # fmt: skip


def test_validation_does_not_depend_on_the_batch(shards: Path, tmp_path: Path) -> None:
    a = daybreak.train(config(shards, tmp_path, "b4", run__steps=1))
    b = daybreak.train(config(shards, tmp_path, "b8", run__steps=1, batch__B=8))
    c = daybreak.train(config(shards, tmp_path, "b1", run__steps=1, batch__B=1, batch__recompute=2))
    first = [run.metrics("val")[0]["loss"] for run in (a, b, c)]
    assert first[1] == pytest.approx(first[0], rel=1e-6)
    assert first[2] == pytest.approx(first[0], rel=1e-6)
    # and the micro-batch only cuts the same step's samples
    steps = [run.metrics("step")[0]["loss"] for run in (a, b, c)]
    assert steps[1] == pytest.approx(steps[0], rel=1e-6)
    assert steps[2] == pytest.approx(steps[0], rel=1e-6)


def test_a_batch_ramp_counts_tokens_and_data_once(shards: Path, tmp_path: Path) -> None:
    ramp = config(shards, tmp_path, "ramp", run__steps=6, batch__total_tokens=64, batch__ramp=[[2, 128], [4, 256]])
    run = daybreak.train(ramp)
    assert [r["tokens"] for r in run.metrics("step")] == [64, 128, 256, 384, 640, 896]
    part = daybreak.train(ramp.override({"run.name": "ramp2", "run.steps": 3, "optim.horizon": 6}))
    resumed = daybreak.train(part.config.override({"run.steps": 6}), resume=part.path)
    assert losses(resumed) == losses(run)


def test_overfitting_one_batch(shards: Path, tmp_path: Path) -> None:
    run = daybreak.train(config(shards, tmp_path, "o", run__steps=150, run__overfit=True, optim__lr=1e-2))
    assert run.metrics("step")[-1]["loss"] < 0.1


def test_fork_and_init_from(shards: Path, tmp_path: Path) -> None:
    first = daybreak.train(config(shards, tmp_path, "first", run__steps=5, optim__horizon=10))
    straight = daybreak.train(config(shards, tmp_path, "straight", run__steps=10, optim__horizon=10))
    fork = daybreak.train(first.config.override({"run.name": "fork", "run.steps": 10}), fork_from=first.path)
    assert losses(fork) == losses(straight)[5:]
    assert losses(first) == losses(straight)[:5]
    init = daybreak.train(config(shards, tmp_path, "init", run__steps=3), init_from=first.path)
    assert init.metrics("val")[0]["loss"] == first.metrics("val")[-1]["loss"]
    assert [r["step"] for r in init.metrics("step")] == [1, 2, 3]


def test_a_fork_that_was_killed_before_it_saved_its_weights(shards: Path, tmp_path: Path) -> None:
    """Resumed as an ordinary run, it would go on from random weights."""
    first = daybreak.train(config(shards, tmp_path, "first", run__steps=2, optim__horizon=4))
    fork = daybreak.train(first.config.override({"run.name": "fork", "run.steps": 4}), fork_from=first.path)
    shutil.rmtree(fork.folder.checkpoints)
    with pytest.raises(ConfigError, match="fork has not saved the weights that it was to begin with"):
        daybreak.train(fork.config, resume=fork.path)


def test_a_stop_before_the_first_update_says_how_to_go_on(shards: Path, tmp_path: Path) -> None:
    """What resumes a run with random weights is refused for one that was given weights and has not saved them."""
    first = daybreak.train(config(shards, tmp_path, "first", run__steps=2, optim__horizon=4))

    class Early(Stop):
        """A signal comes while the model is loaded."""

        def check(self) -> None:
            self.reason = "stopped by SIGTERM" if (tmp_path / name / "config.toml").is_file() else ""
            super().check()

    for name, given, way in (
        ("new", {}, f"resume with: daybreak train {tmp_path}/new"),
        ("init", {"init_from": first.path}, f"remove {tmp_path}/init and start it again"),
        ("fork", {"fork_from": first.path}, f"remove {tmp_path}/fork and start it again"),
    ):
        with pytest.raises(daybreak.Error) as error:
            daybreak.train(first.config.override({"run.name": name, "run.steps": 4}), stop=Early(), **given)
        assert str(error.value) == f"stopped by SIGTERM before the first update; {way}."


def test_records_that_cannot_be_flushed_cost_one_save(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, calls = MetricsWriter.sync, list[int]()

    def sync(self: MetricsWriter) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(self)

    monkeypatch.setattr(MetricsWriter, "sync", sync)
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=6, checkpoint__every=2, checkpoint__keep=0))
    assert [path.name for path in run.checkpoints] == ["step-00000006", "step-00000002"]
    (event,) = [r for r in run.metrics("event") if r["what"] == "save_failed"]
    said = "the save of step 4 could not begin (Input/output error); free space or repair the disk."
    assert event["detail"] == said


def test_a_folder_that_is_renamed_as_a_save_ends(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_rename(*given: Any) -> Path:
        path = save_checkpoint(*given)
        if path.name == "step-00000002":
            (tmp_path / "old").rename(tmp_path / "new")
        return path

    monkeypatch.setattr(saver, "save_checkpoint", save_and_rename)
    run = daybreak.train(config(shards, tmp_path, "old", run__steps=6, checkpoint__every=2, checkpoint__keep=0))
    assert run.path == tmp_path / "new"
    assert [path.name for path in run.checkpoints] == [f"step-{step:08d}" for step in (6, 4, 2)]
    assert [r["step"] for r in run.metrics("checkpoint")] == [2, 4, 6]


def test_norms_and_profile(shards: Path, tmp_path: Path) -> None:
    run = daybreak.train(config(shards, tmp_path, "p", run__steps=4, log__norms_every=2, run__profile="1:2"))
    events = [r for r in run.metrics("event") if r["what"] == "norms"]
    assert [e["step"] for e in events] == [2, 4]
    norms, step = json.loads(events[-1]["detail"]), run.metrics("step")[-1]
    total = math.sqrt(sum(n["grad"] ** 2 for n in norms.values()))
    assert total == pytest.approx(step["norm"], rel=1e-5)
    assert norms["h.1.ln1w"]["weight"] == pytest.approx(float(weights(run)["h.1.ln1w"].norm()), rel=1e-6)
    assert "traceEvents" in json.loads((run.path / "profile-1-2.json").read_text())


def test_starting_and_writing_a_profile_is_no_step_s_time(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for the profiler, which takes a thousand seconds to start and to write."""
    now, profile = [0.0], torch.profiler.profile

    class Slow(profile):  # type: ignore[misc, valid-type]
        def start(self) -> None:
            now[0] += 1000.0
            super().start()

        def stop(self) -> None:
            now[0] += 1000.0
            super().stop()

    monkeypatch.setattr(torch.profiler, "profile", Slow)
    monkeypatch.setattr(loop, "Throughput", partial(Throughput, clock=lambda: now[0]))
    run = daybreak.train(config(shards, tmp_path, "p", run__steps=4, run__profile="1:2"))
    assert now == [2000.0]
    assert [record["ms"] for record in run.metrics("step")] == [pytest.approx(1e-6)] * 4  # the least that a lap takes
    assert (run.path / "profile-1-2.json").is_file()


def test_max_hours_saves_and_leaves_with_75(shards: Path, tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10.0
        return now

    with pytest.raises(daybreak.Error, match=r"--max-hours 0\.1 is over after step") as error:
        daybreak.train(config(shards, tmp_path, "h", run__steps=1000, run__max_hours=0.1), stop=Stop(clock=clock))
    assert error.value.exit_code == 75
    run = daybreak.load(tmp_path / "h")
    assert json.loads((run.path / "exit.json").read_text())["code"] == 75
    last = run.metrics("step")[-1]["step"]
    assert [int(p.name[5:]) for p in run.checkpoints] == [last]
    assert 0 < last < 40


def test_diverging_ends_with_3_and_keeps_the_last_weights(shards: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30 makes the second loss non-finite: the update before it is what stays."""
    bad = config(shards, tmp_path, "bad", optim__lr=1e30, schedule__warmup=0, guard__max_skips=3)
    with pytest.raises(daybreak.Error, match="3 updates in a row were skipped") as error:
        daybreak.train(bad)
    assert error.value.exit_code == 3
    run = daybreak.load(tmp_path / "bad")
    skipped = [r["step"] for r in run.metrics("step") if r["skipped"]]
    assert skipped == list(range(skipped[0], skipped[0] + 3))
    assert run.checkpoints
    assert [e["step"] for e in run.metrics("event") if e["what"] == "skip"] == skipped


def test_changed_data_is_refused_with_4(shards: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for path in shards.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    run = daybreak.train(config(own, tmp_path, "d", run__steps=2, schedule__final_frac=0.1))
    tokens = markov(3000, 1)
    tokens[1500] = (tokens[1500] + 1) % V
    write_shard(own / "x_train_000000.bin", tokens)
    with pytest.raises(
        daybreak.Error, match=r"the training data changed since .* its fingerprint was [0-9a-f]+, it is"
    ) as e:
        daybreak.train(run.config.override({"run.steps": 4}), resume=run.path)
    assert e.value.exit_code == 4


def test_other_validation_data_is_told(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tmp_path / "own"
    shutil.copytree(shards, own)
    run = daybreak.train(config(own, tmp_path, "d", run__steps=2, schedule__final_frac=0.1))
    longer = run.config.override({"run.steps": 3})
    assert daybreak.train(longer, resume=run.path).metrics("step")[-1]["step"] == 3
    assert "validation data" not in caplog.text
    (val,) = own.glob("*val*")
    write_shard(val, markov(3000, 2))
    assert daybreak.train(longer.override({"run.steps": 4}), resume=run.path).metrics("step")[-1]["step"] == 4
    assert f"the validation data changed since {run.path}/checkpoints/step-00000003 was saved" in caplog.text


def test_a_save_request_is_taken_once(shards: Path, tmp_path: Path) -> None:
    """Asked for (as SIGUSR1 does) in a step whose save is due anyway, and in one whose save is not."""

    class Asks(Stop):
        checks = 0

        def check(self) -> None:
            self.checks += 1
            self.save_requested |= self.checks in wanted

    wanted: set[int] = set()
    make = config(shards, tmp_path, "u", run__steps=9, checkpoint__every=3, checkpoint__keep=0, eval__every=0)
    counter = Asks()
    daybreak.train(make.override({"run.name": "plain", "run.steps": 2}), stop=counter)
    per_step, before = 3, 2  # two micro-steps and the update; engine and loading
    assert counter.checks > before + 2 * per_step
    wanted = {before + 3 * per_step, before + 5 * per_step}  # the last checks of steps 3 and 5
    run = daybreak.train(make, stop=Asks())
    assert [int(p.name[5:]) for p in run.checkpoints][::-1] == [3, 5, 6, 9]


def test_a_rewound_run_forgets_the_abandoned_steps(shards: Path, tmp_path: Path) -> None:
    run = daybreak.train(config(shards, tmp_path, "a", run__steps=20, checkpoint__every=10))
    shutil.rmtree(run.checkpoints[0])  # back to step 10
    again = daybreak.train(run.config.override({"run.steps": 12}), resume=run.path)
    assert [r["step"] for r in again.metrics("step")] == list(range(1, 13))
    assert again.metrics("val")[-1]["step"] == 12


def test_data_too_small_for_one_batch(shards: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "tiny_train.bin", markov(40, 1))
    small = config(shards, tmp_path, "s", data__train=str(tmp_path / "tiny_train.bin"), run__steps=3)
    with pytest.raises(daybreak.Error, match="one step takes 128 tokens, more than all of") as error:
        daybreak.train(small)
    assert error.value.exit_code == 2
    assert not (tmp_path / "s").exists()


def test_a_refused_start_leaves_no_folder(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(daybreak.Error, match="nowhere does not exist") as error:
        daybreak.train(config(shards, tmp_path, "a"), init_from=tmp_path / "nowhere")
    assert error.value.exit_code == 2
    long = str(tmp_path / "long_train.bin")
    huge = config(
        shards, tmp_path, "a", model__max_T=65536, batch__T=65536, batch__B=65536, batch__total_tokens=0,
        data__train=long, data__val=long, run__overfit=True,
    )  # fmt: skip
    write_shard(tmp_path / "long_train.bin", np.zeros(70000, np.int64))
    with pytest.raises(daybreak.Error, match=r"the run needs \d+ MiB .* try --batch\.B \d{1,4}\.$") as error:
        daybreak.train(huge)
    assert error.value.exit_code == 6
    assert not (tmp_path / "a").exists()


def test_a_pattern_of_fp8_that_fits_nothing_is_refused_in_new_runs_only(shards: Path, tmp_path: Path) -> None:
    """An older version left such a pattern out, so its runs have the checkpoints of the list without it."""
    keys = {"precision.compute": "fp8", "precision.fp8": "h.0.*", "run.steps": 1, "optim.horizon": 4}
    settings, both = config(shards, tmp_path, "old", **keys), {"precision.fp8": "h.0.*, h.1.*"}
    with pytest.raises(ConfigError, match=r"' h\.1\.\*' fits no weight of a block .*; remove the blank"):
        daybreak.train(settings.override(both))
    assert not (tmp_path / "old").exists()
    saved = daybreak.train(settings).checkpoints[0] / "manifest.json"
    manifest = json.loads(saved.read_text())
    manifest["config"] |= both
    saved.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    file = (path := tmp_path / "old") / "config.toml"
    file.write_text(file.read_text().replace('"h.0.*"', '"h.0.*, h.1.*"'))
    run = daybreak.train(daybreak.Run(path).config.override({"run.steps": 2}), resume=path)
    assert (run.metrics("step")[-1]["step"], run.config.precision.fp8) == (2, both["precision.fp8"])
