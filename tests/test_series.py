"""A run's metrics as columns: figures from files made by hand."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import EVIL, MadeRun, made_run, read
from snapshots import FACTS, snapshot

from daybreak.cli.main import main
from daybreak.config import Config
from daybreak.data.dataset import Manifest, SplitRecord
from daybreak.errors import ConfigError
from daybreak.images.png import write_png
from daybreak.report import series
from daybreak.report.page import render
from daybreak.report.series import Curve, Follower, quantiles
from daybreak.state.checkpoint import save_checkpoint
from daybreak.state.run_folder import RunFolder


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return made_run(tmp_path / "made")


def test_a_run_as_columns(made: MadeRun) -> None:
    p = read(made.path)
    assert p["train"]["step"] == [1, 2, 3, 4, 5]
    assert p["train"]["loss"] == [6.0, 5.0, 4.0, None, 3.0]  # the abandoned 3 and 4 are gone
    assert p["train"]["tokens"] == [1000, 2000, 3000, 4000, 5000]
    seconds = [100, 200, 510, 610, 710]  # 410 until the first attempt's last word; the hour between costs nothing
    assert p["train"]["hours"] == pytest.approx([s / 3600 for s in seconds])
    assert p["train"]["temp_c"] == [None] * 4 + [60.0]
    assert (p["val"]["step"], p["val"]["loss"], p["val"]["bpb"]) == ([2], [5.5], [2.0])
    assert p["evals"]["hellaswag"]["accuracy"] == [0.25]
    assert (p["restarts"], p["outliers"]) == ([2], [4])
    assert p["skipped"] == [{"step": 4, "detail": "loss nan"}]
    assert p["samples"] == [{"step": 2, "text": EVIL}]
    assert [c["path"] for c in p["checkpoints"]] == ["checkpoints/step-00000005"]
    assert p["tok_s"] == dict.fromkeys(("5 %", "25 %", "50 %", "75 %", "95 %"), 500.0)  # 1,000 tokens in 2 s
    assert (p["price"], p["flops_per_token"], p["steps"], p["eta"]) == (36.0, 600.0, 10, 1.0)


def test_the_state_of_a_run(made: MadeRun) -> None:
    """exit.json says how it ended; without one a fresh line or a process that holds the folder means it runs."""

    def state() -> tuple[str, str]:
        p = read(made.path)
        return p["state"], p["why"]

    assert state() == ("running", "")
    os.utime(made.path / "metrics.jsonl", (1e9, 1e9))
    assert state() == ("killed", "It ended without a word, or runs on another machine.")
    with RunFolder(made.path).locked():
        assert state() == ("running", "")
    for code, reason, want in ((0, "done", ("finished", "done")), (75, "SIGTERM", ("stopped", "SIGTERM")),
                               (3, "loss is NaN", ("failed", "loss is NaN (exit 3)"))):  # fmt: skip
        (made.path / "exit.json").write_text(json.dumps({"code": code, "reason": reason, "t": 1}))
        assert state() == want


def test_a_clock_that_jumps_adds_no_hours(made: MadeRun) -> None:
    """Ten years ahead and back again: such a step counts as long as it took, 2 s."""
    before = read(made.path)["train"]["hours"][-1]
    made.step(6, 4330.0 + 10 * 365 * 86400, 3.0)
    made.step(7, 4332.0, 3.0)
    made.step(8, 4342.0, 3.0)
    hours = read(made.path)["train"]["hours"]
    assert [3600 * (h - before) for h in hours[5:]] == pytest.approx([20 + 2, 20 + 4, 20 + 14])  # a save took the 20


def test_whose_vocabulary(made: MadeRun, tmp_path: Path) -> None:
    """From the configuration, else a checkpoint's manifest, else the data set's; llm.c's is GPT-2's."""
    assert read(made.path)["vocabulary"] == ""
    data = tmp_path / "data/mine"
    data.mkdir(parents=True)
    keys = {"run.steps": 10, "data.dir": str(tmp_path / "data"), "data.name": "mine"}
    split = SplitRecord(1, 1, 1, ())
    (data / "manifest.json").write_text(Manifest("mine", "bytes", "", "", "", "", split, split).to_json())
    (made.path / "config.toml").write_text(Config().override(keys).to_toml())
    assert read(made.path)["vocabulary"] == "bytes"
    tokenizer = {"tokenizer": {"name": "gpt2", "fingerprint": "0"}}
    save_checkpoint(made.path / "checkpoints", replace(snapshot(5), manifest=FACTS | tokenizer))
    assert read(made.path)["vocabulary"] == "gpt2"
    (made.path / "config.toml").write_text(Config().override(keys | {"data.tokenizer": "gpt2-1024"}).to_toml())
    assert read(made.path)["vocabulary"] == "gpt2-1024"
    (tmp_path / "main.log").write_text("s:0 tel:10.9500\n")
    assert read(tmp_path / "main.log")["vocabulary"] == "gpt2"


def test_following_a_file_that_grows(made: MadeRun) -> None:
    run = Follower(made.path)
    assert run.update()
    assert not run.update()
    made.line("val", 5, 4400.0, end="", loss=2.5, tokens_evaluated=1, bpb=1.0)  # half a line yet
    assert run.update()
    assert run.payload()["val"]["loss"] == [5.5]
    with open(made.path / "metrics.jsonl", "a") as file:
        file.write("\nnot json\n")
    run.update()
    assert run.payload()["val"]["loss"] == [5.5, 2.5]
    (made.path / "metrics.jsonl").write_text("")  # begun anew under the same name
    made.step(1, 1.0, 8.0)
    run.update()
    assert run.payload()["train"]["loss"] == [8.0]


@pytest.mark.parametrize("bad", [{"loss": "x"}, {"ms": []}, {"step": "y"}, {"t": None}, {"norm": 10**400}, {"lr": {}}])
def test_lines_of_somebody_elses_making_are_left_out(made: MadeRun, bad: dict[str, Any]) -> None:
    """A folder from elsewhere may hold anything; a bad line costs that line only, and columns stay equally long."""
    whole = json.loads((made.path / "metrics.jsonl").read_text().splitlines()[1]) | {"step": 6, "t": 4400.0}
    with open(made.path / "metrics.jsonl", "a") as file:
        for fields in (bad, {"kind": "sample", "text": {"not": "text"}}, {"loss": 2.5}):
            file.write(json.dumps(whole | fields) + "\n")
    p = read(made.path)
    assert p["train"]["loss"][-2:] == [3.0, 2.5]
    assert len({len(column) for column in p["train"].values()}) == 1
    assert len(p["samples"]) == 1


def test_llmc_logs(tmp_path: Path) -> None:
    """The lines of llm.c's logger; a resumed run repeats steps, and the later ones count."""
    (tmp_path / "main.log").write_text(
        "s:0 tel:10.9500\ns:0 trl:10.9000 lr:0.000001 norm:20.00\ns:1 trl:9.9000 lr:0.000002 norm:5.50\n"
        "s:2 tel:9.5000\ns:2 eval:0.2601\ns:2 trl:9.3000 lr:0.000003 norm:4.25\ns:2 tel:9.4000\ns:2 eval:0.2611\n"
        "s:2 trl:9.2000 lr:0.000003 norm:4.00\ns:3 trl:nan\n"
    )
    for given in (tmp_path, tmp_path / "main.log"):
        p = read(given)
        assert p["train"]["step"] == [1, 2, 3, 4]
        assert p["train"]["loss"] == [10.9, 9.9, 9.2, None]
        assert p["train"]["norm"] == [20.0, 5.5, 4.0, None]
        assert (p["val"]["step"], p["val"]["loss"]) == ([0, 2], [10.95, 9.4])
        assert p["evals"]["hellaswag"]["accuracy"] == [0.2611]
        assert set(p["train"]["tokens"]) == {None}  # the log does not say


def test_other_files_are_no_logs(made: MadeRun, tmp_path: Path) -> None:
    """A report's own page, given in place of its run, would be overwritten with a page without curves."""
    assert main(["report", str(made.path)]) == 0
    page = (made.path / "report.html").read_bytes()
    for name in ("report.html", "metrics.jsonl", "config.toml"):
        with pytest.raises(ConfigError, match=rf"/{name} is not a run; it is a file of a run: give {made.path}\.$"):
            Follower(made.path / name)
        assert main(["report", str(made.path / name)]) == 2
    assert (made.path / "report.html").read_bytes() == page
    other, log = tmp_path / "notes.txt", tmp_path / "main.log"
    other.write_text("s:0 is the first step\n")
    with pytest.raises(
        ConfigError, match=r"notes\.txt is not a run; give a folder that daybreak train made, or llm\.c's"
    ):
        Follower(other)
    log.touch()  # llm.c has only just started
    follower = Follower(log)
    log.write_text("s:0 tel:10.9500\n")
    assert follower.update()
    assert follower.payload()["val"]["loss"] == [10.95]


def test_thinning_keeps_every_stretch_s_extremes() -> None:
    curve, n = Curve("loss"), 100_000
    for i in range(n):
        curve.append({"step": i, "loss": {7: 99.0, 54_321: -5.0, 99_998: 50.0}.get(i, 1.0 + (i % 10) / 10)})
    got = curve.thinned("loss")
    assert len(got["step"]) <= series.MOST_POINTS + 1
    assert got["step"] == sorted(set(got["step"]))
    assert (got["step"][0], got["step"][-1]) == (0, n - 1)
    assert {99.0, -5.0, 50.0} <= set(got["loss"])
    assert got["step"][got["loss"].index(99.0)] == 7


def test_quantiles() -> None:
    assert quantiles([]) == {}
    want = {"5 %": 5.0, "25 %": 25.0, "50 %": 50.0, "75 %": 75.0, "95 %": 95.0}
    assert quantiles([float("nan"), *map(float, range(100, 0, -1))]) == want


def test_drawn_pictures_are_in_the_page_s_data_and_nothing_outside_their_folder(tmp_path: Path) -> None:
    made, pixels = MadeRun(tmp_path / "drawn"), np.full((2, 3, 3), 7, np.uint8)
    (made.path / "images").mkdir()
    for name in ("images/step-00000002-0.png", "images/step-00000004-0.png", "images/other.png"):
        write_png(made.path / name, pixels)
    write_png(tmp_path / "outside.png", pixels)
    (made.path / "images/step-00000004-1.png").symlink_to(tmp_path / "outside.png")
    (made.path / "images/step-00000004-2.png").write_bytes(b"<svg onload=alert(1)>")
    made.line("image", 2, 1.0, caption="a <b>", path="images/step-00000002-0.png")
    bad = ["step-00000004-1.png", "step-00000004-2.png", "step-00000004-3.png", "other.png", "../../outside.png"]
    for name in ("step-00000004-0.png", *bad):
        made.line("image", 4, 2.0, caption=name, path=f"images/{name}")
    source = (
        f"data:image/png;base64,{base64.b64encode((made.path / 'images/step-00000002-0.png').read_bytes()).decode()}"
    )
    first, second = read(made.path)["samples"]
    assert first == {"step": 2, "text": "", "pictures": [{"caption": "a <b>", "src": source}]}
    assert [p["src"] for p in second["pictures"]] == [source, *[""] * len(bad)]
    text, policy = render({"runs": []})
    assert "; img-src data:;" in policy
    assert "img-src data:" in text


def test_a_run_that_is_continued_under_the_page_s_eyes_shows_its_new_settings(made: MadeRun) -> None:
    run = Follower(made.path)
    run.update()
    assert (run.payload()["steps"], run.payload()["price"]) == (10, 36.0)
    (made.path / "config.toml").write_text(Config().override({"run.steps": 20}).to_toml())
    made.step(6, 4400.0, 3.0)
    run.update()
    assert run.payload()["steps"] == 10  # the settings of a start count from its first line
    made.line("run", 5, 5000.0, name="made", config_hash="1", device="card", parameters=100, flops_per_token=600.0)
    run.update()
    assert (run.payload()["steps"], run.payload()["price"]) == (20, 0.0)
