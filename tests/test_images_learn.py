"""Models that draw what captions say, pixel for pixel: a few shapes here, the whole recipe with `--full`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from daybreak.cli.main import main
from daybreak.data.dataset import open_dataset
from daybreak.data.shards import open_shard
from daybreak.data.tokenizer import get_tokenizer
from daybreak.generate import Sampling
from daybreak.images.codec import Codec
from daybreak.images.draw import draw
from daybreak.images.png import write_png
from daybreak.images.scenes import scenes
from daybreak.state.run import Run
from daybreak.state.run_folder import cpu_model, package_commit

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def held_out(folder: Path) -> list[str]:
    """The captions of a set's validation split."""
    dataset = open_dataset(str(folder))
    tokenizer = get_tokenizer(dataset.tokenizer_name, folder)
    ids = np.concatenate([np.array(open_shard(shard))[:-1] for shard in dataset.val])
    rows = ids.reshape(-1, tokenizer.pictures.D)[:, : tokenizer.pictures.room + 1]
    return [tokenizer.decode(int(i) for i in row if i != tokenizer.eot) for row in rows]


def right_ones(run: Path, captions: list[str]) -> list[bool]:
    """Whether the likeliest picture of each caption is the right one, to the pixel."""
    engine, tokenizer = Run(run).load_engine(rows=8)
    codes = draw(engine, tokenizer, captions, Sampling(temperature=0.0))
    known = dict(scenes())
    pixels = Codec.load(run, tokenizer).decode(codes)
    return [bool(np.array_equal(x, known[caption])) for x, caption in zip(pixels, captions, strict=True)]


def test_a_small_model_draws_captions_that_it_has_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three colours of three large shapes: 324 captions, of which a tenth is held out with their pictures."""
    monkeypatch.chdir(tmp_path)
    Path("few").mkdir()
    few = [(caption, x) for caption, x in scenes()
           if not set(caption.split()) & {"small", "purple", "black", "yellow", "cross", "ring"}]  # fmt: skip
    assert len(few) == 324
    for i, (_, pixels) in enumerate(few):
        write_png(Path(f"few/{i}.png"), pixels)
    lines = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, (caption, _) in enumerate(few)]
    Path("few/metadata.jsonl").write_text("\n".join(lines))
    assert main(["prepare", "few", "--as", "images", "--px", "16", "--tokenizer", "gpt2-1024"]) == 0
    folder = Path("data/few-gpt2-1024")
    tokenizer = get_tokenizer(open_dataset(str(folder)).tokenizer_name, folder)
    keys = {"model.L": 2, "model.C": 64, "model.NH": 2, "model.V": tokenizer.V, "model.max_T": tokenizer.pictures.D,
            "batch.B": 16, "optim.lr": 6e-3, "eval.every": 0, "eval.sample_tokens": 0, "checkpoint.every": 0,
            "run.steps": 200}  # fmt: skip
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert main(["train", "shapes", "--data", "few-gpt2-1024", "--name", "few", *words]) == 0
    captions = held_out(folder)
    assert len(captions) > 15
    # A model that does not heed which is where draws at most one in four right.
    assert np.mean(right_ones(Path("runs/few"), captions)) >= 0.5


def test_the_recipe_draws_what_it_has_not_seen(full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 unseen captions at least 90 % of the pictures are exact. The CPU time of training is recorded."""
    if not full:
        pytest.skip("minutes of training; make test-images")
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "shapes", "--tokenizer", "gpt2-1024"]) == 0
    began = time.process_time()
    assert main(["train", "shapes"]) == 0
    seconds = time.process_time() - began
    captions = held_out(Path("data/shapes-gpt2-1024"))
    chosen = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))[:200]]
    share = float(np.mean(right_ones(Path("runs/shapes"), chosen)))
    val = Run("runs/shapes").metrics("val")[-1]
    rows = {"date": time.strftime("%Y-%m-%d"), "commit": package_commit(ROOT), "processor": cpu_model(),
            "torch": torch.__version__, "unseen captions": len(chosen), "exact pictures, %": round(100 * share, 1),
            "CPU seconds of training": round(seconds), "nats per image token": round(val["image_loss"], 4),
            "nats per text token": round(val["text_loss"], 4)}  # fmt: skip
    text = "figure,value\n" + "".join(f'"{key}",{value}\n' for key, value in rows.items())
    (ROOT / "bench/results/images.csv").write_text(text)
    print(f"\n{text}")
    assert share >= 0.9
