"""`daybreak doctor --check` on this CPU: eight lines and exit 0, or BAD lines and exit 1."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daybreak.cli.main import main
from daybreak.kernels import OPS
from daybreak.report import check


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Runs are started by this shell script instead."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_all_is_good(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--check"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 8
    assert err == ""
    assert re.match(r"daybreak \S+, torch \S+, fp32 on the CPU", lines[0])
    assert [line[:6] for line in lines[1:7]] == ["good  "] * 6
    errors = [float(re.search(r"largest error (\S+)", line)[1]) for line in lines[1:3]]  # type: ignore[index]
    assert 0 < errors[0] < 1e-5
    assert 0 < errors[1] < 1e-4
    patterns = r"two runs: (\d+) of \1 losses", r"kill -9 after step (\d+) ", r"every file of step (\d+) equal to"
    made, killed, end = (int(re.search(p, out)[1]) for p in patterns)  # type: ignore[index]
    assert end == killed + check.EVERY
    assert made == killed > check.EVERY
    assert re.search(r"memory: \d+ MiB used, \d+ MiB planned\n", out)
    assert re.search(r"speed of tiny: [\d,]+ tok/s in the median step; plan has no figure\n", out)
    assert lines[7].startswith("all good, in ")
    assert list(here.glob("runs/*")) == []
    assert list(here.glob("runs/.*")) == []


def test_a_run_that_differs_is_bad(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that is never stopped has another seed."""
    seed = 'case "$*" in *whole*) set -- "$@" --run.seed 7;; esac'
    python(here, monkeypatch, f'{seed}\nexec {sys.executable} "$@"')
    assert main(["doctor", "--check"]) == 1
    out, err = capsys.readouterr()
    assert [line[:4] for line in out.splitlines()[1:7]] == ["good", "good", "BAD ", "BAD ", "good", "good"]
    assert re.search(r"BAD   two runs: 0 of \d+ losses equal to the last bit\n", out)
    assert re.search(r"BAD   kill -9 after step \d+ and resume: every file of step \d+ NOT equal", out)
    assert out.splitlines()[7].startswith("2 bad, in ")
    assert err == "daybreak: this machine does not compute as it should, see the lines marked BAD.\n"


def test_a_run_that_fails_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python(here, monkeypatch, "echo daybreak: the disk is full. >&2; exit 1")
    assert main(["doctor", "--check"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[3] == "BAD   a run failed, the rest is not checked: daybreak: the disk is full."
    assert out.splitlines()[4].startswith("1 bad, in ")
    assert list(here.glob("runs/.*")) == []


@pytest.mark.parametrize(("name", "which"), [
    ("layernorm_backward", "dw"), ("attention_backward", "dk"), ("embedding_backward", "dwte"),
    ("matmul_backward_weight", "dw"), ("matmul_gelu_backward", "db"),
])  # fmt: skip
def test_a_wrong_gradient_is_found(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One output of one operation is a thousandth too large."""
    impl = OPS[name].impls["torch"]
    at = OPS[name].parameters.index(which)

    @functools.wraps(impl.fn)
    def wrong(*args: Any, **kwargs: Any) -> None:
        impl.fn(*args, **kwargs)
        out: Tensor = kwargs[which] if which in kwargs else args[at]
        out *= 1.001

    monkeypatch.setitem(OPS[name].impls, "torch", type(impl)(wrong, impl.temps, impl.dtypes))
    assert check._derivatives() > check.DERIVATIVE


def test_memory_beyond_the_plan_is_bad() -> None:
    target, keys = check._setting(check.pick_device("cpu"))
    p = check.plan(check.resolve(target)[0].override(keys | {"run.device": "cpu"}))
    planned = (p.nbytes + p.outside + p.host_nbytes) >> 20
    for used, good in ((planned, True), (planned + 100, True), (2 * planned + 200, False)):
        said = f"memory: {used:,} MiB used, {planned:,} MiB planned"
        assert check._memory(p, [(used - 50, used), (used, used - 9)], [0, 0, 0, 0]) == (good, said)


STEADY, MORE = [5000] * 4, [5000, 5000, 9000, 9000]  # what other programs hold between the runs


@pytest.mark.parametrize(("pairs", "idle", "good", "used"), [
    # Alone, or beside programs that hold what they hold: every fault is found, also one that grows step by step.
    ([(900, 900)] * 9, [0] * 4, True, "900"),
    ([(1300, 1300)] * 9, [0] * 4, False, "1,300"),
    ([(900 + 50 * i, 900 + 50 * i) for i in range(9)], [0] * 4, False, "1,300"),
    ([(5900, 5900)] * 9, STEADY, True, "900"),
    ([(6300, 6300)] * 9, STEADY, False, "1,300"),
    # Another program takes memory for a while: in one of the two processes of a step, or before one of them.
    ([(5900, 8900)] * 3 + [(5900, 5900)] * 6, STEADY, None, "between 900 and 3,900"),
    ([(9900, 9900)] * 9, MORE, None, "between 900 and 4,900"),
    ([(9900, 5900)] * 9, MORE, None, "between 0 and 4,900"),
    ([(5950, 5900)] * 9, [5000, 5030, 5000, 5000], True, "between 870 and 950"),
    # It frees some: the figure means nothing, and is not good either.
    ([(3000, 3000)] * 9, [5000, 2000, 2000, 2000], True, "between 0 and 1,000"),
    ([(3000, 3000)] * 9, STEADY, None, "0"),
    # Whatever the others do, so much is ours.
    ([(15900, 15900)] * 9, MORE, False, "between 6,900 and 10,900"),
])  # fmt: skip
def test_memory_of_a_gpu_that_others_use(pairs: Any, idle: Any, good: bool | None, used: str) -> None:
    """1,000 MiB are planned, so 1,228 are too many. A fault of our own is BAD, and never hidden as somebody else's."""
    p = check.plan(check.resolve("tiny")[0].override({"run.device": "cpu", "run.steps": 1}))
    p = replace(p, device="cuda", outside=(1000 << 20) - p.nbytes)
    why = "not measured, another program uses this GPU; " if good is None else ""
    assert check._memory(p, pairs, idle) == (good, f"memory: {why}{used} MiB used, 1,000 MiB planned")


def test_what_is_not_measured_is_not_called_good(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [(True, "a"), (None, "b")], [(True, "a"), (None, "b"), (False, "c")]
    for told, verdict, marks in ((lines[0], "all that was measured is good", "good n/a"),
                                 (lines[1], "1 bad", "good n/a BAD")):  # fmt: skip
        monkeypatch.setattr(check, "_checks", lambda *_, told=told: iter(told))
        said = list(check.check())
        assert [line.split()[0] for line in said[1:-1]] == marks.split()
        assert said[-1].startswith(f"{verdict}, in ")


def test_the_memory_between_two_runs_may_come_back_late(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([9000, 7000, 5000, 5000])
    monkeypatch.setattr(check, "used_mib", lambda device: next(figures))
    monkeypatch.setattr(check.time, "sleep", lambda seconds: None)
    assert check._idle(torch.device("cuda"), 5000) == 5000
    assert check._idle(torch.device("cpu")) == 0


def test_a_run_and_the_check_do_not_go_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "runs/x", "--check"]) == 2
    assert "--check looks at this machine, not at a run" in capsys.readouterr().err
