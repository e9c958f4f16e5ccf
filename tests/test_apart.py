"""Libraries that read the command line, replace the exception hook or install signal handlers: none reaches ours.

The stand-ins do what CUTLASS's DSL does (an argparse parser with `-diagnostic` over sys.argv, which prints its usage
for `-h` and exits for `-d 1024`; a new sys.excepthook), and take the signals too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest
from interop_runs import ROOT, shape_of, values_of, write_shards
from patience import PATIENCE
from test_interop_llmc import model_bytes

from daybreak.cli.main import cli, main
from daybreak.state.run import Run

COMPILE = """
    import argparse, signal, sys, warnings

    def compile(*args, **kwargs):
        warnings.warn("for the library's own developers")
        parser = argparse.ArgumentParser(description="another program")
        parser.add_argument("-diagnostic", nargs="?", const="all", choices=["all", "fail"])
        parser.parse_known_args()
        assert sys.argv[1:] == [], sys.argv
        sys.excepthook = print
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
"""
# Python imports this by itself: from then on every library that is loaded compiles something.
SITECUSTOMIZE = """
    import sys
    from standin import compile

    class Loading:
        def find_spec(self, name, path=None, target=None):
            if name in ("torch", "rich", "wandb", "tiktoken"):
                compile()
                print("compiled for", name, file=sys.stderr)

    sys.meta_path.insert(0, Loading())
"""
WANDB = """
    import os, signal
    from standin import compile

    class Run:
        def log(self, values=None, **kwargs):
            if values and values["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            compile()

        def finish(self, *args, **kwargs):
            pass

        def __getattr__(self, name):
            return self.log

    def init(*args, **kwargs):
        compile()
        return Run()

    class Settings:
        def __init__(self, *args, **kwargs):
            pass
"""


def write(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def run(folder: Path, *argv: str, code: int = 0) -> str:
    path = os.pathsep.join((str(folder / "lib"), str(ROOT)))
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


TINY = {"-i": "shards/*train*", "-j": "shards/*val*", "-e": "m.bin", "-b": "1", "-t": "64", "-m": "1", "-s": "0",
        "-g": "4", "-o": "log"}  # fmt: skip


def test_llmc_s_own_flags_are_not_another_program_s(tmp_path: Path) -> None:
    """`-d` begins `-diagnostic`, and `-h` is another program's help."""
    write(tmp_path / "lib", standin=COMPILE, sitecustomize=SITECUSTOMIZE)
    write_shards(tmp_path / "shards", 50257)
    shape = shape_of("gpt2", L=1, C=32, NH=2)
    (tmp_path / "m.bin").write_bytes(model_bytes(shape, values_of(shape), 3))
    flags = [x for pair in TINY.items() for x in pair]
    said = run(tmp_path, "-m", "daybreak.llmc", *flags, "-d", "128", "-h", "1", "-x", "1")
    assert "compiled for torch" in said
    assert "step    1/1 | loss " in said
    assert "another program" not in said


SMALL = {"model.L": 1, "model.C": 16, "model.NH": 2, "model.max_T": 16, "model.V": 257, "batch.B": 2, "eval.tokens": 64,
         "eval.sample_tokens": 4, "run.steps": 30, "data.tokenizer": "bytes", "data.train": "shards/*train*",
         "data.val": "shards/*val*", "log.sinks": "wandb"}  # fmt: skip


@pytest.mark.parametrize(
    "entry", [["-m", "daybreak"], ["-c", "import daybreak.cli.main as m; raise SystemExit(m.main())"]]
)
def test_signals_stay_ours_when_a_library_takes_them(tmp_path: Path, entry: list[str]) -> None:
    """A library ignores every signal, again at each step; SIGTERM after step 3 still saves and ends with 75."""
    write(tmp_path / "lib", standin=COMPILE, sitecustomize=SITECUSTOMIZE, wandb=WANDB)
    write_shards(tmp_path / "shards", 257)
    flags = [x for k, v in SMALL.items() for x in (f"--{k}", str(v))]
    said = run(tmp_path, *entry, "train", "d12", "--name", "x", *flags, code=75)
    assert "compiled for wandb" in said
    assert json.loads((tmp_path / "runs/x/exit.json").read_text())["code"] == 75
    assert Run(tmp_path / "runs/x").checkpoints


@pytest.mark.parametrize("verb", cli.commands)
def test_no_verb_runs_with_our_arguments_in_sys_argv(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    command = cli.commands[verb]
    needed = ["x" for p in command.params if isinstance(p, click.Argument) and p.required]
    for p in [p for p in command.params if isinstance(p, click.Option) and p.required]:
        needed += [p.opts[0], p.type.choices[0] if isinstance(p.type, click.Choice) else "x"]
    monkeypatch.setattr(command, "callback", lambda *_, **__: seen.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["daybreak", verb, *needed])
    assert main() == 0
    assert seen == [["daybreak"]]


LIBRARY = """
    import signal, sys
    import torch
    from daybreak.kernels.cuda import fa4, quack

    argv, hook = sys.argv, sys.excepthook
    handlers = [signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    x = torch.zeros(1)
    reasons = fa4.broken("flash_attn.cute", fa4._interface), quack.broken("quack", quack.epilogues)
    assert reasons == (None, None), reasons
    quack.launch("plain", quack.Tile(128, 128, True, 2, 1), x, x, x)
    heads = [torch.zeros(1, 1, 1, 64)] * 8
    fa4.attention_backward(*heads, x, scale=1.0, scratch=None)
    assert sys.argv is argv and argv[1:] == ["-d", "1024", "-h"], sys.argv
    assert sys.excepthook is hook
    assert [signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    print("compiled", sys.modules["standin"].count)
"""


def test_a_script_s_own_arguments_do_not_reach_the_kernels_libraries(tmp_path: Path) -> None:
    counting = COMPILE + "        global count\n        count += 1\n\n    count = 0\n"
    package: dict[str, Any] = {
        "standin": counting,
        "flash_attn__cute__interface": "from standin import compile\ncompile()\n_flash_attn_bwd = compile",
        "cutlass": "cute = BFloat16 = Float32 = None",
        "quack__activation": "relu = None",
        "quack__epilogue__frontend": """
            from standin import compile
            compile()
            def gemm_epilogue(**options):
                return lambda fn: type("Epilogue", (), {"gemm": staticmethod(compile)})
            unpack = tuple
        """,
        "quack__epilogue__ops": "RowVecLoad = RowVecReduce = str",
        "script": LIBRARY,
    }
    write(tmp_path / "lib", **package)
    said = run(tmp_path, "lib/script.py", "-d", "1024", "-h")
    assert "compiled 4\n" in said
    assert "developers" not in said
