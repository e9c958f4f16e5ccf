"""A run's folder, `runs/NAME/`: where everything the run leaves behind lies. Later verbs take just this folder."""

from __future__ import annotations

import faulthandler
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from daybreak import __version__
from daybreak.data.shards import locked, write_atomic
from daybreak.errors import ConfigError

log = logging.getLogger("daybreak")
PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "triton")


class RunFolder:
    """The names inside `path` (a public contract). Creating and writing is rank 0's business."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.env, self.exit = path / "config.toml", path / "env.json", path / "exit.json"
        self.metrics, self.main_log, self.samples = path / "metrics.jsonl", path / "main.log", path / "samples.txt"
        self.checkpoints, self.crash = path / "checkpoints", path / "crash.txt"

    def create(self) -> None:
        """Make the folder. Raises ConfigError when the run exists (nothing is ever written over) or the disk refuses.

        An empty folder is not a run yet: one that a crash left at its very start is taken over.
        """
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run's folder {self.path} cannot be created: {error.strerror}; choose another --run.dir."
            ) from None

    def check_free(self) -> None:
        """Raise ConfigError, with the command that continues it, if there is a run of this name.

        Hidden files are what a crash left of a first write: no run yet.
        """
        if self.path.is_dir() and any(path.name[0] != "." for path in self.path.iterdir()):
            raise ConfigError(
                f"run.name = {self.path.name!r} is taken: {self.path} exists; continue it with "
                f"`daybreak train {self.path}` or choose another --name."
            )

    def write_env(self) -> None:
        """Write env.json: what a reader needs to judge figures and repeat the run, nothing about who ran it."""
        write_atomic(self.env, json.dumps(describe_environment(), indent=2) + "\n")

    def write_exit(self, code: int, reason: str) -> None:
        """Write exit.json, which schedulers and restart loops read: torchrun reports 1 for any failed worker."""
        try:
            write_atomic(self.exit, json.dumps({"code": code, "reason": reason, "t": time.time()}) + "\n")
        except OSError as error:  # never in place of the reason itself
            log.warning("%s could not be written (%s).", self.exit, error.strerror)

    def forget_exit(self) -> None:
        """Remove what an earlier attempt said at its end: from here on a missing exit.json means killed or running."""
        self.exit.unlink(missing_ok=True)
        self.crash.unlink(missing_ok=True)

    def write_crash(self, text: str) -> None:
        """Write crash.txt, if the disk lets us."""
        try:
            self.crash.write_text(text)
        except OSError as error:
            log.warning("%s could not be written (%s).", self.crash, error.strerror)

    def append_stacks(self, why: str) -> None:
        """Append to crash.txt where every thread of this process is. Ranks do so one after the other."""
        with open(self.crash, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {why}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run for this process, until it ends however it ends. ConfigError if another holds it."""
        return locked(self.path, ConfigError(f"{self.path} is being trained by another process; wait or stop it."))

    def append_sample(self, step: int, text: str) -> None:
        """Append one generated text to samples.txt under a heading with its step, if the disk lets us."""
        try:
            with open(self.samples, "a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{text}\n")
        except OSError as error:  # metrics.jsonl has it too
            log.warning("%s could not be written (%s).", self.samples, error.strerror)


def describe_environment() -> dict[str, Any]:
    """Versions, system, processor and cards; no user or host name, no path, no environment variable, no serial."""
    import torch  # here, so that looking into a run folder does not cost importing torch

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "daybreak": __version__,
        "commit": package_commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "packages": {**_versions(), "torch": torch.__version__},  # with its build, as in 2.11.0+cu130
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cards": [
            {"name": c.name, "memory_mib": c.total_memory >> 20, "capability": f"{c.major}.{c.minor}"} for c in cards
        ],
    }


def _versions() -> Mapping[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def package_commit(root: Path) -> str | None:
    """The git commit of the checkout at `root`, '-dirty' appended where tracked files differ; None elsewhere."""
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
