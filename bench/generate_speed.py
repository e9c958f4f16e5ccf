"""Writing text with GPT-2 124M on the CPU: daybreak beside `transformers.generate`, and beside the memory's limit.

    python bench/generate_speed.py

Both read one folder of random weights, each in a process of its own with the same threads, and take turns, at least
7 rounds; greedy, fp32, keys and values cached. Refuses to print a figure unless
both wrote the same tokens. The limit: every token must read all weights once, at the bandwidth of summing a buffer of
their size. Prints medians, quartiles and ratios; writes bench/results/generate_speed_CPU.csv.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from contenders import RESULTS, Contender, commit, cpu_name, interleaved, quartiles, write

from daybreak.config import resolve
from daybreak.engine import Engine
from daybreak.generate import Batch, Sampling, Text
from daybreak.interop import open_source
from daybreak.state.run import engine_with

CASES = [(1, 16, 64), (8, 16, 48), (1, 512, 64), (8, 256, 32)]  # texts, prompt's tokens, tokens written
V = 50257


def prompts(texts: int, length: int) -> list[list[int]]:
    """Random ids below the end-of-text token, the same for everybody."""
    drawn = torch.randint(V - 1, (texts, length), generator=torch.Generator().manual_seed(texts * 1000 + length))
    return drawn.tolist()


def random_model(folder: Path) -> None:
    """A Hugging Face folder of GPT-2 124M with transformers' own random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)


def ours(folder: Path) -> Callable[[int, int, int], list[list[int]]]:
    """Greedy ids by daybreak."""
    source = open_source(folder, "gpt2")
    config = resolve("d12")[0]
    engines: dict[int, Engine] = {}

    def generate(texts: int, length: int, count: int) -> list[list[int]]:
        if texts not in engines:
            engines.clear()
            engines[texts] = engine_with(config, source, rows=texts, device="cpu")
        batch, how = Batch(engines[texts]), Sampling(count, temperature=0.0)
        made = [Text(ids, how) for ids in prompts(texts, length)]
        batch.add(made)
        while batch.texts:
            batch.step()
        return [[token.id for token in text.made] for text in made]

    return generate


def theirs(folder: Path) -> Callable[[int, int, int], list[list[int]]]:
    """Greedy ids by transformers."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).eval()

    def generate(texts: int, length: int, count: int) -> list[list[int]]:
        ids = torch.tensor(prompts(texts, length))
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": V - 1}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, length:].tolist()

    return generate


def weights_alone(folder: Path) -> Callable[[int, int, int], list[list[int]]]:
    """Reads as many bytes as the weights have, once a token."""
    del folder
    buffer = torch.ones(124_000_000 + (50304 - V) * 768)
    half = len(buffer) // 2

    def read(texts: int, length: int, count: int) -> list[list[int]]:
        del texts, length
        for _ in range(count):
            torch.dot(buffer[:half], buffer[half : 2 * half])
        return []

    return read


CONTENDERS = {"daybreak": ours, "transformers": theirs, "reading the weights": weights_alone}


def work(name: str, folder: Path) -> None:
    """The child process: one answer for each line of standard input."""
    generate = CONTENDERS[name](folder)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        began = time.perf_counter()
        ids = generate(*case)
        print(json.dumps({"seconds": time.perf_counter() - began, "ids": ids}), flush=True)


def measure(folder: Path, threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Case -> contender -> seconds of each round."""
    flags = ["--folder", str(folder), "--threads", str(threads)]
    contenders = {name: Contender(__file__, "--work", name, *flags) for name in CONTENDERS}
    results = {}
    for case in CASES:
        first = {name: c.ask(case)["ids"] for name, c in contenders.items()}  # warms up, too
        if first["daybreak"] != first["transformers"]:
            sys.exit(f"no figures, because both do not write the same: {case}")
        seconds = interleaved(contenders, case, rounds)
        label = "{} x {} + {}".format(*case)
        results[label] = seconds
        print(f"\n{label:<24}{'seconds':<28}times daybreak's")
        for name, values in seconds.items():
            ratios = [v / o for v, o in zip(values, seconds["daybreak"], strict=True)]
            print(f"{name:<24}{quartiles(values):<28}{quartiles(ratios) if name != 'daybreak' else ''}".rstrip())
    for c in contenders.values():
        c.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: every core")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.work:
        work(args.work, args.folder)
        return
    if args.rounds < 7:
        parser.error(f"--rounds {args.rounds} is too few for quartiles; use at least 7")
    import transformers

    setting = {
        "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "cpu": cpu_name(), "threads": args.threads,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in setting.items()) + f", {args.rounds} interleaved rounds")
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        results = measure(Path(folder), args.threads, args.rounds)
    cpu = re.sub(r"\(\w+\)|processor", "", cpu_name().lower()).split()
    write(RESULTS / f"generate_speed_{'_'.join(cpu)}.csv", setting, results, "texts x prompt + tokens")


if __name__ == "__main__":
    main()
