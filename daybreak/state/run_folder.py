"""A run's folder, `runs/NAME/`, which holds everything that a run leaves behind. Later verbs take just this folder.

    config.toml      complete: it can start the run again     checkpoints/   see state/checkpoint.py
    env.json         versions, GPUs, commit                   exit.json      how the last attempt ended: code and reason
    metrics.jsonl    one record a line                        crash.txt      a traceback, or where every thread was
    main.log         llm.c's lines                            samples.txt    generated text
    run-id           tells it from a run of the same name     *.before.*     the same two, of an attempt before
                                                              .torchrun      which torchruns may restart it
                                                              .holder        process and host that train it

Rank 0 creates the folder, and writes the files that a run has once. These calls follow each other:

    check_free, create     a new run: the name must be free, since nothing is ever written over
    locked                 no second process trains the run: the lock ends with the process, however that ends
    watched                the folder stays open, so that people may rename it
    locate                 before each write: where the folder is now
    write_exit             the last file: a run without exit.json is in progress, or was killed

`locate` compares the open folder with the name. If the name leads elsewhere, Linux tells the folder's new name, and the
run continues there. If the folder was removed, `locate` raises Error. Then the saver calls `remake` for a new folder.
"""

from __future__ import annotations

import faulthandler
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from daybreak import __version__
from daybreak.checked import FLAG, TEXT, WHOLE, or_null, read_json
from daybreak.errors import ConfigError, Error, by_exit_code, explained
from daybreak.files import holder_of, lock, locked, no_follow, signed, write_atomic
from daybreak.formatting import quoted
from daybreak.manifest import read_id

log = logging.getLogger("daybreak")
ENV = {  # keys of env.json
    "time?": TEXT, "daybreak?": TEXT, "commit?": or_null(TEXT), "source?": TEXT, "python?": TEXT,
    "packages?": {str: TEXT}, "platform?": TEXT, "cpu?": TEXT, "cpus?": or_null(WHOLE), "cuda?": or_null(TEXT),
    "cudnn?": or_null(WHOLE),
    "cards?": [{"name": TEXT, "memory_mib": WHOLE, "capability": TEXT}],
}  # fmt: skip
ORIGIN = "init.json"  # names the weights that a run began with, if they were given
PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "triton")


class RunFolder:
    """The names inside `path` (a public contract). Creating and writing is rank 0's business.

    lost: the folder was removed while it was watched, or its name belongs to another run now.
    """

    def __init__(self, path: Path) -> None:
        self._fd, self.lost = -1, False
        self.move(path)

    def move(self, path: Path) -> None:
        """The folder is at `path`."""
        self.path = path
        self.config, self.env, self.exit = path / "config.toml", path / "env.json", path / "exit.json"
        self.metrics, self.main_log, self.samples = path / "metrics.jsonl", path / "main.log", path / "samples.txt"
        self.checkpoints, self.crash = path / "checkpoints", path / "crash.txt"
        self.run_id = path / "run-id"
        self.agents = path / ".torchrun"  # hidden: no run yet, see check_free

    def create(self) -> None:
        """Make the folder. Raises ConfigError when the run exists (nothing is ever written over) or the disk refuses.

        An empty folder is not a run yet: one that a crash left at its very start is taken over.
        """
        self.check_free()
        with explained(ConfigError, f"the run's folder {self.path} cannot be created", "choose another --run.dir"):
            self.path.mkdir(parents=True, exist_ok=True)

    def check_free(self, flag: str = "--name") -> None:
        """Raise ConfigError, with the command that continues it, if there is a run of this name, which `flag` gave.

        Hidden files are what a crash left of a first write: no run yet.
        """
        if self.path.is_dir() and any(path.name[0] != "." for path in self.path.iterdir()):
            said, fix = f"{self.path} exists and is not a run: it has no config.toml", "remove it"
            if self.config.is_file():
                said = f"run.name = {self.path.name!r} is taken: {self.path} exists"
                fix = f"continue it with `daybreak train {quoted(self.path)}`"
            raise ConfigError(f"{said}; {fix} or choose another {flag}.")

    @cached_property
    def id(self) -> str:
        """See `read_id`."""
        return read_id(self.path)

    def keep_agents(self, agents: Sequence[str]) -> None:
        """Note which torchruns train the run, if any do: they may restart it by the command that made it."""
        if any(agents):
            write_atomic(self.agents, "\n".join(sorted({*agents})) + "\n")

    def is_of(self, agent: str) -> bool:
        """Whether the torchrun `agent` made the run or was allowed to resume it."""
        return self.agents.is_file() and agent in self.agents.read_text(errors="replace").split()

    def keep_id(self, known: str = "") -> None:
        """Give the run its id, for good. known: that of its checkpoints, should the file be gone."""
        if not self.id:
            self.id = known or uuid.uuid4().hex
            write_atomic(self.run_id, f"{self.id}\n")

    def write_env(self) -> str:
        """Write env.json: what a reader needs to judge figures and repeat the run, nothing about who ran it. Returns
        how daybreak's code changed since the file was written last; "" if it did not, or the file does not tell."""
        was: dict[str, Any] = {}
        with suppress(Error):
            was = self.read_env()
        now = describe_environment()
        write_atomic(self.env, json.dumps(now, indent=2) + "\n")
        keys = ["source"] if "source" in was else ["daybreak", "commit"]  # older versions did not write the first
        same = "daybreak" not in was or all(was.get(key) == now[key] for key in keys)
        return "" if same else f"{code_in(was)} -> {code_in(now)}"

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file's path, for a block that may fail, with a warning: other things are said or saved nevertheless."""
        try:
            yield self.locate() / name
        except (OSError, Error) as error:
            log.warning("%s could not be written (%s).", self.path / name, getattr(error, "strerror", error))

    def write_exit(self, code: int, reason: str, final: bool = False, *, free: bool = False) -> None:
        """Write exit.json, which schedulers and restart loops read: torchrun reports 1 for any failed worker.

        free: only if no process trains the run, for a rank that writes it in the place of a dead one."""
        held = self.locked() if free else nullcontext()
        with suppress(ConfigError, OSError), held, self.writing(self.exit.name) as path:  # the folder may be gone
            said = {"code": code, "reason": reason, "t": time.time()} | ({"final": True} if final else {})
            write_atomic(path, json.dumps(said) + "\n")

    def check_not_final(self) -> None:
        """Raise the Error with which the last attempt ended, if it was a final one: torchrun starts workers again."""
        said: dict[str, Any] = {}
        with suppress(Error):
            said = self.read_exit()
        if said.get("final"):
            error = by_exit_code(said["code"])(said["reason"])
            error.final = True
            raise error

    def read_exit(self) -> dict[str, Any]:
        """Code and reason of the last attempt's end; {} where exit.json is not there. Raises Error if it is damaged."""
        spec = {"code": WHOLE, "reason": TEXT, "final?": FLAG}
        return dict(read_json(self.exit, spec, Error, "remove it")) if self.exit.is_file() else {}

    def read_env(self) -> dict[str, Any]:
        """The content of env.json; {} where it is not there. Raises Error if it is damaged."""
        env = read_json(self.env, ENV, Error, "remove it") if self.env.is_file() else {}
        return {key: value for key, value in env.items() if f"{key}?" in ENV}

    def forget_exit(self) -> None:
        """Rename what an earlier attempt said at its end: from here on a missing exit.json means killed or running.

        Launchers start a failed run again within seconds, so exit.before.json and crash.before.txt tell people why."""
        for path in (self.exit, self.crash):
            with suppress(FileNotFoundError):
                path.replace(path.with_suffix(f".before{path.suffix}"))

    def exit_mark(self) -> int:
        """When exit.json was written, in ns; 0 where there is none."""
        return self.exit.stat().st_mtime_ns if self.exit.is_file() else 0

    def refuse(self, error: Error, mark: int) -> None:
        """Put a start's refusal in the place of how an earlier attempt ended: schedulers would act on that. mark: when
        the start began. If it is another one now, the attempt itself has said how it ended."""
        with suppress(OSError, Error), self.locked():  # no process trains it
            if self.config.is_file() and self.exit_mark() == mark:
                self.write_exit(error.exit_code, str(error), error.final)

    def say_done(self) -> None:
        """exit.json of a complete run: a kill after its last save, or a refused start, may have left another one."""
        with suppress(Error):
            if self.read_exit().get("code") == 0:
                return
        self.write_exit(0, "done")

    def _append(self, name: str, text: str) -> None:
        """Append to a file of the folder, if the disk lets us. Never through a symbolic link."""
        with self.writing(name) as path, open(path, "a", encoding="utf-8", opener=no_follow) as file:
            file.write(text)

    def write_crash(self, text: str) -> None:
        """Write crash.txt, if the disk lets us."""
        self._append(self.crash.name, text)

    def append_stacks(self, why: str) -> None:
        """Append to crash.txt where every thread of this process is. Ranks do so one after the other."""
        with open(self.locate() / self.crash.name, "a", opener=no_follow) as file:
            lock(file.fileno(), fcntl.LOCK_EX)
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {why}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def append_sample(self, step: int, text: str) -> None:
        """Append one generated text to samples.txt under a heading with its step, if the disk lets us."""
        self._append(self.samples.name, f"--- step {step} ---\n{text}\n")  # metrics.jsonl has it too

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process, until it ends however it ends. ConfigError if another holds it, or if a link
        in the folder leads out of it."""
        busy = ConfigError(f"{self.path} is being trained by {holder_of(self.path)}; wait or stop it.")
        with locked(self.path, busy):
            self.check_links()
            with signed(lambda: self.path), self.watched():
                yield

    def check_links(self) -> None:
        """Raise ConfigError for a symbolic link that leads out of the folder, or for what is no file and no folder.

        A folder from somebody else may hold one: we would write through it, or delete behind it. Inside of `wandb`,
        W&B has links of its own to its logs, and daybreak touches nothing.
        """
        home = self.path.resolve()
        for folder, folders, files in os.walk(home):
            if Path(folder) == home / "wandb":
                folders.clear()
                continue
            for path in (Path(folder, name) for name in (*folders, *files)):
                outside = path.is_symlink() and not path.resolve().is_relative_to(home)
                if outside or (path.exists() and not path.is_file() and not path.is_dir()):
                    what = "a symbolic link out of the run's folder" if outside else "neither a file nor a folder"
                    raise ConfigError(f"{path} is {what}, so nothing is written here; remove it, then start again.")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notice from now on if people rename or remove the folder: see `locate`."""
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            yield
        finally:
            with suppress(Error):
                self.locate()
            os.close(self._fd)
            self._fd = -1

    def locate(self) -> Path:
        """Where the folder is now, if it is watched: it is followed to a new name. Raises Error if it is `lost`."""
        if self._fd >= 0 and not self._is_at(self.path):
            with suppress(OSError):  # only Linux tells an open folder's name
                if self._is_at(moved := Path(os.readlink(f"/proc/self/fd/{self._fd}"))):
                    log.warning("%s was renamed to %s; the run continues there.", self.path, moved)
                    self.move(moved)
                    return self.path
            self.lost = True
        if self.lost:
            raise Error(f"{self.path} is no longer this run's folder: it was removed, or another one took its place.")
        return self.path

    def remake(self, config: str) -> None:
        """A new folder, at a free name, for a run that has `lost` its own. config: the text of its config.toml."""
        self.move(self.path.with_name(f"{self.path.name}-{self.id[:8]}") if self.path.exists() else self.path)
        self.create()
        write_atomic(self.config, config)
        write_atomic(self.run_id, f"{self.id}\n")
        self.write_env()
        fd = os.open(self.path, os.O_RDONLY)
        os.dup2(fd, self._fd)
        os.close(fd)
        self.lost = False

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._fd))
        except OSError:
            return False


def code_in(env: Mapping[str, Any]) -> str:
    """The code that env.json names, for people: version, commit and hash of the source, those that are known."""
    commit = re.sub(r"^([0-9a-f]{7})[0-9a-f]+", r"\1", env.get("commit") or "")
    parts = {"commit": commit, "source": env.get("source")}
    return ", ".join([env["daybreak"], *(f"{name} {value}" for name, value in parts.items() if value)])


def source_hash() -> str:
    """Of the package's own Python files, by name and content."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def describe_environment() -> dict[str, Any]:
    """Versions, system, processor and GPUs; no user or host name, no path, no environment variable, no serial."""
    import torch  # here, so that looking into a run folder does not cost importing torch

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "daybreak": __version__,
        "commit": package_commit(Path(__file__).resolve().parents[2]),
        "source": source_hash(),
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
    # git refuses a repository of another user, as a team's clone may be. It runs commands that such a repository names,
    # but its owner has written the code that runs here already.
    safe = ["-c", f"safe.directory={root}"] if (root / ".git").lstat().st_uid == Path(__file__).stat().st_uid else []
    command = ["git", *safe, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def cpu_model() -> str:
    """The processor's name as the system gives it; the architecture where it gives none."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1].strip()
    return platform.processor() or platform.machine()
