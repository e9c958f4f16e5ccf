"""Changes by people and strangers to a run's folder: rename, remove, replace and copy it, and plant links in it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recovery import assert_same, config, curve, make_shards, tensors
from snapshots import exit_of, fork, snapshot

import daybreak
from daybreak.cli.main import main
from daybreak.errors import ConfigError, Error
from daybreak.manifest import list_checkpoints, run_id
from daybreak.report.doctor import check_run
from daybreak.state.checkpoint import load_checkpoint, newest_good, prune_checkpoints, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
STEPS = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> daybreak.Run:
    """Never disturbed."""
    return daybreak.train(config(shards, tmp_path_factory.mktemp("straight"), "r", run__steps=STEPS))


def once(act: Callable[[], object]) -> Callable[[Path], None]:
    """For `on_save`: does it after the first save."""
    left = [act]
    return lambda path: left.pop()() and None if left else None


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ---- renamed, removed, replaced


@pytest.mark.parametrize("background", [True, False])
def test_a_renamed_folder_is_followed(shards, tmp_path, straight, caplog, background):
    made = config(shards, tmp_path, "r", run__steps=STEPS, checkpoint__background=background)
    run = daybreak.train(made, on_save=once(lambda: (tmp_path / "r").rename(tmp_path / "s")))
    assert run.path == tmp_path / "s"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    assert [p.name for p in run.checkpoints] == ["step-00000020", "step-00000015"]
    assert '"code": 0' in run.folder.exit.read_text()
    assert f"{tmp_path / 'r'} was renamed to {tmp_path / 's'}; the run continues there." in caplog.text
    assert_same(straight, run)


def test_a_new_run_under_the_old_name_is_left_alone(shards, tmp_path, straight):
    """The first run goes to its new name; the second one's folder has nothing of it."""
    found = []

    def replace() -> None:
        (tmp_path / "r").rename(tmp_path / "s")
        second = daybreak.train(config(shards, tmp_path, "r", run__steps=10, run__seed=7))
        found.append((second, digests(second.path)))

    run = daybreak.train(config(shards, tmp_path, "r", run__steps=STEPS), on_save=once(replace))
    second, before = found[0]
    assert run.path == tmp_path / "s"
    assert_same(straight, run)
    assert digests(second.path) == before
    assert {run_id(p) for p in run.checkpoints} == {run.folder.id} != {second.folder.id}


@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_folder_costs_no_step(shards, tmp_path, straight, replaced):
    """The state is saved once more, under the old name if that is free, and the run ends with 1."""
    made = config(shards, tmp_path, "r", run__steps=STEPS)
    before: dict[str, str] = {}

    def remove() -> None:
        shutil.rmtree(tmp_path / "r")
        if replaced:
            other = daybreak.train(made.override({"run.steps": 5, "run.seed": 7}))
            before.update(digests(other.path))

    with pytest.raises(
        Error, match=r"was removed, or another one took its place; the state after step 10 is saved"
    ) as e:
        daybreak.train(made, on_save=once(remove))
    assert e.value.exit_code == 1
    folder = Path(str(e.value).rpartition(" ")[2])
    assert (folder == tmp_path / "r") != replaced
    assert '"code": 1' in (folder / "exit.json").read_text()
    assert not replaced or digests(tmp_path / "r") == before
    again = daybreak.train(daybreak.Run(folder).config, resume=folder)
    assert curve(again) == [r for r in curve(straight) if r[0] > 10]
    wanted, got = tensors(straight.checkpoints[0]), tensors(again.checkpoints[0])
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_doctor_names_what_dead_saves_left_and_nothing_else(straight, tmp_path):
    """The number at the end is the process's. Other hidden names are not ours."""
    shutil.copytree(straight.path, tmp_path / "r")
    folder = tmp_path / "r/checkpoints"
    left = folder / ".tmp-step-00000010-999999999"  # above any process's id
    for path in (left, folder / ".tmp-mine", folder / f".tmp-step-00000015-{os.getppid()}"):
        path.mkdir()
    lines, good = check_run(str(tmp_path / "r"))
    assert good
    assert [line for line in lines if ".tmp-" in line] == [f"left by a save that died, removed by the next: {left}"]


def test_a_checkpoint_of_another_run_is_never_resumed_nor_counted(shards, tmp_path, straight, caplog):
    """Planted with a higher step: the run goes on from its own, and its own are what `keep` counts."""
    part = daybreak.train(config(shards, tmp_path, "r", run__steps=10, optim__horizon=STEPS))
    alien = daybreak.train(config(shards, tmp_path, "alien", run__steps=40, run__seed=7, optim__horizon=STEPS))
    planted = part.folder.checkpoints / "step-00000040"
    shutil.copytree(alien.checkpoints[0], planted)
    assert [p.name for p in part.checkpoints] == ["step-00000010", "step-00000005"]
    lines, good = check_run(str(part.path))
    assert (lines[0], good) == (f"BAD: {planted} belongs to another run; move it there, or remove it.", False)
    run = daybreak.train(part.config.override({"run.steps": STEPS}), resume=part.path)
    assert f"{planted} belongs to another run" in caplog.text
    assert curve(run) == curve(straight)
    wanted, got = tensors(straight.checkpoints[0]), tensors(run.checkpoints[0])
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert [p.name for p in run.checkpoints] == ["step-00000020", "step-00000015"]
    assert planted.is_dir()  # not ours to remove
    for path in run.checkpoints:
        shutil.rmtree(path)
    with pytest.raises(Error, match=r"none of the 1 checkpoints below .* of this run") as e:
        daybreak.train(run.config, resume=run.path)
    assert e.value.exit_code == 5


def test_an_id_that_was_lost_is_taken_from_the_checkpoints(shards, tmp_path):
    part = daybreak.train(config(shards, tmp_path, "r", run__steps=5, optim__horizon=STEPS))
    known = part.folder.id
    assert len(known) == 32
    (part.path / "run-id").unlink()
    run = daybreak.train(part.config.override({"run.steps": 10}), resume=part.path)
    assert (part.path / "run-id").read_text() == f"{known}\n"
    assert [run_id(p) for p in run.checkpoints] == [known, known]


# ---- reading beside a run that prunes


def test_what_is_being_read_is_not_removed(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, snapshot(step))
    held = load_checkpoint(tmp_path / "step-00000001")
    assert prune_checkpoints(tmp_path, keep=1, major=0) == [tmp_path / "step-00000002"]
    out = torch.empty(12, 5)
    held.read_model("wte", out)
    assert out[0, 0] == 1
    del held
    assert prune_checkpoints(tmp_path, keep=1, major=0) == [tmp_path / "step-00000001"]


def test_a_reader_beside_a_run_that_prunes_never_fails(tmp_path):
    """A process saves and prunes as fast as it can; another one opens the newest and reads it, again and again."""

    def saves() -> None:
        step = 1
        while True:
            save_checkpoint(tmp_path, snapshot(step))
            prune_checkpoints(tmp_path, keep=1, major=0, verify="size")
            step += 1

    pid, steps = fork(saves), []
    try:
        while len(set(steps)) < 30:
            found = newest_good(tmp_path) if list_checkpoints(tmp_path) else None
            if found is None:
                time.sleep(0.01)
                continue
            out = torch.empty(12, 5)
            found.read_model("wte", out)
            assert out[0, 0] == found.step
            steps.append(found.step)
    finally:
        os.kill(pid, signal.SIGKILL)
        exit_of(pid)
    assert steps == sorted(steps)


# ---- links

OURS = ("config.toml", "env.json", "metrics.jsonl", "main.log", "samples.txt", "exit.json", "crash.txt",
        "report.html", "run-id", "tokenizer.json", "profile-1-2.json", "checkpoints", "checkpoints/step-00000099",
        "checkpoints/step-00000005/manifest.json", "checkpoints/.old-step-00000007-1", "tensorboard",
        "wandb", "exit.before.json")  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_link_out_of_a_run_is_refused_before_anything_is_written(shards, tmp_path, name, capsys):
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=5, optim__horizon=STEPS))
    victim, planted = tmp_path / "victim", run.path / name
    if planted.exists() and not planted.is_symlink():
        planted.rename(victim)  # so that reading through the link succeeds
    else:
        victim.mkdir()
        save_checkpoint(victim, snapshot(99))
    planted.symlink_to(victim)
    before = digests(tmp_path)
    with pytest.raises(ConfigError, match="is a symbolic link out of the run's folder, so nothing is written") as e:
        daybreak.train(run.config.override({"run.steps": 30, "checkpoint.keep": 1}), resume=run.path)
    assert str(planted) in str(e.value)
    assert digests(tmp_path) == before
    assert main(["report", str(run.path)]) == 0  # which replaces a link instead
    capsys.readouterr()
    after = digests(tmp_path)
    assert {k: v for k, v in after.items() if "report.html" not in k} == {
        k: v for k, v in before.items() if "report.html" not in k
    }
    assert not (run.path / "report.html").is_symlink()


def test_dangling_links_and_pipes_are_refused_and_links_within_are_not(shards, tmp_path):
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=5, optim__horizon=STEPS))
    more = run.config.override({"run.steps": 6})
    (run.path / "samples.txt").unlink()
    (run.path / "samples.txt").symlink_to(tmp_path / "made")
    with pytest.raises(ConfigError, match=r"samples\.txt is a symbolic link out of"):
        daybreak.train(more, resume=run.path)
    (run.path / "samples.txt").unlink()
    os.mkfifo(run.path / "samples.txt")
    with pytest.raises(ConfigError, match=r"samples\.txt is neither a file nor a folder"):
        daybreak.train(more, resume=run.path)
    (run.path / "samples.txt").unlink()
    (run.path / "wandb").mkdir()
    (run.path / "wandb/debug.log").symlink_to(tmp_path / "log")  # as W&B makes them
    run.path.rename(tmp_path / "elsewhere")
    run.path.symlink_to("elsewhere")  # a link to the whole folder is the user's own
    assert daybreak.train(more, resume=run.path).metrics("step")[-1]["step"] == 6
    assert not (tmp_path / "made").exists()


def test_links_that_appear_during_a_run_are_not_followed(shards, tmp_path, caplog):
    victim = tmp_path / "victim"
    victim.write_text("mine\n")

    def plant() -> None:
        for name in ("samples.txt", "exit.json", "crash.txt", "checkpoints/.tmp-step-00000010-1"):
            (tmp_path / "r" / name).unlink(missing_ok=True)
            (tmp_path / "r" / name).symlink_to(victim)
        (tmp_path / f"r/.exit.json-{os.getpid()}").symlink_to(victim)

    run = daybreak.train(config(shards, tmp_path, "r", run__steps=STEPS, eval__sample_every=1), on_save=once(plant))
    assert victim.read_text() == "mine\n"
    assert '"code": 0' in run.folder.exit.read_text()
    assert not run.folder.exit.is_symlink()
    assert "samples.txt could not be written" in caplog.text


# ---- data that moved


def test_data_that_moved_is_the_same_data(tmp_path, straight):
    """Content decides: as globs, as a folder, by the API and the command line; the loss curve is that of one run."""
    data = make_shards(tmp_path / "data")
    run = daybreak.train(config(data, tmp_path, "r", run__steps=5, optim__horizon=STEPS))
    data.rename(tmp_path / "moved")
    moved = {"data.train": str(tmp_path / "moved/*train*"), "data.val": str(tmp_path / "moved/*val*")}
    run = daybreak.train(run.config.override({"run.steps": 10, **moved}), resume=run.path)
    (tmp_path / "moved").rename(tmp_path / "again")
    assert main(["train", str(run.path), "--data", str(tmp_path / "again"), "--steps", str(STEPS), "--quiet"]) == 0
    assert curve(run) == curve(straight)
    assert run.config.data.name == str(tmp_path / "again")


@pytest.mark.parametrize("split", ["train", "val"])
def test_other_data_in_another_place_is_refused_with_both_values(shards, tmp_path, split, caplog):
    run = daybreak.train(config(shards, tmp_path, "r", run__steps=5, optim__horizon=STEPS))
    other = make_shards(tmp_path / "other")
    path = other / f"x_{split}_0.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\1\0")
    before = (run.path / "config.toml").read_text()
    places = {"data.train": f"{other}/*train*", "data.val": f"{other}/*val*", "run.steps": 10}
    with pytest.raises(ConfigError, match=r"data\.train is .* in the saved run and cannot become .*--fork NAME") as e:
        daybreak.train(run.config.override(places), resume=run.path)
    assert str(shards) in str(e.value)
    assert str(other) in str(e.value)
    assert f"the data there is not what {run.path} was trained on" in caplog.text
    assert (run.path / "config.toml").read_text() == before
    assert daybreak.train(run.config.override({"run.steps": 10}), resume=run.path).metrics("step")[-1]["step"] == 10
