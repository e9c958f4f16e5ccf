"""bench/finetune_step.py on a CPU, with one layer of a small shape: losses, memory and packed rows."""

from __future__ import annotations

import csv
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
METHODS = ["lora", "full"]


def speeds(tokens: int, ms: str) -> tuple[float, float]:
    """The least and the most tokens a second that a time in milliseconds allows, since both are rounded."""
    half = 0.5 * 10.0 ** -len(ms.partition(".")[2])
    return 1e3 * tokens / (float(ms) + half) - 0.5, 1e3 * tokens / (float(ms) - half) + 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_measured(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first loss is that of guessing, and a smaller one follows. Adapters have no optimizer state for the rest."""
    monkeypatch.syspath_prepend(str(BENCH))
    script = importlib.import_module("finetune_step")
    given = "smollm2-135m --layers 1 --B 1 --T 16 --precision fp32 --device cpu --seconds 0 --rounds 1 --costs"
    given += f" --method {method} --out {tmp_path / 'out.csv'}"
    monkeypatch.setattr("sys.argv", ["finetune_step.py", *given.split()])
    script.main()
    out = capsys.readouterr().out
    losses = [float(x) for x in re.search(r"losses \[([^]]*)\]", out)[1].split(", ")]  # type: ignore[index]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(math.log(49152), abs=0.5)
    parameters = 49152 * 576 + 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 3 * 576
    adapters = 16 * (3 * 576 + 576 + 2 * 192 + 576 + 576 + 2 * 576 + 2 * 1536 + 1536 + 576)
    planned = dict(re.findall(r"'(\w+)': (\d+)", out))
    trained = parameters if method == "full" else adapters
    assert int(planned["m"]) == pytest.approx(trained * 4 >> 20, abs=1)  # with padding
    assert bool(re.search(r"lora_forward +4 calls", out)) == (method != "full")
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert (row["method"], row["B"], row["T"], row["card"]) == (method, "1", "16", "cpu")
    least, most = speeds(16, row["ms"])
    assert least <= int(row["tok_s"]) <= most


def test_packed_rows_hold_documents_of_the_average_that_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    script = importlib.import_module("finetune_step")
    rows = script.places(64, 2048, 0)
    starts = (rows == 0).sum().item()
    assert rows[:, 0].eq(0).all()
    assert 64 * 2048 / starts == pytest.approx(script.AVERAGE, rel=0.1)
    assert ((rows[:, 1:] == rows[:, :-1] + 1) | (rows[:, 1:] == 0)).all()
    assert not torch.equal(rows, script.places(64, 2048, 1))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_answers_are_the_share_that_was_asked_for(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In spans: of one answer each, where questions lie between them."""
    monkeypatch.syspath_prepend(str(BENCH))
    script = importlib.import_module("finetune_step")
    found = script.answers(1 << 16, share, 0)
    assert found.double().mean().item() == pytest.approx(share, abs=0.02)
    assert found.all() if share == 1 else not found[0]
    spans = (found[1:] & ~found[:-1]).sum().item()
    assert share in (0, 1) or found.sum().item() / spans == pytest.approx(script.ANSWER, rel=0.1)
    assert share in (0, 1) or not torch.equal(found, script.answers(1 << 16, share, 1))


@pytest.mark.parametrize("rank", [0, 16])
def test_the_other_program_trains_the_same_shape(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """decoder_peer.py: transformers learns as many parameters as we do, and its first loss is that of guessing."""
    monkeypatch.syspath_prepend(str(BENCH))
    script = importlib.import_module("decoder_peer")
    given = f"smollm2-135m --layers 1 --B 1 --T 16 --tokens 32 --device cpu --seconds 0 --rounds 1 --lora {rank}"
    monkeypatch.setattr("sys.argv", ["decoder_peer.py", *given.split(), "--out", str(tmp_path / "out.csv")])
    script.main()
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    parameters = 49152 * 576 + 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576 + 3 * 576
    adapters = 16 * (576 + 576 + 576 + 192 + 576 + 192 + 576 + 576 + 2 * (576 + 1536) + 1536 + 576)
    assert int(row["learned"]) == (adapters if rank else parameters)
    assert float(row["first_loss"]) == pytest.approx(math.log(49152), abs=0.5)
    assert (row["tokens"], row["card"]) == ("32", "cpu")
    least, most = speeds(32, row["ms"])
    assert least <= int(row["tok_s"]) <= most
