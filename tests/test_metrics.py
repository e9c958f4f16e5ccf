"""The records of a run: JSONL, main.log, the console's line, speed, the run folder."""

from __future__ import annotations

import getpass
import json
import math
import os
import re
import resource
import socket
import subprocess
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from snapshots import exit_of, fork

from daybreak.errors import ConfigError, Error
from daybreak.files import write_atomic
from daybreak.formatting import counted, disk, format_duration, quoted
from daybreak.state import run_folder
from daybreak.state.metrics import COMMON, FIELDS, MOST_WAITING, MainLog, MetricsWriter, read_metrics, step_line
from daybreak.state.run_folder import RunFolder, package_commit
from daybreak.state.throughput import Throughput, peak_flops

torch.set_num_threads(1)
NAN = math.nan

# The contract, spelled out a second time on purpose: renaming a field breaks other people's programs.
EXAMPLES: dict[str, dict[str, object]] = {
    "run": {"name": "a", "config_hash": "ff", "device": "cpu", "parameters": 7, "flops_per_token": 1e9},
    "step": {
        "loss": 4.5, "norm": 1.25, "lr": 6e-4, "ms": 12.5, "tok_s": 1e5, "mfu": None, "loss_z": None, "norm_z": -0.5,
        "skipped": False, "mem_mib": 100, "eta_s": 60.0, "epoch": 0, "temp_c": None, "power_w": 61.5,
        "saturated": None,
    },
    "val": {"loss": 4.0, "tokens_evaluated": 4096, "bpb": 1.5, "text_loss": 2.5, "image_loss": None},
    "eval": {"task": "hellaswag", "accuracy": 0.25, "examples": 10042},
    "sample": {"text": "line\n<script> é 🌅 NaN"},
    "image": {"caption": "a <b> é", "path": "images/step-3-0.png"},
    "checkpoint": {"path": "checkpoints/step-00000010", "seconds": 0.5, "stall": 0.25, "bytes": 123},
    "event": {"what": "signal", "detail": "SIGTERM"},
}  # fmt: skip


def test_the_field_names_are_fixed():
    assert {kind: list(fields) for kind, fields in FIELDS.items()} == {k: list(v) for k, v in EXAMPLES.items()}
    assert list(COMMON) == ["v", "kind", "step", "tokens", "t"]


@pytest.mark.parametrize("kind", list(EXAMPLES))
def test_each_kind_is_one_json_line(tmp_path, kind):
    with closing(MetricsWriter(tmp_path / "m.jsonl", clock=lambda: 1000.25)) as writer:
        writer.write(kind, 3, 300, **EXAMPLES[kind])
    text = (tmp_path / "m.jsonl").read_text()
    expected = {"v": 1, "kind": kind, "step": 3, "tokens": 300, "t": 1000.25, **EXAMPLES[kind]}
    assert text.count("\n") == 1
    assert text.endswith("}\n")
    assert json.loads(text) == expected
    assert read_metrics(tmp_path / "m.jsonl") == [expected]


def wrong_examples():
    for kind, fields in EXAMPLES.items():
        for name, value in fields.items():
            yield kind, {k: v for k, v in fields.items() if k != name}
            wrong: list[object] = [[], {}] + ([] if value is None else [1 if isinstance(value, bool | str) else "1"])
            wrong += [True] if isinstance(value, float | int) and not isinstance(value, bool) else []
            wrong += [0.5] if type(value) is int else []
            for bad in wrong:
                yield kind, fields | {name: bad}
        yield kind, fields | {"another": 1}


def test_a_wrong_field_is_our_own_bug(tmp_path):
    with closing(MetricsWriter(tmp_path / "m.jsonl")) as writer:
        cases = list(wrong_examples())
        for kind, fields in cases:
            with pytest.raises(AssertionError):
                writer.write(kind, 1, 1, **fields)
        for step, tokens in ((1.0, 1), (1, None), (True, 1)):
            with pytest.raises(AssertionError):
                writer.write("event", step, tokens, what="a", detail="b")  # type: ignore[arg-type]
    assert len(cases) > 80
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_numbers_that_json_lacks_survive(tmp_path):
    values = {"loss": NAN, "norm": math.inf, "lr": -math.inf, "mfu": NAN, "ms": 7}
    with closing(MetricsWriter(tmp_path / "m.jsonl")) as writer:
        writer.write("step", 1, 1, **EXAMPLES["step"] | values)
        writer.write("sample", 1, 1, text="NaN")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    first = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0], parse_constant=refuse)
    assert (first["loss"], first["norm"], first["lr"], first["mfu"]) == ("NaN", "Infinity", "-Infinity", "NaN")
    step, sample = read_metrics(tmp_path / "m.jsonl")
    assert math.isnan(step["loss"])
    assert math.isnan(step["mfu"])
    assert (step["norm"], step["lr"], step["ms"], sample["text"]) == (math.inf, -math.inf, 7, "NaN")


def test_readers_keep_the_last_record_of_kind_step_task(tmp_path):
    rows = [
        {"kind": "val", "step": 0, "loss": 11.0},
        {"kind": "step", "step": 1, "loss": 1.0},
        {"kind": "step", "step": 2, "loss": 2.0},
        {"kind": "eval", "step": 2, "task": "hellaswag", "accuracy": 0.1},
        {"kind": "eval", "step": 2, "task": "arc", "accuracy": 0.2},
        {"kind": "event", "step": 2, "what": "signal"},
        {"kind": "event", "step": 2, "what": "resume"},
        {"kind": "step", "step": 2, "loss": 20.0},  # the resumed run does step 2 again
        {"kind": "eval", "step": 2, "task": "arc", "accuracy": 0.3},
        {"kind": "novel", "step": 1, "value": "kept: kinds may be added"},
    ]
    rows = [{"v": 1, "tokens": 7, "t": 0.5, **EXAMPLES.get(row["kind"], {}), **row} for row in rows]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_metrics(path) == [rows[i] for i in (0, 1, 9, 3, 5, 6, 7, 8)]


WHOLE = '{"v":1,"kind":"event","step":2,"tokens":1,"t":0,"what":"x","detail":""}'


@pytest.mark.parametrize("torn", [WHOLE[:30], "{", WHOLE, WHOLE.replace("2", "-2"), "\x00\x00\x00", "[]", "7"])
def test_a_torn_line_costs_only_itself(tmp_path, caplog, torn):
    path = tmp_path / "m.jsonl"
    with closing(MetricsWriter(path)) as writer:
        writer.write("val", 1, 1, **EXAMPLES["val"])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    counted = [2] if torn == WHOLE else []  # all but its line feed arrived
    assert [r["step"] for r in read_metrics(path)] == [1, *counted]
    assert caplog.text == ""

    with closing(MetricsWriter(path)) as writer:  # the process that resumes
        writer.write("val", 3, 1, **EXAMPLES["val"])
        writer.write("val", 4, 1, **EXAMPLES["val"])
    assert path.read_bytes().startswith(whole + torn.encode() + b"\n{")
    assert [r["step"] for r in read_metrics(path)] == [1, *counted, 3, 4]
    assert ("m.jsonl line 2 is not a metrics record" in caplog.text) == (not counted)


def test_many_lines_that_are_no_records_are_counted(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    with closing(MetricsWriter(path)) as writer:
        writer.write("val", 1, 1, **EXAMPLES["val"])
    path.write_bytes(b"{}\n" * 50 + path.read_bytes())
    assert [r["step"] for r in read_metrics(path)] == [1]
    said = [record.getMessage() for record in caplog.records]
    assert [f"m.jsonl line {i} is not a metrics record" in said[i - 1] for i in (1, 2, 3)] == [True] * 3
    assert said[3:] == [f"{path}: lines that are no metrics records either: 47 more; they are left out."]


def test_every_cut_leaves_the_lines_before_it(tmp_path):
    path = tmp_path / "m.jsonl"
    with closing(MetricsWriter(path)) as writer:
        for step in range(3):
            writer.write("val", step, 1, **EXAMPLES["val"])
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        complete = data[: cut + 1].count(b"\n")
        assert [r["step"] for r in read_metrics(path)] == list(range(complete))


def test_two_writers_never_mix_their_lines(tmp_path):
    with closing(MetricsWriter(tmp_path / "m.jsonl")) as a, closing(MetricsWriter(tmp_path / "m.jsonl")) as b:
        for step in range(50):
            a.write("sample", 2 * step, 0, text="a" * 5000)
            b.write("sample", 2 * step + 1, 0, text="b" * 5000)
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [(r["step"], r["text"]) for r in rows] == [(i, "ab"[i % 2] * 5000) for i in range(100)]


def test_what_a_full_disk_refuses_waits_and_is_not_lost(tmp_path, caplog):
    """The file may take 700 bytes more; in the 13th write the limit goes, as when somebody freed space."""
    path = tmp_path / "m.jsonl"

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
        with closing(MetricsWriter(path)) as writer:
            for step in range(20):
                if step == 12:
                    assert path.stat().st_size == 700  # a line is cut in the middle
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                writer.write("val", step, 1, **EXAMPLES["val"])

    assert exit_of(fork(body)) == 0
    assert [r["step"] for r in read_metrics(path)] == list(range(20))
    assert len(path.read_text().splitlines()) == 20
    with closing(MetricsWriter(Path("/dev/full"))) as writer:
        for _ in range(3):
            writer.write("event", 1, 1, what="a", detail="b")
        assert caplog.text.count("/dev/full cannot be written (No space left on device); its lines wait") == 1
        with pytest.raises(Error, match=r"/dev/full cannot be written \(No space left on device\): fix that"):
            writer.append("x" * MOST_WAITING)
    assert re.search(r"/dev/full: its last 67109\d{3} bytes could not be written", caplog.text)


def test_main_log_is_llm_c_s_byte_for_byte(tmp_path):
    path = tmp_path / "main.log"
    path.write_text("of an earlier run\n")
    log = MainLog(path, fresh=True)
    log.val(0, 11.129390)
    log.train(0, 11.133732, 8.57142879e-07, 52.9732)
    log.train(1, 10.539388, 6e-4, 0.125)
    MainLog(path, fresh=False).eval(250, 0.294463)
    MainLog(path, fresh=False).train(2, NAN, 0.0, math.inf)
    assert path.read_bytes() == (
        b"s:0 tel:11.1294\n"
        b"s:0 trl:11.1337 lr:0.000001 norm:52.97\n"
        b"s:1 trl:10.5394 lr:0.000600 norm:0.12\n"
        b"s:250 eval:0.2945\n"
        b"s:2 trl:nan lr:0.000000 norm:inf\n"
    )


def test_step_line():
    common = {"loss": 5.270009, "norm": 1.25, "lr": 6e-4, "ms": 2747.19, "tok_s": 381400.4, "mem_mib": 64756}
    common |= {"precision": "bf16"}
    line = step_line(1, 10, {**common, "loss_z": None, "norm_z": NAN, "mfu": None, "eta_s": None})
    assert line == ("step    1/10 | loss 5.270009 | norm 1.2500 | lr 6.00e-04 | 2747.19 ms | 381400 tok/s | 64756 MiB")
    assert line[20:28] == "5.270009"  # the columns that llm.c's loss checker reads
    values = {**common, "loss_z": -0.123, "norm_z": 7.0, "mfu": 0.47374, "eta_s": 3725}
    assert step_line(20000, 32000, values) == (
        "step 20000/32000 | loss 5.270009 (-0.12z)| norm 1.2500 (+7.00z)| lr 6.00e-04 | 2747.19 ms | 47.4% bf16 MFU | "
        "381400 tok/s | 64756 MiB | ETA 1h02m"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3599.9, "1h00m"), (7620, "2h07m"),
     (7649, "2h07m"), (7651, "2h08m"), (86369, "23h59m"), (86399, "1d00h"), (96050, "1d03h"), (97200, "1d03h"),
     (170999, "1d23h"), (171001, "2d00h"), (8640000, "100d00h"), (None, "n/a")],
)  # fmt: skip
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "word", ["runs/mine", "runs/дневник", "C:/a+b=c,d@e.f", "runs/mein roman", "it's", "$HOME", "", "~/x"]
)
def test_a_shell_reads_a_named_path_as_it_is(word: str) -> None:
    said = quoted(Path(word) if word else word)
    assert subprocess.run(["sh", "-c", f"printf %s {said}"], capture_output=True, check=True).stdout.decode() == word
    assert (said == word) is (word in ("runs/mine", "runs/дневник", "C:/a+b=c,d@e.f"))


def test_large_numbers_change_their_unit_where_they_round_to_one() -> None:
    said = [counted(x, "tokens") for x in (999, 999_400, 999_812_096, 9.9951e11, 1.5e12)]
    assert said == ["999 tokens", "999,400 tokens", "1 billion tokens", "1 trillion tokens", "1.5 trillion tokens"]
    assert [disk(x) for x in (8192, 9.994e8, 9.996e8, 74.8e9, 7.48e13)] == [
        "0.00819 MB", "999 MB", "1 GB", "74.8 GB", "74.8 TB"
    ]  # fmt: skip


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_by_hand():
    clock = FakeClock()
    meter = Throughput(flops_per_token=2e6, peak=1e9, clock=clock)
    assert meter.eta(1000) is None
    clock.now += 50  # start-up belongs to no step
    meter.start()
    clock.now += 10
    first = meter.lap(1000)  # the warm-up step: shown raw, left out of the average
    assert (first.seconds, first.tok_s, first.mfu) == pytest.approx((10.0, 100.0, 2e6 * 100 / 1e9))
    assert meter.eta(5000) == pytest.approx(50.0)

    clock.now += 1.5
    with meter.pause():
        clock.now += 1000
    clock.now += 0.5
    second = meter.lap(1000)  # e = 0.05 * 500, / (1 - 0.95) = 500
    assert (second.seconds, second.tok_s, second.mfu) == pytest.approx((2.0, 500.0, 1.0))

    with suppress(KeyError), meter.pause():
        clock.now += 77
        raise KeyError
    with meter.pause():
        clock.now += 3
    clock.now += 4
    third = meter.lap(1000)  # e = 0.95 * 25 + 0.05 * 250 = 36.25, / (1 - 0.9025) = 371.79...
    assert (third.seconds, third.tok_s, third.mfu) == pytest.approx((4.0, 36.25 / 0.0975, 0.5))

    clock.now += 1
    fourth = meter.lap(500)  # e = 0.95 * 36.25 + 0.05 * 500 = 59.4375, / (1 - 0.857375) = 416.74...
    assert (fourth.tok_s, fourth.mfu) == pytest.approx((59.4375 / 0.142625, 1.0))
    assert meter.eta(0) == 0
    assert meter.eta(10_000) == pytest.approx(10_000 / (59.4375 / 0.142625))


def test_unknown_peak_means_no_mfu():
    clock = FakeClock()
    meter = Throughput(1e9, None, clock)
    clock.now += 1
    assert meter.lap(10).mfu is None
    meter.lap(10)  # a clock that did not move must not divide by zero


def test_mfu_of_the_published_1558m_run():
    """llm.c's discussion 677: 8 H100, 1,048,576 tokens in 2747.19 ms, printed as 47.4 %."""
    clock = FakeClock()
    meter = Throughput(9_817_977_600, 8 * peak_flops("NVIDIA H100 80GB HBM3"), clock)
    clock.now += 2.74719
    assert meter.lap(1_048_576).mfu == pytest.approx(0.4737, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 988.8e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA H100", None), ("cpu", None), ("", None)],
)  # fmt: skip
def test_peaks(name, peak):
    assert peak_flops(name) == peak


# ---- run folder


def test_run_folder_names_and_creation(tmp_path):
    run = RunFolder(tmp_path / "runs" / "first")
    run.create()
    names = [
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "main.log",
        "samples.txt",
        "checkpoints",
        "exit.json",
        "crash.txt",
    ]
    found = [run.config, run.env, run.metrics, run.main_log, run.samples, run.checkpoints, run.exit, run.crash]
    assert found == [tmp_path / "runs" / "first" / name for name in names]
    run.create()  # still empty: an attempt that crashed here is taken over
    run.config.touch()
    with pytest.raises(ConfigError, match=f"`daybreak train {run.path}` or choose another --name") as e:
        run.create()
    assert e.value.exit_code == 2
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be created \(Not a directory"):
        RunFolder(tmp_path / "file" / "run").create()


def test_env_tells_versions_and_nothing_about_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/planted-home")
    monkeypatch.setenv("USER", "planted-user")
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret")
    monkeypatch.setenv("HOSTNAME", "planted-host")
    run = RunFolder(tmp_path)
    run.write_env()
    text = run.env.read_text()
    env = json.loads(text)
    assert env["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"3\.\d+\.\d+\S*", env["python"])
    assert set(env) == {
        "time", "daybreak", "commit", "source", "python", "packages", "platform", "cpu", "cpus", "cuda", "cudnn",
        "cards",
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", env["time"])
    assert env["cpus"] == os.cpu_count()
    assert env["cpu"]
    monkeypatch.undo()
    words = set(re.findall(r"[\w./-]+", text))  # whole words: a user may be called "x"
    assert not words & {getpass.getuser(), socket.gethostname()}
    assert not [p for p in (Path.home(), Path.cwd(), tmp_path) if len(str(p)) > 1 and str(p) in text]
    assert "planted" not in text


def test_commit_is_that_of_the_package_s_own_checkout(tmp_path):
    def git(*args: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], capture_output=True, text=True, check=True
        ).stdout

    (tmp_path / "package").mkdir()
    assert package_commit(tmp_path) is None
    git("init", "-q")
    assert package_commit(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    sha = git("rev-parse", "HEAD").strip()
    assert package_commit(tmp_path) == sha
    (tmp_path / "a").write_text("2")
    assert package_commit(tmp_path) == sha + "-dirty"
    assert package_commit(tmp_path / "package") is None  # installed inside somebody's repository


def test_the_commit_of_a_clone_that_belongs_to_another_user(tmp_path, monkeypatch):
    """As where a team shares one. git is told so by a variable that its own tests use, and then refuses the clone."""
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", "-C", tmp_path, "init", "-q"], check=True)
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    mine = package_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", mine)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert package_commit(tmp_path) == mine
    if os.getuid() == 0:  # a repository that another user put beside the code may name commands for git to run
        os.chown(tmp_path / ".git", os.stat(run_folder.__file__).st_uid + 1, -1)
        assert package_commit(tmp_path) is None


def test_exit_and_samples(tmp_path):
    run = RunFolder(tmp_path)
    run.write_exit(75, "stopped by SIGTERM")
    run.write_exit(0, "done")
    written = json.loads(run.exit.read_text())
    assert (written["code"], written["reason"]) == (0, "done")
    assert written["t"] > 1.7e9
    run.append_sample(100, "Once\nupon é")
    run.append_sample(200, "")
    assert run.samples.read_text(encoding="utf-8") == "--- step 100 ---\nOnce\nupon é\n--- step 200 ---\n\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exit.json", "samples.txt"]


def test_the_end_of_a_dead_rank_in_a_folder_that_is_gone_is_no_error(tmp_path):
    """Another rank writes it before it raises its own error, which must not be hidden behind this one."""
    RunFolder(tmp_path / "gone").write_exit(7, "rank 1 was silent", free=True)
    assert not (tmp_path / "gone").exists()


def test_write_atomic_keeps_the_old_text_when_the_new_cannot_be_written(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", "old")

    def fail(*_: object) -> None:
        raise OSError("pulled the plug")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="plug"):
        write_atomic(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_reading_a_run_does_not_import_torch():
    code = (
        "import sys, daybreak.state.metrics, daybreak.state.run_folder, daybreak.state.throughput as t; "
        "assert t.peak_flops('NVIDIA L4'); assert 'torch' not in sys.modules"
    )
    subprocess.run([os.sys.executable, "-c", code], check=True)
