"""Signals in every phase, the watchdog, the restart loop and the Slurm script: real processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE, until
from recovery import CHILD, assert_intact, assert_same, config, exit_code, make_shards, recipe, spawn, train, wait_for

import daybreak
from daybreak.cli.main import main
from daybreak.training.stop import ENDING, Interrupted, Stop

STEPS, ENGINE = 150, "daybreak.engine.step:Engine"
# Where the signal arrives: accident, its place and time.
PHASES = {
    "reading the data": ("term", "call:daybreak.training.loop:open_run", 1),
    "allocating, compiling": ("int", "call:daybreak.training.loop:Engine", 1),
    "validating step 0": ("term", f"call:{ENGINE}.eval_losses", 1),
    "a first micro-step": ("term", f"call:{ENGINE}.micro_step", 17),
    "loading a checkpoint": ("term", "call:daybreak.training.loop:restore", 1),
    "a second micro-step": ("int", f"call:{ENGINE}.micro_step", 24),
    "an update": ("term", f"call:{ENGINE}.update", 9),
    "copying for a save": ("term", "call:daybreak.state.restore:Staging.take", 2),
    "writing a save": ("int", "call:daybreak.state.checkpoint:_write_manifest", 2),
    "publishing a save": ("term", "after:daybreak.state.checkpoint:_publish", 2),
    "recording a step": ("term", "call:daybreak.state.metrics:Lines.append", 30),
    "validating": ("term", f"call:{ENGINE}.eval_losses", 2),
    "sampling": ("term", f"call:{ENGINE}.decode", 2),  # not in the last token: then all is done
    "the last save": ("int", "after:daybreak.training.loop:Trainer._sample", 1),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> daybreak.Run:
    return daybreak.train(config(shards, tmp_path_factory.mktemp("straight"), "straight", run__steps=STEPS))


def test_a_signal_in_every_phase_saves_and_loses_nothing(shards, tmp_path, straight, full, figures):
    folder = tmp_path / "s"
    args = [recipe(config(shards, tmp_path, "s", run__steps=STEPS), tmp_path)]
    phases = list(PHASES.items()) if full else list(PHASES.items())[1::2]
    for name, (do, at, n) in phases:
        code, err = train(args, {"do": do, "at": at, "n": n})
        if name == "the last save":  # it was the end anyway
            assert (code, exit_code(folder)) == (0, 0)
            continue
        assert code == 75, (name, err)
        assert "daybreak: stopped by SIG" in err, name
        assert exit_code(folder) == 75
        args = [folder]
        steps = daybreak.Run(folder).metrics("step")
        assert assert_intact(folder) == (steps[-1]["step"] if steps else -1), name  # not one update was lost
    assert train(args)[0] == 0
    assert_same(straight, daybreak.Run(folder))
    figures["signals, one in each phase of a run"] = len(phases)


@pytest.mark.parametrize("at", [f"call:{ENGINE}.micro_step", "call:daybreak.state.checkpoint:_write_manifest"])
def test_a_second_signal_leaves_at_once(shards, tmp_path, straight, at):
    args = [recipe(config(shards, tmp_path, "t", run__steps=STEPS), tmp_path)]
    code, _ = train(args, {"do": "twice", "at": at, "n": 2 if "state" in at else 30})
    assert code == 128 + signal.SIGTERM
    assert not (tmp_path / "t/exit.json").exists()  # as after kill -9
    assert_intact(tmp_path / "t")
    assert train([tmp_path / "t"])[0] == 0
    assert_same(straight, daybreak.Run(tmp_path / "t"))


def test_sigusr1_before_anything_is_loaded_ends_nothing(shards, tmp_path):
    args = [recipe(config(shards, tmp_path, "e", run__steps=1), tmp_path)]
    assert spawn(args, {"do": "usr1", "at": "audit:import:'click'"}, stderr=subprocess.DEVNULL).wait(PATIENCE) == 0


def test_sigusr1_saves_and_goes_on(shards, tmp_path):
    args = [recipe(config(shards, tmp_path, "u", run__steps=40, checkpoint__every=0, checkpoint__keep=0), tmp_path)]
    assert train(args, {"do": "usr1", "at": f"call:{ENGINE}.micro_step", "n": 23})[0] == 0
    assert [int(path.name[5:]) for path in daybreak.Run(tmp_path / "u").checkpoints] == [40, 12]


@pytest.mark.parametrize("name", [*ENDING, "SIGUSR1"])
def test_every_signal_that_ends_a_process_is_heard(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    stop = Stop()
    stop.announce = lambda text: None
    with stop.handling_signals():
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) if name != "SIGUSR1" else contextlib.nullcontext():
            stop.check()
    assert stop.reason == ("" if name == "SIGUSR1" else f"stopped by {name}")
    assert stop.take_save_request() == (name == "SIGUSR1")
    assert signal.getsignal(number) is before


def test_the_list_has_every_signal_that_ends_a_process():
    """Each signal is sent to a process of its own. Those that a fault of the program raises are no wish to stop."""
    faults = {"SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGSEGV", "SIGSYS", "SIGSTKFLT"}
    ended = set()
    for number in sorted(signal.valid_signals()):
        if number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU) or number >= signal.SIGRTMIN:
            continue
        pid = os.fork()
        if pid == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError):  # SIGKILL
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            os._exit(0)
        if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            ended.add(signal.Signals(number).name)
    assert ended - faults == {*ENDING, "SIGKILL", "SIGUSR1", "SIGPIPE", "SIGXFSZ"}  # Python ignores the last two


def test_a_closed_terminal_saves(shards, tmp_path):
    """The terminal's end is SIGHUP to its processes, and every later write to it fails."""
    target = recipe(config(shards, tmp_path, "hup", run__steps=100000, checkpoint__every=0), tmp_path)
    terminal, inside = os.openpty()
    command = [sys.executable, "-c", "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
               "os.execv(sys.executable, [sys.executable, '-m', 'daybreak', 'train', sys.argv[1]])",
               target]  # fmt: skip
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    drain(terminal, tmp_path / "hup/metrics.jsonl")
    os.close(terminal)
    assert process.wait(PATIENCE) == exit_code(tmp_path / "hup") == 75
    run = daybreak.Run(tmp_path / "hup")
    assert run.checkpoint().step == run.metrics("step")[-1]["step"]
    assert json.loads((tmp_path / "hup/exit.json").read_text())["reason"].startswith("stopped by SIGHUP")


def drain(terminal: int, metrics: Path) -> None:
    """Read what a run says until it has made 20 steps."""
    while not (metrics.exists() and metrics.read_bytes().count(b'"kind":"step"') >= 20):
        os.read(terminal, 65536)


def test_nohup_is_respected(shards, tmp_path):
    target = recipe(config(shards, tmp_path, "n", run__steps=100000), tmp_path)
    command = ["nohup", sys.executable, "-m", "daybreak", "train", target]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "n", process, 5)
    process.send_signal(signal.SIGHUP)
    wait_for(tmp_path / "n", process, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75


def test_which_signals_ask_twice(monkeypatch):
    """The same signal again, or another one later: leave at once. What one cause sends together is one wish to stop."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    now = [0.0]

    def stopped(*signals):
        left.clear()
        stop = Stop(lambda: now[0])
        stop.announce = lambda text: None
        for number, seconds in signals:
            now[0] += seconds
            stop._handle(number, None)
        return left[:]

    hup, term, sigint = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
    assert stopped((hup, 0), (hup, 0), (term, 0.1)) == []  # the shell and the kernel, then torchrun
    assert stopped((sigint, 0), (term, 0.1)) == []
    assert stopped((term, 0), (hup, 60)) == []  # a logout while it saves
    assert stopped((term, 0), (term, 0.01)) == [143]
    assert stopped((hup, 0), (term, 6)) == [143]
    assert stopped((sigint, 0), (term, 6), (sigint, 0)) == [143, 130]
    with monkeypatch.context() as torchrun:
        torchrun.setenv("TORCHELASTIC_RUN_ID", "1")
        assert stopped((term, 0), (term, 0.01)) == []  # Slurm signals the workers, then torchrun does
        assert stopped((term, 0), (term, 6)) == [143]

        class Interrupted(set):  # the second signal comes while the first one is being noted
            def add(self, number):
                super().add(number)
                if len(self.came) < 1:
                    self.came.append(number)
                    stop._handle(term, None)

        left.clear()
        stop = Stop(lambda: 100.0)
        stop.announce, stop._seen, Interrupted.came = lambda text: None, Interrupted(), []
        stop._handle(term, None)
        assert (left, stop.reason, Interrupted.came) == ([], "stopped by SIGTERM", [term])
    stopped((sigint, 0), (term, 6), (sigint, 0))
    late = Stop(lambda: now[0])
    late.announce, late.reason = lambda text: None, "--max-hours 1 is over"  # the scheduler's limit is its own
    late._handle(term, None)
    assert (late.reason, left) == ("--max-hours 1 is over", [143, 130])


# ---- the watchdog

QUICK = ("--guard.hang_factor", "5", "--guard.hang_seconds", "1.5")


@pytest.mark.parametrize("where", ["micro_step", "eval_losses"])
def test_a_hung_run_ends_with_7_and_its_stacks(shards, tmp_path, straight, where):
    args = [recipe(config(shards, tmp_path, "h", run__steps=STEPS), tmp_path)]
    n = 60 if where == "micro_step" else 6  # the sixth batch of validation is of step 50
    code, err = train([*args, *QUICK], {"do": "hang", "at": f"call:{ENGINE}.{where}", "n": n})
    assert code == exit_code(tmp_path / "h") == 7, err
    reason = json.loads((tmp_path / "h/exit.json").read_text())["reason"]
    told = re.match(r"nothing happened for (\d+\.\d) s, (\d+) times the median step", reason)
    assert told, reason
    quiet, times = float(told[1]), int(told[2])  # the limit is 1.5 s, or five steps where the machine is slow
    assert times >= 5
    assert 1.5 <= quiet <= max(1.5, 5 * quiet / (times - 0.5)) + 0.2  # one look every 0.15 s, and rounding
    crash = (tmp_path / "h/crash.txt").read_text()
    assert "recovery_child.py" in crash
    assert "in happen" in crash
    assert "in _loop" in crash
    assert_intact(tmp_path / "h")
    assert train([tmp_path / "h"])[0] == 0
    assert_same(straight, daybreak.Run(tmp_path / "h"))


def test_a_process_that_was_stopped_is_not_hung(shards, tmp_path):
    made = config(shards, tmp_path, "z", run__steps=100000, checkpoint__every=0)
    process = spawn([recipe(made, tmp_path), *QUICK])
    wait_for(tmp_path / "z", process, 20)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    wait_for(tmp_path / "z", process, 50)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75


def test_a_slow_disk_neither_hangs_nor_stalls_training(shards, tmp_path, straight):
    made = config(shards, tmp_path, "slow", run__steps=STEPS, checkpoint__every=60)
    slow = {"do": "slow", "at": "call:daybreak.state.checkpoint:_publish", "seconds": 4.0, "m": 1}
    slow["until"] = [str(tmp_path / "slow/metrics.jsonl"), '"step":75']  # steps go on while it is written
    assert train([recipe(made, tmp_path), *QUICK], slow)[0] == 0
    run = daybreak.Run(tmp_path / "slow")
    first, second = run.metrics("checkpoint")[:2]
    assert (first["step"], second["step"]) == (60, 120)
    assert first["stall"] < 4.0 <= first["seconds"]
    at = {r["step"]: r["t"] for r in run.metrics("step")}
    assert at[75] < first["t"]
    assert_same(straight, run)


# ---- restarting


def tools(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment whose PATH begins with these commands."""
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "RESTART_WAIT": "0"}


ROOT = Path(__file__).parents[1]
RESTART = ROOT / "scripts/restart.sh"
COUNTED = "#!/bin/bash\nn=$(cat count 2>/dev/null || echo 0)\necho $((n+1)) > count\n"


def test_the_restart_loop_ends_in_the_undisturbed_run(shards, tmp_path, straight):
    """A kill before the first save, a hang and a kill between saves: each is started again, and progress is counted."""
    bad = [{"do": "kill", "at": f"call:{ENGINE}.micro_step", "n": 5},
           {"do": "hang", "at": f"call:{ENGINE}.micro_step", "n": 60},
           {"do": "kill", "at": f"call:{ENGINE}.micro_step", "n": 60}]  # fmt: skip
    cases = "".join(f"  {i}) exec {sys.executable} {CHILD} '{json.dumps(b)}' \"$@\" ;;\n" for i, b in enumerate(bad))
    shim = COUNTED + f'case $n in\n{cases}esac\nexec {sys.executable} -m daybreak "$@"\n'
    made = recipe(
        config(shards, tmp_path, "r", run__steps=STEPS, guard__hang_factor=5, guard__hang_seconds=1), tmp_path
    )
    command = ["bash", RESTART, tmp_path / "r", "daybreak", "train", made, "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=tools(tmp_path, daybreak=shim), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "count").read_text() == "4\n"
    assert_same(straight, daybreak.Run(tmp_path / "r"))


@pytest.mark.parametrize(
    ("code", "starts", "ends"),
    [*((code, 1, code) for code in (0, 2, 3, 4, 5, 6, 75)), (1, 3, 1), (7, 3, 7), (None, 3, 137)],
)
def test_the_restart_loop_follows_the_rule(tmp_path, code, starts, ends):
    """1, 7 and a missing exit.json are tried again, three starts without progress are the end; the rest is final.
    The process itself says 1, as torchrun does, whatever exit.json says."""
    said = "kill -9 $$" if code is None else f'echo \'{{"code": {code}, "reason": "x", "t": 0}}\' > r/exit.json'
    shim = COUNTED + f"mkdir -p r/checkpoints; touch r/config.toml\n{said}\nexit 1\n"
    done = subprocess.run(["bash", RESTART, "r", "daybreak", "train", "tiny", "--name", "r"], cwd=tmp_path,
                          env=tools(tmp_path, daybreak=shim), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "count").read_text() == f"{starts}\n"
    how = "left no exit.json, as after a kill" if code is None else f"ended with {code}"  # a refused start is no kill
    assert done.stderr.count(f"restart.sh: r {how}, and is started again\n") == starts - 1
    assert (f"brought no new checkpoint, and the last one {how}: it is not" in done.stderr) == (starts == 3)
    assert ("messages above and in r, mend it, and give the same command." in done.stderr) == (starts == 3)


def test_a_signal_between_two_starts_ends_the_restart_loop(tmp_path):
    """It used to be lost: the next start trained on, although somebody had asked for the end."""
    shim = COUNTED + "mkdir -p r/checkpoints; touch r/config.toml\nkill -9 $$\n"
    env = tools(tmp_path, daybreak=shim) | {"RESTART_WAIT": "30"}
    loop = subprocess.Popen(["bash", RESTART, "r", "daybreak", "train", "tiny", "--name", "r"], cwd=tmp_path, env=env,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip
    said = iter(loop.stderr.readline, "")
    assert any(line == "restart.sh: r left no exit.json, as after a kill, and is started again\n" for line in said)
    loop.terminate()
    assert (loop.wait(), loop.stderr.read()) == (75, "restart.sh: stopped by a signal; the same command resumes r\n")
    assert (tmp_path / "count").read_text() == "1\n"


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_restart_loop_says_that_it_does_not_watch_another_folder(tmp_path, status):
    """--name says another name than the folder: the run is not started again, and nobody learned why."""
    shim = COUNTED + f"mkdir -p other; touch other/config.toml\nexit {status}\n"
    done = subprocess.run(["bash", RESTART, "r", "daybreak", "train", "tiny", "--name", "other"], cwd=tmp_path,
                          env=tools(tmp_path, daybreak=shim), capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, (tmp_path / "count").read_text()) == (status, "1\n")
    assert done.stderr.startswith("restart.sh: there is no folder r: the command did not start, or its run has another")
    assert not (tmp_path / "r").exists()


def test_progress_starts_the_count_anew(tmp_path):
    """Five crashes, each after a new checkpoint, then two without: two more starts than a loop that only counts."""
    shim = COUNTED + (
        "d=r/checkpoints/step-0000000$((n < 5 ? n : 5)); mkdir -p $d; touch r/config.toml $d/manifest.json\n"
        'echo \'{"code": 1, "reason": "x", "t": 0}\' > r/exit.json\nexit 1\n'
    )
    subprocess.run(["bash", RESTART, "r", "daybreak", "train", "tiny"], cwd=tmp_path,
                   env=tools(tmp_path, daybreak=shim), capture_output=True)  # fmt: skip
    assert (tmp_path / "count").read_text() == "8\n"


def test_a_signal_to_the_restart_loop_reaches_the_run(shards, tmp_path):
    made = recipe(config(shards, tmp_path, "r", run__steps=100000), tmp_path)
    shim = f'#!/bin/sh\nexec {sys.executable} -m daybreak "$@"\n'
    command = ["bash", RESTART, tmp_path / "r", "daybreak", "train", made, "--quiet"]
    loop = subprocess.Popen(command, cwd=tmp_path, env=tools(tmp_path, daybreak=shim), text=True)
    wait_for(tmp_path / "r", loop, 20)
    loop.terminate()
    assert loop.wait(PATIENCE) == exit_code(tmp_path / "r") == 75


def test_a_stopped_run_is_requeued_while_it_makes_progress(tmp_path):
    """Five stops, each after a new checkpoint, then stops without one: the third of these is the end."""
    run, said = tmp_path / "r", []
    for step in (1, 2, 3, 4, 5, 5, 5):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        (run / f"checkpoints/step-{step:08d}/manifest.json").touch()
        (run / "exit.json").write_text('{"code": 75, "reason": "x", "t": 0}')
        said.append(verdict(run))
    assert said == ["stopped"] * 6 + ["failed"]


def test_a_run_that_fell_back_makes_progress(tmp_path):
    """Step 9 is damaged, so the run continued from 4; the checkpoint that was written last counts, not the highest."""
    run, said = tmp_path / "r", []
    for n, step in enumerate((9, 5, 6, 7, 7, 7)):
        made = run / f"checkpoints/step-{step:08d}/manifest.json"
        made.parent.mkdir(parents=True, exist_ok=True)
        if not made.exists():
            made.touch()
            os.utime(made, ns=(n, n))
        said.append(verdict(run))
    assert said == ["again"] * 5 + ["failed"]


@pytest.mark.parametrize("launcher", ["torchrun", "daybreak"])
def test_usr1_does_not_end_torchrun(tmp_path, launcher):
    """torchrun would die of it and leave its workers alone; daybreak itself saves."""
    shim = "#!/bin/bash\ntrap 'echo > saved' USR1\ntrap 'exit 0' TERM\ntouch ready\nwhile true; do sleep 0.05; done\n"
    command = ["env", "--default-signal=USR1", "bash", RESTART, "r"]  # this process ignores it
    command += [*(["torchrun", "-m"] * (launcher == "torchrun")), "daybreak", "train", "tiny"]
    loop = subprocess.Popen(command, cwd=tmp_path, env=tools(tmp_path, **{launcher: shim}))
    status = Path(f"/proc/{loop.pid}/status")
    until(lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> signal.SIGUSR1 - 1 & 1)
    until(lambda: (tmp_path / "ready").exists())
    for _ in range(5):
        loop.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    if launcher == "daybreak":
        until(lambda: (tmp_path / "saved").exists())
    loop.terminate()
    assert loop.wait(PATIENCE) == 0
    assert (tmp_path / "saved").exists() == (launcher == "daybreak")


@pytest.mark.parametrize(
    "change", [["--model.V", "300"], ["--optim.lr", "-1"], ["--data.train", "/dev/null/x"], ["--run.device", "cuda:77"]]
)
def test_a_refused_start_of_a_stopped_run_is_final(shards, tmp_path, change):
    """The start may be refused anywhere, before or after it opens the run: "stopped" must not survive it.
    --print-config and --fork are no starts of the run."""
    made = daybreak.train(config(shards, tmp_path, "r", run__steps=2))
    told = made.path / "exit.json"
    told.write_text('{"code": 75, "reason": "stopped by SIGTERM", "t": 0}')
    assert verdict(made.path) == "stopped"
    assert main(["train", str(made.path), *change, "--print-config"]) in (0, 2)
    main(["train", str(made.path), *change, "--fork", "x"])
    assert exit_code(made.path) == 75
    assert main(["train", str(made.path), "--steps", "4", *change]) in (2, 4)
    assert exit_code(made.path) in (2, 4)
    assert verdict(made.path) == "failed"


EARLIER = [None, '{"code": 0, "reason": "done", "t": 0}', '{"code": 7, "reason": "hung", "t": 0}',
           '{"code": 1, "reason": "the disk is full", "t": 0, "final": true}', "damaged"]  # fmt: skip


@pytest.mark.parametrize("earlier", EARLIER)
def test_a_refused_start_takes_the_place_of_any_earlier_end(shards, tmp_path, earlier):
    """Schedulers and restarts of torchrun act on exit.json. It went on saying "done", or that a disk is full."""
    made = daybreak.train(config(shards, tmp_path, "r", run__steps=2))
    (told := made.path / "exit.json").unlink()
    if earlier is not None:
        told.write_text(earlier)
    assert main(["train", str(made.path), "--batch.total_tokens", "7"]) == 2
    said = json.loads(told.read_text())
    assert (said["code"], "final" in said) == (2, False)
    assert said["reason"].startswith("batch.total_tokens = 7 must be a multiple of ")
    assert main(["train", str(made.path)]) == 0  # nothing to do: the run is complete, whatever was said of it
    assert exit_code(made.path) == 0
    assert verdict(made.path) == "done"


def test_the_restart_loop_ends_with_the_code_of_a_refused_start(shards, tmp_path):
    """It ended with 0, since the run had been complete before somebody gave it more steps, and a mistake."""
    made = daybreak.train(config(shards, tmp_path, "r", run__steps=2)).path
    text = (made / "config.toml").read_text()
    (made / "config.toml").write_text(text.replace("steps = 2 ", 'steps = "many" '))
    shim = f'#!/bin/sh\n{sys.executable} -m daybreak "$@" || exit 1\n'  # as torchrun
    done = subprocess.run(["bash", RESTART, made, "daybreak", "train", "tiny"], cwd=tmp_path,
                          env=tools(tmp_path, daybreak=shim), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == exit_code(made) == 2
    assert done.stderr.count("run.steps = 'many' must be a whole number") == 1


def verdict(run):
    done = subprocess.run(["bash", RESTART, "--verdict", run], capture_output=True, text=True, check=True)
    return done.stdout.strip()


HOSTILE = {
    ".restarts": ["step[$(touch x)0] 1\n", "-1 a[$(touch x)0]\n", "-1 -99\n", "$(touch x)\n", f"-1 {10**20}\n"],
    "exit.json": ['{"code": "$(touch x)"}', '{"code": 1e999}', '{"code": 4294967296}', "[" * 9999, "\x00"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in HOSTILE.items() for text in texts])
def test_nothing_that_a_foreign_folder_holds_is_executed(tmp_path, name, text):
    """Three starts without progress are the end, whatever the files said before; and no file appears."""
    (tmp_path / "r/checkpoints/step-a[$(touch x)0]").mkdir(parents=True)
    (tmp_path / "r/checkpoints/step-a[$(touch x)0]/manifest.json").touch()
    (tmp_path / "r" / name).write_text(text)
    command = ["bash", RESTART, "--verdict", "r"]
    done = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(3)]
    assert [d.stdout for d in done] == ["again\n", "again\n", "failed\n"]
    assert not done[0].stderr + done[1].stderr
    assert done[2].stderr.startswith("restart.sh: 3 starts of r in a row brought no new checkpoint, and the last one")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name not in ("manifest.json", "exit.json")) == sorted(
        ["checkpoints", "r", "step-a[$(touch x)0]"]
    )


def test_the_count_of_starts_is_not_written_through_a_link(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "victim").write_text("mine\n")
    (tmp_path / "r/.restarts").symlink_to("../victim")
    subprocess.run(["bash", RESTART, "--verdict", "r"], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "victim").read_text() == "mine\n"
    assert (tmp_path / "r/.restarts").read_text() == "-1 1\n"


def test_no_script_evaluates_what_it_read():
    """No shell arithmetic, eval or unquoted file contents; all decisions come from verdict.py."""
    for path in (ROOT / "scripts").iterdir():
        text = path.read_text()
        assert path.suffix == ".py" or not re.search(
            r"\$\(\(|(?<![-.])\beval\b(?!\.)|\$\(cat|\$\(<|\bsource\b", text
        ), path
