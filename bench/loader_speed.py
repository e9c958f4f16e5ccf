"""How much of one core the loader takes to feed d12 (T = 1024) at a million tokens a second.

    python bench/loader_speed.py [--shards 10]

Shards of random ids, 20 million each, in the page cache; batches of 512 samples as one step of GPT-2 124M.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from daybreak.data.loader import Loader
from daybreak.data.mixing import MixLoader
from daybreak.data.shards import ShardWriter

T, ROWS, SHARD = 1024, 512, 20_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=10)
    count = parser.parse_args().shards
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = []
        for i in range(count):
            writer = ShardWriter(Path(folder, f"{i:06d}.bin"))
            writer.write(rng.integers(0, 50257, SHARD, np.uint16))
            shards.append(writer.close())
        half = count // 2
        one = Loader(shards, T, 1, V=50257)
        mix = MixLoader([Loader(part, T, 1, V=50257) for part in (shards[:half], shards[half:])], [0.7, 0.3], 1)
        for name, loader in (("one data set", one), ("mixture of two", mix)):
            for step in range(count * SHARD // (ROWS * T)):  # into the page cache
                loader.batch(step * ROWS, ROWS)
            cpu = []
            for step in range(40):
                before = time.process_time()
                loader.batch(step * ROWS, ROWS)
                cpu.append(time.process_time() - before)
            low, middle, high = (100 * c * 1e6 / (ROWS * T) for c in statistics.quantiles(cpu, n=4))
            print(f"{name}: {middle:.2f} % of a core at 1 M tokens/s ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
