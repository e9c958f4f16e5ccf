"""Whole runs on several real ranks: resumed on other numbers of them, stopped together, failing with one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import time
from pathlib import Path
from typing import Any

import dist_engine
import numpy as np
import pytest
import ranks
import torch
from patience import PATIENCE, until
from safetensors.torch import load_file
from test_training import config, losses, markov, write_shard

import daybreak
from daybreak.config import Config
from daybreak.data.loader import Loader
from daybreak.data.shards import read_header
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import os_error

WAIT = 10  # parallel.timeout, in seconds, of the runs in which a rank does not come
SOON = ("--parallel.timeout", WAIT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "x_train_000000.bin", markov(1200, 1))
    write_shard(folder / "x_val_000000.bin", markov(600, 3))
    examples = [[0, i % 4, 4, 3, 1, 2, 3, *[x for e in range(4) for x in (2, i % 90 + e, 7)]] for i in range(10)]
    body = []
    for i, (_, label, count, *rest) in enumerate(examples):
        values = [i, label, count, *rest]
        body += [65535, 2 * len(values) + 4, *values]
    header = struct.pack("<4i", 20240522, 1, 10, 2 * len(examples[0]) + 4).ljust(1024, b"\0")
    (folder / "hs.bin").write_bytes(header + np.array(body, "<u2").tobytes())
    return folder


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    yield
    ranks.end_all()


def recipe(shards: Path, root: Path, name: str, **values: Any) -> Path:
    """12 samples of 16 tokens a step; an epoch is 74 samples, so it ends within the 7th step."""
    base: dict[str, Any] = {
        "batch__B": 1, "batch__total_tokens": 192, "run__steps": 12, "optim__horizon": 12, "eval__every": 4,
        "parallel__bucket_bytes": 16384, "parallel__timeout": 60,
    }  # fmt: skip
    path = root / f"{name}.toml"
    path.write_text(config(shards, root, name, **base | values).to_toml())
    return path


def train(world: int, root: Path, *args: Any, **more: str) -> list[int]:
    command = ["train", *args, "--quiet", "--json"]
    return ranks.finish(ranks.start(world, command, root, **more))


@pytest.mark.parametrize("compute", ["fp64", "bf16"])
def test_resume_on_other_ranks_and_stages(shards: Path, tmp_path: Path, compute: str) -> None:
    """4 -> 2 -> 1 -> 3 ranks and stage 1 -> 0 -> 2, mid-epoch and across its end: the run of one process."""
    name = {"precision__compute": compute, "eval__hellaswag": ""}
    straight = daybreak.train(Config.from_target(str(recipe(shards, tmp_path, "straight", **name))))
    moves = [(4, 1, 3), (2, 0, 5), (1, 0, 8), (3, 2, 12)] if compute == "fp64" else [(2, 1, 4), (1, 2, 12)]
    target: Path = recipe(shards, tmp_path, "moved", **name, run__steps=moves[0][2])
    for world, zero, steps in moves:
        if world > 1:
            assert train(world, tmp_path, target, "--parallel.zero", zero, "--steps", steps) == [0] * world
        else:
            saved = daybreak.load(target).config.override({"run.steps": steps, "parallel.zero": zero})
            daybreak.train(saved, resume=target)
        target = tmp_path / "moved"
        newest = daybreak.load(target).checkpoints[0]
        assert len(list(newest.glob("optimizer-*"))) == world
        how = f" (parallel.zero {zero}, parallel.bucket_bytes 16384)" if world > 1 else ""
        assert json.loads((newest / "manifest.json").read_text())["kernels"]["ranks"] == f"{world}{how}"
    moved = daybreak.load(target)
    limit = 1e-9 if compute == "fp64" else 3e-3
    for a, b in zip(losses(straight), losses(moved), strict=True):
        assert a[:1] + a[3:] == b[:1] + b[3:]
        assert b[1] == pytest.approx(a[1], rel=limit)
    for a, b in zip(straight.metrics("step"), moved.metrics("step"), strict=True):
        assert (a["tokens"], a["epoch"]) == (b["tokens"], b["epoch"])
    for val in moved.metrics("val"):
        same = [v["loss"] for v in straight.metrics("val") if v["step"] == val["step"]]
        assert not same or val["loss"] == pytest.approx(same[0], rel=limit)
    if compute == "fp64":
        a, b = (load_file(run.checkpoints[0] / "model.safetensors") for run in (straight, moved))
        assert all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a)


def test_a_masked_target_is_neither_learned_nor_counted_whatever_the_rank(shards: Path, tmp_path: Path) -> None:
    """Every fourth sample is all masked: one rank has more targets than the other, and micro-steps differ too."""
    for world in (1, 2):
        values = {"run__steps": 3, "precision__compute": "fp64", "eval__every": 3, "eval__hellaswag": ""}
        command = ["train", recipe(shards, tmp_path, f"on{world}", **values), "--quiet"]
        assert ranks.finish(ranks.start(world, command, tmp_path, run=dist_engine.masked)) == [0] * world
    one, two = (daybreak.load(tmp_path / f"on{world}") for world in (1, 2))
    assert losses(two) == [pytest.approx(step, rel=1e-9) for step in losses(one)]
    a, b = (run.metrics("val")[-1] for run in (one, two))
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-9)
    assert b["bpb"] == pytest.approx(a["bpb"], rel=1e-9, nan_ok=True)
    # By hand: the mean over the learned targets of the first step, and how many those of the validation are.
    loader = Loader([read_header(shards / "x_train_000000.bin")], 16, one.config.run.seed, V=one.config.model.V)
    tokens, targets = (part.astype(np.int64) for part in loader.batch(0, 12))
    targets[(targets % 3 > 0) | (np.arange(12) % 4 == 0)[:, None]] = -1
    engine = Engine(EngineSpec(one.config.model, B=12, T=16, compute="fp64"), seed=one.config.run.seed)
    found = engine.eval_losses(torch.from_numpy(tokens), torch.from_numpy(targets))
    assert losses(one)[0][1] == pytest.approx(float(found.sum()) / (targets >= 0).sum(), rel=1e-9)
    budget = markov(600, 3)[1:513].reshape(32, 16)
    learned = int((budget[np.arange(32) % 4 > 0] % 3 == 0).sum())
    assert a["tokens_evaluated"] == b["tokens_evaluated"] == learned


def test_each_rank_writes_its_slice_and_any_rank_can_be_read(shards: Path, tmp_path: Path) -> None:
    """The optimizer's files by hand: ranges of all ranks cover the flat buffer once, equal to one process's moments."""
    same = {"run__steps": 3, "precision__compute": "fp64"}
    one = daybreak.train(Config.from_target(str(recipe(shards, tmp_path, "one", **same))))
    many = recipe(shards, tmp_path, "many", **same, parallel__zero=1)
    assert train(3, tmp_path, many) == [0, 0, 0]
    folder = daybreak.load(tmp_path / "many").checkpoints[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {key: torch.full((manifest["flat_numel"],), torch.nan, dtype=torch.float64) for key in ("m", "v")}
    sizes = []
    for rank in range(3):
        path = folder / f"optimizer-{rank:05d}-of-00003.safetensors"
        sizes.append(path.stat().st_size)
        for name, tensor in load_file(path).items():
            if "[" in name:
                start, stop = map(int, name[2:-1].split(":"))
                assert found[name[0]][start:stop].isnan().all()  # nobody else's
                found[name[0]][start:stop] = tensor
    assert max(sizes) < 1.2 * min(sizes)
    whole = load_file(one.checkpoints[0] / "optimizer-00000-of-00001.safetensors")
    for key, tensor in found.items():
        (name,) = [n for n in whole if n.startswith(f"{key}[")]
        assert torch.allclose(tensor, whole[name], rtol=1e-9, atol=1e-15)


def test_all_ranks_agree(shards: Path, tmp_path: Path) -> None:
    """Validation, HellaSwag, skipped outliers, a save request and a stop that only one rank was told of."""
    same = {
        "data__tokenizer": "gpt2", "model__V": 50257, "model__C": 8, "model__L": 1, "run__steps": 4,
        "eval__hellaswag": str(shards / "hs.bin"), "eval__every": 2, "precision__compute": "fp64", "eval__tokens": 350,
    }  # fmt: skip
    one = daybreak.train(Config.from_target(str(recipe(shards, tmp_path, "one", **same))))
    assert train(3, tmp_path, recipe(shards, tmp_path, "three", **same, parallel__zero=2)) == [0, 0, 0]
    three = daybreak.load(tmp_path / "three")
    for a, b in zip(one.metrics("val"), three.metrics("val"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-9)
        assert b["bpb"] == pytest.approx(a["bpb"], rel=1e-9)
        assert a["tokens_evaluated"] == b["tokens_evaluated"]
    counts = [
        [(r["step"], r["task"], r["accuracy"], r["examples"]) for r in run.metrics("eval")] for run in (one, three)
    ]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 4
    assert (three.path / "main.log").read_text() == (one.path / "main.log").read_text()


def wait_for(folder: Path, text: str, count: int) -> None:
    """Until metrics.jsonl has this text so often."""
    path = folder / "metrics.jsonl"
    until(lambda: path.is_file() and path.read_text().count(text) >= count)


def wait_for_steps(folder: Path, steps: int) -> None:
    wait_for(folder, '"kind":"step"', steps)


def test_one_rank_is_told_to_save_and_one_to_stop(shards: Path, tmp_path: Path) -> None:
    endless = recipe(shards, tmp_path, "s", run__steps=100000, eval__every=0)
    processes = ranks.start(2, ["train", endless], tmp_path)
    wait_for_steps(tmp_path / "s", 3)
    processes[1].send_signal(signal.SIGUSR1)
    until(lambda: daybreak.load(tmp_path / "s").checkpoints)
    saved = daybreak.load(tmp_path / "s").checkpoints[0].name
    wait_for_steps(tmp_path / "s", int(saved[5:]) + 3)  # it went on
    processes[1].send_signal(signal.SIGTERM)
    assert ranks.finish(processes) == [75, 75]
    run = daybreak.load(tmp_path / "s")
    assert json.loads((run.path / "exit.json").read_text())["code"] == 75
    assert len(run.checkpoints) == 2
    assert f"saved; resume with: daybreak train {run.path}, started as 2 processes again" in ranks.said(tmp_path, 0)
    assert "saved; resume with" not in ranks.said(tmp_path, 1)  # all ended alike, and one says so
    assert all(r["stall"] == r["seconds"] for r in run.metrics("checkpoint"))  # ranks save together, and wait


@pytest.mark.parametrize(("keys", "code", "words"), [
    ({"run__max_hours": 1e-9}, 75, "--max-hours 1e-09 is over"),
    ({"optim__lr": 1e30, "schedule__warmup": 0, "guard__max_skips": 3}, 3, "3 updates in a row were skipped"),
])  # fmt: skip
def test_a_reason_that_all_ranks_share_is_said_once(
    shards: Path, tmp_path: Path, keys: dict[str, Any], code: int, words: str
) -> None:
    target = recipe(shards, tmp_path, "s", run__steps=30, **keys)
    assert ranks.finish(ranks.start(2, ["train", target], tmp_path)) == [code, code]
    assert words in json.loads((tmp_path / "s/exit.json").read_text())["reason"]
    assert [words in ranks.said(tmp_path, rank) for rank in range(2)] == [True, False]


@pytest.mark.parametrize("where", ["HellaSwag", "sampling"])
def test_all_ranks_are_told_to_stop_while_they_are_at_something_else(shards: Path, tmp_path: Path, where: str) -> None:
    """SIGTERM to three ranks in the evaluation after step 2, a batch or token of which waits for it: all leave it, and
    save that step."""
    slow = {"HellaSwag": ("eval_losses", 23), "sampling": ("decode", 1)}  # the second validation's end, the first token
    values = {"data__tokenizer": "gpt2", "model__V": 50257, "model__C": 8, "model__L": 1, "eval__every": 2}
    if where == "HellaSwag":
        values["eval__hellaswag"] = str(shards / "hs.bin")
    target = recipe(shards, tmp_path, "s", **values, run__steps=100000, eval__sample_every=2, eval__sample_tokens=15)
    what, n = slow[where]
    (sent := tmp_path / "sent").touch()
    slowly = {"do": "slow", "at": f"call:daybreak.engine.step:Engine.{what}", "n": n, "seconds": 0.0}
    args = [json.dumps(slowly | {"until": [str(sent), "all"]}), "train", target]
    processes = ranks.start(3, args, tmp_path, run=ranks.accident)
    wait_for(tmp_path / "s", '"kind":"val","step":2', 1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    sent.write_text("all")
    assert ranks.finish(processes) == [75, 75, 75]
    run = daybreak.load(tmp_path / "s")
    assert [path.name for path in run.checkpoints] == ["step-00000002"]
    assert len(run.metrics("step")) == 2
    assert [record["step"] for record in run.metrics("val")] == [0, 2]
    assert run.metrics("eval") == []  # left before its end, as was the sample, with some of its 15 tokens
    assert all(len(get_tokenizer("gpt2").encode(record["text"])) < 8 for record in run.metrics("sample"))


# ---- failing


def refused(tmp_path: Path, processes: list[Any], code: int, *words: str) -> str:
    """Every rank ends with `code`; the sentence has the words and is said by somebody, without a traceback."""
    codes = ranks.finish(processes)
    text = "".join(path.read_text() for path in sorted(tmp_path.glob("rank-*.txt")))
    assert codes == [code] * len(codes), (codes, text)
    for word in words:
        assert word in text, text
    assert "Traceback" not in text
    return text


def command(target: Path, *more: Any) -> list[Any]:
    return ["train", target, "--parallel.timeout", 600, "--quiet", *more]


def test_a_batch_that_does_not_divide(shards: Path, tmp_path: Path) -> None:
    target = recipe(shards, tmp_path, "a")
    processes = ranks.start(2, command(target, "--batch.B", 4), tmp_path)
    refused(
        tmp_path,
        processes,
        2,
        "batch.total_tokens = 192 must be a multiple of batch.B * T * ranks = 4 * 16 * 2 = 128; keep it with "
        "batch.B = 3, or make it 128 or 256.",
    )
    assert not (tmp_path / "a").exists()


def test_nobody_there_a_port_in_use_too_few_ranks(shards: Path, tmp_path: Path) -> None:
    target, port = recipe(shards, tmp_path, "a"), ranks.free_port()
    elsewhere = tmp_path / "few"
    elsewhere.mkdir()
    # Both wait at the same time.
    torchruns = {"TORCHELASTIC_RUN_ID": "1", "GROUP_WORLD_SIZE": "2"}  # of two machines: they chose the address
    few = ranks.start(3, command(target, *SOON), elsewhere, range(2), port=str(ranks.free_port()), **torchruns)
    alone = ranks.start(2, command(target, *SOON), tmp_path, range(1, 2), port=str(port))
    refused(tmp_path, alone, 7, f"rank 1 cannot reach rank 0 at 127.0.0.1:{port}", f"within {WAIT} s")
    refused(elsewhere, few, 7, "2 of 3 ranks reached 127.0.0.1:", "missing: 2", "3 processes; if the address is wrong")
    with ranks.socket.socket() as busy:
        busy.bind(("", port))
        busy.listen()
        taken = ranks.start(2, command(target), tmp_path, range(1), port=str(port))
        refused(tmp_path, taken, 7, f"rank 0 cannot listen on 127.0.0.1:{port}", "in use")
    assert not (tmp_path / "a").exists()


def test_ranks_of_other_launches(shards: Path, tmp_path: Path) -> None:
    """Another number of ranks, a rank too often, a run that another launch is training: by name, and as its folder."""
    target, port = recipe(shards, tmp_path, "a"), ranks.free_port()
    both = ranks.start(2, command(target, *SOON), tmp_path, range(1), port=port)
    both += ranks.start(3, command(target, *SOON), tmp_path, range(1, 2), port=port)
    said = "rank 1 was started as one of 3 ranks, rank 0 as one of 2; give every process the same WORLD_SIZE"
    refused(tmp_path, both[1:], 2, said)
    refused(tmp_path, both[:1], 7, "1 of 2 ranks reached 127.0.0.1:", "missing: 1")

    other, port = tmp_path / "other", ranks.free_port()
    other.mkdir()
    endless = recipe(shards, tmp_path, "a", run__steps=100000, eval__every=0)
    first = ranks.start(2, ["train", endless], tmp_path, port=port)
    wait_for_steps(tmp_path / "a", 3)
    third = ranks.start(2, command(endless), other, range(1, 2), port=port)
    refused(other, third, 2, "rank 1 of 2 was started twice; give every process its own RANK")
    refused(other, ranks.start(2, command(endless), other), 2, "run.name = 'a' is taken: ")
    said = f"a is being trained by process {first[0].pid} on "
    refused(other, ranks.start(2, command(tmp_path / "a"), other), 2, said)
    assert not (tmp_path / "a/exit.json").exists()
    wait_for_steps(tmp_path / "a", 10)  # it did not notice
    first[0].send_signal(signal.SIGTERM)
    assert ranks.finish(first) == [75, 75]


def test_a_signal_while_ranks_wait_for_each_other_ends_them_with_75(shards: Path, tmp_path: Path) -> None:
    """Rank 0 of two that listens, rank 1 that finds nobody, and rank 0 of llm.c's command; each in time."""
    target = recipe(shards, tmp_path, "a")
    ours = ["-m", "daybreak", "train", target, "--parallel.timeout", "60", "--quiet"]
    llmc = ["-m", "daybreak.llmc", "-i", shards / "*train*", "-j", shards / "*val*", "-e", "d6", "-o", "log"]
    waiting = []
    for number, (line, rank) in enumerate([(ours, 0), (ours, 1), (llmc, 0)]):
        (home := tmp_path / str(number)).mkdir()
        waiting.append(ranks.python(line, home, f"rank-{rank}.txt", ranks.environment(rank, 2, port=ranks.free_port())))
    for process in waiting:  # until it handles SIGTERM
        status = Path(f"/proc/{process.pid}/status")
        until(lambda s=status: int(s.read_text().split("SigCgt:")[1].split()[0], 16) >> 14 & 1)
    time.sleep(1)
    for process in waiting:
        process.send_signal(signal.SIGTERM)
    assert ranks.finish(waiting) == [75, 75, 75]
    for number, rank in enumerate((0, 1, 0)):
        assert "stopped by SIGTERM before all ranks had started; start them again." in ranks.said(
            tmp_path / str(number), rank
        )
    assert not (tmp_path / "a").exists()


def test_ranks_that_differ(shards: Path, tmp_path: Path) -> None:
    """Configuration, data, and code: each pair of ranks is started with its own."""
    target, port = recipe(shards, tmp_path, "a"), str(ranks.free_port())
    both = [
        ranks.start(2, command(target, "--optim.lr", lr), tmp_path, range(r, r + 1), port=port)[0]
        for r, lr in enumerate((0.1, 0.2))
    ]
    refused(tmp_path, both, 2, "rank 1 on ", "has optim.lr = 0.2, rank 0 on ", "has 0.1")

    other, port = tmp_path / "other", str(ranks.free_port())
    shutil.copytree(shards, other)
    write_shard(other / "x_train_000000.bin", markov(1200, 9))
    globs = [{"data.train": str(f / "*train*"), "data.val": str(f / "*val*")} for f in (shards, other)]
    assert globs[0] != globs[1]
    links = []
    for rank, folder in enumerate((shards, other)):  # the same names on two machines, with other contents
        home = tmp_path / f"host{rank}"
        home.mkdir()
        (home / "d").symlink_to(folder)
        path = home / "r.toml"
        path.write_text(
            Config.from_target(str(target)).override({"data.train": "d/*train*", "data.val": "d/*val*"}).to_toml()
        )
        links += ranks.start(2, command(path), home, range(rank, rank + 1), port=port)
    codes = ranks.finish(links)
    text = "".join((tmp_path / f"host{r}/rank-{r}.txt").read_text() for r in range(2))
    assert codes == [4, 4], text
    assert "has training data = " in text

    copy, port = tmp_path / "copy", str(ranks.free_port())
    shutil.copytree(Path(daybreak.__file__).parent, copy / "daybreak", ignore=shutil.ignore_patterns("__pycache__"))
    with open(copy / "daybreak/shapes.py", "a") as file:
        file.write("# another version\n")
    paths = os.environ.get("PYTHONPATH", "")
    both = []
    for rank, path in enumerate((paths, f"{copy}:{paths}")):
        env = ranks.environment(rank, 2, int(port), PYTHONPATH=path)
        both.append(ranks.python(["-m", "daybreak", *command(target)], tmp_path, f"rank-{rank}.txt", env))
    refused(tmp_path, both, 2, f"has daybreak = '{daybreak.__version__} ")
    assert not (tmp_path / "a").exists()


def test_one_rank_is_out_of_disk(shards: Path, tmp_path: Path) -> None:
    target, port = recipe(shards, tmp_path, "a", run__steps=50, checkpoint__every=5), str(ranks.free_port())
    both = ranks.start(2, command(target), tmp_path, range(1), port=port)
    both += ranks.start(2, command(target), tmp_path, range(1, 2), ranks.small_files, port=port)
    refused(tmp_path, both, 1, "could not be written (File too large); free space")
    run = daybreak.load(tmp_path / "a")
    verdict = json.loads((run.path / "exit.json").read_text())
    assert verdict["code"] == 1
    assert verdict["reason"].startswith("rank 1: checkpoint ")
    assert run.checkpoints == []
    assert list((run.path / "checkpoints").iterdir()) == []


def test_one_rank_is_out_of_memory(shards: Path, tmp_path: Path) -> None:
    """All leave with 6, and the flags that help are those of three ranks: one row is the least, so they share."""
    target, port = recipe(shards, tmp_path, "a", run__steps=50, eval__every=0), ranks.free_port()
    three = ranks.start(3, command(target), tmp_path, range(2), port=port)
    args = ["Triton Error [CUDA]: out of memory", *command(target)]
    three += ranks.start(3, args, tmp_path, range(2, 3), ranks.out_of_memory, port=port)
    refused(tmp_path, three, 6, "cpu ran out of memory: the run takes ", "; try --parallel.zero 1 --batch.B ")
    verdict = json.loads((tmp_path / "a/exit.json").read_text())
    assert verdict["code"] == 6
    assert verdict["reason"].startswith("rank 2: cpu ran out of memory")


def test_everybody_hears_who_is_to_blame(tmp_path: Path) -> None:
    """The one who fails holds the store in which it says so; who is busy for seconds hears it all the same."""
    three = ranks.start(3, [], tmp_path, run=dist_engine.blame)
    refused(tmp_path, three, 4)
    assert [ranks.said(tmp_path, r) for r in range(3)] == ["the reason.\n", *["rank 0: the reason.\n"] * 2]


@pytest.mark.parametrize("how", ["alone", "everywhere"])
def test_what_the_system_refuses_is_said_alike_on_every_rank(tmp_path: Path, how: str) -> None:
    """With the sentence and the code of one process."""
    for error in (PermissionError(13, "Permission denied", "a/b"), OSError("0 written")):
        want = os_error(error)
        two = ranks.start(2, [how, str(error.errno)], tmp_path, run=dist_engine.disk_trouble)
        assert [process.wait(PATIENCE) for process in two] == [want.exit_code, 0]
        assert ranks.said(tmp_path, 0) == f"rank 1: {want}\n"


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [("dies", 1, "rank 1 on "), ("says why", 4, "rank 1: the reason."), ("is late", 7, "rank 1 on ")],
)
def test_a_device_that_waits_for_a_rank_that_is_gone(tmp_path: Path, how: str, code: int, words: str) -> None:
    """NCCL's kernels never come back then; the host must."""
    two = ranks.start(2, [how], tmp_path, run=dist_engine.waits_for_a_device)
    assert two[0].wait(PATIENCE) == code
    assert ranks.said(tmp_path, 0).startswith(words)


def test_one_rank_hangs_or_dies(shards: Path, tmp_path: Path) -> None:
    """Two launches side by side, since most of the time they wait."""
    said = f"hangs: the others have waited {WAIT} s for it (parallel.timeout); see why its process is"
    stop = (signal.SIGSTOP, 7, said)
    cases = {"hangs": stop, "dies": (signal.SIGKILL, 1, "died")}
    launches: dict[str, list[Any]] = {}
    for name in cases:
        (tmp_path / name).mkdir()
        target = recipe(shards, tmp_path / name, "a", run__steps=100000, eval__every=0)
        launches[name] = ranks.start(3, command(target, *SOON), tmp_path / name)
    try:
        for name, (number, _, _) in cases.items():
            wait_for_steps(tmp_path / name / "a", 3)
            launches[name][1].send_signal(number)
        for name, (_, code, words) in cases.items():
            refused(tmp_path / name, [launches[name][0], launches[name][2]], code, "rank 1 on ", words)
    finally:
        for name in cases:
            launches[name][1].kill()
            launches[name][1].wait()
    for name, (_, code, _) in cases.items():
        verdict = json.loads((tmp_path / name / "a/exit.json").read_text())
        assert verdict["code"] == code
        assert "rank 1 on" in verdict["reason"]


def test_when_a_rank_hangs_every_rank_leaves_its_stacks(shards: Path, tmp_path: Path) -> None:
    target, port = recipe(shards, tmp_path, "a", run__steps=100000, eval__every=0), str(ranks.free_port())
    hang = json.dumps({"do": "hang", "at": "call:daybreak.engine.step:Engine.micro_step", "n": 9})
    stuck = ranks.start(3, [hang, *command(target, *SOON)], tmp_path, range(1, 2), port=port, run=ranks.accident)
    others = [ranks.start(3, command(target, *SOON), tmp_path, range(r, r + 1), port=port)[0] for r in (0, 2)]
    said = (f"hangs: the others have waited {WAIT} s", "look for its stacks in the run")
    refused(tmp_path, others, 7, "rank 1 on ", *said)
    assert stuck[0].poll() is None
    parts = (tmp_path / "a/crash.txt").read_text().split("Z rank ")[1:]
    assert sorted(part[0] for part in parts) == ["0", "1", "2"]
    (said,) = [part for part in parts if part[0] == "1"]
    assert "in happen" in said
    assert "in _loop" in said
    assert "in _keep_beating" in said


def test_under_mpirun(shards: Path, tmp_path: Path) -> None:
    """llm.c's own command with the variables that mpirun sets (mpirun itself is not needed for them)."""
    line = [
        "-i", shards / "*train*", "-j", shards / "*val*", "-e", "d6", "-b", "1", "-t", "8",
        "-x", "2", "-o", "log", "-z", "1", "-v", "2", "-m", "1", "-n", "2", "-g", "4",
    ]  # fmt: skip
    processes, port = [], ranks.free_port()
    for rank in range(2):
        env = {f"OMPI_COMM_WORLD_{k}": str(v) for k, v in (("RANK", rank), ("SIZE", 2), ("LOCAL_RANK", rank))}
        env |= {"MASTER_PORT": str(port)}
        processes.append(ranks.Forked(ranks.llmc, [str(x) for x in line], tmp_path, tmp_path / f"rank-{rank}.txt", env))
    assert ranks.finish(processes) == [0, 0], ranks.said(tmp_path, 0)
    assert "| num_processes         | 2 " in ranks.said(tmp_path, 0)
    assert "| zero_stage            | 1 " in ranks.said(tmp_path, 0)
    assert ranks.said(tmp_path, 1) == ""
    assert (tmp_path / "log/main.log").read_text().count("trl:") == 2
    assert (tmp_path / "log/DONE_00000002").exists()
