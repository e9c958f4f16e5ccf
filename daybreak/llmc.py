"""llm.c's own command line: `python -m daybreak.llmc -i ... -e d48 -b 16 ...`, only the program's name replaced.

FLAGS is the whole interface. `parse` reads it, `translate` turns it into a Config, `main` calls the same `train` as
everybody. The folder -o is a run of daybreak's that also holds llm.c's files: main.log, and with -n the .bin
checkpoints with their DONE markers, from which either program resumes with -y 1.
"""

from __future__ import annotations

import logging
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from daybreak.checked import Rule
from daybreak.cli.ends import ending
from daybreak.config import Config, run_config
from daybreak.config_keys import FRACTION, at_least, one_of
from daybreak.console import guard_streams
from daybreak.errors import ConfigError, Error
from daybreak.formatting import meant
from daybreak.manifest import checkpoint_step, is_run, list_checkpoints
from daybreak.parallel import connect, launched
from daybreak.shapes import is_shape, parse_shape
from daybreak.training.stop import Stop

TINY = "dev/data/tinyshakespeare/tiny_shakespeare"
HELLASWAG = "dev/data/hellaswag/hellaswag_val.bin"
PORT = "12345"  # llm.c's
ALL_TOKENS = 1 << 62


@dataclass(frozen=True)
class Flag:
    """A flag of llm.c. kind: type of the value. row: its line of the parameter table, '' = none, with the C format.

    key: the configuration key that takes the value as it is; '' = `translate` knows. no_effect: why it does nothing.
    """

    name: str
    default: Any
    doc: str
    row: str = ""
    form: str = "d"
    key: str = ""
    rule: Rule | None = None
    no_effect: str = ""


SWITCH = one_of(0, 1)
NATURAL = at_least(0)
OR_ALL = Rule("must be at least 1, or -1 for all", lambda x: bool(x == -1 or x >= 1))

FLAGS = [  # in the order of llm.c's table
    Flag("-i", f"{TINY}_train.bin", "training shards, a glob", "train data pattern", "s"),
    Flag("-j", f"{TINY}_val.bin", "validation shards, a glob", "val data pattern", "s", "data.val"),
    Flag("-o", "", "output folder: main.log, checkpoints (default: runs/llmc-TIME)", "output log dir", "s"),
    Flag("-n", 0, "write a checkpoint every N steps and at the end; 0 = only daybreak's own at the end",
         "checkpoint_every"),
    Flag("-y", 0, "1 = resume from the newest checkpoint in -o, if there is one", "resume", rule=SWITCH),
    Flag("-b", 4, "rows per micro-batch and process", "micro batch size B", key="batch.B", rule=at_least(1)),
    Flag("-t", 1024, "sequence length", "sequence length T", key="batch.T", rule=at_least(1)),
    Flag("-d", -1, "tokens per step; -1 = B * T * processes", "total batch size", rule=OR_ALL),
    Flag("-k", "cosine", "cosine, linear, constant or wsd", "LR scheduler", "s", "schedule.name",
         one_of("cosine", "linear", "constant", "wsd")),
    Flag("-l", 3e-4, "peak learning rate", "learning rate (LR)", "e", "optim.lr", NATURAL),
    Flag("-u", 0, "warmup steps", "warmup iterations", "d", "schedule.warmup", NATURAL),
    Flag("-q", 1.0, "final learning rate as a fraction of the peak", "final LR fraction", "e", "schedule.final_frac",
         FRACTION),
    Flag("-c", 0.0, "weight decay", "weight decay", "e", "optim.weight_decay", NATURAL),
    Flag("-sl", 0.0, "skip updates whose loss z-score exceeds this; 0 = off", "skip update lossz", "f", "guard.loss_z",
         NATURAL),
    Flag("-sg", 0.0, "skip updates whose gradient-norm z-score exceeds this; 0 = off", "skip update gradz", "f",
         "guard.norm_z", NATURAL),
    Flag("-x", -1, "steps; -1 = one epoch", "max_steps", rule=OR_ALL),
    Flag("-v", 20, "validate every N steps", "val_loss_every", "d", "eval.every", at_least(1)),
    Flag("-m", 20, "validation batches; -1 = the whole split", "val_max_steps", rule=OR_ALL),
    Flag("-s", 20, "sample text every N steps; 0 or less = only at the end", "sample_every"),
    Flag("-g", 64, "a sample is this many tokens less one; 1 or less = no samples", "genT"),
    Flag("-a", 0, "1 = train on the first validation batch over and over", "overfit_single_batch", rule=SWITCH),
    Flag("-w", 1, "weights exact to fp32; 0 = bf16 with stochastic rounding", "use_master_weights", "s", rule=SWITCH),
    Flag("-ge", -1, "GELU fusion", "gelu_fusion", no_effect="the kernels decide"),
    Flag("-r", 1, "recompute: 0 or less none, 1 GELU, 2 or more GELU and LayerNorm", "recompute"),
    # without a line in the first part of the table
    Flag("-e", "gpt2_124M_bf16.bin", "a model .bin, or a shape: d12, gpt2:d12, gpt3:c768"),
    Flag("-nk", 0, "keep only the newest K .bin checkpoints; 0 or less = all"),
    Flag("-nm", 0, "checkpoints at multiples of this step are never deleted; 0 = none"),
    Flag("-f", 1, "fp32 products may use TF32; 0 = they may not"),
    Flag("-h", 0, f"HellaSwag at each validation, if {HELLASWAG} is there; 0 = off"),
    Flag("-lg", -1, "GPU status every N steps", no_effect="memory is on every step's line"),
    Flag("-z", 0, "ZeRO stage: 0, 1, or 2 (daybreak's own); 3 or more falls back to 2"),
    Flag("-pn", 1, "processes (-pi tcp or fs)"),
    Flag("-pr", 0, "rank of this process (-pi tcp or fs)"),
    Flag("-pg", 8, "GPUs per machine (-pi tcp or fs)"),
    Flag("-pi", "mpi", "how processes meet: mpi (mpirun, torchrun), tcp, fs", rule=one_of("mpi", "tcp", "fs")),
    Flag("-ps", "", "address of rank 0 (-pi tcp)"),
    Flag("-pf", "", "shared folder (-pi fs)"),
]  # fmt: skip
BY_NAME = {flag.name: flag for flag in FLAGS}
Values = dict[str, Any]


def parse(argv: Sequence[str]) -> Values:
    """Flag -> value, defaults filled in; the last of equal flags wins. ConfigError for what llm.c would not notice."""
    values = {flag.name: flag.default for flag in FLAGS}
    for i in range(0, len(argv), 2):
        name = argv[i]
        flag = BY_NAME.get(name)
        if flag is None:
            raise ConfigError(f"unknown flag {name!r}; {meant(name, BY_NAME, 'none has this name.')} --help lists all.")
        if i + 1 == len(argv):
            raise ConfigError(f"{name} needs a value: {flag.doc}.")
        values[name] = _value(flag, argv[i + 1])
    return values


def _value(flag: Flag, text: str) -> Any:
    kind = type(flag.default)
    try:
        value = kind(text)
        if kind is not str and ("_" in text or not abs(value) < float("inf")):  # Python's 1_000 is 1 in C
            raise ValueError
    except ValueError:
        words = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{flag.name} {text} must be {words}; the default is {flag.default}.") from None
    if flag.rule is not None and not flag.rule.holds(value):
        raise ConfigError(f"{flag.name} {text} {flag.rule.text}; the default is {flag.default}.")
    return value


def launch(values: Values, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of torch's initialisation (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) that flags and launcher mean.

    -pi fs gives INIT_METHOD, a file:// URL. Raises ConfigError for -pi tcp without -ps, fs without -pf, or a rank that
    there is not.
    """
    how, world, rank = values["-pi"], values["-pn"], values["-pr"]
    if how == "mpi":
        return launched({"MASTER_PORT": PORT, **environ})  # where the launcher says, if it does
    if not 0 <= rank < world:
        raise ConfigError(f"-pr {rank} must be below -pn {world}, the number of processes, and at least 0.")
    if values["-pg"] < 1:
        raise ConfigError(f"-pg {values['-pg']} must be at least 1; the default is 8.")
    made = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % values["-pg"])}
    needed = {"tcp": "-ps", "fs": "-pf"}[how]
    if not values[needed]:
        raise ConfigError(f"-pi {how} needs {needed}: {BY_NAME[needed].doc}.")
    if how == "tcp":
        return made | {"MASTER_ADDR": values["-ps"], "MASTER_PORT": PORT}
    return made | {"INIT_METHOD": f"file://{Path(values['-pf']).resolve()}/daybreak.sync"}


def translate(values: Values, world: int = 1, base: Config | None = None, tokenizer: str = "") -> Config:
    """The Config that the flags mean for `world` processes. base: of the run to resume, or with the model of -e.

    Checked only for the flags' own values: `train` checks the rest.
    """
    out = Path(values["-o"] or f"runs/llmc-{time.strftime('%Y%m%d-%H%M%S')}")
    steps, micro = max(values["-x"], 0), values["-b"] * values["-t"] * world
    keys: dict[str, Any] = {flag.key: values[flag.name] for flag in FLAGS if flag.key}
    keys |= {
        "data.train": values["-j"] if values["-a"] else values["-i"],
        "batch.total_tokens": max(values["-d"], 0) or micro,
        "run.steps": steps,
        # As in llm.c, whatever a resumed run was started with; a warmup may be longer than the run.
        "optim.horizon": max(steps, values["-u"]) if steps else 0,
        "eval.tokens": ALL_TOKENS if values["-m"] == -1 else values["-m"] * micro,
        "eval.sample_every": max(values["-s"], 0),
        "eval.sample_tokens": max(values["-g"] - 1, 0),
        "checkpoint.every": max(values["-n"], 0) if values["-o"] else 0,
        "checkpoint.keep": 2,  # of daybreak's own; -nk is about the .bin files
        "run.overfit": bool(values["-a"]),
        "precision.tf32": bool(values["-f"]),
        "precision.masters": "auto" if values["-w"] else "none",
        "eval.hellaswag": HELLASWAG if values["-h"] and Path(HELLASWAG).is_file() else "",
        "batch.recompute": min(max(values["-r"], 0), 2),
        "parallel.zero": min(max(values["-z"], 0), 2) if world > 1 else 0,
        "log.display": "plain",
        "run.dir": str(out.parent),
        "run.name": out.name,
    }
    if tokenizer:
        keys["data.tokenizer"] = tokenizer
    return (base or Config(model=parse_shape(values["-e"]))).override(keys)


# ---- what is printed


def parameter_table(values: Values, config: Config, world: int, start: str, epoch: int, val: int) -> list[str]:
    """llm.c's table, line by line. start: where the weights come from. epoch: its steps. val: tokens of that split."""
    from daybreak.engine.device import pick_compute, pick_device
    from daybreak.interop.source import layout
    from daybreak.training.setup import describe_device

    device = pick_device(config.run.device)
    compute = pick_compute(config.precision.compute, device)
    name, peak = describe_device(device, compute)
    tf32 = compute == "fp32" and config.precision.tf32 and device.type == "cuda"
    m, micro = config.model, values["-b"] * values["-t"] * world
    val_steps = val // micro if values["-m"] == -1 else values["-m"]
    parameters = sum(math.prod(shape) for _, _, shape in layout(m))
    shown = values | {"-i": config.data.train, "-o": values["-o"] or "NULL", "-d": config.batch.total_tokens}
    shown |= {"-ge": max(values["-ge"], 0), "-w": "enabled" if values["-w"] else "disabled"}
    parts: list[list[tuple[str, object]]] = [
        [("Parameter", "Value")],
        [(f.row, format(shown[f.name], f.form)) for f in FLAGS if f.row],
        [("device", name), ("peak TFlops", f"{peak / 1e12:.1f}" if peak else "n/a"),
         ("precision", "TF32" if tf32 else compute.upper())],
        [("weight init method", start), ("max_sequence_length T", m.max_T), ("vocab_size V", m.V),
         ("padded_vocab_size Vp", m.Vp), ("num_layers L", m.L), ("num_heads NH", m.NH), ("channels C", m.C),
         ("num_parameters", parameters)],
        [("train_num_batches", config.run.steps or epoch), ("val_num_batches", val_steps)],
        [("run hellaswag", "yes" if config.eval.hellaswag else "no")],
        [("num_processes", world), ("zero_stage", config.parallel.zero)],
    ]  # fmt: skip
    rule = f"+{'-' * 23}+{'-' * 52}+"
    rows = [[*(f"| {key:<21} | {value!s:<50} |" for key, value in part), rule] for part in parts]
    size = parameters * (2 if compute == "bf16" else 4)
    return [
        rule,
        *chain(*rows),
        f"num_parameters: {parameters} => bytes: {size}",
        f"allocated {size >> 20} MiB for model parameters",
        f"batch_size B={values['-b']} * seq_len T={values['-t']} * num_processes={world} and "
        f"total_batch_size={config.batch.total_tokens}",
        f"=> setting grad_accum_steps={config.batch.total_tokens // micro}",
    ]


HELP = (["--help"], ["-help"])


class _Stdout(logging.Handler):
    """Everything on stdout, as llm.c does it, and results of evaluation in its form."""

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"^step \d+: (val loss [^ ]+|HellaSwag: .*=[^(]*?)( \(.*)?$", r"\1", self.format(record))
        text = re.sub(r"((?:loss|norm) [^ ]+) \|", r"\1 (+nanz)|", text)  # what we leave out while it is unknown
        print(text, flush=True)


# ---- the .bin checkpoints


def bin_writer(values: Values, config: Config, world: int) -> Callable[..., None]:
    """The action after each checkpoint that training saved: write llm.c's files of it, and delete old ones.

    They are those of `world` processes, at ZeRO 1 (llm.c's only stage) if we have one and it divides every tensor.
    Files that the disk refuses are a warning, as checkpoint.on_error says. must: an Error instead.
    """
    from daybreak.interop import llmc_files
    from daybreak.interop.source import Export
    from daybreak.state.checkpoint import load_checkpoint

    every, keep, major = values["-n"], values["-nk"], values["-nm"]

    def write(path: Path, must: bool = False) -> None:
        checkpoint, folder = load_checkpoint(path, "size"), path.parents[1]  # wherever the run's folder is by now
        step, saved = checkpoint.step, checkpoint.manifest
        if step == 0 or (step % every and step != saved["config"]["run.steps"]):
            return  # saved for another reason: a signal, given weights
        dtype = "bf16" if saved["compute"] == "bf16" else "fp32"
        source, samples = Export(checkpoint, whole=True), llmc_files.loader_samples(config, world)
        zero = int(config.parallel.zero > 0 and all(math.prod(x) % world == 0 for x in source.shapes.values()))
        try:
            llmc_files.write_checkpoint(folder, source, dtype=dtype, world=world, zero=zero, samples=samples)
        except Error as error:
            with suppress(OSError):
                llmc_files.remove_checkpoint(folder, step)
            if must or isinstance(error, ConfigError) or config.checkpoint.on_error == "stop":
                raise
            logging.getLogger("daybreak").warning("not written, training continues: %s", error)
            return
        for old in llmc_files.done_steps(folder)[keep:] if keep > 0 else []:
            if not major or old % major:
                llmc_files.remove_checkpoint(folder, old)

    return write


# ---- the program


def main(argv: Sequence[str] | None = None) -> int:
    """Run llm.c's command line (default: the process's own) and return the exit code (docs/files.md)."""
    log = logging.getLogger("daybreak")
    log.handlers, log.propagate = [_Stdout()], False
    log.setLevel(logging.INFO)
    if argv is None:  # libraries parse sys.argv too, and would take our flags for theirs
        argv, sys.argv = sys.argv[1:], sys.argv[:1]
    given = [os.path.expanduser(arg) for arg in argv]
    guard_streams(result=given in HELP)  # else stdout is the log, as in llm.c

    def body() -> None:
        with Stop().handling_signals() as stop:
            _run(given, stop)

    return ending("daybreak.llmc", body)


def _run(argv: list[str], stop: Stop) -> None:
    if argv in HELP:
        print("Usage: python -m daybreak.llmc [-flag value]...")
        print("\n".join(f"  {f.name:4} {f.doc} ({f.default!r})" for f in FLAGS))
        return
    values = parse(argv)
    found = launch(values, os.environ)
    world, chief = int(found["WORLD_SIZE"]), found["RANK"] == "0"
    if world > 1:
        os.environ.update(found)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stop.group = group = connect(os.environ, Config().parallel.timeout, lambda: stop.reason)
    with group.failing_together():  # rank 0 looks at the folder, which it soon fills
        config, resume, init, start = group.first(lambda: _begin(values, world))
    config.check(ranks=world)
    from daybreak.data.dataset import open_dataset  # not above: what it imports may read our command line

    data, T = open_dataset(config.data.name, train_glob=config.data.train, val_glob=config.data.val), config.T
    epoch = config.steps_in(sum((shard.tokens - 1) // T * T for shard in data.train), world)
    if not config.run.steps and config.schedule.warmup:
        config = config.override({"optim.horizon": max(epoch, config.schedule.warmup)})
    if chief:
        val = sum(shard.tokens for shard in data.val)
        print("\n".join(parameter_table(values, config, world, start, epoch, val)), flush=True)
        for flag in FLAGS:
            if flag.no_effect and values[flag.name] != flag.default:
                print(f"{flag.name} {values[flag.name]}: no effect ({flag.no_effect})", flush=True)
        if values["-z"] > max(config.parallel.zero, 1):
            print(f"-z {values['-z']}: not supported for {world} process(es), falling back to {config.parallel.zero}")
    else:
        logging.getLogger("daybreak").setLevel(logging.WARNING)

    from daybreak.interop import llmc_files
    from daybreak.training.loop import train

    on_save = bin_writer(values, config, world) if config.checkpoint.every else None
    run = train(config, resume=resume, init_from=init, stop=stop, on_save=on_save)
    if not chief:
        return
    newest = run.checkpoints[0]
    if on_save is not None and checkpoint_step(newest) not in llmc_files.done_steps(run.path):
        on_save(newest, must=True)  # the disk refused them, or a kill came between, and there is nothing left to train
    samples = run.metrics("sample") if config.eval.sample_tokens else []
    text = samples[-1]["text"] + "\n" if samples else ""  # a run that had nothing left to train may have none
    print(f"generating:\n---\n{text}---")
    times = [record["ms"] for record in run.metrics("step")][1:]
    print(f"total average iteration time: {statistics.fmean(times) if times else 0.0:f} ms")


def _begin(values: Values, world: int) -> tuple[Config, Path | None, Path | None, str]:
    """The configuration, the folder to resume, the file of initial weights, and where they are from in words."""
    from daybreak.interop import llmc_files, open_source
    from daybreak.interop.source import make_run

    out = Path(values["-o"]) if values["-o"] else None
    if values["-y"] and out is None:
        raise ConfigError("-y 1 resumes what is in the output folder; give it with -o.")
    if out is not None and out.is_dir() and any(out.iterdir()):
        if not values["-y"]:
            raise ConfigError(f"-o {out} is not empty; continue what is in it with -y 1, or remove it.")
        ours = max(map(checkpoint_step, list_checkpoints(out / "checkpoints")), default=-1)
        theirs = max(llmc_files.done_steps(out), default=-1)
        if theirs > ours:
            source = open_source(out)
            make_run(source, translate(values, world, Config(model=source.model), source.tokenizer.name), into=out)
        if max(theirs, ours) >= 0:
            return translate(values, world, run_config(out)), out, None, "intermediate checkpoint"
    again = out if out is not None and is_run(out) else None  # it stopped before its first save
    if not values["-e"].endswith(".bin"):
        if not is_shape(values["-e"]) or parse_shape(values["-e"]).arch != "gpt2":
            shapes = "d6 ... d84, gpt3:c384 ... c12288"
            raise ConfigError(f"-e {values['-e']} is neither a .bin file nor llm.c's shape: {shapes}.")
        return translate(values, world), again, None, values["-e"]
    source = open_source(values["-e"])
    config = translate(values, world, Config(model=source.model), source.tokenizer.name)
    return config, again, Path(values["-e"]), values["-e"]


if __name__ == "__main__":
    sys.exit(main())
