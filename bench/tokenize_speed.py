"""Tokenizing: `daybreak prepare` beside the plain script (llm.c's fineweb.py: a process pool of encode_ordinary).

Both read the same Parquet file of web-like documents and write GPT-2 token shards, with the same number of workers,
each in its own process, interleaved. Prints medians and quartiles of MB of text per second, and the main
process's peak of memory.

    python bench/tokenize_speed.py [--megabytes 48] [--workers N] [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAIN = """
import multiprocessing as mp, sys
import numpy as np, pyarrow.parquet as pq, tiktoken
from daybreak.data.tokenizer import GPT2_PATTERN, get_tokenizer
own = get_tokenizer("gpt2")
ranks = {own.token_bytes(i): i for i in range(own.eot)}
enc = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
def tokenize(text):  # as llm.c's script does it
    tokens = [50256]
    tokens.extend(enc.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)
def texts(path):
    for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
        yield from batch.column(0).to_pylist()
if __name__ == "__main__":
    path, out, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    shard, count, index = np.empty((10**8,), np.uint16), 0, 0
    with mp.Pool(workers) as pool:
        for tokens in pool.imap(tokenize, texts(path), chunksize=16):
            if count + len(tokens) > len(shard):
                open(f"{out}/{index}.bin", "wb").write(shard[:count].tobytes()); count, index = 0, index + 1
            shard[count : count + len(tokens)] = tokens
            count += len(tokens)
    open(f"{out}/{index}.bin", "wb").write(shard[:count].tobytes())
    print(count, PEAK)
"""
OURS = """
import sys
from daybreak.data.prepare import prepare
if __name__ == "__main__":
    made = prepare(sys.argv[1], data_dir=sys.argv[2], name="x", workers=int(sys.argv[3]))
    print(made.train.tokens + made.val.tokens, PEAK)
"""


def write_corpus(path: Path, megabytes: int) -> int:
    """Documents of about 4 kB cut from the standard library's sources and topics; returns the bytes of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from daybreak.data.sources import stdlib_documents

    whole, rng, texts, size = "\n".join(text for _, text in stdlib_documents()), random.Random(1), [], 0
    while size < megabytes * 1_000_000:
        start, length = rng.randrange(len(whole)), int(rng.lognormvariate(7.9, 0.9)) + 50
        texts.append(whole[start : start + length])
        size += len(texts[-1].encode())
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    return size


def run(code: str, corpus: Path, workers: int) -> tuple[float, int, int]:
    """(seconds, tokens, peak MiB without worker processes) of one contender in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        script = Path(out, "contender.py")
        script.write_text(code.replace("PEAK", 'open("/proc/self/status").read().split("VmHWM:")[1].split()[0]'))
        before = time.perf_counter()
        command = [sys.executable, str(script), str(corpus), out, str(workers)]
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
        return time.perf_counter() - before, int(said[0]), int(said[1]) >> 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus.parquet")
        size = write_corpus(corpus, a.megabytes)
        rows = [(run(PLAIN, corpus, a.workers), run(OURS, corpus, a.workers)) for _ in range(a.rounds)]
    assert len({tokens for pair in rows for _, tokens, _ in pair}) == 1, "the contenders disagree on the tokens"
    print(f"{size / 1e6:.0f} MB, {rows[0][0][1]:,} tokens, {a.workers} workers, {a.rounds} rounds")
    for k, name in enumerate(("plain script", "daybreak")):
        speed = [size / 1e6 / pair[k][0] for pair in rows]
        low, middle, high = statistics.quantiles(speed, n=4)
        print(f"{name}: {middle:.2f} MB/s ({low:.2f} .. {high:.2f}), peak {max(p[k][2] for p in rows)} MiB")
    low, middle, high = statistics.quantiles([plain[0] / ours[0] for plain, ours in rows], n=4)
    print(f"daybreak / plain script: {middle:.2f} ({low:.2f} .. {high:.2f})")


if __name__ == "__main__":
    main()
