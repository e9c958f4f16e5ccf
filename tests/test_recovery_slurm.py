"""The Slurm scripts: requeue by the rule, and have Slurm signal the tasks of srun, which would kill them itself."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE, until
from recovery import exit_code
from test_recovery_signals import COUNTED, RESTART, ROOT, tools

import daybreak

SLURM = {  # script -> the words of its job, and those with which srun is called first and later
    "slurm": (["r", "daybreak", "train", "tiny", "--name", "r"], "daybreak train tiny --name r", "daybreak train r"),
    "slurm torchrun": (["r", "torchrun", "-m", "daybreak", "train", "tiny", "--name", "r"],
                       "torchrun -m daybreak train tiny --name r", "torchrun -m daybreak train r"),
    "slurm_cluster": (["r", "tiny", "--parallel.zero", "1"], " --nproc-per-node 4 --max-restarts 3 --rdzv-id 77 "
                      "--rdzv-backend c10d --rdzv-endpoint host7:29400 -m daybreak train tiny --parallel.zero 1 "
                      "--name r --run.dir .", "host7:29400 -m daybreak train r"),
}  # fmt: skip


def slurm_job(folder: Path, script: str, srun: str) -> Callable[[], tuple[int, str, list[str]]]:
    """A job of a Slurm script: each call is a start, and returns its exit code, what it told scontrol so far, and the
    words of every srun. srun and scontrol are stand-ins that record how they are called: there is no Slurm here."""
    srun = f'#!/bin/bash\necho "$@" >> sruns\n{srun}exit 1\n'
    scontrol = '#!/bin/bash\n[ "$1" = show ] && echo host7 || echo "$@" >> scontrols\n'
    env = tools(folder, srun=srun, scontrol=scontrol)
    env |= {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[7-8]", "SLURM_GPUS_ON_NODE": "4"}
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "scontrols").touch()
    command = ["env", "--default-signal=USR1", "bash", f"scripts/{script.split()[0]}.sbatch", *SLURM[script][0]]

    def start() -> tuple[int, str, list[str]]:
        job = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE)
        return job.returncode, (folder / "scontrols").read_text(), (folder / "sruns").read_text().splitlines()

    return start


@pytest.mark.parametrize(("code", "requeued"), [(0, 0), (1, 1), (2, 0), (3, 0), (5, 0), (7, 1), (75, 1), (None, 1)])
@pytest.mark.parametrize("script", ["slurm", "slurm_cluster"])
def test_the_slurm_scripts_requeue_by_the_rule(tmp_path, script, code, requeued):
    said = "" if code is None else f'echo \'{{"code": {code}, "reason": "x", "t": 0}}\' > r/exit.json\n'
    start = slurm_job(tmp_path, script, f"mkdir -p r/checkpoints; touch r/config.toml\n{said}")
    for attempt in range(3):
        ended, calls, _ = start()
        (tmp_path / "r/exit.json").unlink(missing_ok=True)
        wanted = requeued * min(attempt + 1, 2)  # the third start without progress is the last
        assert calls == "requeue 77\n" * wanted
        assert ended == (code != 0 and wanted < attempt + 1)


@pytest.mark.parametrize("script", SLURM)
def test_a_requeued_job_keeps_its_launcher(tmp_path, script):
    start = slurm_job(tmp_path, script, "mkdir -p r; touch r/config.toml\n")
    start()
    (first, later), words = start()[2], SLURM[script]
    assert first.endswith(words[1])
    assert later.endswith(words[2])


@pytest.mark.parametrize(
    ("job", "given", "port"), [(77, {}, 10077), (123456, {}, 13456), (77, {"MASTER_PORT": "3"}, 3)]
)
def test_each_job_has_a_port_of_its_own(tmp_path, job, given, port):
    """Two jobs may share a machine."""
    env = tools(tmp_path, srun="#!/bin/bash\necho $MASTER_PORT > ports\n", scontrol="#!/bin/bash\n")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    env = {name: value for name, value in env.items() if name != "MASTER_PORT"} | {"SLURM_JOB_ID": str(job)} | given
    subprocess.run(["bash", "scripts/slurm.sbatch", *SLURM["slurm"][0]], cwd=tmp_path, env=env, timeout=PATIENCE)
    assert (tmp_path / "ports").read_text() == f"{port}\n"


@pytest.mark.parametrize(("name", "requeued"), [("USR1", "requeue 77\n"), ("TERM", "")])
def test_scancel_ends_a_job_for_good(tmp_path, name, requeued):
    """Both signals to the script save and stop the run. USR1 comes before the time limit. scancel's TERM goes to the
    task as well. TERM to srun kills the task, as real srun does, so nothing may send it there."""
    task = "trap 'printf %s \\{\\\"code\\\":75\\} > r/exit.json; exit 1' TERM\ntouch up; while :; do sleep 0.05; done"
    tools(
        tmp_path, task=f"#!/bin/bash\n{task}\n", scancel='#!/bin/bash\necho "$@" >> scancels\nkill -TERM $(cat pid)\n'
    )
    srun = (
        "mkdir -p r; touch r/config.toml\ntask & echo $! > pid\ntrap 'kill -KILL $(cat pid); exit 137' TERM\n"
        "until [ -e up ] && grep -q 'SigCgt:.*[4-7c-f]...$' /proc/$PPID/status; do sleep 0.05; done\n"  # both hear TERM
        f"kill -{name} $PPID\n[ {name} = USR1 ] || kill -TERM $(cat pid)\nwhile kill -0 $(cat pid); do wait; done\n"
    )
    ended, calls, _ = slurm_job(tmp_path, "slurm_cluster", srun)()
    assert exit_code(tmp_path / "r") == 75
    assert (ended, calls) == (int(not requeued), requeued)
    if name == "USR1":
        assert (tmp_path / "scancels").read_text() == "--signal=TERM 77\n"


def test_the_restart_loop_stops_tasks_of_srun_through_slurm(tmp_path):
    """In a job of Slurm, where TERM to srun would kill them."""
    srun = COUNTED + "trap 'exit 137' TERM\nmkdir -p r; touch up; until [ -e ended ]; do sleep 0.05; done\n"
    srun += 'echo \'{"code": 75, "reason": "x", "t": 0}\' > r/exit.json\nexit 75\n'
    env = tools(tmp_path, srun=srun, scancel='#!/bin/bash\necho "$@" > ended\n') | {"SLURM_JOB_ID": "77"}
    loop = subprocess.Popen(["bash", RESTART, "r", "srun", "daybreak", "train", "tiny"], cwd=tmp_path, env=env)
    until(lambda: (tmp_path / "up").exists())
    loop.terminate()
    assert loop.wait(PATIENCE) == 75
    assert (tmp_path / "ended").read_text() == "--signal=TERM 77\n"


@pytest.mark.parametrize("script", ["slurm", "slurm_cluster"])
def test_a_start_that_left_no_run_is_not_requeued(tmp_path, script):
    """A recipe that does not exist, missing data, no torchrun: nothing could count such starts, so one is the end."""
    assert slurm_job(tmp_path, script, "")()[:2] == (1, "")


@pytest.mark.parametrize("script", ["slurm", "slurm_cluster"])
def test_a_job_without_its_words_says_how_it_is_called(tmp_path, script):
    script = str(ROOT / "scripts" / f"{script}.sbatch")
    job = subprocess.run(["bash", script, "runs/x"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert job.returncode == 2
    assert job.stderr.startswith(f"{script} needs RUN and ")
    shown = [line[2:] for line in Path(script).read_text().splitlines() if line.startswith("#     sbatch ")]
    assert shown == [line for line in job.stderr.splitlines() if line.startswith("    sbatch ")] != []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["slurm", "slurm_cluster"])
def test_a_job_from_another_folder_needs_the_scripts(tmp_path, script):
    """Without them nothing would train, and the job would end with 0, so jobs that depend on it would start."""
    started = ["bash", str(ROOT / "scripts" / f"{script}.sbatch"), *SLURM[script][0]]
    env = tools(tmp_path, srun="#!/bin/bash\ntouch called\n", scontrol="#!/bin/bash\necho host7\n")
    env |= {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host7"}
    job = subprocess.run(started, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert job.returncode == 2
    assert (
        f"cannot run {tmp_path}/scripts/restart.sh; submit from daybreak's clone, or set DAYBREAK_SCRIPTS" in job.stderr
    )
    assert not (tmp_path / "called").exists()
    env["DAYBREAK_SCRIPTS"] = str(ROOT / "scripts")
    subprocess.run(started, cwd=tmp_path, env=env, capture_output=True, timeout=PATIENCE)
    assert (tmp_path / "called").exists()


def test_torchrun_runs_the_installed_code(tmp_path):
    """And not a folder `daybreak` where the job was submitted: Python puts that one first for `-m`."""
    (tmp_path / "daybreak").mkdir()
    (tmp_path / "daybreak/__main__.py").write_text("print('the code of the clone')\n")
    (tmp_path / "daybreak/__init__.py").touch()
    srun = f"export PYTHONPATH={ROOT}\n{sys.executable} -m daybreak --version > version\n"
    slurm_job(tmp_path, "slurm_cluster", srun)()
    assert (tmp_path / "version").read_text() == f"daybreak {daybreak.__version__}\n"


@pytest.mark.parametrize("resumes", [False, True])
def test_a_pod_of_the_jobset_resumes_the_run_of_its_name(tmp_path, resumes):
    """With --name in the template it began the recipe again at every restart: exit 2, until maxRestarts was used up."""
    lines = (ROOT / "scripts/jobset.yaml").read_text().split("                    - |\n")[1].split("env:")[0]
    text = textwrap.dedent(lines.rpartition("\n")[0])
    assert text.count("name=gpt2-1558M #") == 1
    env = tools(tmp_path, torchrun='#!/bin/bash\necho "$@" > called\n')
    if resumes:
        (tmp_path / "runs/mine").mkdir(parents=True)
        (tmp_path / "runs/mine/config.toml").touch()
    text = text.replace("name=gpt2-1558M #", "name=mine #")
    subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, check=True, timeout=PATIENCE)
    target = "runs/mine" if resumes else "gpt2-1558M --name mine"
    said = (tmp_path / "called").read_text()
    assert said.endswith(f" -m daybreak train {target} --parallel.zero 1 --checkpoint.on_error stop\n")


def test_an_old_python_of_the_host_can_decide():
    """Beside a container the host's python3 runs verdict.py: 3.6 on RHEL 8, which knows no `annotations` to import."""
    tree = ast.parse((ROOT / "scripts/verdict.py").read_text(), feature_version=(3, 6))
    assert {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} == {"contextlib", "pathlib"}
    assert "missing_ok" not in {word.arg for word in ast.walk(tree) if isinstance(word, ast.keyword)}  # 3.8
    generic = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)]
    assert {node.value.id for node in generic}.isdisjoint({"dict", "list", "tuple"})  # 3.9
