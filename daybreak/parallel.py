"""Processes that train together: who they are, how they meet, what they agree on, and who is to blame when it fails.

A `Group` is this process's place among them; `ALONE` is the group of one, with which the same code runs. `connect`
makes one from what torchrun, mpirun or srun put into the environment. Tensors travel through torch.distributed (NCCL
on GPUs, gloo on CPUs), decisions and errors through gloo and the launch's key-value store.

Within `parallel.timeout` seconds every failure becomes one sentence that names a rank: each process tells the store
once a second how far it has come, and the first to notice a failure says there who is behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from daybreak.errors import ConfigError, Error, Hung, Stopped, by_exit_code

log = logging.getLogger("daybreak")
PORT = "29500"  # torch's own default
BEAT = 1.0  # seconds between signs of life
SILENT = 30.0  # seconds without one after which a rank is taken for dead: a compiler may hold Python for a while
LEAVE = 10.0  # seconds that torch.distributed gets to end
RANK_VARIABLES = (  # (rank, processes, rank on this machine), as launchers set them
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # the second: only srun sets it, not a batch script
)
T = TypeVar("T")


def launched(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher means them; a group of one without.

    mpirun tells no address: on several machines give it with `-x MASTER_ADDR=HOST`. Under srun it is the job's first.
    Raises ConfigError for a rank that is not below the number of processes.
    """
    made = dict(zip(RANK_VARIABLES[0], ("0", "1", "0"), strict=True))
    for rank, world, local in RANK_VARIABLES:
        if rank in environ and world in environ:
            found = (environ[rank], environ[world], environ.get(local, environ[rank]))
            made = dict(zip(RANK_VARIABLES[0], found, strict=True))
            break
    if not all(value.isdecimal() for value in made.values()) or int(made["RANK"]) >= int(made["WORLD_SIZE"]):
        said = ", ".join(f"{name} = {value!r}" for name, value in made.items())
        raise ConfigError(f"{said}: a rank must be a whole number below the number of processes; start them again.")
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ.get("SLURM_STEP_NODELIST", ""))
    host = (first[1] + (first[2] or "")) if first else "127.0.0.1"
    return {
        **made,
        "MASTER_ADDR": environ.get("MASTER_ADDR", host),
        "MASTER_PORT": environ.get("MASTER_PORT", PORT),
    }


def restarted(environ: Mapping[str, str]) -> bool:
    """Whether torchrun has started these workers again after a failure or a change of machines."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def agent(environ: Mapping[str, str]) -> str:
    """A hash that tells this host's torchrun from any other one; "" without torchrun. It stays when workers restart.

    torchrun makes itself a folder with a name of its own, in which every attempt's error file lies.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return ""
    folder = re.sub(r"/attempt_\d+/\d+/[^/]*$", "", environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return hashlib.sha256(f"{environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {folder}".encode()).hexdigest()


def exit_code(error: Error, environ: Mapping[str, str]) -> int:
    """What the process ends with. torchrun starts workers again that fail: one that was asked to stop, and has saved,
    has not failed; exit.json says 75."""
    return 0 if isinstance(error, Stopped) and "TORCHELASTIC_RUN_ID" in environ else error.exit_code


class Group:
    """This process among `world` others. The methods are collective: every rank calls them in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, timeout: float = 300.0) -> None:
        self.rank, self.world, self.local_rank, self.timeout = rank, world, local_rank, timeout
        self.progress = 0  # collectives entered: who is behind is who the others wait for
        self.dist: Any = None  # torch.distributed, once connected
        self.store: Any = None
        self.holds_store = False  # it ends with this process
        self._reason: tuple[int, int, str] | None = None  # (rank, exit code, sentence): why all end, once it is known
        self.leave_stacks: Callable[[], None] = lambda: None  # called in a thread when ranks wait in vain, on each
        self.capturable = True  # into CUDA graphs: NCCL's calls, not gloo's
        self.before_close: list[Callable[[], None]] = []  # what holds on to NCCL's communicators lets go of them
        self._closing = threading.Event()

    # ---- deciding together

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.world == 1:
            return [value]
        self.progress += 1
        found: list[Any] = [None] * self.world
        self.dist.all_gather_object(found, value)
        return found

    def numbers(self, values: Sequence[float], largest: bool = False) -> list[float]:
        """The sum (or the largest) of every rank's values, place by place."""
        if self.world == 1:
            return list(values)
        import torch

        self.progress += 1
        flat = torch.tensor(values, dtype=torch.float64)
        self.dist.all_reduce(flat, op=self.dist.ReduceOp.MAX if largest else self.dist.ReduceOp.SUM)
        return flat.tolist()

    def everywhere(self, fn: Callable[[], T]) -> list[T]:
        """fn() on every rank, and all results. Where one raises an Error, or the disk does, every rank raises it."""
        if self.world == 1:
            return [fn()]
        value, failure = None, None
        try:
            value = fn()
        except (Error, OSError) as error:
            failure = error
        said = (None, "") if failure is None else (getattr(failure, "exit_code", 1), str(failure))
        outcomes = self.gather((value, *said))
        if failure is not None:
            raise failure
        for rank, (_, code, text) in enumerate(outcomes):
            if code is not None:
                raise _from_elsewhere(code, f"rank {rank}: {text}")
        return [outcome[0] for outcome in outcomes]

    def first(self, fn: Callable[[], T]) -> T:
        """fn() on rank 0 alone; every rank returns its result, or raises its Error."""
        return self.everywhere(lambda: fn() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def agree(self, what: Mapping[str, Any], error: type[Error] = ConfigError) -> None:
        """Raise `error` on every rank, naming rank and key, unless all ranks have the same `what`."""
        for rank, other in enumerate(everyone := self.gather((socket.gethostname(), dict(what)))):
            for name, value in other[1].items():
                if value != everyone[0][1].get(name):
                    raise error(
                        f"rank {rank} on {other[0]} has {name} = {value!r}, rank 0 on {everyone[0][0]} has "
                        f"{everyone[0][1].get(name)!r}; start every rank with the same configuration, data and version."
                    )

    # ---- tensors

    def reduce_scatter(self, out: Any, whole: Any) -> Any:
        """Start: out = this rank's part of the sum of all ranks' `whole`. Returns what to wait for."""
        run = getattr(self.dist, "reduce_scatter_single", None) or self.dist.reduce_scatter_tensor
        return run(out, whole, async_op=True)

    def all_gather_into(self, whole: Any, part: Any) -> Any:
        """Start: whole = all ranks' `part`, one after the other; `part` may lie in it. Returns what to wait for."""
        run = getattr(self.dist, "all_gather_single", None) or self.dist.all_gather_into_tensor
        return run(whole, part, async_op=True)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until ready(). NCCL's kernels wait for ever for a rank that is gone, and the host for them: here the waiting
        ends, with an Error, soon after another rank gave a reason or fell silent, and after `timeout`."""
        self.progress += 1  # graphs enter their collectives unseen: who does not come to wait is behind
        began = looked = time.monotonic()
        before: list[list[Any]] = []
        while not ready():
            now = time.monotonic()
            late, dead = now - began > self.timeout, False
            if now - looked > (SILENT if before else BEAT):
                beats = self._beats()
                dead = any(a[1] == b[1] for a, b in zip(before, beats, strict=False))
                before, looked = beats, now
            if late or dead or self._reason:  # the thread that gives signs of life hears of reasons
                raise self.explain(RuntimeError("NCCL timed out" if late else "NCCL"))
            time.sleep(0.0002)

    # ---- failing together

    def fail(self, code: int, text: str) -> tuple[int, str]:
        """Tell the other ranks why this one ends. Returns what counts: the first reason that anybody gave."""
        if self.store is None:
            return code, text
        with suppress(RuntimeError):  # the store was rank 0's, which is gone
            self.store.compare_set("failed", "", json.dumps([self.rank, code, text]))
            self._hear()
        rank, code, text = self._reason or (self.rank, code, text)
        return code, text if rank == self.rank or text.startswith("rank ") else f"rank {rank}: {text}"

    def _hear(self) -> bool:
        """Whether anybody has given a reason, which from then on this rank knows without the store."""
        if self._reason is None and self.store.check(["failed"]):
            self._reason = json.loads(self.store.get("failed"))
            self.store.set(f"heard/{self.rank}", "")
        return self._reason is not None

    def _be_heard(self) -> None:
        """Whose store it is stays until all ranks know the reason; those that died never will."""
        deadline, heard = time.monotonic() + 3 * BEAT, [f"heard/{rank}" for rank in range(self.world)]
        while self.store.check(["failed"]) and not self.store.check(heard) and time.monotonic() < deadline:
            time.sleep(0.05)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What is raised inside becomes known to the other ranks; what torch.distributed raises gets its reason."""
        try:
            yield
        except Error as error:
            if not error.elsewhere:
                self.fail(error.exit_code, str(error))
            raise
        except RuntimeError as error:
            if self.store is None or not re.search("gloo|NCCL|c10d|DistNetwork|process group", f"{error!r}"):
                self.fail(1, f"{type(error).__name__}: {error}")
                raise
            raise self.explain(error) from error
        except OSError as error:
            self.fail(1, f"{error.filename or 'a file'} failed ({error.strerror}); free space or repair the disk.")
            raise
        except BaseException as error:
            if type(error).__name__ != "Interrupted":  # that one all ranks have agreed on
                self.fail(1, f"{type(error).__name__}: {error}")
            raise

    def explain(self, error: BaseException) -> Error:
        """The Error that an exception of torch.distributed means: what another rank said, or who is behind."""
        late = "imed out" in str(error) or "imeout" in str(error)
        with suppress(RuntimeError, ValueError):
            deadline, before = time.monotonic() + 3 * BEAT, self._beats()
            if late:
                self.store.set("late", "")
            while not self._hear() and time.monotonic() < deadline:  # who ends with a reason says it within moments
                time.sleep(0.05)
            if self._reason is None:
                self.fail(*self._blame(before, self._beats(), late))
        gone = "rank 0 does not answer any more: its process or machine is gone; start the run again."
        return _from_elsewhere(*self.fail(1, gone))

    def _beats(self) -> list[list[Any]]:
        """[host, signs of life, collectives entered] of every rank."""
        self._beat()
        return [json.loads(self.store.get(f"beat/{rank}")) for rank in range(self.world)]

    def _beat(self) -> None:
        self._alive = getattr(self, "_alive", 0) + 1
        self.store.set(f"beat/{self.rank}", json.dumps([socket.gethostname(), self._alive, self.progress]))

    def _blame(self, before: list[list[Any]], now: list[list[Any]], late: bool) -> tuple[int, str]:
        behind = min(range(self.world), key=lambda r: now[r][2])
        silent = [r for r in range(self.world) if before[r][1] == now[r][1]]
        if silent and not late:
            r = min(silent, key=lambda r: now[r][2])
            return 1, f"rank {r} on {now[r][0]} died; start the run again, it goes on from its newest checkpoint."
        r = behind if behind in silent or not silent else silent[0]
        return Hung.exit_code, (
            f"rank {r} on {now[r][0]} hangs: the others have waited {self.timeout:g} s for it (parallel.timeout); see "
            "what its process does there, then start the run again."
        )

    def _keep_beating(self) -> None:
        left = False
        while not self._closing.wait(BEAT):
            try:
                self._beat()
                self._hear()
                if not left and self.store.check(["late"]):
                    left = True
                    self.leave_stacks()
            except (RuntimeError, OSError):  # the store is gone, and with it whoever could read; or the disk refuses
                return

    def close(self) -> None:
        """Leave the group."""
        if self.dist is not None and not self._closing.is_set():
            with suppress(RuntimeError):
                self.store.set(f"heard/{self.rank}", "")
                if self.holds_store:
                    self._be_heard()
            self._closing.set()
            leaving = threading.Thread(target=self._leave, daemon=True)
            leaving.start()
            leaving.join(LEAVE)  # NCCL may wait for a rank that is gone; the process's end does not

    def _leave(self) -> None:
        for let_go in self.before_close:
            let_go()
        self.dist.destroy_process_group()


ALONE = Group()


def _from_elsewhere(code: int, text: str) -> Error:
    """Another rank's Error: of its class, and marked, so that not every rank prints it."""
    error = by_exit_code(code)(text)
    error.elsewhere = True
    return error


def connect(environ: Mapping[str, str], timeout: float, stopped: Callable[[], str] = str) -> Group:
    """Meet the other processes of this launch. Raises ConfigError, within `timeout` seconds, when they do not come,
    and Stopped soon after `stopped` gives a reason to wait no longer."""
    env = launched(environ)
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    if world == 1:
        return ALONE
    import torch
    import torch.distributed

    dist: Any = torch.distributed
    group = Group(rank, world, int(env["LOCAL_RANK"]), timeout)

    def look() -> None:
        if reason := stopped():
            raise Stopped(f"{reason} before all ranks had started; start them again.")

    where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    agents = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process listens, not rank 0
    group.holds_store = rank == 0 and not agents
    method, wait = environ.get("INIT_METHOD", ""), timedelta(seconds=timeout)
    if rank and not method:
        _reach(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout, rank, look)
    os.environ.update(env)
    try:
        if agents or method:
            url = f"{method}?rank={rank}&world_size={world}" if method else "env://"
            root = next(dist.rendezvous(url, timeout=wait))[0]
        else:
            port = int(env["MASTER_PORT"])
            root = dist.TCPStore(env["MASTER_ADDR"], port, world, rank == 0, wait, wait_for_workers=False)
        meeting = _assemble(group, root, method or where, agents or bool(method), look)
        group.store = dist.PrefixStore(f"daybreak/{meeting}", root)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(f"rank 0 cannot listen on {where}: the port is in use; choose another one.") from None
        raise ConfigError(f"rank {rank} cannot join the other ranks at {where}: {_line(error)}") from None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available() and group.local_rank >= torch.cuda.device_count():
        backend, group.capturable = "cpu:gloo,cuda:gloo", False  # NCCL refuses two ranks on one card
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"torch/{meeting}", root), rank=rank, world_size=world, timeout=wait
    )
    group.dist = dist
    group._beat()
    group.gather(None)  # from here on every rank has a sign of life in the store
    threading.Thread(target=group._keep_beating, name="beat", daemon=True).start()
    return group


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]  # what follows is a C++ stack


def _reach(host: str, port: int, timeout: float, rank: int, look: Callable[[], None]) -> None:
    """Wait until somebody listens there: a sentence of ours instead of torch's pages."""
    deadline = time.monotonic() + timeout
    while True:
        look()
        try:
            socket.create_connection((host, port), timeout=min(5.0, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank {rank} cannot reach rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout:g} "
                    f"s: {error.strerror or error}; check name, port and firewall, and that rank 0 was started."
                ) from None
        time.sleep(0.2)


def _assemble(group: Group, root: Any, where: str, again: bool, look: Callable[[], None]) -> str:
    """Wait until every rank is there, and return a name for this meeting that no earlier one in this store had.

    Each rank leaves a word of its own and waits for rank 0's answer to just that word: what ranks that are gone left
    in a store that outlives them (torchrun's, or a file: `again` is true) is answered to nobody. ConfigError names who
    is missing, was started twice, or expects another number of ranks.
    """
    rank, world, deadline = group.rank, group.world, time.monotonic() + group.timeout
    word = f"{world} {os.urandom(8).hex()}"
    if again:
        root.set(f"word/{rank}", word)
    elif root.compare_set(f"word/{rank}", "", word).decode() != word:
        raise ConfigError(f"rank {rank} of {world} was started twice; give every process its own RANK.")

    def wait(key: str) -> None:
        while not root.check([key]):
            look()
            if time.monotonic() > deadline:
                root.wait([key], timedelta(seconds=1))  # for the store's own words
            time.sleep(0.01)

    meeting: str = word.split()[1]
    answered = set[str]()
    while rank == 0 and (missing := [r for r in range(world) if not root.check([f"came/{meeting}/{r}"])]):
        for r in (r for r in missing if root.check([f"word/{r}"])):
            if (other := root.get(f"word/{r}").decode()) not in answered:
                answered.add(other)
                root.set(f"answer/{other}", f"{world} {meeting}")
                if r == 0:
                    root.set(f"came/{meeting}/0", "")
        look()
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{world - len(missing)} of {world} ranks reached {where} within {group.timeout:g} s "
                f"(parallel.timeout); missing: {', '.join(map(str, missing[:8]))}; start exactly {world} processes."
            )
        time.sleep(0.01)
    if rank == 0:
        root.set(f"complete/{meeting}", "")
        return meeting
    wait(f"answer/{word}")
    expected, meeting = root.get(f"answer/{word}").decode().split()
    if expected != str(world):
        raise ConfigError(
            f"rank {rank} was started as one of {world} ranks, rank 0 as one of {expected}; give every process the "
            "same WORLD_SIZE."
        )
    root.set(f"came/{meeting}/{rank}", "")
    wait(f"complete/{meeting}")
    return meeting
