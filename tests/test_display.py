"""The live panel and the plain lines: every number under a fake clock, what a terminal shows as text."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from daybreak.engine.device import Sensors
from daybreak.training.display import PATIENCE, LiveDisplay, PlainDisplay, make_display, sparkline
from daybreak.training.stop import Stop

VALUES: dict[str, Any] = {
    "loss": 3.21987, "norm": 0.3456, "lr": 6e-4, "ms": 310.4, "tok_s": 52_767.4, "mfu": 0.5239, "loss_z": 0.1,
    "norm_z": None, "mem_mib": 48_228, "eta_s": 7200.0, "precision": "bf16", "step_tokens": 16_384,
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


def raw_screen(display: LiveDisplay, width: int = 84) -> list[str]:
    display.console = Console(file=io.StringIO(), width=width, color_system=None)
    display.console.print(display.panel())
    *lines, last = display.console.file.getvalue().splitlines()
    assert last == ""  # the terminal's place for ^C
    return lines


def screen(display: LiveDisplay, width: int = 84) -> list[str]:
    """The panel's lines, cells separated by single blanks."""
    return [" ".join(line.strip("│╭╮╰╯─ ").split()) for line in raw_screen(display, width)]


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
    display.step(512, 2400, VALUES)
    assert screen(display) == [
        "gpt: 124,475,904 parameters on a card",
        "step 512/2400 ━━━━━━━━ 21%, 2h00m left",
        "loss 3.2199 █▅▁▂ 3.00 to 5.00",
        "val 3.3010 at step 500, 1.5700 bits per byte",
        "HellaSwag 29.45% at step 500",
        "update norm 0.35 learning rate 6.0e-04, 1 skipped",
        "speed 52,767 tok/s 310 ms a step, 52.4% MFU",
        "memory 48,228 MiB 63 °C, 693 W",
        "cost $14.00 since this start, $70.00 at the end",  # half an hour and two more at $28
        "sample step 400 Once upon [31ma [bold]time",  # no control character reaches the terminal, no markup is read
        "Ctrl-C saves and stops",
        "",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_panel_fits_the_terminal(display: LiveDisplay, width: int) -> None:
    display.record({"kind": "sample", "step": 400, "text": "word " * 100})
    for i in range(1000):
        display.step(i + 1, 2400, {**VALUES, "loss": 11 - i / 100})
    display.announce("Stopping: saving step 1000. Ctrl-C again quits without saving.")
    assert {len(line) for line in raw_screen(display, width)} == {min(width, 84)}


def test_the_speeds_are_one_average(display: LiveDisplay) -> None:
    """A last step that took twice as long: tokens per second, ms and MFU are all of the average."""
    display.step(512, 2400, {**VALUES, "ms": 620.8, "mfu": 0.26195})
    assert "speed 52,767 tok/s 310 ms a step, 52.4% MFU" in screen(display)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_skipped_loss_has_no_place_on_the_curve(display: LiveDisplay, loss: float) -> None:
    for x in (5.0, loss, 3.0, VALUES["loss"]):
        display.step(512, 2400, {**VALUES, "loss": x})
    assert screen(display)[2] == "loss 3.2199 █▁▂ 3.00 to 5.00"


def test_what_is_unknown_is_left_out() -> None:
    shown = LiveDisplay("x")
    shown.close()
    shown.record({"kind": "val", "step": 1, "loss": 3.0, "bpb": float("nan")})
    shown.step(1, 10, {**VALUES, "mfu": None, "eta_s": None})
    lines = screen(shown)
    assert lines[1].endswith("━ 10%")
    assert lines[2:] == [
        "loss 3.2199",
        "val 3.0000 at step 1",
        "update norm 0.35 learning rate 6.0e-04",
        "speed 52,767 tok/s 310 ms a step",
        "memory 48,228 MiB",
        "Ctrl-C saves and stops",
        "",
    ]


def test_before_the_first_step_and_while_something_lasts(display: LiveDisplay) -> None:
    assert screen(display)[1:] == ["Ctrl-C saves and stops", ""]
    with display.working("validating at step 0", 4) as check:
        assert screen(display)[1] == "validating at step 0 (0s)"
        for _ in range(3):  # before the first, second and third part: two are done
            check()
        display.clock.now += 30
        assert screen(display)[1] == "validating at step 0: 50%, 30s left"
    display.step(1, 10, VALUES)
    with display.working("step 2", 2):
        assert "step 2 " not in "\n".join(screen(display))  # only what lasts is worth a line
        display.clock.now += 2
        assert screen(display)[-3] == "step 2 (2s)"
    assert screen(display)[-3].startswith("cost")


def test_a_stop_is_said_in_the_panel_and_nowhere_else(display: LiveDisplay, capfd: pytest.CaptureFixture[str]) -> None:
    """The signal handler leaves the text, the panel's own thread draws it: two writers would tear the screen."""
    stop = Stop()
    stop.announce, stop.step = display.announce, 43
    stop._handle(signal.SIGINT, None)
    assert screen(display)[1] == "Stopping: saving step 43. Ctrl-C again quits without saving."
    assert capfd.readouterr().err == ""


def test_the_terminal_is_left_with_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever kills the process finds the cursor, below the panel on a line of its own."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = LiveDisplay("x")
    shown.live.refresh()
    text = shown.console.file.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    assert text.endswith("╯\n")
    shown.close()


class Broken(io.StringIO):
    """A terminal that is gone."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("kind", ["live", "plain"])
def test_a_console_that_breaks_ends_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script of one's own too, where nobody has set up the log."""
    monkeypatch.setattr("sys.stderr", Broken())
    monkeypatch.setattr(logging.getLogger("daybreak"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("daybreak"), "propagate", False)
    shown = make_display(kind, 1, "x")
    shown.note("note")
    shown.step(1, 2, VALUES)
    shown.sample("text")
    shown.close()


def test_what_lasts_is_said_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("daybreak.training.display.say", said.append)
    assert PATIENCE == 2.0
    monkeypatch.setattr("daybreak.training.display.PATIENCE", 0.01)
    shown = PlainDisplay(1)
    with shown.working("validating", 4) as task:
        task()
        while len(said) < 2:
            time.sleep(0.01)
    assert said[0] == "validating (0s)"


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(no_color: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the panel has colours, unless NO_COLOR is set."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    live = LiveDisplay("colours")
    live.live.stop()
    live.step(3, 10, VALUES)
    with live.console.capture() as got:
        live.console.print(live.panel())
    codes = set(re.findall(r"\x1b\[([\d;]+)m", got.get())) - {"0", "1", "2"}
    # Green and grey of the terminal's own palette: colours given as numbers are unreadable on one background or other.
    assert codes == (set() if no_color else {"32", "90"})


def test_sparkline() -> None:
    assert sparkline([], 5) == ("", 0, 0)
    assert sparkline([1.0, 1.0], 5) == ("▁▁", 1, 1)
    assert sparkline([0.0, 7.0, 3.0], 5) == ("▁█▄", 0, 7)
    assert sparkline([0, 2, 6, 8, 14, 14], 3) == ("▁▄█", 1, 14)  # means 1, 7, 14 of two each


def test_plain_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("daybreak.training.display.say", lines.append)
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
