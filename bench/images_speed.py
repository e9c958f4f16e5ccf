"""The convolutional codec of pictures on one GPU: quality, codes used and speed; then a GPT that draws with it.

    python bench/images_speed.py pics/emoji --sizes 64 128 --steps 3000 --train-seconds 40 --out results
    python bench/images_speed.py pics/large pics/photos --sizes 256 --out results

For each size it trains the codec of images/fsq.py on nine tenths of the folders' pictures, in patches of 8 pixels. The
rest is held out: codec-PX.png has it above what comes back. The first gradients are compared with fp64 on the CPU.

With --train-seconds the ordinary commands follow: prepare, train and sample. `prepare` would take the dictionary up to
128 pixels, so here it is told to take this codec. It trains the codec again, which must give the same bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_step import commit
from PIL import Image
from timing import append_row

from daybreak.cli.main import main as daybreak
from daybreak.data.formats import Faults
from daybreak.data.tokenizer import get_tokenizer
from daybreak.generate import Sampling
from daybreak.images import codec, decoder, fsq, prepare
from daybreak.images.draw import draw
from daybreak.images.patches import CONVOLVED, Grid
from daybreak.images.png import sheet
from daybreak.images.read import list_pictures, read_picture
from daybreak.interop import load_model

BEGAN, TRIAL, ROWS = time.perf_counter(), 30, 16  # TRIAL: steps that tell how fast training is; ROWS: drawn at a time


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


def timed(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of a call whose result is on the CPU: the mean of as many as take so long, after one to warm up."""
    run()
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        run()
        calls += 1
    return (time.perf_counter() - began) / calls


def read(folders: list[Path], px: int) -> tuple[np.ndarray, list[prepare.Item]]:
    """Pixels (n, px, px, 3) and captions of the folders' pictures."""
    files = list_pictures(folders, "text", Faults(False))
    if (least := min(Image.open(files[0].path).size)) < px:
        say(f"NOTE: {files[0].path} has {least} pixels. Enlarged pictures say little of {px} pixels.")
    pixels = np.stack([read_picture(file.path, px)[0] for file in files])
    return pixels, [prepare.Item(f.caption, f.split, prepare.key_of(pixels[i]), i) for i, f in enumerate(files)]


def counted() -> Iterator[None]:
    """Says every 5 seconds how many steps have begun."""
    said = time.perf_counter()
    for step in itertools.count(1):
        if time.perf_counter() - said >= 5:
            say(f"codec: step {step}")
            said = time.perf_counter()
        yield


def gradients(grid: Grid, pixels: np.ndarray, device: torch.device) -> float:
    """The largest error of a new codec's gradients in fp32 on the device, relative to the largest of each parameter."""
    p, x = fsq.init(grid, 0, torch.float64), codec._channels(pixels, codec.CPU).double()
    _, right = fsq.loss_and_grads(p, grid, x)
    with decoder.exact():
        _, found = fsq.loss_and_grads({n: v.float().to(device) for n, v in p.items()}, grid, x.float().to(device))
    assert all(g.device.type == device.type for g in found.values())
    return max(float((found[n].cpu() - g).abs().max() / g.abs().max().clamp(min=1e-30)) for n, g in right.items())


def measure(grid: Grid, pixels: np.ndarray, items: list[prepare.Item], a: Any) -> tuple[codec.Codec, dict[str, object]]:
    """The trained codec, and its columns of the CSV file."""
    train, held = (pixels[[item.row for item in part]] for part in prepare.divided(items, prepare.VAL_FRACTION))
    say(f"{grid.px} px: {len(train)} pictures to train on, {len(held)} held out, {grid.N} tokens each, on {a.device}")
    error, cuda = gradients(grid, train[:2], a.device), a.device.type == "cuda"
    began = time.perf_counter()
    made = codec.train(grid, train, partial(next, counted()), a.device)
    taken = time.perf_counter() - began  # the last step's norm has waited for the GPU
    assert all(value.device.type == a.device.type for value in made.parameters.values())
    steps = max(decoder.LEAST_STEPS, min(decoder.MOST_STEPS, decoder.PASSES * len(train) // fsq.BATCH))
    peak = torch.cuda.max_memory_allocated() >> 20 if cuda else 0
    say(f"trained {steps} steps in {taken:.1f} s, {1e3 * taken / steps:.2f} ms a step, {peak} MiB at the peak")
    count = np.bincount(made.encode(pixels).ravel(), minlength=made.K)
    share = count[count > 0] / count.sum()
    block, columns = np.resize(held, (4 * codec.BATCH, *held.shape[1:])), min(len(held), max(4, 1024 // grid.px))
    ids, encoding = made.encode(block), timed(lambda: made.encode(block), a.seconds)
    decoding = timed(lambda: made.decode(ids), a.seconds)
    rows = [held[at : at + columns] for at in (0, columns) if len(held) >= at + columns]
    pairs = [part for row in rows for part in (row, made.decode(made.encode(row)))]
    Image.fromarray(sheet(np.concatenate(pairs), columns)).save(a.out / f"codec-{grid.px}.png", optimize=True)
    row = {
        "px": grid.px, "patch": grid.patch, "tokens": grid.N, "pictures": len(train), "held_out": len(held),
        "steps": steps, "train_s": f"{taken:.1f}", "memory_mib": peak, "psnr_held_out": f"{made.psnr(held):.2f}",
        "psnr_trained_on": f"{made.psnr(train[: len(held)]):.2f}", "codes_used": f"{(count > 0).sum() / made.K:.3f}",
        "perplexity": f"{math.exp(-(share * np.log(share)).sum()):.0f}", "gradient_error": f"{error:.1e}",
        "encode_pictures_s": f"{len(block) / encoding:.0f}", "encode_tok_s": f"{ids.size / encoding:.0f}",
        "decode_pictures_s": f"{len(block) / decoding:.0f}", "decode_tok_s": f"{ids.size / decoding:.0f}",
        "card": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "commit": commit(),
    }  # fmt: skip
    say(", ".join(f"{key} {value}" for key, value in row.items()))
    return made, row


def train(name: str, steps: int, V: int, D: int, a: Any) -> list[dict[str, Any]]:
    """The metrics of a run by the ordinary command."""
    flags = f"--data {name} --data.dir {a.work}/data --run.dir {a.work}/runs --name {name}-{steps} --model.V {V} "
    flags += f"--model.max_T {D} --batch.B {a.B} --steps {steps} --run.device {a.device.type} --eval.every {steps} "
    flags += f"--eval.sample_every 0 --checkpoint.every {steps} --log.every {max(1, steps // 20)} {a.model}"
    say(f"daybreak train shapes {flags}")
    command = [sys.executable, "-m", "daybreak", "train", "shapes", *flags.split()]
    subprocess.run(command, check=True, timeout=2 * a.train_seconds + 120)
    metrics = (a.work / "runs" / f"{name}-{steps}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in metrics.splitlines()]


def gpt(made: codec.Codec, pixels: np.ndarray, items: list[prepare.Item], a: Any) -> dict[str, object]:
    """Trains and draws with the ordinary commands; columns of the CSV file."""
    px, name, data, began = made.grid.px, f"pics-{made.grid.px}", a.work / "data", time.perf_counter()
    manifest = prepare.prepare_images(a.pictures, name=name, data_dir=data, tokenizer="gpt2-1024", px=px)
    tokenizer = get_tokenizer(manifest.tokenizer, data / name)
    again = codec.Codec.load(data / name, tokenizer).parameters
    same = all(torch.equal(value, made.parameters[key].cpu()) for key, value in again.items())
    say(f"prepare took {time.perf_counter() - began:.1f} s; its codec has the same bits: {same or 'NO'}")
    ms = [line["ms"] for line in train(name, TRIAL, tokenizer.V, tokenizer.pictures.D, a) if line["kind"] == "step"]
    steps = max(TRIAL + 1, int(1e3 * a.train_seconds / np.median(ms[len(ms) // 2 :])))
    kinds = {line["kind"]: line for line in train(name, steps, tokenizer.V, tokenizer.pictures.D, a)}  # the last each
    tok_s, loss, run = kinds["step"]["tok_s"], kinds["val"]["image_loss"], a.work / "runs" / f"{name}-{steps}"
    say(f"{steps} steps of {tok_s:.0f} tokens/s; validation {loss:.3f} nats per token of pictures")
    engine, _, _ = load_model(str(run), None, rows=ROWS)
    shown, n = (prepare.divided(items, prepare.VAL_FRACTION)[1] * ROWS)[:ROWS], min(ROWS, 2048 // px)
    captions = [item.caption for item in shown]
    drawing = timed(lambda: draw(engine, tokenizer, captions, Sampling(top_k=100)), 0)
    back = made.decode(draw(engine, tokenizer, captions[:n], Sampling(top_k=100)))
    Image.fromarray(sheet(np.concatenate([pixels[[item.row for item in shown[:n]]], back]), n)).save(
        a.out / f"drawn-{px}.png", optimize=True
    )
    say(f"drawn-{px}.png has held-out pictures, and below what was drawn of their captions: {captions[:n]}")
    say(f"{ROWS} pictures drawn in {drawing:.2f} s, {ROWS * made.grid.N / drawing:.0f} tokens/s")
    for caption in captions[:3]:
        drawn = ["--prompt", caption, "--top-k", "100", "-n", "4", "--out", str(a.out / f"drawn-{px}")]
        say(f"sample {caption!r} ended with {daybreak(['sample', str(run), *drawn])}")
    return {
        "gpt_steps": steps, "gpt_tok_s": f"{tok_s:.0f}", "image_loss": f"{loss:.4f}",
        "draw_tok_s": f"{ROWS * made.grid.N / drawing:.0f}", "same_bits": int(same),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=Path, nargs="+", help="folders as for prepare --as images")
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is written")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=0, help="of the codec; 0: as prepare takes")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of the codec's speed")
    parser.add_argument("--train-seconds", type=float, default=0.0, help="of the GPT; 0: none")
    parser.add_argument("--model", default="--model.L 6 --model.C 384 --model.NH 6", help="flags of daybreak train")
    parser.add_argument("--B", type=int, default=64, help="of the GPT")
    parser.add_argument("--device", type=torch.device, default="cuda")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    prepare.codec_device, prepare.grid_of = lambda: a.device, lambda px: Grid(px, CONVOLVED)
    if a.steps:
        decoder.LEAST_STEPS = decoder.MOST_STEPS = a.steps
    read_ones = [read(a.pictures, px) for px in a.sizes]
    codecs = [measure(Grid(px, CONVOLVED), *pictures, a) for px, pictures in zip(a.sizes, read_ones, strict=True)]
    for (made, row), pictures in zip(codecs, read_ones, strict=True):
        drawn: dict[str, object] = dict.fromkeys(("gpt_steps", "gpt_tok_s", "image_loss", "draw_tok_s", "same_bits"))
        with tempfile.TemporaryDirectory() as work:
            a.work = Path(work)
            try:
                drawn |= gpt(made, *pictures, a) if a.train_seconds else {}
            finally:  # the codec has been measured in any case
                append_row(a.out / "images_speed.csv", {**row, **drawn})
    say("done")


if __name__ == "__main__":
    main()
