"""torchrun itself: workers that die come back, a stopped run stays stopped, a machine goes and returns, the one where
the torchruns meet is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
from patience import PATIENCE, until
from test_dist_train import SOON, command, recipe, shards, wait_for_steps  # noqa: F401  (a fixture)
from test_training import losses

import daybreak
from daybreak.config import Config
from daybreak.errors import ConfigError
from daybreak.parallel import GONE, launched, meeting_advice

AGENTS: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    for agent in AGENTS:
        end(agent)
    AGENTS.clear()


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of an agent's workers, oldest first."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return sorted(pid for pid, line in lines.items() if b"daybreak" in line)


def is_first(pid: int) -> bool:
    """Whether this worker is rank 0."""
    return b"RANK=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def end(agent: subprocess.Popen[bytes]) -> None:
    """As a machine that loses power: the agent and its workers at once."""
    if agent.poll() is None:
        for pid in [agent.pid, *workers(agent)]:
            os.kill(pid, signal.SIGKILL)
        agent.wait()


def torchrun(root: Path, name: str, *args: Any, target: Path, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    line = [
        *before,
        sys.executable,
        "-m",
        "torch.distributed.run",
        *map(str, args),
        "-m",
        "daybreak",
        "train",
        str(target),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int("--nnodes" in args))  # see docs/distributed.md
    with open(root / f"{name}.txt", "w") as out:
        AGENTS.append(subprocess.Popen(line, cwd=root, env=env, stdout=out, stderr=subprocess.STDOUT))
    return AGENTS[-1]


def starts(folder: Path) -> list[int]:
    """The step at which each attempt started."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if '"kind":"run"' in line]


def wait_for_starts(folder: Path, count: int) -> None:
    until(lambda: len(starts(folder)) >= count)


def test_a_killed_worker_comes_back_and_a_stopped_one_does_not(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    target = recipe(shards, tmp_path, "e", run__steps=100000, eval__every=0, checkpoint__every=5)
    port = f"localhost:{ranks.free_port()}"
    agent = torchrun(
        tmp_path, "agent", "--nproc-per-node", 2, "--max-restarts", 3, "--rdzv-backend", "c10d", "--rdzv-endpoint",
        port, target=target,
    )  # fmt: skip
    folder = tmp_path / "e"
    wait_for_steps(folder, 12)
    os.kill(workers(agent)[1], signal.SIGKILL)
    wait_for_starts(folder, 2)
    wait_for_steps(folder, 20)
    assert starts(folder)[0] == 0
    assert starts(folder)[1] >= 10
    for worker in 2 * workers(agent):  # as Slurm and then torchrun would
        os.kill(worker, signal.SIGTERM)
    assert agent.wait(PATIENCE) == 0, (tmp_path / "agent.txt").read_text()
    assert len(starts(folder)) == 2  # no third
    assert json.loads((folder / "exit.json").read_text())["code"] == 75
    run = daybreak.load(folder)
    last = int(run.checkpoints[0].name[5:])
    assert last == run.metrics("step")[-1]["step"]
    straight = daybreak.train(
        Config.from_target(str(target)).override({"run.name": "straight", "run.steps": last, "checkpoint.every": 0})
    )
    for a, b in zip(losses(straight)[:20], losses(run)[:20], strict=True):
        assert b[1] == pytest.approx(a[1], rel=1e-4)


def test_a_taken_name_is_refused_at_every_attempt(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """The first attempt is refused and ends with 2; the second one must not go into the run of another job."""
    target = recipe(shards, tmp_path, "taken", run__steps=2, eval__every=0)
    first = torchrun(tmp_path, "first", "--standalone", "--nproc-per-node", 1, target=target)
    assert first.wait(PATIENCE) == 0, (tmp_path / "first.txt").read_text()
    target.write_text(target.read_text().replace("steps = 2 ", "steps = 4 "))
    before = {path: path.read_bytes() for path in (tmp_path / "taken").rglob("*") if path.is_file()}
    again = torchrun(tmp_path, "again", "--standalone", "--nproc-per-node", 1, "--max-restarts", 1, target=target)
    assert again.wait(PATIENCE) != 0
    said = (tmp_path / "again.txt").read_text()
    assert said.count("run.name = 'taken' is taken") == 2, said
    assert before == {path: path.read_bytes() for path in (tmp_path / "taken").rglob("*") if path.is_file()}


def test_a_failed_save_that_ends_the_run_ends_it_for_torchrun_too(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """torchrun starts the workers again: refused at once. exit.json keeps its reason, no job is requeued."""
    target = recipe(shards, tmp_path, "d", run__steps=100000, eval__every=0, checkpoint__every=5,
                    checkpoint__on_error="stop")  # fmt: skip
    small_files = ("bash", "-c", 'ulimit -f 64; exec "$@"', "bash")
    agent = torchrun(tmp_path, "agent", "--standalone", "--nproc-per-node", 1, "--max-restarts", 2, target=target,
                     before=small_files)  # fmt: skip
    assert agent.wait(PATIENCE) == 1, (tmp_path / "agent.txt").read_text()
    told = json.loads((tmp_path / "d/exit.json").read_text())
    assert (told["code"], told["final"]) == (1, True)
    assert "could not be written (File too large)" in told["reason"]
    assert starts(tmp_path / "d") == [0]
    assert (tmp_path / "agent.txt").read_text().count(told["reason"]) == 3
    verdict = Path(__file__).parents[1] / "scripts/verdict.py"
    assert subprocess.check_output([sys.executable, verdict, tmp_path / "d"], text=True) == "failed 1\n"
    made = tmp_path / "d/config.toml"
    made.write_text(re.sub(r"total_tokens = \d+", "total_tokens = 7", made.read_text(), count=1))
    again = torchrun(tmp_path, "again", "--standalone", "--nproc-per-node", 1, "--max-restarts", 2, target=made.parent)
    assert again.wait(PATIENCE) == 1  # each start names its own refusal, and not the earlier end
    said = (tmp_path / "again.txt").read_text()
    assert (said.count("total_tokens = 7 must be a multiple of"), said.count("File too large")) == (3, 0), said
    assert json.loads((tmp_path / "d/exit.json").read_text())["code"] == 2


@pytest.mark.parametrize(("number", "before"), [(signal.SIGTERM, ()), (signal.SIGHUP, ("nohup",))])
def test_the_agent_itself_is_told_to_stop(shards: Path, tmp_path: Path, number: int, before: Any) -> None:  # noqa: F811
    """SIGHUP is a closed terminal: torchrun ends then even under nohup, and passes the signal on."""
    target = recipe(shards, tmp_path, "s", run__steps=100000, eval__every=0, checkpoint__every=0)
    agent = torchrun(tmp_path, "agent", "--standalone", "--nproc-per-node", 2, "--max-restarts", 3, target=target,
                     before=before)  # fmt: skip
    folder = tmp_path / "s"
    wait_for_steps(folder, 3)
    agent.send_signal(number)
    agent.wait(PATIENCE)
    assert json.loads((folder / "exit.json").read_text())["code"] == 75, (tmp_path / "agent.txt").read_text()
    run = daybreak.load(folder)
    assert int(run.checkpoints[0].name[5:]) == run.metrics("step")[-1]["step"]
    assert len(starts(folder)) == 1


def test_two_hosts_one_of_which_goes_and_returns(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two agents of two ranks each on addresses of their own, which meet by name. The second dies and returns."""
    target = recipe(shards, tmp_path, "h", run__steps=100000, eval__every=0, checkpoint__every=5, parallel__zero=1)
    meet = f"localhost:{ranks.free_port()}"
    shared = [
        "--nnodes", 2, "--nproc-per-node", 2, "--max-restarts", 5, "--rdzv-backend", "c10d", "--rdzv-endpoint", meet,
        "--rdzv-id", "7", "--rdzv-conf",
        "join_timeout=600,close_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=5",
    ]  # fmt: skip

    def host(number: int, first: bool) -> subprocess.Popen[bytes]:
        return torchrun(
            tmp_path, f"host{number}", *shared[:-1], f"{shared[-1]},is_host={int(first)}", "--local-addr",
            f"127.0.0.{1 + number}", target=target,
        )  # fmt: skip

    one, two = host(1, True), host(2, False)
    folder = tmp_path / "h"
    wait_for_steps(folder, 12)
    assert len(workers(one)) == len(workers(two)) == 2
    end(two)
    two = host(2, False)
    wait_for_starts(folder, 2)
    wait_for_steps(folder, 20)
    assert starts(folder)[-1] >= 10
    assert len(list(daybreak.load(folder).checkpoints[0].glob("optimizer-*"))) == 4
    os.kill(workers(two)[0], signal.SIGTERM)
    assert [one.wait(PATIENCE), two.wait(PATIENCE)] == [0, 0], (tmp_path / "host1.txt").read_text()
    assert json.loads((folder / "exit.json").read_text())["code"] == 75


def test_the_machine_where_the_torchruns_meet_is_lost(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """The other torchrun ends too, by itself, and its worker says why. Both start again, and the run resumes."""
    target = recipe(shards, tmp_path, "m", run__steps=100000, eval__every=0, checkpoint__every=5, parallel__zero=1)
    folder = tmp_path / "m"

    def both(what: Path, name: str) -> list[subprocess.Popen[bytes]]:
        meet = f"localhost:{ranks.free_port()}"
        return [
            torchrun(
                tmp_path, f"{name}{number}", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3,
                "--rdzv-backend", "c10d", "--rdzv-endpoint", meet, "--rdzv-conf", f"is_host={int(number == 1)}",
                "--local-addr", f"127.0.0.{1 + number}", target=what,
            )
            for number in (1, 2)
        ]  # fmt: skip

    lost, left = both(target, "first")
    wait_for_steps(folder, 12)
    gone = int(is_first(workers(left)[0]))  # the rank on the other machine
    end(lost)
    assert left.wait(PATIENCE) == 1
    said = (tmp_path / "first2.txt").read_text()
    told = json.loads((folder / "exit.json").read_text())
    assert told["code"] == 1
    assert f"daybreak: {told['reason']}" in said
    assert f"rank {gone} " in told["reason"]
    one, two = both(folder, "again")
    wait_for_starts(folder, 2)
    wait_for_steps(folder, 20)
    assert starts(folder)[1] >= 10
    os.kill(workers(two)[0], signal.SIGTERM)
    assert [one.wait(PATIENCE), two.wait(PATIENCE)] == [0, 0], (tmp_path / "again1.txt").read_text()
    assert json.loads((folder / "exit.json").read_text())["code"] == 75


@pytest.mark.parametrize("how", ["torchrun", "srun", "silent"])
def test_rank_0_dies(shards: Path, tmp_path: Path, how: str) -> None:  # noqa: F811
    """Another rank says so in its place, on the console and in exit.json. Under srun the store dies with rank 0. It may
    also fall silent, as when a machine loses power; rank 0 then seems to hold the run, so that nobody writes exit.json.
    """
    target = recipe(shards, tmp_path, "z", run__steps=100000, eval__every=0, checkpoint__every=5)
    folder = tmp_path / "z"
    if how == "torchrun":
        agent = torchrun(tmp_path, "agent", "--standalone", "--nproc-per-node", 3, target=target)
        wait_for_steps(folder, 7)
        os.kill(next(pid for pid in workers(agent) if is_first(pid)), signal.SIGKILL)
        agent.wait(PATIENCE)
        said = (tmp_path / "agent.txt").read_text()
    else:
        three = ranks.start(3, command(target, *SOON), tmp_path)
        wait_for_steps(folder, 7)
        three[0].send_signal(signal.SIGKILL if how == "srun" else signal.SIGSTOP)
        assert ranks.finish(three[1:]) == [1, 1]
        three[0].kill()
        said = ranks.said(tmp_path, 1) + ranks.said(tmp_path, 2)
    if how == "silent":
        assert said.count(f"daybreak: {GONE}") == 1, said
        return
    told = json.loads((folder / "exit.json").read_text())
    assert told["code"] == 1
    assert re.match("rank 0 (on .* died|does not answer any more)", told["reason"]), told
    assert said.count(f"daybreak: {told['reason']}") == 1, said


def test_launchers_variables() -> None:
    assert launched({})["WORLD_SIZE"] == "1"
    ompi = {
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
    }
    assert launched(ompi) | {"MASTER_PORT": ""} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "",
    }
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08],x1",
    }
    assert launched(slurm)["MASTER_ADDR"] == "gpu07"
    for port in ("", "abc", "0", "65536", "-1"):
        with pytest.raises(ConfigError, match=f"MASTER_PORT = {port!r} must be a whole number from 1"):
            launched(slurm | {"MASTER_PORT": port})
        assert launched({"MASTER_PORT": port})["WORLD_SIZE"] == "1"  # which needs no port
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})["WORLD_SIZE"] == "1"  # a batch script without srun
    assert launched({**slurm, "RANK": "0", "WORLD_SIZE": "2"})["WORLD_SIZE"] == "2"  # srun of torchrun
    with pytest.raises(daybreak.Error, match="a rank must be a whole number below the number of processes"):
        launched({"RANK": "2", "WORLD_SIZE": "2"})


def test_only_torchruns_of_several_machines_are_told_of_their_flag() -> None:
    """The others have MASTER_ADDR from their user or their scheduler."""
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "2"}
    assert "--local-addr" in meeting_advice(torchrun)
    assert [meeting_advice({"MASTER_ADDR": "a"}), meeting_advice(torchrun | {"GROUP_WORLD_SIZE": "1"})] == ["", ""]
