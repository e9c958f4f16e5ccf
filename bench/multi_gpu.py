"""Several GPUs of one host beside one of them: the same losses, the same bits, speed, memory, and a worker killed.

    python bench/multi_gpu.py FOLDER [--ranks 4] [--models d12,d48] [--parts same,kill,speed,long] [--out results.csv]

FOLDER holds train.bin and val.bin (token shards of real text). Whole runs of `daybreak train`, alone or under torchrun;
figures come from their metrics.jsonl. `same`: one rank with three sizes of micro-batch, all ranks twice. `kill`: the
second of these loses a worker, restarts, and must keep the same bits; then half of the ranks, and one, resume from its
checkpoints. `speed`: 8 micro-steps of B = 16 a rank and step on both sides, and memory beside `daybreak plan`. `long`:
1,048,576 tokens a step. Runs of one rank that --runs already holds are taken from there; with --ranks 1 nothing else is
run. Ends at the first part that fails.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
STEPS = {"toy": 12, "d12": 24, "d48": 10}  # to time
Say = Callable[[str, str, object], None]
CARDS = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
SKIP = 4  # steps at a run's start that no figure counts


class Run:
    """A run of `daybreak train` under way."""

    def __init__(
        self, a: argparse.Namespace, name: str, model: str = "", ranks: int = 0, gpu: int = 0, **flags: object
    ) -> None:
        """Starts it; of 0 ranks: one that was made before. Without a model it resumes."""
        self.folder, self.name = a.runs / name, name
        if not ranks:
            return
        launcher = [sys.executable] if ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", "1",
        ]  # fmt: skip
        base = ["--data.train", a.folder / "train.bin", "--data.val", a.folder / "val.bin", "--data.tokenizer", "gpt2"]
        base += ["--run.name", name, "--run.dir", a.runs, "--eval.tokens", 16384, "--eval.every", 0,
                 "--eval.sample_tokens", 1]  # fmt: skip
        if ranks > 1:
            base += ["--parallel.zero", 1]
        more = [text for key, value in flags.items() for text in ("--" + key.replace("__", "."), value)]
        words = TRAIN + SHAPES[model] + base + more if model else [*TRAIN, self.folder]
        env = dict(os.environ, NCCL_NVLS_ENABLE="0")
        if ranks == 1 and not CPU:
            env["CUDA_VISIBLE_DEVICES"] = CARDS[gpu]
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
        """Tokens a second of the median step."""
        steps = self.lines("step")
        tokens = steps[-1]["tokens"] - steps[-2]["tokens"]
        return 1e3 * tokens / statistics.median(line["ms"] for line in steps[SKIP:])

    def times(self) -> str:
        """Milliseconds of every step."""
        return " ".join(f"{line['ms']:.1f}" for line in self.lines("step"))

    def memory(self) -> int:
        """MiB in use on the first rank's card, as the driver says."""
        return int(max(line["mem_mib"] for line in self.lines("step")))


def gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def alone(a: argparse.Namespace, runs: dict[str, tuple[str, dict[str, object]]]) -> list[Run]:
    """Runs of one rank, side by side, a GPU each: name -> model and flags, until their model's number of steps. Those
    that were made before are not made again."""
    todo = [name for name in runs if not (a.runs / name / "metrics.jsonl").exists()]
    while todo:
        now, todo = todo[: a.ranks], todo[a.ranks :]
        started = [Run(a, name, runs[name][0], 1, gpu, **runs[name][1]) for gpu, name in enumerate(now)]
        for run in started:
            run.reach(STEPS[runs[run.name][0]], 400)
        for run in started:
            run.stop()
    return [Run(a, name) for name in runs]


def same(a: argparse.Namespace, say: Say, kill: bool) -> None:
    """Losses of one rank and of all ranks, for the same total batch; a killed worker."""
    model, T, B, steps, every = ("toy", 64, 4, 16, 4) if CPU else ("d12", 1024, 16, 40, 10)
    total = 8 * B * T
    flags: dict[str, object] = {"batch__total_tokens": total, "run__steps": steps, "checkpoint__every": every}
    names = {f"one-{b}": b for b in (B // 2, B, 2 * B)}
    missing = [Run(a, name, model, 1, k % a.ranks, **flags, batch__B=b) for k, (name, b) in enumerate(names.items())
               if not (a.runs / name / "exit.json").exists()]  # fmt: skip
    for run in missing:
        run.done(240)
    small, *larger = (Run(a, name).losses() for name in names)
    bound = max(gap(x, y) for x, y in itertools.combinations((small, *larger), 2))
    say("same", f"largest gap of {steps} losses, one rank, B = {', '.join(map(str, names.values()))}", f"{bound:.2e}")
    if a.ranks == 1:
        return
    first = Run(a, f"all-1-{a.ranks}", model, a.ranks, **flags).done(240)
    apart = gap(larger[0], first.losses())
    say("same", f"largest gap of losses, one rank and {a.ranks}, B = {B}", f"{apart:.2e}")
    say("memory", f"{model} MiB on rank 0 of {a.ranks} with a save every {every} steps", first.memory())
    assert apart <= 2 * bound or CPU
    name = f"all-2-{a.ranks}"
    second = Run(a, name, model, a.ranks, **flags)
    if not kill:
        second.done(240)
        equal = first.losses() == second.losses()
        say("same", f"{a.ranks} ranks again: losses equal to the last bit", equal)
        assert equal
        return
    second.reach(every + every // 2, 240)
    os.kill(second.workers()[-1], signal.SIGKILL)
    say("kill", f"one of {a.ranks} workers killed at step", len(second.losses()))
    second.reach(2 * every + every // 2, 240)
    second.stop()
    n = len(second.losses())
    equal = first.losses()[:n] == second.losses()
    say("kill", f"restarted by torchrun; losses of {n} steps equal first run's", equal)
    assert equal
    if a.ranks > 2:
        half = Run(a, name, "", a.ranks // 2)
        half.reach(3 * every + every // 2, 240)
        half.stop()
        say("kill", f"from step {2 * every} on {a.ranks // 2} ranks; steps that it had made when it was stopped",
            len(half.losses()))  # fmt: skip
    one = Run(a, name, "", 1).done(240).losses()
    say("kill", "then on one rank, to the end; largest gap to the first run", f"{gap(first.losses(), one):.2e}")
    assert gap(first.losses(), one) <= 2 * bound or CPU


def speed(a: argparse.Namespace, say: Say, part: str, models: list[str], micro: int) -> None:
    """Tokens a second of a rank, alone and among all; memory beside the plan. micro: micro-steps of B = 16 of all ranks
    a step (0: 8 a rank)."""
    T, B = (64, 4) if CPU else (1024, 16)
    flags: dict[str, object] = {"run__steps": 32000, "checkpoint__every": 0, "optim__lr": 6e-4, "schedule__warmup": 700}
    asked = {f"{part}-{m}-1": (m, {**flags, "batch__total_tokens": (micro or 8) * B * T}) for m in models}
    ones = dict(zip(models, alone(a, asked), strict=True))
    for model in models:
        one = ones[model].speed()
        tokens = (micro or 8) * B * T
        say(part, f"{model} tok/s of one rank alone, {tokens} tokens a step", f"{one:.0f}")
        if micro:
            say(part, f"{model} losses of one rank", " ".join(f"{x:.3f}" for x in ones[model].losses()[:10]))
        if a.ranks == 1:
            continue
        tokens *= 1 if micro else a.ranks
        many = Run(a, f"{part}-{model}-{a.ranks}", model, a.ranks, batch__total_tokens=tokens, **flags)
        many.reach(STEPS[model], 240)
        many.stop()
        each = many.speed() / a.ranks
        say(part, f"{model} ms of each step of one rank", ones[model].times())
        say(part, f"{model} ms of each step of {a.ranks} ranks", many.times())
        if model == models[0] and not micro:  # for bench/timeline.py; a profiled run is not one to be timed
            traced = Run(a, f"{part}-{model}-{a.ranks}-profile", model, a.ranks, batch__total_tokens=tokens, **flags,
                         run__profile="6:7")  # fmt: skip
            traced.reach(12, 240)
            traced.stop()
            say(part, f"{model} ms of each step of {a.ranks} ranks, the 7th profiled", traced.times())
        say(part, f"{model} tok/s a rank of {a.ranks}, {tokens} tokens a step", f"{each:.0f}")
        say(part, f"{model} ratio of {a.ranks}", f"{each / one:.4f}")
        if micro:
            say(part, f"{model} losses of {a.ranks} ranks", " ".join(f"{x:.3f}" for x in many.losses()[:10]))
        say("memory", f"{model} MiB of one rank alone as the driver says", ones[model].memory())
        say("memory", f"{model} MiB on rank 0 of {a.ranks} as the driver says", many.memory())
        say("memory", f"{model} MiB planned",
            elsewhere(f"multi_gpu.planned_mib({model!r}, {a.ranks})"))  # fmt: skip


def elsewhere(expression: str) -> str:
    """The output of a process of its own: this one makes no context on a GPU whose memory is measured."""
    code = f"import multi_gpu, torch; print({expression})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or sys.exit(done.stderr)  # type: ignore[func-returns-value]


def planned_mib(model: str, ranks: int) -> int:
    """The memory that `daybreak plan` counts for a rank."""
    words = SHAPES[model]
    flags = {key.removeprefix("--"): int(value) for key, value in zip(words[1::2], words[2::2], strict=True)}
    config = Config.from_target(words[0]).override({**flags, "parallel.zero": 1})
    device = torch.device("cpu") if CPU else torch.device("cuda", 0)
    group = Group(world=ranks)
    arena, outside = plan_memory(config, device, missing_on(device), group)
    return (sum(arena.sizes().values()) + outside) >> 20


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
    card = elsewhere("'cpu' if multi_gpu.CPU else torch.cuda.get_device_name()")
    head = {"card": card, "ranks": a.ranks, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
            "commit": package_commit(ROOT)}  # fmt: skip
    with a.out.open("w", newline="") as file:
        writer = csv.writer(file)

        def say(part: str, what: str, value: object) -> None:
            writer.writerow((part, what, value))
            file.flush()
            print(f"{part}: {what}: {value}", flush=True)

        writer.writerow(("part", "what", "value"))
        for what, value in head.items():
            say("machine", what, value)
        models = a.models.split(",")
        if "same" in parts:
            same(a, say, "kill" in parts)
        if "speed" in parts:
            speed(a, say, "speed", models, 0)
        if "long" in parts:  # GPT-2 1558M's own batch
            speed(a, say, "long", models, 64)


if __name__ == "__main__":
    main()
