"""Runs of llm.c's command line: the lines that are printed, the files that are written, and how a run is resumed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from interop_runs import MAX_T, ROOT, daybreak, inside, shape_of, values_of, write_shards
from oracle import GPT2, AdamW
from patience import PATIENCE, until
from test_interop_llmc import model_bytes, write_checkpoint
from test_llmc_cli import RUN_124M, RUN_1558M

from daybreak.config import Config
from daybreak.evaluate.multiple_choice import Example, write_eval_bin
from daybreak.interop import llmc_files, open_source
from daybreak.interop.source import Export
from daybreak.llmc import BY_NAME, HELLASWAG, main
from daybreak.state.run import Run

SMALL = ["-e", "m/model_00000007.bin", "-i", "shards/*train*", "-j", "shards/*val*", "-b", "2", "-t", "64", "-d", "256",
         "-m", "2", "-g", "5", "-v", "4", "-k", "constant", "-l", "0.001", "-r", "0"]  # fmt: skip


def llmc(folder: Path, *argv: str, code: int = 0, here: bool = False) -> str:
    """stdout of a process, or with `here` of a call in this one; stderr if it is to fail."""
    if here:
        done = inside(folder, *argv, code=code, main=main)
    else:
        done = daybreak(folder, *argv, code=code, run=ranks.llmc, CUDA_VISIBLE_DEVICES="")
    if code:
        assert done.stderr.startswith("daybreak.llmc: ")
        assert done.stderr.count("\n") == 1
        return done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of llm.c written by hand, shards, and in `log` a run of ten steps, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("llmc")
    write_shards(folder / "shards", 1025, (3000, 2000))
    write_checkpoint(folder / "m")
    out = llmc(folder, *SMALL, "-o", "log", "-x", "10", "-n", "2", "-nk", "2", "-nm", "4", "-ge", "1", "-h", "1")
    (folder / "stdout").write_text(out)
    return folder


def trl(folder: Path) -> dict[int, str]:
    """Step -> the rest of its line of main.log; the last of equal steps."""
    lines = (folder / "main.log").read_text().splitlines()
    return {int(m[1]): m[2] for m in (re.fullmatch(r"s:(\d+) (trl:.*)", line) for line in lines) if m}


def test_what_is_printed(made: Path) -> None:
    lines = (made / "stdout").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert all(len(line) == 78 for line in rows)
    table = {line[2:23].rstrip(): line[26:76].rstrip() for line in rows}
    labels = ["Parameter", "train data pattern", "val data pattern", "output log dir", "checkpoint_every", "resume",
              "micro batch size B", "sequence length T", "total batch size", "LR scheduler", "learning rate (LR)",
              "warmup iterations", "final LR fraction", "weight decay", "skip update lossz", "skip update gradz",
              "max_steps", "val_loss_every", "val_max_steps", "sample_every", "genT", "overfit_single_batch",
              "use_master_weights", "gelu_fusion", "recompute", "device", "peak TFlops", "precision",
              "weight init method", "max_sequence_length T", "vocab_size V", "padded_vocab_size Vp", "num_layers L",
              "num_heads NH", "channels C", "num_parameters", "train_num_batches", "val_num_batches", "run hellaswag",
              "num_processes", "zero_stage"]  # fmt: skip
    assert list(table) == labels
    parameters = sum(x.numel() for x in values_of(shape_of()).values())
    want = {"train data pattern": "shards/*train*", "output log dir": "log", "total batch size": "256",
            "learning rate (LR)": "1.000000e-03", "skip update lossz": "0.000000", "use_master_weights": "enabled",
            "precision": "FP32", "weight init method": "m/model_00000007.bin", "vocab_size V": "1025",
            "padded_vocab_size Vp": "1152", "num_parameters": str(parameters), "train_num_batches": "10",
            "val_num_batches": "2", "num_processes": "1", "gelu_fusion": "1"}  # fmt: skip
    assert {k: table[k] for k in want} == want
    assert lines[0] == "+-----------------------+----------------------------------------------------+"
    assert f"num_parameters: {parameters} => bytes: {4 * parameters}" in lines
    assert "batch_size B=2 * seq_len T=64 * num_processes=1 and total_batch_size=256" in lines
    assert "=> setting grad_accum_steps=2" in lines
    assert "-ge 1: no effect (the kernels decide)" in lines
    assert "| run hellaswag         | no                                                 |" in lines
    assert len([line for line in lines if re.fullmatch(r"val loss \d+\.\d{6}", line)]) == 4  # at 0, 4, 8, 10
    # As dev/loss_checker_ci.py reads it: columns 20 to 28 of the lines from 'step    1/' on.
    steps = [line for line in lines if line.startswith("step   ") and "/10 | loss " in line]
    losses = [float(line[20:28]) for line in steps]
    assert [f"{x:.4f}" for x in losses] == [line.split()[0][4:] for line in trl(made / "log").values()]
    assert re.fullmatch(
        r"step    1/10 \| loss \d\.\d{6} \(\+nanz\)\| norm \d+\.\d{4} \(\+nanz\)\| "
        r"lr 1\.00e-03 \| \d+\.\d\d ms \| .*tok/s.*",
        steps[0],
    )
    assert lines[-1].startswith("total average iteration time: ")
    assert float(lines[-1].split()[-2]) > 0
    at = lines.index("generating:")
    assert lines[at + 1] == "---"


def test_main_log_and_checkpoints_are_llmc_s(made: Path) -> None:
    log = made / "log"
    text = (log / "main.log").read_text()
    assert re.fullmatch(r"(s:\d+ (tel:\d+\.\d{4}|trl:\d+\.\d{4} lr:0\.001000 norm:\d+\.\d\d)\n)+", text)
    names = sorted(p.name for p in log.iterdir() if re.match(r"DONE|model_|state_", p.name))
    steps = (4, 8, 10)  # -nk 2 keeps 8 and 10, -nm 4 keeps 4
    assert names == [f"DONE_{s:08d}" for s in steps] + [f"model_{s:08d}.bin" for s in steps] + [
        f"state_{s:08d}_00000.bin" for s in steps
    ]
    run, shape = Run(log), shape_of()
    weights = {n: torch.empty(s) for n, s in shape.parameters().items()}
    for name, out in weights.items():
        run.checkpoint(10).read_model(name, out)
    assert (log / "model_00000010.bin").read_bytes() == model_bytes(shape, weights, 3)
    source = open_source(log, tokenizer="gpt2-1024")
    assert source.step == 10
    assert torch.equal(source.read("h.1.fcw"), weights["h.1.fcw"])


def test_hellaswag_and_fallbacks_are_said_as_llmc_does(made: Path, tmp_path: Path) -> None:
    shape = shape_of("gpt2", L=1, C=32, NH=2)
    (tmp_path / "m.bin").write_bytes(model_bytes(shape, values_of(shape), 3))
    (tmp_path / "shards").symlink_to(made / "shards")
    (tmp_path / HELLASWAG).parent.mkdir(parents=True)
    rng = np.random.default_rng(1)
    texts = rng.integers(0, 1024, (7, 5, 6)).tolist()
    examples = [Example(x[0], x[1:], label) for x, label in zip(texts, (0, 1, 2, 3, 0, 1, 2), strict=True)]
    write_eval_bin(tmp_path / HELLASWAG, examples)
    said = llmc(tmp_path, *SMALL, "-e", "m.bin", "-o", "log", "-x", "1", "-h", "1", "-z", "3", here=True)
    assert "| run hellaswag         | yes " in said
    found = re.search(r"^HellaSwag: (\d)/7 = (0\.\d{6})$", said, re.M)
    assert found, said
    assert float(found[2]) == pytest.approx(int(found[1]) / 7, abs=1e-6)
    assert f"s:1 eval:{int(found[1]) / 7:.4f}\n" in (tmp_path / "log/main.log").read_text()
    assert "-z 3: not supported for 1 process(es), falling back to 0\n" in said
    assert "| zero_stage            | 0 " in said


def test_either_kind_of_checkpoint_goes_on_with_y_1(made: Path) -> None:
    """14 steps in one go; 10, then 4 from our checkpoint; 10, then 4 from the .bin files alone."""
    n2 = ["-x", "14", "-n", "4"]
    llmc(made, *SMALL, *n2, "-o", "whole", "-y", "1", here=True)  # nothing there yet: a fresh start
    for name in ("ours", "theirs"):
        shutil.copytree(made / "log", made / name)
    for path in [p for p in (made / "theirs").iterdir() if not re.match(r"DONE|model_|state_|main\.log", p.name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(made / "m/gpt2_tokenizer.bin", made / "theirs")
    for name in ("ours", "theirs"):
        out = llmc(made, *SMALL, *n2, "-o", name, "-y", "1", here=name == "theirs")
        assert "| weight init method    | intermediate checkpoint" in out
        assert "step   11/14" in out
        assert "step   10/14" not in out
        assert trl(made / name) == trl(made / "whole"), name
        assert (made / name / "DONE_00000014").is_file()
    # Killed between our last checkpoint and its DONE: scripts wait for that file.
    (made / "whole/DONE_00000014").unlink()
    llmc(made, *SMALL, *n2, "-o", "whole", "-y", "1", here=True)
    assert (made / "whole/DONE_00000014").is_file()
    refused = llmc(made, *SMALL, "-o", "log", code=2, here=True)
    assert "-o log is not empty; continue what is in it with -y 1, or remove it" in refused
    assert "cannot become 0.002" in llmc(made, *SMALL, *n2, "-o", "ours", "-y", "1", "-l", "0.002", code=2, here=True)


@pytest.mark.parametrize("failing", [2, 4])
def test_a_full_disk_costs_one_set_of_files_and_not_the_run(
    made: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The disk is full when the state of a step is written. The last set is tried twice, and then an error."""
    usual, tries = llmc_files.write_state, list[int]()

    def full(path: Path, source: Export, **more: Any) -> None:
        tries.append(source.step)
        if source.step == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(path, source, **more)

    monkeypatch.setattr(llmc_files, "write_state", full)
    log = made / f"full-{failing}"
    said = llmc(made, *SMALL, "-o", log.name, "-x", "4", "-n", "2", here=True, code=int(failing == 4))
    assert tries == ([2, 4] if failing == 2 else [2, 4, 4])
    assert sorted(p.name for p in log.iterdir() if re.match(r"DONE|model_|state_", p.name)) == [
        f"{name}{6 - failing:08d}{end}" for name, end in (("DONE_", ""), ("model_", ".bin"), ("state_", "_00000.bin"))
    ]
    assert Run(log).checkpoint().step == 4
    assert "No space left on device" in said
    assert (f"not written, training continues: {log.name} could not be written" in said) == (failing == 2)


def test_a_warmup_longer_than_the_run_and_no_samples(made: Path) -> None:
    """Of 2 steps, and of one epoch: every step is one of the warmup, at (step + 1) / 700 of the peak."""
    for name, steps, count in (("short", ["-x", "2"], 2), ("epoch", ["-d", "512"], 0)):
        said = llmc(
            made, *SMALL, *steps, "-k", "cosine", "-u", "700", "-l", "0.7", "-g", "0", "-s", "0", "-o", name, here=True
        )
        assert said.splitlines()[-3:-1] == ["---", "---"]
        run = Run(made / name)
        assert run.metrics("sample") == []
        lrs = [record["lr"] for record in run.metrics("step")]
        assert lrs == pytest.approx([0.001 * (step + 1) for step in range(count or len(lrs))])
        assert len(lrs) == run.config.run.steps
        assert len(lrs) > 1


def test_a_finished_run_without_samples_is_asked_for_one(made: Path) -> None:
    """There is nothing left to train, so there is no sample either."""
    argv = [*SMALL, "-x", "2", "-o", "silent"]
    llmc(made, *argv, "-g", "0", here=True)
    said = llmc(made, *argv, "-g", "5", "-y", "1", here=True)
    assert "nothing to do" in said
    assert said.splitlines()[-3:-1] == ["---", "---"]


def test_overfitting_one_batch_equals_the_oracle(made: Path) -> None:
    """-a 1: the first validation batch again and again. Losses of an independent GPT-2 and AdamW, in fp64."""
    llmc(made, *SMALL, "-a", "1", "-x", "5", "-o", "over", "-c", "0.1")
    shape = shape_of()
    tokens = torch.from_numpy(np.fromfile(made / "shards/x_val_000000.bin", "<u2", offset=1024).astype(np.int64))
    x, y = (tokens[i : i + 4 * MAX_T].view(4, MAX_T) for i in (0, 1))
    values = {k: v.bfloat16().double() for k, v in values_of(shape).items()}
    oracle = GPT2(shape).load(values)
    adam = AdamW(dict(oracle.named_parameters()), weight_decay=0.1)
    for step in range(5):
        loss, grads = oracle.gradients(x, y)
        norm = adam.step(grads, 1e-3, step)
        assert trl(made / "over")[step] == f"trl:{loss:.4f} lr:0.001000 norm:{norm:.2f}"


TINY_124M = {"-i": "shards/*train*", "-j": "shards/*val*", "-e": "d6", "-b": "1", "-t": "64", "-d": "128", "-x": "2",
             "-u": "1", "-g": "4", "-o": "log6", "-n": "2"}  # fmt: skip


def published(argv: list[str], **tiny: str) -> list[str]:
    """One of the published commands with sizes and paths replaced, after the name of the Python."""
    pairs = {k: (TINY_124M | tiny).get(k, v) for k, v in zip(argv[::2], argv[1::2], strict=True)}
    return ["-m", "daybreak.llmc", *(x for pair in pairs.items() for x in pair), "-m", "1"]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC"))}
    return kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | more


def test_the_published_124m_command_runs_under_mpirun(tmp_path: Path) -> None:
    """As it is, but for a small shape, sizes and paths."""
    write_shards(tmp_path / "shards", 50257)
    env = environment()
    if shutil.which("mpirun"):
        start = ["mpirun", "--allow-run-as-root", "-np", "1", sys.executable]
    else:  # the variables that mpirun would set
        start = [sys.executable]
        env |= {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    done = subprocess.run(
        [*start, *published(RUN_124M)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "step    2/2 | loss 10." in done.stdout
    assert (tmp_path / "log6/DONE_00000002").is_file()
    assert (tmp_path / "log6/model_00000002.bin").stat().st_size == 1024 + 4 * 30357504
    first = re.search(r"step    1/2 \| loss (\d+\.\d+)", done.stdout)
    assert first
    assert abs(float(first[1]) - 10.825) < 0.3  # ln 50257


# Two processes that meet where torchrun says.
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "1",
]


@pytest.mark.parametrize("launcher", ["torchrun", ""])
def test_a_stopped_run_is_saved_and_not_started_again(made: Path, launcher: str) -> None:
    """One worker gets SIGTERM. torchrun would start again what fails; everybody else is told 75."""
    name = f"stopped-{launcher}"
    tiny = {"-e": "m/model_00000007.bin", "-o": name, "-b": "2", "-d": "256", "-s": "0"}
    tiny |= dict.fromkeys(("-x", "-v", "-n"), "1000000")
    with open(made / f"{name}.txt", "w") as out:
        start = TORCHRUN if launcher else [sys.executable]
        process = subprocess.Popen(
            [*start, *published(RUN_1558M, **tiny)], cwd=made, env=environment(), stdout=out, stderr=out
        )
    workers = [process.pid]
    try:
        log = made / name / "main.log"
        until(lambda: log.is_file() and len(trl(log.parent)) > 2, process, (made / f"{name}.txt").read_text)
        if launcher:
            workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        os.kill(workers[-1], signal.SIGTERM)
        code = process.wait(PATIENCE)
    finally:
        for pid in {process.pid, *workers} if process.poll() is None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    said = (made / f"{name}.txt").read_text()
    assert code == (0 if launcher else 75), said
    assert "daybreak.llmc: stopped by SIGTERM after step" in said
    assert json.loads((made / name / "exit.json").read_text())["code"] == 75
    run = Run(made / name)
    assert len(run.metrics("run")) == 1  # not started again
    assert run.checkpoints[0].name == f"step-{run.metrics('step')[-1]['step']:08d}"


def test_user_errors_are_one_sentence(made: Path) -> None:
    for argv, reason in [
        (["-y", "1"], "-y 1 resumes what is in the output folder; give it with -o"),
        (["-e", "dog.pt"], "-e dog.pt is neither a .bin file nor llm.c's shape"),
        (["-e", "qwen3-0.6b"], "-e qwen3-0.6b is neither a .bin file nor llm.c's shape"),
        (["-e", "gone.bin"], "gone.bin does not exist"),
        (["-d", "300"], "batch.total_tokens = 300 must be a multiple of batch.B * T = 2 * 64 = 128"),
        (["-t", "65", "-d", "130"], "batch.T = 65 must be at most model.max_T = 64"),
        (["-i", "gone*"], "no token shard matches 'gone*'"),
        (["-pi", "tcp", "-pn", "2"], "-pi tcp needs -ps: address of rank 0"),
        (["-pi", "tcp", "-pn", "2", "-pr", "2", "-ps", "127.0.0.1"], "-pr 2 must be below -pn 2"),
    ]:
        assert reason in llmc(made, *SMALL, "-x", "1", *argv, code=4 if "gone*" in argv else 2, here=True)
    assert not (made / "runs").exists()
    assert "unknown flag" in llmc(made, "-help", "1", code=2, here=True)
    said = llmc(made, "--help", here=True)
    assert all(f"  {name} " in said for name in BY_NAME)
    assert isinstance(Config(), Config)
