"""Start-up, agreement and errors across the processes that train together.

A `Group` is this process's place among the others. `ALONE` is a group of one process, and the same code runs with it.
`connect` makes a group from the environment variables of torchrun, mpirun or srun. Tensors travel through
torch.distributed, with NCCL on GPUs and gloo on CPUs. Decisions use gloo too. Errors use the store, a small key-value
server which rank 0 or torchrun runs.

How the ranks meet (`connect`, `_assemble`). Every rank waits up to `parallel.timeout` seconds:

    rank r                                      rank 0
    word/r = world size and a random number
                       ---------------------->  reads word/r, sets answer/WORD = world size and MEETING's name
    reads answer/WORD, compares world sizes
    came/MEETING/r = ""  ------------------->   waits until all have come, sets complete/MEETING
    waits for complete/MEETING                  then all start torch.distributed under that name

A store can hold the words of an earlier attempt. Rank 0 answers these too, but nobody reads the answers.

How a failure gets its reason. Each rank writes a beat once a second: a count that grows, and how many collectives it
has entered. `parallel.timeout` limits how long a rank waits for the others:

                       an error of its own
    training ------------------------------------> fail(): the first rank sets "failed" = [rank, code, sentence]
       |                                             ^
       | torch.distributed raised, or wait_for ended | nobody gave a reason: _blame() names a rank
       v                                             |
    explain(): wait 3 beats for "failed" ------------+
       |
       | another rank gave a reason
       v
    raise that reason as an Error of the same exit code, marked `elsewhere` so that not all ranks print it

Rank 0 prints the reason and writes it to exit.json. If rank 0 died or hangs, the rank that says so does it (`speaks`).

`_blame` compares the beats at the start and end of these 3 seconds. If there was no timeout and a rank's count stood
still, that rank died. Otherwise a rank hangs: mostly the one that has entered the fewest collectives.
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

from daybreak.errors import ConfigError, Error, Hung, Stopped, by_exit_code, os_error
from daybreak.formatting import quoted

log = logging.getLogger("daybreak")
PORT = "29500"  # torch's own default
BEAT = 1.0  # seconds between two beats of a rank
SILENT = 30.0  # seconds without a beat, or the store's answer, that count as death; a compiler may hold Python's lock
GONE = "rank 0 does not answer any more: its process or machine is gone; start the run again."
LEAVE = 10.0  # seconds that `close` gives to torch.distributed
RANK_VARIABLES = (  # of each launcher: rank, number of processes, rank on this machine
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # only srun sets the second; a batch script does not
)
T = TypeVar("T")
Check = Callable[[], None]  # called between the parts of long work; raises if it should stop


def launched(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the launcher's variables; one rank without them.

    mpirun gives no address: on several machines pass `-x MASTER_ADDR=HOST`. Under srun it is the step's first host.
    Raises ConfigError for a rank that is not below the number of processes, and for ranks that have no port.
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
    where = {"MASTER_ADDR": environ.get("MASTER_ADDR", host), "MASTER_PORT": environ.get("MASTER_PORT", PORT)}
    port, alone = where["MASTER_PORT"], int(made["WORLD_SIZE"]) == 1  # a process alone uses none
    if not alone and (not port.isdecimal() or not 0 < int(port) < 1 << 16):
        raise ConfigError(f"MASTER_PORT = {port!r} must be a whole number from 1 to {(1 << 16) - 1}; start them again.")
    return made | where


def restarted(environ: Mapping[str, str]) -> bool:
    """Whether torchrun has started these workers again after a failure or a change of machines."""
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def agent(environ: Mapping[str, str]) -> str:
    """A hash that differs between any two torchruns; "" without torchrun. It stays the same when workers restart.

    torchrun makes a folder with a unique name, and the error file of every attempt lies in it.
    """
    if "TORCHELASTIC_RUN_ID" not in environ:
        return ""
    folder = re.sub(r"/attempt_\d+/\d+/[^/]*$", "", environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return hashlib.sha256(f"{environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {folder}".encode()).hexdigest()


def exit_code(error: Error, environ: Mapping[str, str]) -> int:
    """The exit code of this process. torchrun restarts every worker that fails. A worker that stopped on request and
    saved has not failed, so under torchrun it ends with 0. Its exit.json still says 75."""
    return 0 if isinstance(error, Stopped) and "TORCHELASTIC_RUN_ID" in environ else error.exit_code


class Group:
    """This process among `world` others. The methods are collective: every rank calls them in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, timeout: float = 300.0) -> None:
        self.rank, self.world, self.local_rank, self.timeout = rank, world, local_rank, timeout
        self.progress = 0  # collectives entered: the others wait for the rank with the fewest
        self._beaten = 0  # the beats written so far
        self.dist: Any = None  # torch.distributed, once connected
        self.store: Any = None
        self.store_lost = False  # it does not answer any more
        self.holds_store = False  # this process runs the store, which ends with it
        self._reason: tuple[int, int, str] | None = None  # rank, exit code, sentence: why all ranks end
        self.leave_stacks: Callable[[], None] = lambda: None  # called in a thread on every rank at a timeout
        self.speaks = rank == 0  # says why all ranks end; another one if rank 0 cannot
        self.capturable = True  # CUDA graphs can record NCCL's calls, but not gloo's
        self.before_close: list[Callable[[], None]] = []  # they release NCCL's communicators
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
        """Call fn() on every rank and return all results. If one raises an Error or OSError, every rank raises."""
        if self.world == 1:
            return [fn()]
        value, failure = None, None
        try:
            value = fn()
        except (Error, OSError) as error:
            failure = error
        told = os_error(failure) if isinstance(failure, OSError) else failure
        said = (None, "") if told is None else (told.exit_code, str(told))
        outcomes = self.gather((value, *said))
        if failure is not None:
            raise failure
        for rank, (_, code, text) in enumerate(outcomes):
            if code is not None:
                raise _from_elsewhere(code, f"rank {rank}: {text}")
        return [outcome[0] for outcome in outcomes]

    def first(self, fn: Callable[[], T]) -> T:
        """Call fn() on rank 0 alone; every rank returns its result, or raises its Error."""
        return self.everywhere(lambda: fn() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def again(self, run: Any) -> str:
        """The command that resumes the run in the folder `run` as it was started."""
        processes = f", started as {self.world} processes again (torchrun, srun, mpirun)" if self.world > 1 else ""
        return f"daybreak train {quoted(run)}{processes}"

    def agree(self, what: Mapping[str, Any], error: type[Error] = ConfigError) -> None:
        """Raise `error` on every rank, with rank and key, unless all ranks have the same `what`."""
        for rank, other in enumerate(everyone := self.gather((socket.gethostname(), dict(what)))):
            for name, value in other[1].items():
                if value != everyone[0][1].get(name):
                    raise error(
                        f"rank {rank} on {other[0]} has {name} = {value!r}, rank 0 on {everyone[0][0]} has "
                        f"{everyone[0][1].get(name)!r}; start every rank with the same configuration, data and version."
                    )

    # ---- tensors

    def reduce_scatter(self, out: Any, whole: Any) -> Any:
        """Start out = this rank's part of the sum of all ranks' `whole`. Returns a handle with wait()."""
        run = getattr(self.dist, "reduce_scatter_single", None) or self.dist.reduce_scatter_tensor
        return run(out, whole, async_op=True)

    def all_gather_into(self, whole: Any, part: Any) -> Any:
        """Start whole = all ranks' `part`, one after the other; `part` may lie in it. Returns a handle with wait()."""
        run = getattr(self.dist, "all_gather_single", None) or self.dist.all_gather_into_tensor
        return run(whole, part, async_op=True)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until ready(). NCCL's kernels wait for ever for a rank that is gone, and so would the host.

        This wait ends with an Error soon after another rank gave a reason or its beats stopped, and after `timeout`.
        """
        self.progress += 1  # collectives inside CUDA graphs are not counted, so each wait counts as one
        began = looked = time.monotonic()
        before: list[list[Any]] = []
        while not ready():
            now = time.monotonic()
            late, dead = now - began > self.timeout, False
            if now - looked > (SILENT if before else BEAT):
                beats = self._beats()
                dead = any(a[1] == b[1] for a, b in zip(before, beats, strict=False))
                before, looked = beats, now
            if late or dead or self._reason:  # the beating thread learns the reason
                raise self.explain(RuntimeError("NCCL timed out" if late else "NCCL"))
            time.sleep(0.0002)

    # ---- failing together

    def fail(self, code: int, text: str) -> tuple[int, str]:
        """Tell the other ranks why this one ends. Returns code and sentence of the first reason of any rank."""
        if self.store is None or self.store_lost:
            return code, text
        with suppress(RuntimeError):  # rank 0 ran the store and is gone
            self.store.compare_set("failed", "", json.dumps([self.rank, code, text]))
            self._hear()
        return self._said(self._reason or (self.rank, code, text))

    def _said(self, reason: tuple[int, int, str]) -> tuple[int, str]:
        """Exit code and sentence of a reason, with the rank that gave it."""
        rank, code, text = reason
        return code, text if rank == self.rank or text.startswith("rank ") else f"rank {rank}: {text}"

    def _hear(self) -> bool:
        """Whether any rank has given a reason. From then on this rank knows it without the store."""
        if self._reason is None and self.store.check(["failed"]):
            self._reason = json.loads(self.store.get("failed"))
            self.store.set(f"heard/{self.rank}", "")
        return self._reason is not None

    def _be_heard(self) -> None:
        """The rank that runs the store waits until all ranks know the reason, 3 beats at most: some may have died."""
        deadline, heard = time.monotonic() + 3 * BEAT, [f"heard/{rank}" for rank in range(self.world)]
        while self.store.check(["failed"]) and not self.store.check(heard) and time.monotonic() < deadline:
            time.sleep(0.05)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the other ranks about an exception raised inside. One of torch.distributed is replaced by its reason."""
        try:
            yield
        except BaseException as error:
            connection = re.search("gloo|NCCL|c10d|DistNetwork|process group|pair closure", f"{error!r}")
            if isinstance(error, RuntimeError) and connection and self.store is not None:
                raise self.explain(error) from error
            code, text = 1, f"{type(error).__name__}: {error}"
            if isinstance(error, Error):
                code, text = error.exit_code, str(error)
            elif isinstance(error, OSError):
                code, text = os_error(error).exit_code, str(os_error(error))
            known = getattr(error, "elsewhere", False) or type(error).__name__ == "Interrupted"  # all agreed to stop
            if not known:
                self.fail(code, text)
            raise

    def explain(self, error: BaseException) -> Error:
        """The Error behind an exception of torch.distributed: another rank's reason, or the rank that died or hangs."""
        late = "imed out" in str(error) or "imeout" in str(error)
        asking = threading.Thread(target=self._ask, args=(late,), daemon=True)
        asking.start()
        asking.join(SILENT)
        if asking.is_alive():  # the store's machine fell silent: TCP would keep us for a quarter of an hour
            self.store_lost = True
        if self._reason is None:  # rank 0 ran the store, so no rank can ask the others: one of each machine speaks
            self.speaks |= self.rank == 1 or self.local_rank == 0
            self._reason = self.rank, 1, GONE
        known = _from_elsewhere(*self._said(self._reason))
        known.elsewhere = not self.speaks
        return known

    def _ask(self, late: bool) -> None:
        """Learn the reason from the others, or find out who is to blame; no reason if the store is gone."""
        with suppress(RuntimeError, ValueError):
            deadline, before = time.monotonic() + 3 * BEAT, self._beats()
            if late:
                self.store.set("late", "")
            while not self._hear() and time.monotonic() < deadline:  # a rank that fails gives its reason within moments
                time.sleep(0.05)
            if self._reason is None:
                blamed, code, text = self._blame(before, self._beats(), late)
                self.fail(code, text)
                self.speaks |= blamed == 0 and self._reason is not None and self._reason[0] == self.rank

    def _beats(self) -> list[list[Any]]:
        """[host, number of beats, collectives entered] of every rank."""
        self._beat()
        return [json.loads(self.store.get(f"beat/{rank}")) for rank in range(self.world)]

    def _beat(self) -> None:
        self._beaten += 1
        self.store.set(f"beat/{self.rank}", json.dumps([socket.gethostname(), self._beaten, self.progress]))

    def _blame(self, before: list[list[Any]], now: list[list[Any]], late: bool) -> tuple[int, int, str]:
        """The rank that died or hangs, exit code and sentence, from two looks at the beats; `late`: at a timeout.

        At a timeout a rank may stand still because it is stopped, so it hangs. It is the one with the fewest
        collectives, unless that one still beats and another does not.
        """
        behind = min(range(self.world), key=lambda r: now[r][2])
        silent = [r for r in range(self.world) if before[r][1] == now[r][1]]
        if silent and not late:
            r = min(silent, key=lambda r: now[r][2])
            return r, 1, f"rank {r} on {now[r][0]} died; start the run again to resume from its newest checkpoint."
        r = behind if behind in silent or not silent else silent[0]
        waited = f"the others have waited {self.timeout:g} s for it (parallel.timeout)"
        fix = "see why its process is stopped or gone"
        if r not in silent:
            fix = "look for its stacks in the run's crash.txt (crash.before.txt after a restart)"
        return r, Hung.exit_code, f"rank {r} on {now[r][0]} hangs: {waited}; {fix}, then start the run again."

    def _keep_beating(self) -> None:
        left = False
        while not self._closing.wait(BEAT):
            try:
                self._beat()
                self._hear()
                if not left and self.store.check(["late"]):
                    left = True
                    self.leave_stacks()
            except (RuntimeError, OSError):  # the store is gone and nobody can read; or the disk failed
                return

    def close(self) -> None:
        """Leave the group."""
        if self.dist is not None and not self._closing.is_set():
            with suppress(RuntimeError):
                if not self.store_lost:
                    self.store.set(f"heard/{self.rank}", "")
                if self.holds_store:
                    self._be_heard()
            self._closing.set()
            leaving = threading.Thread(target=self._leave, daemon=True)
            leaving.start()
            leaving.join(LEAVE)  # NCCL may wait for a rank that is gone; this process ends all the same

    def _leave(self) -> None:
        for let_go in self.before_close:
            let_go()
        self.dist.destroy_process_group()


ALONE = Group()


def _from_elsewhere(code: int, text: str) -> Error:
    """Another rank's Error, of the same class, and marked so that not every rank prints it."""
    error = by_exit_code(code)(text)
    error.elsewhere = True
    return error


def connect(environ: Mapping[str, str], timeout: float, stopped: Callable[[], str] = str) -> Group:
    """Meet the other processes of this launch, in the steps at the top of this file.

    Raises Hung if they do not come within `timeout` seconds, and Stopped soon after `stopped` gives a reason.
    """
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
    agents = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun runs the store, not rank 0
    group.holds_store = rank == 0 and not agents
    method, wait = environ.get("INIT_METHOD", ""), timedelta(seconds=timeout)
    if rank and not method:
        _reach(env["MASTER_ADDR"], int(env["MASTER_PORT"]), timeout, rank, look, meeting_advice(environ))
    os.environ.update(env)
    try:
        if agents or method:
            url = f"{method}?rank={rank}&world_size={world}" if method else "env://"
            root = next(dist.rendezvous(url, timeout=wait))[0]
        else:
            port = int(env["MASTER_PORT"])
            root = dist.TCPStore(env["MASTER_ADDR"], port, world, rank == 0, wait, wait_for_workers=False)
        meeting = _assemble(group, root, method or where, agents or bool(method), look, meeting_advice(environ))
        group.store = dist.PrefixStore(f"daybreak/{meeting}", root)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise Hung(f"rank 0 cannot listen on {where}: the port is in use; choose another one.") from None
        raise Hung(f"rank {rank} cannot join the other ranks at {where}: {_line(error)}") from None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available() and group.local_rank >= torch.cuda.device_count():
        backend, group.capturable = "cpu:gloo,cuda:gloo", False  # NCCL refuses two ranks on one GPU
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"torch/{meeting}", root), rank=rank, world_size=world, timeout=wait
    )
    group.dist = dist
    group._beat()
    group.gather(None)  # from here on every rank has a beat in the store
    threading.Thread(target=group._keep_beating, name="beat", daemon=True).start()
    return group


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]  # the lines after the first are a C++ stack


def meeting_advice(environ: Mapping[str, str]) -> str:
    """Where torchruns of several machines chose the address, only their own flag mends it; "" otherwise."""
    if "TORCHELASTIC_RUN_ID" not in environ or environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return ""
    return "; if the address is wrong, give each torchrun --local-addr with the address of its own machine"


def _reach(host: str, port: int, timeout: float, rank: int, look: Callable[[], None], advice: str) -> None:
    """Wait until a process listens there. The error is one sentence, where torch would print pages."""
    deadline = time.monotonic() + timeout
    while True:
        look()
        try:
            socket.create_connection((host, port), timeout=min(5.0, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Hung(
                    f"rank {rank} cannot reach rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout:g} "
                    f"s: {error.strerror or error}; check name, port and firewall, and that rank 0 was "
                    f"started{advice}."
                ) from None
        time.sleep(0.2)


def _assemble(group: Group, root: Any, where: str, again: bool, look: Callable[[], None], advice: str) -> str:
    """Wait until every rank is there, and return a name for this meeting that is new in this store.

    Each rank writes a random word and waits for rank 0's answer to that word. So words of ranks that are gone do no
    harm. `again`: the store outlives the ranks (torchrun's, or a file), and such words may be in it. Raises Hung
    with the ranks that are missing, ConfigError with those started twice or with another number of ranks.
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
                root.wait([key], timedelta(seconds=1))  # raises the store's own error
            time.sleep(0.01)

    meeting: str = word.split()[1]
    while rank == 0 and (missing := [r for r in range(1, world) if not root.check([f"came/{meeting}/{r}"])]):
        for r in missing:
            if root.check([f"word/{r}"]):
                root.set(f"answer/{root.get(f'word/{r}').decode()}", f"{world} {meeting}")
        look()
        if time.monotonic() > deadline:
            raise Hung(
                f"{world - len(missing)} of {world} ranks reached {where} within {group.timeout:g} s "
                f"(parallel.timeout); missing: {', '.join(map(str, missing[:8]))}; start exactly {world} processes"
                f"{advice}."
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
