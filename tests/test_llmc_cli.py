"""llm.c's command line: every flag and its meaning, the published commands, and how processes find each other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from daybreak.config import resolve
from daybreak.errors import ConfigError
from daybreak.llmc import ALL_TOKENS, BY_NAME, FLAGS, HELLASWAG, launch, parse, translate

# The published commands (scripts/run_gpt2_124M.sh, run_gpt2_1558M.sh), after the program's name.
RUN_124M = shlex.split(
    "-i dev/data/fineweb10B/fineweb_train_*.bin -j dev/data/fineweb10B/fineweb_val_*.bin -o log124M -v 250 -s 20000 "
    "-g 144 -h 1 -b 64 -t 1024 -d 524288 -r 0 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 -y 1 -e d12 -x 18865"
)
RUN_1558M = shlex.split(
    "-i dev/data/edu_fineweb100B/edu_fineweb_train_*.bin -j dev/data/edu_fineweb100B/edu_fineweb_val_*.bin "
    "-o log_gpt2_1558M -v 250 -s 300000 -g 384 -h 1 -b 16 -t 1024 -d 1048576 -r 0 -z 1 -c 0.1 -k cosine -l 0.0006 "
    "-q 0.1 -u 700 -n 2000 -x 32000 -ge 1 -y 1 -e d48"
)

# Every flag of llm.c: a value, and what it makes of the configuration at 2 processes; None = seen by other tests.
MEANING: dict[str, tuple[str, dict[str, Any] | None]] = {
    "-i": ("a/*.bin", {"data.train": "a/*.bin"}),
    "-j": ("b/*.bin", {"data.val": "b/*.bin"}),
    "-e": ("gpt3:c384", {"model.L": 6, "model.C": 384, "model.NH": 6, "model.max_T": 2048, "model.V": 50257}),
    "-o": ("x/log", {"run.dir": "x", "run.name": "log"}),
    "-lg": ("10", {}),
    "-n": ("7", {"checkpoint.every": 7}),
    "-nk": ("3", None),
    "-nm": ("4", None),
    "-y": ("1", None),
    "-b": ("8", {"batch.B": 8, "batch.total_tokens": 8 * 1024 * 2, "eval.tokens": 20 * 8 * 1024 * 2}),
    "-t": ("64", {"batch.T": 64, "batch.total_tokens": 4 * 64 * 2, "eval.tokens": 20 * 4 * 64 * 2}),
    "-d": ("524288", {"batch.total_tokens": 524288}),
    "-x": ("123", {"run.steps": 123, "optim.horizon": 123}),
    "-k": ("wsd", {"schedule.name": "wsd"}),
    "-l": ("0.0006", {"optim.lr": 0.0006}),
    "-u": ("700", {"schedule.warmup": 700}),
    "-q": ("0.1", {"schedule.final_frac": 0.1}),
    "-c": ("0.1", {"optim.weight_decay": 0.1}),
    "-sl": ("5", {"guard.loss_z": 5.0}),
    "-sg": ("5", {"guard.norm_z": 5.0}),
    "-v": ("250", {"eval.every": 250}),
    "-m": ("-1", {"eval.tokens": ALL_TOKENS}),
    "-s": ("-1", {"eval.sample_every": 0}),
    "-g": ("144", {"eval.sample_tokens": 143}),
    "-h": ("1", {"eval.hellaswag": HELLASWAG}),
    "-a": ("1", {"run.overfit": True, "data.train": BY_NAME["-j"].default}),
    "-f": ("0", {"precision.tf32": False}),
    "-w": ("0", {"precision.masters": "none"}),
    "-ge": ("2", {}),
    "-z": ("1", {"parallel.zero": 1}),
    "-r": ("2", {"batch.recompute": 2}),
    "-pn": ("4", None),
    "-pr": ("3", None),
    "-pg": ("2", None),
    "-pi": ("tcp", None),
    "-ps": ("10.0.0.1", None),
    "-pf": ("/shared", None),
}
DEFAULTS = {  # llm.c's defaults as a configuration, beside those that are daybreak's too
    "data.train": "dev/data/tinyshakespeare/tiny_shakespeare_train.bin", "batch.B": 4, "batch.T": 1024,
    "data.val": "dev/data/tinyshakespeare/tiny_shakespeare_val.bin", "batch.total_tokens": 8192, "optim.lr": 3e-4,
    "schedule.final_frac": 1.0, "schedule.warmup": 0, "schedule.name": "cosine", "optim.weight_decay": 0.0,
    "eval.every": 20, "eval.tokens": 20 * 8192, "eval.sample_every": 20, "eval.sample_tokens": 63, "run.steps": 0,
    "batch.recompute": 1, "checkpoint.every": 0, "optim.beta1": 0.9, "optim.beta2": 0.95, "optim.eps": 1e-8,
    "optim.clip": 1.0, "run.seed": 42, "guard.loss_z": 0.0, "run.overfit": False, "precision.tf32": True,
}  # fmt: skip


def settings(argv: list[str], world: int = 2) -> dict[str, Any]:
    return dict(translate(parse(argv), world).items())


def test_the_table_is_llmc_s() -> None:
    assert set(BY_NAME) == set(MEANING)
    assert len(FLAGS) == len(BY_NAME) == 37


@pytest.mark.parametrize("name", BY_NAME)
def test_every_flag_has_its_meaning_and_no_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, meaning = MEANING[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / HELLASWAG).parent.mkdir(parents=True)
    (tmp_path / HELLASWAG).touch()
    parsed = parse([name, value])
    assert parsed == {f.name: f.default for f in FLAGS} | {name: type(BY_NAME[name].default)(value)}
    if meaning is None:
        return
    base = ["-e", "d12"] if name == "-e" else ["-e", "d12", "-o", "log"]
    before, after = settings(base), settings([*base, name, value])
    changed = {k: v for k, v in after.items() if v != before[k] and (name == "-o" or not k.startswith("run.name"))}
    meaning = {k: v for k, v in meaning.items() if before[k] != v}
    if name == "-e":
        changed.pop("run.name", None)
    assert changed == meaning
    assert bool(BY_NAME[name].no_effect) == (not meaning)


def test_stages_of_zero() -> None:
    """2 is daybreak's own; 3 falls back to it; one process has nothing to share out."""
    assert [settings(["-e", "d12", "-z", str(z)])["parallel.zero"] for z in range(4)] == [0, 1, 2, 2]
    assert [settings(["-e", "d12", "-z", str(z)], world=1)["parallel.zero"] for z in range(4)] == [0] * 4


# What llm.c accepts beyond the obvious, and what it means there: llm.c tests most numbers for a sign or for zero only.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("-u 700 -x 16", {"schedule.warmup": 700, "run.steps": 16, "optim.horizon": 700}),
    ("-u 16 -x 16", {"schedule.warmup": 16, "run.steps": 16, "optim.horizon": 16}),
    ("-u 700", {"schedule.warmup": 700, "run.steps": 0, "optim.horizon": 0}),
    *((f"-g {g} -s {s}", {"eval.sample_tokens": 0, "eval.sample_every": 0}) for g in (1, 0, -5) for s in (0, -1)),
    ("-g 2", {"eval.sample_tokens": 1}),
    ("-r -1", {"batch.recompute": 0}), ("-r 3", {"batch.recompute": 2}), ("-r 9", {"batch.recompute": 2}),
    ("-z -1", {"parallel.zero": 0}), ("-z 7", {"parallel.zero": 2}),
    ("-f 2", {"precision.tf32": True}), ("-f -1", {"precision.tf32": True}),
    ("-n -3", {"checkpoint.every": 0}), ("-lg 0", {}), ("-ge 3", {}), ("-ge -2", {}), ("-nk -1", {}), ("-nm -2", {}),
    ("-q 0 -l 0 -c 0 -sl 0 -sg 0", {"optim.lr": 0.0, "schedule.final_frac": 0.0, "guard.loss_z": 0.0}),
    ("-pn 0 -pr -1 -pg 0", {}),  # under mpirun and torchrun they mean nothing
    ("-x +5 -b 08", {"run.steps": 5, "batch.B": 8}),
]  # fmt: skip
# What is refused on purpose: llm.c dies of it, computes nonsense, or reads another number than it was given.
REFUSED = {
    "at least 1": ("-b 0", "-t 0", "-v 0", "-v -1"),
    "at least 1, or -1": ("-d 0", "-m 0", "-x 0", "-d -2", "-m -2", "-x -2"),
    "at least 0": ("-u -1", "-l -1", "-c -1", "-sl -1", "-sg -1"),
    "0 or 1": ("-y 2", "-a 2", "-w 2"),
    "between 0 and 1": ("-q 1.5", "-q -1"),
    "a whole number": ("-b 1_0", "-b 8.0", "-x 0x10"),
    "a number": ("-l 1_0.5",),
    "mpi or tcp": ("-pi foo",),
    "cosine or linear": ("-k const",),
}


@pytest.mark.parametrize(("line", "meaning"), ACCEPTED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_llmc_accepts_is_accepted(line: str, meaning: dict[str, Any]) -> None:
    config = translate(parse(["-e", "d12", *line.split()]), 2)
    config.check(ranks=2)
    got = dict(config.items())
    assert {k: got[k] for k in meaning} == meaning
    launch(parse(line.split()), {})


@pytest.mark.parametrize(("line", "rule"), [(line, rule) for rule, lines in REFUSED.items() for line in lines])
def test_what_llmc_dies_of_is_one_sentence_with_the_flag(line: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line} must be {rule}"):
        parse(line.split())


def test_the_defaults_are_llmc_s() -> None:
    got = settings(["-e", "d12"])
    assert {k: got[k] for k in DEFAULTS} == DEFAULTS
    assert settings(["-e", "d12", "-n", "5"])["checkpoint.every"] == 0  # without -o there are none


@pytest.mark.parametrize("flag", FLAGS, ids=lambda f: f.name)
def test_bad_values_are_errors(flag: Any) -> None:
    """llm.c's atoi would read 8 from '8x' and 1 from '1e5'."""
    kind = type(flag.default)
    bad = {int: ["8x", "1e5", "", "1.5"], float: ["fast", "nan", "inf", ""], str: []}[kind]
    for text in bad:
        words = {int: "a whole number", float: "a number"}[kind]
        with pytest.raises(ConfigError, match=rf"^{flag.name} {re.escape(text)} must be {words}; the default is"):
            parse([flag.name, text])
    if flag.rule is not None:
        with pytest.raises(ConfigError, match=rf"^{flag.name} \S+ must be .*; the default is"):
            parse([flag.name, "other" if kind is str else "-7"])
    with pytest.raises(ConfigError, match=f"^{flag.name} needs a value"):
        parse([flag.name])


def test_flags_that_llmc_would_take_for_others() -> None:
    for name, near in [("-bx", "-b"), ("-pm", "-"), ("--b", "-b"), ("b", "-b"), ("-zz", "-z")]:
        with pytest.raises(ConfigError, match=rf"unknown flag '{name}'; did you mean '{near}"):
            parse([name, "8"])
    assert parse(["-b", "8", "-b", "16"])["-b"] == 16


@pytest.mark.parametrize(("argv", "recipe"), [(RUN_124M, "gpt2-124M"), (RUN_1558M, "gpt2-1558M")])
def test_the_published_commands_are_our_recipes(argv: list[str], recipe: str) -> None:
    got = settings(argv, 8)
    want = dict(resolve(recipe)[0].items())
    same = [k for k in want if k.split(".")[0] in ("model", "optim", "schedule", "precision", "guard")]
    same += ["batch.B", "batch.total_tokens", "batch.recompute", "eval.every", "checkpoint.every",
             "run.steps", "run.seed"]  # fmt: skip
    free = {"optim.horizon": got["run.steps"], "schedule.warmup": 700}  # written out there, worked out here
    assert {k: got[k] for k in same} == {k: want[k] for k in same} | free
    assert got["parallel.zero"] == 1
    assert got["eval.tokens"] == 20 * 8 * {"gpt2-124M": 64, "gpt2-1558M": 16}[recipe] * 1024


def test_processes_find_each_other() -> None:
    def found(*argv: str, **environ: str) -> dict[str, str]:
        return launch(parse(list(argv)), environ)

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "12345"}
    assert found() == alone | here
    torchrun = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    assert found(**torchrun) == torchrun | here
    mpirun = {f"OMPI_COMM_WORLD_{k.replace('WORLD_SIZE', 'SIZE')}": v for k, v in torchrun.items()}
    assert found(**mpirun) == torchrun | here
    assert found(PMI_RANK="9", PMI_SIZE="16", MPI_LOCALRANKID="1") == torchrun | here
    there = {"MASTER_ADDR": "10.0.0.2", "MASTER_PORT": "40000"}  # the launcher knows better where the ranks meet
    for given in (there, {"MASTER_ADDR": "10.0.0.2"}, {"MASTER_PORT": "40000"}):
        assert found(**torchrun, **given) == torchrun | here | given
        assert found(**mpirun, **given) == torchrun | here | given
    assert found("-pi", "tcp", "-pn", "16", "-pr", "9", "-pg", "8", "-ps", "10.0.0.1", RANK="3", WORLD_SIZE="4") == (
        torchrun | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    )
    assert found("-pi", "fs", "-pf", "/shared", "-pn", "2", "-pr", "1") == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "INIT_METHOD": "file:///shared/daybreak.sync",
    }  # fmt: skip
    for argv, reason in [
        (["-pi", "tcp"], "-pi tcp needs -ps"), (["-pi", "fs"], "-pi fs needs -pf"),
        (["-pi", "tcp", "-pn", "2", "-pr", "2", "-ps", "x"], "-pr 2 must be below -pn 2"),
        (["-pi", "tcp", "-pn", "2", "-pr", "-1", "-ps", "x"], "-pr -1 must be below -pn 2, .* and at least 0"),
        (["-pi", "tcp", "-pn", "0", "-ps", "x"], "-pr 0 must be below -pn 0"),
        (["-pi", "tcp", "-pg", "0", "-ps", "x"], "-pg 0 must be at least 1"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=reason):
            found(*argv)
