"""Imports and exports are there whole or not at all, whatever stops them, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interop_runs import config_of, inside, shape_of, values_of, write_run
from recovery import write_shard
from snapshots import exit_of, fork

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, Error
from daybreak.interop import huggingface
from daybreak.interop.source import Export, Source, appearing, make_run
from daybreak.manifest import list_checkpoints
from daybreak.shapes import GPT2Config
from daybreak.state.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
SHAPE = shape_of("bytes", L=1, C=16, NH=2, max_T=16)
MODEL = GPT2Config(L=1, C=16, NH=2, max_T=16, V=SHAPE.V)
EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")


def source() -> Source:
    values = values_of(SHAPE)
    return Source(Path("theirs.bin"), MODEL, get_tokenizer("bytes"), values.__getitem__, step=3)


def killed(root: Path, fatal: int, into: Path | None) -> int:
    """The import, killed before its file operation number `fatal` below `root`; how it ended."""

    def body() -> None:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if event in EVENTS and str(root) in str(args):
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        make_run(source(), config_of(SHAPE, "bytes", run__dir=str(root / "runs"), run__name="m"), into=into)

    return exit_of(fork(body))


@pytest.mark.parametrize("theirs", [False, True], ids=["new folder", "llm.c's folder"])
def test_a_kill_before_any_file_operation_leaves_a_run_or_none(tmp_path, theirs):
    """And the same import then works. In llm.c's folder a listed checkpoint says that the rest is there."""
    status, fatal, seen = -signal.SIGKILL, 0, set()
    while status == -signal.SIGKILL:
        fatal += 2 if fatal % 3 else 1  # two thirds of them
        root = tmp_path / str(fatal)
        folder = root / "runs/m"
        if theirs:
            folder.mkdir(parents=True)
            (folder / "DONE_00000003").touch()
        into = folder if theirs else None
        status = killed(root, fatal, into)
        there = bool(list_checkpoints(folder / "checkpoints")) if theirs else folder.exists()
        seen.add(there)
        if there:
            assert Run(folder).checkpoint().step == 3
            assert (folder / "imported.json").is_file()
        if theirs or not there:
            made = config_of(SHAPE, "bytes", run__dir=str(root / "runs"), run__name="m")
            make_run(source(), made, into=into)
        assert torch.equal(Export(Run(folder).checkpoint()).read("wte"), values_of(SHAPE)["wte"])
        assert [p.name for p in (root / "runs").iterdir()] == ["m"]
    assert status == 0
    assert seen == {False, True}
    assert fatal > 10


def test_a_failed_import_leaves_nothing(tmp_path):
    def read(name: str) -> torch.Tensor:
        raise OSError(28, "No space left on device", "theirs.bin")

    broken = Source(Path("theirs.bin"), MODEL, get_tokenizer("bytes"), read)
    made = config_of(SHAPE, "bytes", run__dir=str(tmp_path / "runs"), run__name="m")
    with pytest.raises(Error, match=r"could not be written \(No space left on device\)"):
        make_run(broken, made)
    assert list((tmp_path / "runs").iterdir()) == []
    make_run(source(), made)
    with pytest.raises(ConfigError, match=r"is taken: .* exists; continue it with `daybreak train"):
        make_run(source(), made)
    (tmp_path / "runs/m/config.toml").unlink()
    with pytest.raises(ConfigError, match=r"exists and is not a run: it has no config\.toml; remove it or choose"):
        make_run(source(), made)


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path):
    dead = fork(lambda: None)
    assert exit_of(dead) == 0
    for pid, name in ((dead, "out"), (os.getppid(), "out"), (dead, "other")):
        (tmp_path / f".{name}-{pid}").mkdir()
        (tmp_path / f".{name}-{pid}/model.safetensors").write_bytes(b"half")
    (tmp_path / ".out-notes").touch()
    with appearing(tmp_path / "out") as path:
        path.write_text("whole")
    left = [".other-" + str(dead), ".out-" + str(os.getppid()), ".out-notes", "out"]  # of a live one, of another name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(left)


TERMINATED = """
import sys
from recovery_child import Accident
from daybreak.cli.main import main
Accident("term", sys.argv[1])
sys.argv[:] = ["daybreak", *sys.argv[2:]]
sys.exit(main())
"""


@pytest.mark.parametrize("line", ["export run --to llmc out", "import theirs --name m"])
def test_a_terminated_export_or_import_leaves_nothing(tmp_path, line):
    write_run(tmp_path / "run", "bytes", max_T=16)
    if line.startswith("import"):
        huggingface.export(Export(Run(tmp_path / "run").checkpoint()), tmp_path / "theirs", "fp32")
    before = sorted(p.name for p in tmp_path.iterdir())
    where = r"audit:open:\.(out|m)-\d+/.*(safetensors|model_\d+\.bin)"
    paths = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[1]}"
    done = subprocess.run([sys.executable, "-c", TERMINATED, where, *line.split()], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": paths})  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "daybreak: interrupted.")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "runs") == before
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []


def test_an_import_that_was_trained_keeps_its_id(tmp_path):
    """Its first checkpoint is of the run, and so are those that training adds."""
    for name in ("x_train_0", "x_val_0"):
        write_shard(tmp_path / f"{name}.bin", torch.arange(900).remainder(97).numpy())
    made = config_of(SHAPE, "bytes", run__dir=str(tmp_path / "runs"), run__name="m", batch__B=2, run__steps=5)
    run = Run(make_run(source(), made))
    assert run.checkpoint().manifest["run"] == run.folder.id != ""
    globs = ("--data.train", f"{tmp_path}/*train*", "--data.val", f"{tmp_path}/*val*")
    inside(tmp_path, "train", "runs/m", *globs, "--quiet")
    assert {c.manifest["run"] for c in map(run.checkpoint, (3, 5))} == {run.folder.id}
    assert main(["doctor", str(run.path)]) == 0
