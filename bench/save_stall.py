"""How long a save stops training, and how long it takes: written in the background, and while training waits.

    python bench/save_stall.py d12 [--rounds 7] [--folder DIR] [--batch.B 4 --batch.T 64 ...]

Interleaved rounds of one step (of batch.total_tokens; 0: of one micro-batch), one save of each kind, and a step beside
the one that is being written. Prints medians with quartiles and a CSV row for bench/results/save_stall.csv.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from daybreak.config import resolve
from daybreak.engine import Engine
from daybreak.engine.device import engine_spec, pick_device
from daybreak.state.restore import Staging, snapshot
from daybreak.state.run_folder import RunFolder, cpu_model, package_commit
from daybreak.state.saver import Saver


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder")
    known, rest = parser.parse_known_args()
    pairs = [(key.removeprefix("--"), value) for key, value in zip(rest[::2], rest[1::2], strict=True)]
    config, _ = resolve(known.shape, pairs)
    device = pick_device(config.run.device)
    engine = Engine(engine_spec(config, device), device=device)
    tokens = torch.randint(config.model.V, (config.batch.B, config.T + 1), generator=torch.Generator().manual_seed(1))
    steps, micro = 0, max(1, config.batch.total_tokens // (config.batch.B * config.T))
    batch = tokens.expand(micro, *tokens.shape)

    def step() -> None:
        nonlocal steps
        engine.train_step(batch[:, :, :-1], batch[:, :, 1:], lr=1e-4, step=steps)
        engine.stats()  # waits for it
        steps += 1

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    root = Path(tempfile.mkdtemp(dir=known.folder))
    staging = Staging(engine)
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    with Saver(RunFolder(root), keep=1, major=0) as saver:
        for round_ in range(known.rounds + 1):
            values = {"step alone": timed(step)}
            began = time.perf_counter()
            saver.start(snapshot(engine, steps, {}, staging), 0, began)
            values["step while writing"] = timed(step)
            saved = saver.result(wait=True)
            assert saved is not None
            values |= {"stall, background": saved.stall, "save, background": saved.seconds}
            began = time.perf_counter()
            saver.start(snapshot(engine, steps, {}), 0, began)
            saver.result(wait=True)
            values["stall, training waits"] = time.perf_counter() - began
            if round_:  # the first touches fresh memory and a cold disk
                for name, seconds in values.items():
                    note(name, seconds)
    shutil.rmtree(root)
    staging.close()
    where = cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    head = [time.strftime("%Y-%m-%d"), package_commit(Path(__file__).parents[1]), where, torch.__version__, known.shape,
            config.batch.B, config.T, engine.spec.compute, f"{saved.nbytes / 2**20:.0f}"]  # fmt: skip
    for name, seconds in found.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{name}: {middle:.3f} s ({low:.3f} .. {high:.3f})")
        print(",".join(map(str, [*head, f'"{name}"', f"{middle:.4f}", f"{low:.4f}", f"{high:.4f}"])))


if __name__ == "__main__":
    main()
