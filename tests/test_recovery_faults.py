"""Other faults: disks, damaged checkpoints, changed data, numbers that are no numbers; and the soak."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patience import PATIENCE
from recovery import (
    assert_intact,
    assert_same,
    config,
    curve,
    exit_code,
    make_shards,
    recipe,
    spawn,
    tensors,
    train,
    write_shard,
)
from snapshots import FACTS

import daybreak
from daybreak.cli.main import main
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.passes import plan_engine
from daybreak.report.doctor import check_run
from daybreak.shapes import GPT2Config
from daybreak.state.checkpoint import save_checkpoint
from daybreak.state.restore import Staging, snapshot, staged_bytes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def put_the_log_back() -> Iterator[None]:
    """`main` sets up the log of the process."""
    log = logging.getLogger("daybreak")
    before = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.level, log.propagate = before


# ---- saving beside training


@pytest.mark.parametrize(("compute", "masters"), [("fp32", "auto"), ("fp64", "auto"), ("bf16", "fp32"),
                                                  ("bf16", "split"), ("bf16", "none")])  # fmt: skip
def test_the_staged_copy_does_not_see_the_next_step(tmp_path, compute, masters):
    shape = GPT2Config(L=1, C=16, NH=2, max_T=16, V=257)
    spec = EngineSpec(shape, B=2, T=16, compute=compute, masters=masters)
    engine = Engine(spec)
    tokens = torch.randint(257, (1, 2, 17), generator=torch.Generator().manual_seed(1))
    engine.train_step(tokens[..., :-1], tokens[..., 1:], lr=1e-2, step=0)
    plain = tensors(save_checkpoint(tmp_path / "plain", snapshot(engine, 1, FACTS)))
    staging = Staging(engine)
    held = [staging._weights, *staging._state.values()]
    arena = plan_engine(spec)[2]
    assert sum(t.nbytes for t in held) == staged_bytes(arena)  # as `plan` said

    snap = snapshot(engine, 1, FACTS, staging)
    for name in ("weights", "masters", "m", "v", "windows", "counts"):
        if name in engine.state:
            engine.state[name].fill_(77)
    staged = tensors(save_checkpoint(tmp_path / "staged", snap))
    assert staged.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], staged[name])] == []
    pointers = [t.data_ptr() for t in held]
    snapshot(engine, 2, FACTS, staging)
    assert pointers == [t.data_ptr() for t in held]


def test_without_the_memory_for_it_the_start_is_refused_with_6(shards, tmp_path, monkeypatch, capsys):
    """The machine's memory is a number here: room for the run, and for all but a byte of the second copy."""
    made = config(shards, tmp_path, "m", run__steps=1)
    needs = daybreak.plan(made)
    monkeypatch.setattr("daybreak.state.restore.available_bytes", lambda device: needs.nbytes + needs.host_nbytes - 1)
    have = needs.host_nbytes - 1  # of it; the sentence rounds this down, and the need up, so that they differ
    sentence = f"takes {(have >> 20) + 1} MiB .* {have >> 20} MiB left .* --checkpoint.background false"
    with pytest.raises(daybreak.Error, match=sentence) as e:
        daybreak.train(made)
    assert e.value.exit_code == 6
    assert daybreak.train(made.override({"checkpoint.background": False})).checkpoints
    assert main(["plan", "d12", "--run.device", "cpu", "--verbose"]) == 0
    assert "Host memory, for saving beside training: 1,424.5 MiB" in capsys.readouterr().out


def test_keep_and_major(shards, tmp_path):
    run = daybreak.train(config(shards, tmp_path, "k", run__steps=60, checkpoint__major=20))
    assert [int(p.name[5:]) for p in run.checkpoints] == [60, 55, 40, 20]


# ---- disks

LACKS = r"needs [\d.]+ MB, which is [\d.e-]+ MB more than its disk has free"


def test_a_full_and_a_read_only_disk_under_a_run(shards, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    made = config(shards, folder, "d", run__steps=100_000, checkpoint__every=10, optim__horizon=3000)
    script = str(Path(__file__).with_name("disk_trouble.py"))
    command = ["unshare", "-rm", sys.executable, script, str(folder), str(recipe(made, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["alive on the full disk"]
    assert told["older one kept"]
    assert told["caught up"]
    assert any(re.search(rf"{LACKS}: free space, lower checkpoint.keep", e) for e in told["full"]), told["full"]
    assert told["warnings"] >= 3
    assert told["code"] == 75
    (code, reason, last), steps = told["last save"], told["steps"]
    assert (code, last) == (1, f"daybreak: {reason}")
    assert re.match(rf"checkpoint .*step-0000{steps:04d} {LACKS}", reason)
    assert f"step-{steps - 7:08d}" in told["checkpoints"]
    assert told["then"] == 0
    straight = config(shards, tmp_path, "s", run__steps=steps, checkpoint__every=0, optim__horizon=3000)
    assert_same(daybreak.train(straight), daybreak.Run(f"{folder}-result"))


@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_rename_that_fails(shards, tmp_path, on_error):
    """The second and third save cannot be published."""
    made = config(shards, tmp_path, "r", run__steps=40, checkpoint__on_error=on_error, checkpoint__keep=0)
    fault = {"do": "errno:EIO", "at": "audit:os.rename:tmp-step.*/step-", "n": 2, "m": 3}
    code, err = train([recipe(made, tmp_path)], fault)
    run, sentence = daybreak.Run(tmp_path / "r"), "step-00000010 could not be written (Input/output error)"
    assert sentence in err
    assert not list(run.folder.checkpoints.glob(".*"))
    if on_error == "warn":
        assert (code, exit_code(run.path)) == (0, 0)
        assert [int(p.name[5:]) for p in run.checkpoints] == [40, 35, 30, 25, 20, 5]
        assert len([e for e in run.metrics("event") if e["what"] == "save_failed"]) == 2
    else:
        assert (code, exit_code(run.path)) == (1, 1)
        assert [int(p.name[5:]) for p in run.checkpoints] == [5]
        assert 10 <= run.metrics("step")[-1]["step"] <= 15  # at the next step, or when the next save was due
        assert daybreak.train(run.config, resume=run.path).checkpoints[0].name == "step-00000040"


# ---- damaged checkpoints, through the whole command

FILES = ("model.safetensors", "optimizer-00000-of-00001.safetensors", "manifest.json")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped bit": flip, "cut short": truncate, "missing": Path.unlink, "empty": lambda p: p.write_bytes(b""),
    "a pickle instead": lambda p: p.write_bytes(pickle.dumps({"weights": [1]})),
}  # fmt: skip


@pytest.fixture(scope="module")
def two(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> daybreak.Run:
    """A run of 20 steps with checkpoints at 10 and 20."""
    return daybreak.train(config(shards, tmp_path_factory.mktemp("two"), "two", run__steps=20, checkpoint__every=10))


def fallbacks(run: daybreak.Run) -> list[tuple[int, int, str]]:
    """Step, tokens and reason of each event that tells of a checkpoint that a resume passed over."""
    return [(e["step"], e["tokens"], e["detail"]) for e in run.metrics("event") if e["what"] == "fallback"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_two_are_exit_5(two, tmp_path, caplog, file, damage):
    shutil.copytree(two.path, tmp_path / "two")
    run = daybreak.Run(tmp_path / "two")
    newest, older = run.checkpoints
    DAMAGE[damage](newest / file)
    lines, good = check_run(str(run.path))
    assert not good
    assert lines[0].startswith(f"BAD: {newest}")
    assert file in lines[0]
    assert lines[1] == f"good: {older}, step 10"
    again = daybreak.train(run.config, resume=run.path)
    assert str(newest / file) in caplog.text
    assert_same(two, again)
    assert fallbacks(two) == []
    at = next(r for r in two.metrics("step") if r["step"] == 10)
    assert fallbacks(again) == [(10, at["tokens"], lines[0].removeprefix("BAD: "))]

    for checkpoint in (newest, older):
        if (checkpoint / file).exists():
            DAMAGE[damage](checkpoint / file)
    with pytest.raises(daybreak.Error, match=r"none of the 2 checkpoints below .* is intact") as e:
        daybreak.train(run.config, resume=run.path)
    assert (e.value.exit_code, exit_code(run.path)) == (5, 5)
    assert str(older / file) in caplog.text


def without_id(checkpoint: Path) -> None:
    """Make a checkpoint's manifest one of daybreak 0.1."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["run"], manifest["checksum"]
    text = json.dumps(manifest, sort_keys=True)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_foreign_files_and_checkpoints(two, shards, tmp_path, caplog):
    """A pickle that would make a file is never opened; another model's checkpoint and manifest are refused."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    shutil.copytree(two.path, tmp_path / "two")
    run = daybreak.Run(tmp_path / "two")
    for name in ("model.pt", "optimizer.pkl", "extra.safetensors"):
        (run.checkpoints[0] / name).write_bytes(pickle.dumps(Bomb()))
    assert daybreak.train(run.config, resume=run.path).checkpoints == run.checkpoints
    assert "model.pt is not part of the checkpoint; it is ignored" in caplog.text
    assert not (tmp_path / "exploded").exists()

    other = daybreak.train(config(shards, tmp_path, "other", model__L=2, run__steps=20, checkpoint__every=10))
    for mine, theirs in zip(run.checkpoints, other.checkpoints, strict=True):
        shutil.copy(theirs / "manifest.json", mine / "manifest.json")
    with pytest.raises(daybreak.Error, match="none of the 2 checkpoints") as e:
        daybreak.train(run.config, resume=run.path)
    assert e.value.exit_code == 5
    assert re.search(r"two/checkpoints/step-00000020/\S+ has \d+ bytes instead of \d+", caplog.text)
    shutil.rmtree(run.folder.checkpoints)
    shutil.copytree(other.folder.checkpoints, run.folder.checkpoints)
    with pytest.raises(daybreak.Error, match=r"none of the 2 checkpoints .* is intact and of this run") as e:
        daybreak.train(run.config, resume=run.path)
    assert e.value.exit_code == 5
    assert "step-00000020 belongs to another run; move it there, or remove it." in caplog.text
    (run.path / "run-id").unlink()  # as runs of 0.1 are, which had no ids
    for checkpoint in run.folder.checkpoints.iterdir():
        without_id(checkpoint)
    with pytest.raises(
        daybreak.Error, match=r"config.toml differs from \S+/step-00000020 .* model.L = 1 instead of 2;"
    ):
        daybreak.train(other.config, resume=run.path)
    assert main(["doctor", str(run.path)]) == 5


# ---- guards


def inject(monkeypatch: pytest.MonkeyPatch, faults: dict[int, tuple[str, int, float]]) -> None:
    """step (from 0) -> (loss or grads, micro-step, what is added to it)."""
    begin, micro, at = Engine.begin_step, Engine.micro_step, [0, 0]

    def begin_step(self: Engine, **values: Any) -> None:
        at[:] = values["step"], 0
        begin(self, **values)

    def micro_step(self: Engine, *args: Any, **values: Any) -> None:
        micro(self, *args, **values)
        name, number, value = faults.get(at[0], ("", -1, 0.0))
        if number == at[1]:
            self.state[name].view(-1)[0] += value
        at[1] += 1

    monkeypatch.setattr(Engine, "begin_step", begin_step)
    monkeypatch.setattr(Engine, "micro_step", micro_step)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["loss", "grads"])
@pytest.mark.parametrize("number", [0, 1])
def test_what_is_not_finite_never_reaches_the_weights(shards, tmp_path, monkeypatch, where, number, value):
    inject(monkeypatch, {6: (where, number, value)})
    made = config(shards, tmp_path, "g", run__steps=8, checkpoint__every=1, checkpoint__keep=0)
    run = daybreak.train(made)
    assert [r["step"] for r in run.metrics("step") if r["skipped"]] == [7]
    assert [r["step"] for r in run.metrics("event") if r["what"] == "skip"] == [7]
    before, after, later = (tensors(run.folder.checkpoints / f"step-{s:08d}") for s in (6, 7, 8))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []  # windows included
    assert not torch.equal(after["wte"], later["wte"])
    assert all(torch.isfinite(t).all() for t in later.values())


def test_outliers_are_skipped_and_the_window_survives_a_resume(shards, tmp_path, monkeypatch):
    """Loss up by 10 at step 150, gradient by 30 at 155; stopped at 149, inside the full window of 128."""
    faults = {149: ("loss", 1, 10.0), 154: ("grads", 0, 30.0)}
    inject(monkeypatch, faults)
    made = config(shards, tmp_path, "a", run__steps=160, optim__horizon=160, checkpoint__every=0, eval__every=0)
    straight = daybreak.train(made)
    skipped = {r["step"]: r for r in straight.metrics("step") if r["skipped"]}
    assert list(skipped) == [150, 155]
    assert skipped[150]["loss_z"] > 6.0 > skipped[150]["norm_z"]
    assert skipped[155]["norm_z"] > 6.0 > skipped[155]["loss_z"]
    part = daybreak.train(made.override({"run.name": "b", "run.steps": 149}))
    resumed = daybreak.train(part.config.override({"run.steps": 160}), resume=part.path)
    assert curve(resumed) == curve(straight)
    assert [r["loss_z"] for r in resumed.metrics("step")] == [r["loss_z"] for r in straight.metrics("step")]


def test_skips_in_a_row_are_counted_over_a_resume_and_end_with_3(shards, tmp_path, monkeypatch):
    inject(monkeypatch, dict.fromkeys(range(10, 20), ("loss", 0, np.nan)))
    made = config(shards, tmp_path, "c", run__steps=12, optim__horizon=40, guard__max_skips=4)
    part = daybreak.train(made)
    with pytest.raises(daybreak.Error, match=r"4 updates in a row were skipped \(guard.max_skips\)") as e:
        daybreak.train(part.config.override({"run.steps": 40}), resume=part.path)
    assert (e.value.exit_code, exit_code(part.path)) == (3, 3)
    assert part.checkpoints[0].name == "step-00000014"


# ---- data that is not the same


def refused(run: daybreak.Run) -> str:
    with pytest.raises(daybreak.Error) as e:
        daybreak.train(run.config.override({"run.steps": 30, "optim.horizon": 30}), resume=run.path)
    assert (e.value.exit_code, exit_code(run.path)) == (4, 4)
    assert json.loads((run.path / "exit.json").read_text())["reason"] == str(e.value)
    return str(e.value)


def test_changed_and_missing_shards_are_exit_4_with_both_fingerprints(tmp_path):
    own = make_shards(tmp_path / "own")
    run = daybreak.train(config(own, tmp_path, "r", run__steps=4))
    was = json.loads((run.checkpoints[0] / "manifest.json").read_text())["data"]["fingerprint"]
    good = (own / "x_train_1.bin").read_bytes()
    said = set()
    for damage in (
        lambda p: p.unlink(),
        lambda p: write_shard(p, np.zeros(1500)),
        lambda p: p.rename(own / "x_train_2.bin"),
    ):
        damage(own / "x_train_1.bin")
        match = re.fullmatch(
            rf"the training data changed since {run.checkpoints[0]} was saved: its fingerprint was {was}, it is "
            r"([0-9a-f]{64}) now; restore the old one, or start a new run\.",
            refused(run),
        )
        assert match
        said.add(match[1])
        (own / "x_train_1.bin").write_bytes(good)
    (own / "x_train_2.bin").unlink()
    assert len(said) == 3
    assert was not in said
    assert daybreak.train(run.config.override({"run.steps": 30}), resume=run.path).metrics("step")[-1]["step"] == 30


def test_a_data_set_prepared_anew_with_another_tokenizer_is_exit_4(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("".join(f"{i} men went to mow a meadow.\n" for i in range(900)))
    assert main(["prepare", "book.txt", "--name", "book", "--tokenizer", "gpt2-300"]) == 0
    keys = {"data.train": "", "data.val": "", "data.name": "book", "data.tokenizer": "", "model.V": 400}
    run = daybreak.train(config(tmp_path, tmp_path, "r", run__steps=4).override(keys))
    shutil.move("data/book", "kept")
    assert main(["prepare", "book.txt", "--name", "book", "--tokenizer", "bytes"]) == 0
    assert re.search(r"trained with tokenizer 'gpt2-300', .* 'book' is made with 'bytes'; choose --data", refused(run))
    shutil.rmtree("data/book")
    shutil.move("kept", "data/book")
    shard = next(Path("data/book").glob("*train*"))
    flip(shard)
    capsys.readouterr()
    assert main(["doctor", str(run.path)]) == 5
    said = capsys.readouterr().out
    assert f"BAD: {shard} is damaged (its sha256 does not match); prepare book again." in said
    assert "the last attempt ended with code 4: " in said
    assert "is made with 'bytes'" in said
    truncate(shard)
    assert main(["doctor", str(run.path)]) == 5
    assert re.search(rf"BAD: {shard} has \d+ bytes but its header says", capsys.readouterr().out)
    shard.unlink()
    assert f"cannot read the token shard {shard} (No such file" in refused(run)
    capsys.readouterr()
    assert main(["doctor", str(run.path)]) == 5
    assert f"BAD: cannot read the token shard {shard} (No such file" in capsys.readouterr().out
    shutil.rmtree("data/book")  # as on another machine
    assert main(["doctor", str(run.path)]) == 0
    assert "data not checked: no dataset 'book' in /" in capsys.readouterr().out


def test_doctor_compares_the_fingerprint_of_shards_without_a_manifest(tmp_path, capsys):
    own = make_shards(tmp_path / "own")
    run = daybreak.train(config(own, tmp_path, "r", run__steps=4))
    assert main(["doctor", str(run.path)]) == 0
    assert "no manifest with sha256 sums: only its fingerprint is compared" in capsys.readouterr().out
    write_shard(own / "x_train_1.bin", np.zeros(1500))
    assert main(["doctor", str(run.path)]) == 5
    was = json.loads((run.checkpoints[0] / "manifest.json").read_text())["data"]["fingerprint"]
    said = re.search(
        rf"BAD: the training data changed: its fingerprint was {was} .* is ([0-9a-f]{{64}}) now",
        capsys.readouterr().out,
    )
    assert said
    for file, sentence in (("x_train_1.bin", "BAD: .*its header says"), ("x_val_0.bin", "BAD: no token shard matches")):
        truncate(own / file) if "train" in file else (own / file).unlink()
        assert main(["doctor", str(run.path)]) == 5
        assert re.search(sentence, capsys.readouterr().out)
        make_shards(own)
    shutil.rmtree(own)
    assert main(["doctor", str(run.path)]) == 0
    assert "data not checked: no token shard matches" in capsys.readouterr().out
    (run.checkpoints[0] / "manifest.json").write_text("{")
    assert main(["doctor", str(run.path)]) == 5
    assert capsys.readouterr().err.endswith("is damaged, see above; it has no good checkpoint to continue from.\n")


# ---- the soak


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_soak(shards, tmp_path, full, figures):
    """Thousands of steps, a save every five, killed at random: memory and open files stay where they were."""
    steps, kills = (40_000, 6) if full else (800, 1)
    made = config(shards, tmp_path, "soak", run__steps=steps, eval__every=1000, eval__sample_every=1000)
    folder, args, rng = tmp_path / "soak", [recipe(made, tmp_path)], random.Random(3)
    memory: list[list[int]] = []
    files: list[list[int]] = []
    seconds = 0.0
    for attempt in range(kills + 1):
        process, began, started = spawn(args, stderr=subprocess.DEVNULL), time.monotonic(), 0.0
        args, before = [folder], size(folder / "metrics.jsonl") + 1000
        memory.append([])
        files.append([])
        life = (rng.uniform(5, 20) if full else 1.0) if attempt < kills else float("inf")
        while process.poll() is None and (not started or time.monotonic() < started + life):
            time.sleep(0.05)
            if size(folder / "metrics.jsonl") > before and not (folder / "exit.json").exists():  # it trains
                started = started or time.monotonic()
                try:
                    memory[-1].append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) >> 8)
                    files[-1].append(len(os.listdir(f"/proc/{process.pid}/fd")))
                except (OSError, IndexError):
                    break
        process.kill()
        process.wait(PATIENCE)
        seconds += time.monotonic() - began
        assert_intact(folder)
    last, files_ = memory[-1][:-2], [n for trace in files for n in trace[:-2]]  # not the process's end
    half = len(last) // 2
    growth = max(last[half:]) - max(last[:half])
    figures |= {
        "soak: steps": steps, "soak: kills": kills, "soak: checkpoints saved": steps // 5,
        "soak: seconds": round(seconds), "soak: resident MiB, at most": max(max(t, default=0) for t in memory),
        "soak: growth of the peak from the first to the second half, MiB": growth,
        "soak: open files, at most": max(files_), "soak: open files, at least": min(files_),
    }  # fmt: skip
    assert growth <= (4 if full else 16)  # in a short run the first evaluation shows
    assert max(files_) - min(files_) <= 4  # those of a save under way
    assert exit_code(folder) == 0
    if not full:
        straight = daybreak.train(
            config(shards, tmp_path, "s", run__steps=steps, eval__every=1000, checkpoint__every=0)
        )
        assert curve(straight) == curve(daybreak.Run(folder))
