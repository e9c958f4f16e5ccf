"""The live panel and the plain lines: every number under a fake clock, what a terminal shows as text."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from daybreak.engine.device import Sensors
from daybreak.training.display import LiveDisplay, PlainDisplay, make_display, sparkline

VALUES: dict[str, Any] = {
    "loss": 3.21987, "norm": 0.3456, "lr": 6e-4, "ms": 310.4, "tok_s": 52_767.4, "mfu": 0.5239, "loss_z": 0.1,
    "norm_z": None, "mem_mib": 48_228, "eta_s": 7200.0, "precision": "bf16",
}  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def display():
    clock = Clock()
    shown = LiveDisplay("gpt: 124,475,904 parameters on a card", price=28.0, clock=clock)
    shown.clock = clock
    yield shown
    shown.close()


def screen(display: LiveDisplay, step: int, steps: int, values: dict[str, Any]) -> list[str]:
    """The panel's lines, cells separated by single blanks."""
    console = Console(file=io.StringIO(), width=84, color_system=None)
    console.print(display.panel(step, steps, values))
    lines = console.file.getvalue().splitlines()
    return [" ".join(line.strip("│╭╮╰╯─ ").split()) for line in lines]


def test_every_number_of_the_panel(display: LiveDisplay) -> None:
    display.clock.now = 100.0 + 1800
    display.record({"kind": "step", "step": 512, "skipped": False, "temp_c": 63.0, "power_w": 692.6})
    display.record({"kind": "step", "step": 511, "skipped": True, "temp_c": 63.0, "power_w": 692.6})
    display.record({"kind": "val", "step": 500, "loss": 3.30104, "bpb": 1.57001})
    display.record({"kind": "eval", "task": "hellaswag", "step": 500, "accuracy": 0.29446})
    display.record({"kind": "eval", "task": "hellaswag-acc", "step": 500, "accuracy": 0.28})
    display.record({"kind": "sample", "step": 400, "text": "Once\nupon \x1b[31ma [bold]time"})
    for loss in (5.0, 4.0, 3.0):
        display.step(512, 2400, {**VALUES, "loss": loss})
    display.step(512, 2400, {**VALUES, "loss": float("nan")})
    lines = screen(display, 512, 2400, VALUES)
    assert lines[0] == "gpt: 124,475,904 parameters on a card"
    assert lines[1].startswith("step 512/2400")
    assert lines[2] == "loss 3.2199 █▅▁"
    assert lines[3:] == [
        "val 3.3010 at step 500, 1.5700 bits per byte",
        "HellaSwag 29.45% at step 500",
        "speed 52,767 tok/s 310 ms a step, MFU 52.4%",
        "memory 48,228 MiB 63 °C, 693 W",
        "left 2h00m norm 0.35 lr 6.0e-04 1 skipped",
        "cost $14.00 since this start; $70.00 at the end",  # half an hour and two more at $28
        "sample step 400 Once upon [31ma [bold]time",  # no control character reaches the terminal, no markup is read
        "",
    ]


def test_what_is_unknown_is_not_invented() -> None:
    shown = LiveDisplay("x")
    shown.close()
    text = "\n".join(screen(shown, 1, 10, {**VALUES, "mfu": None, "eta_s": None}))
    assert "MFU n/a" in text
    assert "left n/a" in text
    for absent in ("val", "HellaSwag", "cost", "$", "°C", "sample", "skipped"):
        assert absent not in text


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the panel has colours, unless NO_COLOR is set."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    live = LiveDisplay("colours")
    live.live.stop()
    with live.console.capture() as got:
        live.console.print(live.panel(3, 10, VALUES))
    assert bool(re.search(r"\x1b\[[\d;]*\b[39][0-8][;m]", got.get())) == (not no_color)


def test_sparkline() -> None:
    assert sparkline([], 5) == ""
    assert sparkline([1.0, 1.0], 5) == "▁▁"
    assert sparkline([0.0, 7.0, 3.0], 5) == "▁█▄"
    assert sparkline([0, 2, 6, 8, 14, 14], 3) == "▁▄█"  # means 1, 7, 14 of two each


def test_plain_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("daybreak.training.display._say", lines.append)
    shown = make_display("auto", 2, "x", 28.0)
    assert isinstance(shown, PlainDisplay)
    for step in (1, 2, 3):
        shown.step(step, 3, VALUES)
    shown.record({"kind": "val"})
    assert [line[:12] for line in lines] == ["step    2/3 ", "step    3/3 "]


def test_sensors_are_read_once_a_second_and_never_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Sensors(torch.device("cpu")).read() == {"temp_c": None, "power_w": None}
    clock, reads = Clock(), []
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 60 + len(reads))
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: reads.append(device) or 692_500)
    sensors = Sensors(torch.device("cuda", 0), clock)
    assert sensors.read() == {"temp_c": 61.0, "power_w": 692.5}
    clock.now += 0.9
    assert sensors.read()["temp_c"] == 61.0
    clock.now += 0.2
    assert sensors.read()["temp_c"] == 62.0

    def no_package(device: object) -> int:
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "power_draw", no_package)
    broken = Sensors(torch.device("cuda", 0), clock)
    assert broken.read() == broken.read() == {"temp_c": None, "power_w": None}
