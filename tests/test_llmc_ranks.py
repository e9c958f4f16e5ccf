"""llm.c's command line on several real processes: how they meet, and the checkpoints that they leave."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from interop_runs import write_shards
from patience import PATIENCE, until
from test_interop_llmc import loader_bytes, write_checkpoint
from test_llmc_cli import RUN_124M, RUN_1558M
from test_llmc_runs import SMALL, TORCHRUN, environment, llmc, published, trl

from daybreak.interop import open_source
from daybreak.state.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of llm.c written by hand, and shards."""
    folder = tmp_path_factory.mktemp("llmc")
    write_shards(folder / "shards", 1025, (3000, 2000))
    write_checkpoint(folder / "m")
    llmc(folder, *SMALL, "-o", "alone", "-x", "1", here=True)
    return folder


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    yield
    ranks.end_all()


def process(folder: Path, rank: int, run: ranks.Run, args: list[str], **more: str) -> Any:
    """A process of `run(ARGS)` whose output is in folder/rank-N.txt."""
    ranks.STARTED.append(ranks.Forked(run, args, folder, folder / f"rank-{rank}.txt", environment(**more)))
    return ranks.STARTED[-1]


def start(folder: Path, *argv: str, port: int = 12345) -> list[Any]:
    """Two ranks that are told by flags who they are; the second comes first."""
    args = [str(port), *SMALL, *argv, "-pn", "2", "-pr"]
    return [process(folder, rank, ranks.llmc_at, [*args, str(rank)]) for rank in (1, 0)]


def wait_until(done: Callable[[], bool], folder: Path) -> None:
    until(done, why=lambda: ranks.said(folder, 0) + ranks.said(folder, 1))


def test_ranks_that_meet_in_a_file_start_again_after_a_kill(made: Path) -> None:
    """The bytes that killed ranks left in the file are nobody's."""
    fs = ["-o", "fs", "-y", "1", "-s", "0", "-pi", "fs", "-pf", "meet"]
    (made / "meet").mkdir()
    both = start(made, *fs, "-x", "1000000", "-v", "1000000")
    wait_until(lambda: (made / "fs/main.log").is_file() and len(trl(made / "fs")) > 2, made)
    for p in both:
        p.kill()
        p.wait()
    assert (made / "meet/daybreak.sync").is_file()
    codes = ranks.finish(start(made, *fs, "-x", "2"))
    assert codes == [0, 0], ranks.said(made, 0) + ranks.said(made, 1)
    assert "| num_processes         | 2 " in ranks.said(made, 0)


def test_ranks_that_meet_at_an_address(made: Path) -> None:
    """Under another port than llm.c's, which others on this machine may want."""
    tcp, port = ["-o", "tcp", "-x", "2", "-pi", "tcp", "-ps", "127.0.0.1"], ranks.free_port()
    codes = ranks.finish(start(made, *tcp, port=port))
    assert codes == [0, 0], ranks.said(made, 0) + ranks.said(made, 1)
    assert "| num_processes         | 2 " in ranks.said(made, 0)
    assert list(trl(made / "tcp")) == [0, 1]


def under_mpirun(folder: Path, args: list[str]) -> str:
    """Two processes of llm.c's command line with the variables that mpirun sets."""
    processes, port = list[Any](), str(ranks.free_port())
    for rank in range(2):
        mpi = {f"OMPI_COMM_WORLD_{k}": str(v) for k, v in (("RANK", rank), ("SIZE", 2), ("LOCAL_RANK", rank))}
        processes.append(process(folder, rank, ranks.llmc, args, **mpi, MASTER_PORT=port))
    assert ranks.finish(processes) == [0, 0], ranks.said(folder, 0) + ranks.said(folder, 1)
    assert ranks.said(folder, 1) == ""
    return ranks.said(folder, 0)


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
@pytest.mark.parametrize("name", ["124M", "1558M"])
def test_the_published_commands_on_two_processes(made: Path, name: str, launcher: str) -> None:
    """As they are, but for sizes and paths: what one process computes, and llm.c's files for two at ZeRO 1."""
    folder = f"{name}-{launcher}"
    tiny = {"-e": "m/model_00000007.bin", "-o": folder, "-b": "2", "-d": "256", "-s": "0"}
    command = published({"124M": RUN_124M, "1558M": RUN_1558M}[name], **tiny)
    if launcher == "mpirun":
        assert command[:2] == ["-m", "daybreak.llmc"]
        said = under_mpirun(made, command[2:])
    else:
        done = subprocess.run(
            [*TORCHRUN, *command], cwd=made, env=environment(), capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout
    assert "| num_processes         | 2 " in said
    assert "| zero_stage            | 1 " in said
    assert "=> setting grad_accum_steps=1" in said
    losses = [float(trl(made / where)[0].split()[0][4:]) for where in (folder, "alone")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)

    assert (made / folder / "DONE_00000002").is_file()
    states = sorted((made / folder).glob("state_*"))
    assert [path.name for path in states] == [f"state_00000002_{rank:05d}.bin" for rank in range(2)]
    for rank, path in enumerate(states):
        data = path.read_bytes()
        assert np.frombuffer(data, "<i4", 11)[[2, 3, 4, 5, 10]].tolist() == [2, rank, 1, 1, 2]
        assert data.endswith(loader_bytes([(n - 1) // 256 for n in (3000, 2000)], rank))
    source, ours = open_source(made / folder, "gpt2-1024"), Run(made / folder).checkpoint()
    for weight in source.names():
        out = torch.empty_like(source.read(weight))
        ours.read_model(weight, out)
        assert torch.equal(source.read(weight), out), weight
