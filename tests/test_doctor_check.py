"""`daybreak doctor --check` on this CPU: eight lines and exit 0, or BAD lines and exit 1."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
        assert check._memory(p, used) == (good, f"memory: {used:,} MiB used, {planned:,} MiB planned")


def test_memory_that_another_program_frees_is_not_measured() -> None:
    target, keys = check._setting(check.pick_device("cpu"))
    p = check.plan(check.resolve(target)[0].override(keys | {"run.device": "cpu"}))
    planned = (p.nbytes + p.outside) >> 20
    said = f"memory: not measured, another program frees memory of this GPU; {planned:,} MiB planned"
    assert check._memory(replace(p, device="cuda"), -11482) == (True, said)


def test_a_run_and_the_check_do_not_go_together(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "runs/x", "--check"]) == 2
    assert "--check looks at this machine, not at a run" in capsys.readouterr().err
