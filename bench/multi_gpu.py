"""Several GPUs of one host beside one of them: the same losses, the same bits, speed, memory, and a worker killed.

    python bench/multi_gpu.py FOLDER [--ranks 2] [--models d12,d48] [--parts same,kill,speed,long] [--out results.csv]

FOLDER holds train.bin and val.bin (token shards of real text). Whole runs of `daybreak train`, alone or under torchrun;
figures come from their metrics.jsonl. `same`: one rank with two sizes of micro-batch, all ranks twice. `kill`: the
second of these loses a worker, restarts, and must keep the same bits; then one rank goes on from its checkpoint.
`speed`: 8 micro-steps of B = 16 a rank and step on both sides, and memory beside `daybreak plan`. `long`: GPT-2 1558M
from its first step at 1,048,576 tokens a step. Ends at the first part that fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from daybreak.config import Config
from daybreak.engine.device import missing_on
from daybreak.engine.fit import plan_memory
from daybreak.parallel import Group
from daybreak.state.run_folder import package_commit

TRAIN = ["-m", "daybreak", "train"]
ROOT = Path(__file__).parents[1]
CPU = not torch.cuda.is_available()  # for trying this file out
SHAPES = {
    "d12": ["d12", "--batch.B", "16"],
    "d48": ["d48", "--batch.B", "16", "--batch.recompute", "2"],
    "toy": ["d6", "--model.L", "2", "--model.C", "64", "--model.NH", "2", "--batch.T", "64", "--batch.B", "4"],
}
STEPS = {"toy": 12, "d12": 40, "d48": 10}  # to time
SKIP = 4  # steps at a run's start that no figure counts


class Run:
    """A run of `daybreak train` under way."""

    def __init__(self, a: argparse.Namespace, name: str, model: str, ranks: int, gpu: int = 0, **flags: object) -> None:
        self.folder, self.name = a.runs / name, name
        launcher = [sys.executable] if ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", "1",
        ]  # fmt: skip
        base = ["--data.train", a.folder / "train.bin", "--data.val", a.folder / "val.bin", "--data.tokenizer", "gpt2"]
        base += [
            "--run.name",
            name,
            "--run.dir",
            a.runs,
            "--eval.tokens",
            16384,
            "--eval.every",
            0,
            "--eval.sample_tokens",
            1,
        ]
        if ranks > 1:
            base += ["--parallel.zero", 1]
        more = [text for key, value in flags.items() for text in ("--" + key.replace("__", "."), value)]
        words = TRAIN + SHAPES[model] + base + more if model else [*TRAIN, self.folder]  # no model: resume
        env = dict(os.environ, NCCL_NVLS_ENABLE="0")
        if ranks == 1 and not CPU:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        a.runs.mkdir(parents=True, exist_ok=True)
        self.log = (a.runs / f"{name}.log").open("a")
        self.process = subprocess.Popen([*launcher, *map(str, words)], env=env, stdout=self.log, stderr=self.log)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Its lines of metrics.jsonl of one kind, a step's last line only."""
        path = self.folder / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
        return list({line["step"]: line for line in found if line["kind"] == kind}.values())

    def reach(self, step: int, seconds: float) -> None:
        """Wait until a step is in metrics.jsonl."""
        end = time.monotonic() + seconds
        while not any(line["step"] >= step for line in self.lines("step")):
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                sys.exit(f"{self.name} did not reach step {step}:\n" + Path(self.log.name).read_text()[-3000:])
            time.sleep(0.2)

    def stop(self) -> None:
        """Kill all of its processes: nothing is saved."""
        if self.process.poll() is None:
            for process in (self.process.pid, *self.workers()):  # torchrun first: it would start others
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """The processes that torchrun started."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return [int(process) for process in found.split()]

    def done(self, seconds: float) -> Run:
        """Wait for its end, which must be good."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            code = "too late"
        if code != 0:
            sys.exit(f"{self.name} ended with {code}:\n" + Path(self.log.name).read_text()[-3000:])
        return self

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines("step")]

    def speed(self) -> float:
        """Median tokens a second."""
        return statistics.median(line["tok_s"] for line in self.lines("step")[SKIP:])

    def memory(self) -> int:
        """MiB in use on the first rank's card, as the driver says."""
        return int(max(line["mem_mib"] for line in self.lines("step")))


def gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def same(a: argparse.Namespace, say: Any, kill: bool) -> None:
    """Losses of one rank and of all ranks, for the same total batch; a killed worker."""
    model, T = ("toy", 64) if CPU else ("d12", 1024)
    B, steps, every = (4, 12, 4) if CPU else (16, 30, 10)
    total = B * T * a.ranks * 2
    flags: dict[str, object] = {"batch__total_tokens": total, "run__steps": steps, "checkpoint__every": every}
    alone = [Run(a, f"one-{k}", model, 1, k, **flags, batch__B=B * (k + 1)) for k in range(2)]
    small, large = (run.done(240).losses() for run in alone)
    first = Run(a, "all-1", model, a.ranks, **flags).done(240)
    say("same", "largest gap of losses, one rank, two sizes of micro-batch", f"{gap(small, large):.2e}")
    say("same", f"largest gap of losses, one rank and {a.ranks}", f"{gap(small, first.losses()):.2e}")
    assert gap(small, first.losses()) <= 2 * gap(small, large) or CPU
    second = Run(a, "all-2", model, a.ranks, **flags)
    if kill:
        second.reach(every + every // 2, 240)
        os.kill(second.workers()[-1], signal.SIGKILL)
        say("kill", f"one of {a.ranks} workers killed at step", len(second.losses()))
        second.reach(2 * every + every // 2, 240)
        second.stop()
        n = len(second.losses())
        say(
            "kill",
            f"restarted by torchrun; losses of {n} steps equal first run's",
            first.losses()[:n] == second.losses(),
        )
        assert first.losses()[:n] == second.losses()
        one = Run(a, "all-2", "", 1).done(240).losses()
        say(
            "kill",
            f"from step {2 * every} on one rank; largest gap to the first run",
            f"{gap(first.losses(), one):.2e}",
        )
        assert gap(first.losses(), one) <= 2 * gap(small, large) or CPU
    else:
        second.done(240)
        say("same", f"{a.ranks} ranks again: losses equal to the last bit", first.losses() == second.losses())
        assert first.losses() == second.losses()


def speed(a: argparse.Namespace, say: Any, models: list[str]) -> None:
    """Tokens a second of a rank, alone and among all; memory beside the plan."""
    T, B = (64, 4) if CPU else (1024, 16)
    flags: dict[str, object] = {"run__steps": 1000, "checkpoint__every": 0}
    alone = {
        model: Run(a, f"speed-{model}-1", model, 1, gpu % a.ranks, batch__total_tokens=8 * B * T, **flags)
        for gpu, model in enumerate(models)  # side by side, a card each
    }
    for model, run in alone.items():
        run.reach(STEPS[model], 240)
    for run in alone.values():
        run.stop()
    for model in models:
        profile = {"run__profile": "6:7"} if model == models[0] else {}
        total = 8 * B * T * a.ranks
        many = Run(a, f"speed-{model}-{a.ranks}", model, a.ranks, batch__total_tokens=total, **flags, **profile)
        many.reach(STEPS[model], 240)
        many.stop()
        one, each = alone[model].speed(), many.speed() / a.ranks
        say("speed", f"{model} tok/s of one rank alone", f"{one:.0f}")
        say("speed", f"{model} tok/s a rank of {a.ranks}", f"{each:.0f}")
        say("speed", f"{model} ratio", f"{each / one:.4f}")
        planned = planned_mib(model, a.ranks)
        say("memory", f"{model} MiB on rank 0 of {a.ranks} as the driver says", many.memory())
        say("memory", f"{model} MiB planned, without what NCCL takes", planned)


def planned_mib(model: str, ranks: int) -> int:
    """What `daybreak plan` counts for a rank."""
    words = SHAPES[model]
    flags = {key.removeprefix("--"): int(value) for key, value in zip(words[1::2], words[2::2], strict=True)}
    config = Config.from_target(words[0]).override({**flags, "parallel.zero": 1})
    device = torch.device("cpu") if CPU else torch.device("cuda", 0)
    group = Group(world=ranks)
    arena, outside = plan_memory(config, device, missing_on(device), group)
    return (sum(arena.sizes().values()) + outside) >> 20


def long(a: argparse.Namespace, say: Any) -> None:
    """GPT-2 1558M's first ten steps at the original batch."""
    model, total, steps = ("toy", 4096, 10) if CPU else ("d48", 1 << 20, 10)
    run = Run(a, "long", model, a.ranks, batch__total_tokens=total, run__steps=32000, checkpoint__every=0,
              optim__lr=6e-4, schedule__warmup=700)  # fmt: skip
    run.reach(steps, 400)
    run.stop()
    say("long", f"{model} losses at {total} tokens a step", " ".join(f"{x:.3f}" for x in run.losses()[:steps]))
    say("long", f"{model} tok/s of {a.ranks} ranks", f"{run.speed():.0f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", default="d12,d48")
    parser.add_argument("--parts", default="same,kill,speed,long")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/multi_gpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/multi_gpu.csv")
    a = parser.parse_args()
    parts = a.parts.split(",")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    head = [("card", "cpu" if CPU else torch.cuda.get_device_name()), ("ranks", a.ranks), ("torch", torch.__version__),
            ("date", time.strftime("%Y-%m-%d")), ("commit", package_commit(ROOT))]  # fmt: skip
    with a.out.open("w", newline="") as file:
        writer = csv.writer(file)

        def say(part: str, what: str, value: object) -> None:
            writer.writerow((part, what, value))
            file.flush()
            print(f"{part}: {what}: {value}", flush=True)

        writer.writerow(("part", "what", "value"))
        for what, value in head:
            say("machine", what, value)
        if "same" in parts:
            same(a, say, "kill" in parts)
        if "speed" in parts:
            speed(a, say, a.models.split(","))
        if "long" in parts:
            long(a, say)


if __name__ == "__main__":
    main()
