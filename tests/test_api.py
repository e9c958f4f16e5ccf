"""The Python API: its signatures, and what calling it from a program or a notebook must not do."""

from __future__ import annotations

import inspect
import json
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import daybreak
from daybreak.config import Config

SIGNATURES = {
    "load": "(path: 'Path | str') -> 'Run'",
    "plan": "(config: 'Config', *, gpu: 'str | None' = None, gpus: 'int' = 1) -> 'Plan'",
    "train": "(config: 'Config', *, resume: 'Path | str | None' = None, fork_from: 'Path | str | None' = None, "
    "init_from: 'Path | str | None' = None, stop: 'Stop | None' = None, "
    "on_save: 'Callable[[Path], None] | None' = None) -> 'Run'",
    "Run": "(path: 'Path | str') -> 'None'",
    "Run.metrics": "(self, kind: 'str | None' = None) -> 'list[dict[str, Any]]'",
    "Run.checkpoint": "(self, step: 'int | None' = None) -> 'Checkpoint'",
    "Config.from_target": "(target: 'str') -> 'Config'",
    "Config.override": "(self, values: 'Mapping[str, Any]') -> 'Config'",
}


def tiny(tmp_path: Path, name: str) -> Config:
    text = tmp_path / "text.txt"
    text.write_text("What you read is what runs, in that order, with those buffers.\n" * 400)
    from daybreak.cli.main import main

    if not (tmp_path / "data").exists():
        assert main(["prepare", str(text), "--tokenizer", "bytes", "--name", "text"]) == 0
    keys = {"model.L": 1, "model.C": 16, "model.NH": 1, "model.max_T": 32, "model.V": 257, "data.name": "text",
            "data.tokenizer": "bytes", "batch.B": 2, "run.device": "cpu", "run.steps": 3, "run.name": name,
            "eval.tokens": 64, "eval.sample_tokens": 4}  # fmt: skip
    return Config().override(keys)


def test_signatures() -> None:
    """People's scripts call these: a change here is a change for them."""
    assert daybreak.__all__ == ["Config", "Error", "Run", "__version__", "load", "plan", "train"]
    for path, want in SIGNATURES.items():
        found: object = daybreak
        for part in path.split("."):
            found = getattr(found, part)
        assert str(inspect.signature(found)) == want, path  # type: ignore[arg-type]
    assert (Path(daybreak.__file__).parent / "py.typed").is_file()
    assert issubclass(daybreak.Error, Exception)
    assert isinstance(daybreak.Error.exit_code, int)


def test_training_from_a_thread_leaves_the_program_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook's kernel does it: no signal handler (only the main thread could set one), no sys.exit."""
    monkeypatch.chdir(tmp_path)
    config, found = tiny(tmp_path, "thread"), []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    generator, grad = torch.get_rng_state(), torch.is_grad_enabled()
    thread = threading.Thread(target=lambda: found.append(daybreak.train(config)))
    thread.start()
    thread.join()
    assert len(found[0].metrics("step")) == 3
    assert {number: signal.getsignal(number) for number in before} == before
    daybreak.train(config.override({"run.name": "main"}))
    assert {number: signal.getsignal(number) for number in before} == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled() == grad


def test_errors_have_their_exit_code_and_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call, code in (
        (lambda: daybreak.load("runs/none"), 2),
        (lambda: daybreak.plan(tiny(tmp_path, "a").override({"model.NH": 3})), 2),
        (lambda: daybreak.train(tiny(tmp_path, "b").override({"data.name": "missing"})), 4),
    ):
        with pytest.raises(daybreak.Error) as error:
            call()
        assert error.value.exit_code == code
        assert "\n" not in str(error.value)


def test_a_notebook_shows_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = repr(daybreak.plan(Config.from_target("gpt2-124M"), gpu="h100")).splitlines()
    assert lines[0].startswith("fits               yes: 22,375 MiB of 79,927 MiB  [arena 21,291 MiB, exact; ")
    assert lines[-1] == "computes           in bf16 on NVIDIA H100 80GB HBM3, recompute 0"
    run = daybreak.train(tiny(tmp_path, "shown"))
    assert repr(run) == "Run('runs/shown')"
    assert repr(run.load_engine(B=2, device="cpu")) == (
        "(Engine(gpt2 L=1 C=16 NH=1 max_T=32 V=257, B=2, T=32, cpu), Tokenizer('bytes', V=257))"
    )
    newest = run.checkpoints[0]
    assert repr(run.checkpoint()) == f"Checkpoint('runs/shown/checkpoints/{newest.name}')"


def test_tokens_that_an_engine_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = daybreak.train(tiny(tmp_path, "room"))
    one, eight = (run.load_engine(B=B, device="cpu")[0] for B in (1, 8))
    tokens = torch.randint(257, (8, 32))
    assert eight.logits(tokens).shape == (8, 32, 257)
    torch.testing.assert_close(one.logits(tokens[3:4]), eight.logits(tokens)[3:4])
    for engine, shape in ((one, (8, 32)), (one, (1, 33)), (eight, (1, 33)), (eight, (32,)), (eight, (2, 2, 2))):
        few = torch.zeros(shape, dtype=torch.int64)
        for call in (lambda e=engine, x=few: e.logits(x), lambda e=engine, x=few: e.eval_losses(x, x)):
            with pytest.raises(daybreak.Error, match=r"tokens have the shape \(.*load_engine\(B=8\)"):
                call()
    rows = tokens[:2].tolist()
    for same in (rows, tuple(map(tuple, rows)), np.array(rows, np.uint16), tokens[:2].to(torch.int32)):
        assert torch.equal(eight.logits(same), eight.logits(tokens[:2]))
        assert torch.equal(eight.eval_losses(same, same).clone(), eight.eval_losses(tokens[:2], tokens[:2]))
    for bad, said in (
        ([[1, 2], [3]], "tokens must be ids (b, t): a tensor, an array, or rows of equal length."),
        ("def", "tokens must be ids (b, t): a tensor, an array, or rows of equal length."),
        ([[0.5]], "tokens are float64; ids must be whole numbers."),
        (tokens > 5, "tokens are bool; ids must be whole numbers."),
        ([1, 2], "tokens have the shape (2,), and this engine takes (b, t) of up to 32 tokens, and t up to 32; "
                 "load_engine(B=8) takes 8 such rows."),
    ):  # fmt: skip
        with pytest.raises(daybreak.Error) as error:
            one.logits(bad)
        assert str(error.value) == said
    for wrong in (-1, 257, 300):  # 257 has a row in the padded embedding, and no meaning
        with pytest.raises(daybreak.Error, match=f"tokens are from {wrong} to {wrong}; ids are from 0 to 256"):
            one.logits(torch.full((1, 4), wrong))


def test_what_nobody_foresaw_leaves_crash_txt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def broken(path: Path) -> None:
        raise ZeroDivisionError(f"at {path.name}")

    with pytest.raises(ZeroDivisionError):
        daybreak.train(tiny(tmp_path, "crash"), on_save=broken)
    run = tmp_path / "runs/crash"
    assert json.loads((run / "exit.json").read_text())["code"] == 1
    assert "ZeroDivisionError: at step-00000003" in json.loads((run / "exit.json").read_text())["reason"]
    crash = (run / "crash.txt").read_text()
    assert "Traceback" in crash
    assert "in broken" in crash
    assert len(daybreak.load(run).checkpoints) == 1  # what was saved before stays
    said = (run / "exit.json").read_text()
    for steps in (6, 9):  # the second start has no crash to keep, and does not lose the first one's
        daybreak.train(daybreak.load(run).config.override({"run.steps": steps, "optim.horizon": steps}), resume=run)
        assert (run / "crash.before.txt").read_text() == crash
        assert not (run / "crash.txt").exists()
        assert (run / "exit.before.json").read_text() == said
        said = (run / "exit.json").read_text()
