"""bench/images_speed.py on a CPU, with twelve pictures and three steps: its columns, its speeds and its sheet."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_images_codec import blobs

from daybreak.images import decoder, prepare

BENCH = Path(__file__).parents[1] / "bench"
image = pytest.importorskip("PIL.Image")
torch.set_num_threads(1)


def test_a_codec_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 64 and 72 pixels, from files of 64. The row's PSNR is that of the pixels in the sheet: all four."""
    monkeypatch.syspath_prepend(str(BENCH))
    for owner, name in (
        (decoder, "LEAST_STEPS"),
        (decoder, "MOST_STEPS"),
        (prepare, "codec_device"),
        (prepare, "grid_of"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # which the script sets
    script = importlib.import_module("images_speed")
    (tmp_path / "pics/val").mkdir(parents=True)
    for i, pixels in enumerate(blobs(12, 64)):
        image.fromarray(pixels).save(tmp_path / "pics" / ("val" * (i < 4)) / f"{i}.png")
    given = f"{tmp_path / 'pics'} --sizes 64 72 --steps 3 --seconds 0 --device cpu --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["images_speed.py", *given.split()])
    script.main()
    assert capsys.readouterr().out.count("say little of 72 pixels") == 1
    rows = list(csv.DictReader((tmp_path / "images_speed.csv").open()))
    assert [(r["px"], r["tokens"], r["pictures"], r["held_out"], r["steps"]) for r in rows] == [
        ("64", "64", "8", "4", "3"), ("72", "81", "8", "4", "3")]  # fmt: skip
    for row in rows:
        px = int(row["px"])
        with image.open(tmp_path / f"codec-{px}.png") as file:
            shown = np.asarray(file.convert("RGB"), np.float64).reshape(2, px + 2, 4, px + 2, 3)[:, 1:-1, :, 1:-1]
        psnr = 10 * np.log10(255**2 / np.square(shown[0] - shown[1]).mean())
        assert float(row["psnr_held_out"]) == pytest.approx(psnr, abs=0.006)
        assert 1 <= int(row["perplexity"]) <= 1000 * float(row["codes_used"]) <= 12 * int(row["tokens"])
        assert float(row["gradient_error"]) < 1e-4
        for way in ("encode", "decode"):
            rate = float(row[f"{way}_tok_s"]) / int(row["tokens"])
            assert float(row[f"{way}_pictures_s"]) == pytest.approx(rate, abs=0.6)
