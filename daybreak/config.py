"""The configuration of a run: `Config`, its checks, and where its values come from.

Precedence: defaults < shape < recipe < saved run < command line. `Config` is immutable: `override` returns a changed
copy, `check` raises ConfigError with one sentence that names key, value, rule and fix, `to_toml` writes the complete,
re-runnable file. `resolve` turns what the user typed into a Config; `check_resume` says what a resumed run may change.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from daybreak import config_keys as keys
from daybreak.checked import read_bytes
from daybreak.config_keys import check_rules, toml_value
from daybreak.errors import CheckpointError, ConfigError
from daybreak.formatting import meant, quoted
from daybreak.manifest import MANIFEST, NewerFormat, is_run, newest_manifest
from daybreak.shapes import ARCHS, SHAPES, GPT2Config, Shape, family, is_shape, model_config, parse_shape

SCHEMA = 1
MOST_TOML = 1 << 20  # bytes
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Config:
    """Everything that decides a training run. Sections in the order of config.toml."""

    model: Shape = field(default_factory=GPT2Config)
    lora: keys.LoraConfig = field(default_factory=keys.LoraConfig)
    data: keys.DataConfig = field(default_factory=keys.DataConfig)
    batch: keys.BatchConfig = field(default_factory=keys.BatchConfig)
    optim: keys.OptimConfig = field(default_factory=keys.OptimConfig)
    schedule: keys.ScheduleConfig = field(default_factory=keys.ScheduleConfig)
    precision: keys.PrecisionConfig = field(default_factory=keys.PrecisionConfig)
    kernels: keys.KernelsConfig = field(default_factory=keys.KernelsConfig)
    parallel: keys.ParallelConfig = field(default_factory=keys.ParallelConfig)
    eval: keys.EvalConfig = field(default_factory=keys.EvalConfig)
    checkpoint: keys.CheckpointConfig = field(default_factory=keys.CheckpointConfig)
    guard: keys.GuardConfig = field(default_factory=keys.GuardConfig)
    log: keys.LogConfig = field(default_factory=keys.LogConfig)
    cost: keys.CostConfig = field(default_factory=keys.CostConfig)
    run: keys.RunConfig = field(default_factory=keys.RunConfig)

    @classmethod
    def from_target(cls, target: str) -> Config:
        """The configuration of a recipe, TOML file, shape or existing run, as `daybreak train TARGET` reads it."""
        return resolve(target)[0]

    @property
    def T(self) -> int:
        """Sequence length in tokens, with batch.T = 0 filled in."""
        return self.batch.T or self.model.max_T

    def tokens_at(self, step: int, ranks: int = 1) -> int:
        """Tokens of the (0-based) step `step` over all ranks, batch.ramp and total_tokens = 0 filled in."""
        total = self.batch.total_tokens or self.batch.B * self.T * ranks
        for start, tokens in self.batch.ramp:
            if step >= start:
                total = tokens
        return total

    def tokens_between(self, start: int, stop: int, ranks: int = 1) -> int:
        """Tokens of the updates after the first `start` up to the first `stop`, whatever batch.ramp does."""
        edges = [start, *(s for s, _ in self.batch.ramp if start < s < stop), stop]
        return sum((b - a) * self.tokens_at(a, ranks) for a, b in pairwise(edges))

    def steps_in(self, tokens: int, ranks: int = 1) -> int:
        """The most steps that take no more than `tokens` tokens in all."""
        steps = 0
        for edge in (*(s for s, _ in self.batch.ramp), None):
            size = self.tokens_at(steps, ranks)
            fitting = (tokens - self.tokens_between(0, steps, ranks)) // size
            if edge is None or fitting < edge - steps:
                return steps + fitting
            steps = edge
        raise AssertionError

    def items(self) -> Iterator[tuple[str, Any]]:
        """(dotted name, value) of every key, in the order of config.toml."""
        for section in fields(self):
            values = getattr(self, section.name)
            for f in fields(values):
                yield f"{section.name}.{f.name}", getattr(values, f.name)

    def override(self, values: Mapping[str, Any]) -> Config:
        """A copy with dotted keys replaced: `config.override({"optim.lr": 1e-3, "batch.B": 8})`.

        Raises ConfigError for an unknown key (with the nearest one) or a value of the wrong type; ranges are
        checked by `check`.
        """
        changed: dict[str, dict[str, Any]] = {}
        known = keys_of(_family(values, self.model.arch).arch)
        for name, value in values.items():
            if name not in known:
                raise unknown_key(name, known)
            section, leaf = name.split(".")
            changed.setdefault(section, {})[leaf] = _typed(name, value, known[name])
        made: dict[str, Any] = {s: replace(getattr(self, s), **v) for s, v in changed.items() if s != "model"}
        if "model" in changed:
            made["model"] = model_config(changed["model"], self.model)
        return replace(self, **made)

    def concrete(self, epoch_tokens: int, *, ranks: int = 1) -> Config:
        """A checked copy with the defaults that depend on others worked out: T, total_tokens, steps, horizon, warmup.

        This is what a new run stores, so that a later `--steps` leaves its learning-rate schedule alone.
        epoch_tokens: tokens in one pass over the training data. Raises ConfigError if one batch takes more than that.
        """
        epoch_steps = self.steps_in(epoch_tokens, ranks)
        asked = self.run.tokens or int(self.run.epochs * epoch_tokens)
        steps = self.run.steps or (max(1, self.steps_in(asked, ranks)) if asked else epoch_steps)
        largest = max(self.tokens_at(step, ranks) for step in (0, *(step for step, _ in self.batch.ramp)))
        if largest > epoch_tokens and not self.run.overfit:
            said = f"one step takes {largest} tokens, more than all of data.name = {self.data.name!r}"
            micro = self.batch.B * self.T * ranks
            most = 0 if self.batch.ramp else epoch_tokens // micro * micro
            B = epoch_tokens // self.T // ranks
            if most:
                fix = f"lower batch.total_tokens to {most} or less"
            elif B and not self.batch.ramp:
                fix = f"use --batch.B {B} --batch.total_tokens {B * self.T * ranks}"
            else:
                fix = "lower batch.total_tokens, batch.ramp or batch.B"
            raise ConfigError(f"{said}; {fix}, or prepare more data.")
        horizon = self.optim.horizon or steps
        warmup = self.schedule.warmup if self.schedule.warmup >= 0 else min(700, horizon // 20)
        made = self.override(
            {
                "batch.T": self.T,
                "batch.total_tokens": self.tokens_at(0, ranks),  # a ramp starts later
                "run.steps": steps,
                "run.epochs": 0,  # they have become steps
                "run.tokens": 0,
                "optim.horizon": horizon,
                "schedule.warmup": warmup,
            }
        )
        made.check(ranks=ranks)
        return made

    def check(self, *, ranks: int = 1) -> None:
        """Raise ConfigError for the first key, in file order, whose type or value is wrong, then for conflicts."""
        known = keys_of(self.model.arch)
        for name, value in self.items():
            _typed(name, value, known[name])
        self.model.check()
        for section in SECTIONS:
            check_rules(section, getattr(self, section))
        if len(given := [f"{name} = {value}" for name, value in self.items() if name in LENGTH and value]) > 1:
            raise ConfigError(f"{' and '.join(given)}: give only one of them.")
        if (self.precision.compute, self.precision.moments) == ("fp64", "bf16"):
            raise ConfigError('precision.moments = "bf16" is for fp32, bf16 and fp8, not precision.compute = "fp64".')
        self._check_data()
        self._check_batch(ranks)
        horizon = self.optim.horizon or self.run.steps
        if horizon and self.schedule.warmup > horizon:
            rule = f"must be at most the learning-rate horizon of {horizon} steps"
            fix = "lower it, or set it to -1 for min(700, horizon // 20)"
            raise ConfigError(f"schedule.warmup = {self.schedule.warmup} {rule}; {fix}.")

    def _check_data(self) -> None:
        data = self.data
        if bool(data.train) != bool(data.val):
            said = f"data.train = {toml_value(data.train)} and data.val = {toml_value(data.val)}"
            raise ConfigError(f"{said} must be given together; give both globs, or neither and data.name.")
        if not data.name and not data.train:
            raise ConfigError('data.name = "" must name a dataset; give one, or data.train and data.val.')

    def _check_batch(self, ranks: int) -> None:
        batch = self.batch
        if self.model.max_T < batch.T:
            rule = f"must be at most model.max_T = {self.model.max_T}"
            raise ConfigError(f"batch.T = {batch.T} {rule}; lower it or raise model.max_T.")
        if batch.total_tokens:
            self._check_multiple("batch.total_tokens", batch.total_tokens, ranks)
        before = 0
        for step, tokens in batch.ramp:
            if step <= before or tokens < 1:
                rule = "must be [step, total_tokens] pairs with steps above 0 and ascending and tokens above 0"
                raise ConfigError(f"batch.ramp = {toml_value(batch.ramp)} {rule}; [{step}, {tokens}] is not.")
            before = step
            self._check_multiple(f"batch.ramp at step {step}: total_tokens", tokens, ranks)

    def _check_multiple(self, name: str, total: int, ranks: int) -> None:
        micro = self.batch.B * self.T * ranks
        if total % micro == 0:
            return
        low, high = total // micro * micro, -(-total // micro) * micro
        fix = f"{low} or {high}" if low else f"{high}"
        smaller = next((B for B in range(self.batch.B - 1, 0, -1) if total % (B * self.T * ranks) == 0), 0)
        fewer = next((n for n in range(ranks - 1, 0, -1) if total % (self.batch.B * self.T * n) == 0), 0)
        kept = f"batch.B = {smaller}" if smaller else f"{fewer} ranks"
        fix = f"keep it with {kept}, or make it {fix}" if smaller or fewer else f"use {fix}"
        product = f"batch.B * T = {self.batch.B} * {self.T}"
        if ranks > 1:
            product = f"batch.B * T * ranks = {self.batch.B} * {self.T} * {ranks}"
        raise ConfigError(f"{name} = {total} must be a multiple of {product} = {micro}; {fix}.")

    def to_toml(self) -> str:
        """The complete file, `schema` first, each key with its meaning. Reading it back gives an equal Config."""
        lines, known = [f"schema = {SCHEMA}"], keys_of(self.model.arch)
        for name, value in self.items():
            section, leaf = name.split(".")
            if f"[{section}]" not in lines:
                lines += ["", f"[{section}]"]
            lines.append(f"{leaf} = {toml_value(value)}  # {known[name].metadata['doc']}")
        return "\n".join(lines) + "\n"


LENGTH = ("run.steps", "run.epochs", "run.tokens")  # only one of them is given
PATHS = ("data.name", "data.train", "data.val", "data.dir", "eval.hellaswag", "run.dir")  # ~ is the home folder there
SECTIONS = [section.name for section in fields(Config)]


@cache
def keys_of(arch: str = GPT2Config.arch) -> dict[str, Field[Any]]:
    """Every key of a configuration whose model is of this family, by dotted name, in the order of config.toml."""
    sections = vars(Config(model=family(arch)()))
    return {f"{section}.{f.name}": f for section, values in sections.items() for f in fields(values)}


def _family(values: Mapping[str, Any], default: str) -> type[Shape]:
    """The family that dotted keys ask for. Another type than text is refused where the types of all are checked."""
    arch = values.get("model.arch", default)
    return family(arch if isinstance(arch, str) else default)


def every_key() -> dict[str, Field[Any]]:
    """The keys of all families together. The first of them describes a key that several have."""
    found: dict[str, Field[Any]] = {}
    for arch in ARCHS:
        found = keys_of(arch) | found
    return found


_KIND_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text",
               tuple: "a list of [step, tokens] pairs"}  # fmt: skip


def _typed(name: str, value: Any, key: Field[Any]) -> Any:
    """`value` as the type of the key of this name (a whole number may stand for a float). ConfigError if it is another
    type."""
    kind, default = type(key.default), toml_value(key.default)
    right = type(value) is kind and not (isinstance(value, int) and abs(value) >= 2**63)
    if kind is float and type(value) is int:
        right, value = True, float(value)
    if kind is float and right and not math.isfinite(value):
        raise ConfigError(f"{name} = {value} must be finite; the default is {default}.")
    if kind is tuple and isinstance(value, list | tuple):  # batch.ramp; TOML and JSON have lists
        right = all(isinstance(e, list | tuple) and len(e) == 2 and all(type(x) is int for x in e) for e in value)
        value = tuple(map(tuple, value)) if right else value
    if kind is str and right:
        if name in PATHS:  # of each source of a mixture
            value = ",".join(map(os.path.expanduser, value.split(",")))
        if re.search("[\ud800-\udfff]", value) or ("\0" in value and name in PATHS):
            raise ConfigError(f"{name} = {shortened(value)} must be valid UTF-8 text, and paths have no NUL.")
    if not right:
        raise ConfigError(f"{name} = {shortened(value)} must be {_KIND_WORDS[kind]}; the default is {default}.")
    return value


def unknown_key(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a key outside `known`: the family that has it, else ours for another program's, or the nearest."""
    for arch in ARCHS:
        if name in keys_of(arch):
            return ConfigError(f"{name} is a key of model.arch {arch}; set model.arch = {arch} too, or leave it out.")
    hint = meant(name, known, "daybreak train tiny --print-config lists all.")
    if ours := keys.theirs(name):
        hint = "daybreak has nothing like it." if ours == keys.NOTHING else f"did you mean {ours!r}?"
    return ConfigError(f"unknown key {shortened(name)}; {hint}")


@dataclass(frozen=True)
class Resume:
    """An existing run that `resolve` was pointed at: its folder and the configuration it was saved with."""

    run: Path
    saved: Config


def run_of(path: Path | str) -> Path:
    """The folder of the run that `path` is, or whose checkpoint it is (runs/NAME/checkpoints/step-N)."""
    path = Path(path).expanduser()
    inside = path.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", path.name)
    return path.parent.parent if inside else path


def recipe_names() -> list[str]:
    """The recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def resolve(target: str | None, overrides: Iterable[tuple[str, str]] = ()) -> tuple[Config, Resume | None]:
    """The checked Config that `target` and the command line's (dotted key, text) pairs mean.

    The form of `target` decides: a .toml file, an existing run directory (then a Resume comes back too), a shipped
    recipe, a shape; None stands for the defaults. Raises ConfigError for anything else, with the nearest name.
    """
    config, resume = _base(target)
    given = dict(overrides)
    values = {name: parse_value(name, text) for name, text in given.items()}
    if not values.keys().isdisjoint(LENGTH):  # one of them now replaces another of the recipe
        values = dict.fromkeys(LENGTH, 0) | values
    if "data.name" in values:  # a dataset named now replaces globs that a recipe named
        values = {"data.train": "", "data.val": ""} | values
    of, config = (config.data.name, config.data.train), config.override(values)
    if target in recipe_names() and resume is None and of != (config.data.name, config.data.train):
        config = config.override({"eval.prompt": values.get("eval.prompt", "")})  # the recipe's is of its own data
    if not config.run.name and target is not None:
        path = Path(target)
        config = config.override({"run.name": path.stem if path.suffix == ".toml" else target.replace(":", "-")})
    config.check()
    return config, resume


def _base(target: str | None) -> tuple[Config, Resume | None]:
    if target is None:
        return Config(), None
    path, run = Path(target).expanduser(), run_of(target)
    if path.suffix == ".toml":
        return read_toml(path), None
    if is_run(run):
        run = run if run.name not in ("", "..") else run.resolve()
        # The folder may have been moved or renamed since: it is where it is now.
        saved = run_config(run).override({"run.dir": str(run.parent), "run.name": run.name})
        return saved, Resume(run, saved)
    if target in recipe_names():
        return read_toml(RECIPES / f"{target}.toml"), None
    if is_shape(target):
        return Config(model=parse_shape(target)), None
    if (path / "config.json").is_file():
        model = quoted(target)
        fix = f"train it further with `daybreak finetune {model} --data NAME`, or `daybreak import {model}`"
        raise ConfigError(f"{target} is a model of Hugging Face's, not a run; {fix}.")
    if path.is_dir() or ("/" in target and path.exists()):
        fix = run_hint(target) or "; give a folder that daybreak train made."
        raise ConfigError(f"{target} is not a run: it has no config.toml{fix}")
    if is_run(named := Path(Config().run.dir) / path):
        raise ConfigError(f"unknown target {target!r}; to resume the run of that name give its folder: {named}.")
    if "/" in target:
        fix = run_hint(target) or "; give a run's folder, a recipe.toml, a recipe (tiny) or a shape (d12)."
        raise ConfigError(f"{target} does not exist{fix}")
    known = [*recipe_names(), *SHAPES]
    other = f"Recipes: {', '.join(recipe_names())}; or a shape such as d12, a recipe.toml, or a run's folder."
    raise ConfigError(f"unknown target {target!r}; {meant(target, known, 'none has this name.')} {other}")


def run_hint(path: Path | str) -> str:
    """For a message about what is no run: the run that it is a part of, or that was probably meant, or nothing."""
    run, path = run_of(path), Path(path).expanduser()
    if run != path and is_run(run):
        step = f"--step {int(path.name.removeprefix('step-'))}"
        return f"; it is a checkpoint: give {run}, and {step} to chat, eval, export, sample and serve."
    if path.is_file() and is_run(path.parent):
        return f"; it is a file of a run: give {path.parent}."
    runs = {found.parent.name: found.parent for found in Path(Config().run.dir).glob("*/config.toml")}
    near = difflib.get_close_matches(path.name, runs, 1)
    if near and (not path.exists() or (near == [path.name] and runs[path.name] != path)):
        return f"; did you mean {runs[near[0]]}?"
    inside = sorted(found.parent for found in path.glob("*/config.toml"))
    return f"; it holds {len(inside)} of them: give one, such as {inside[0]}." if inside else ""


def run_config(run: Path) -> Config:
    """The checked configuration of a run: its newest checkpoint's, with what its config.toml says otherwise and may.

    A key that is not in the file has the checkpoint's value. ConfigError names each one that differs and may not.
    """
    file, newest = run / "config.toml", newest_manifest(run)
    saved = None if newest is None else saved_config(*newest)
    config = read_toml(file, saved)
    if newest is not None and saved is not None:
        # An import's checkpoint has seen no data: only its model is settled.
        fixed = _fixed(saved, config, fork=not newest[1]["data"]["fingerprint"], moved=True)
        if said := [f"{name} = {toml_value(now)} instead of {toml_value(was)}" for name, was, now in fixed]:
            fix = "delete these lines to restore the checkpoint's values (or remove the checkpoint of another run)"
            raise ConfigError(f"{file} differs from {newest[0]} in what a run cannot change: {', '.join(said)}; {fix}.")
    try:
        config.check()
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from None
    return config


def saved_config(checkpoint: Path, manifest: Mapping[str, Any]) -> Config:
    """The configuration in a checkpoint's manifest. CheckpointError if it is none, or its model cannot exist."""
    if unknown := sorted(set(manifest["config"]).difference(every_key())):
        raise NewerFormat(f"{checkpoint / MANIFEST} was written by a newer daybreak: it has the key "
                          f"{shortened(unknown[0])}, which this one does not know; upgrade.")  # fmt: skip
    try:
        config = Config().override(manifest["config"])
        config.model.check()
    except ConfigError as e:
        raise CheckpointError(f"{checkpoint / MANIFEST}: config: {e}") from None
    return config


def read_toml(path: Path, base: Config | None = None) -> Config:
    """Read a recipe or a run's config.toml over `base` (None: the defaults). A ConfigError names the file."""
    try:
        tables = tomllib.loads(read_bytes(path, MOST_TOML).decode())
    except FileNotFoundError:
        shipped = ", ".join(recipe_names())
        raise ConfigError(f"{path} does not exist; recipes shipped with daybreak: {shipped}.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} cannot be read as TOML: {e}.") from None
    schema = tables.pop("schema", SCHEMA)
    if type(schema) is not int or schema < 1:
        raise ConfigError(f"{path}: schema = {schema!r} must be a whole number, at least 1; write schema = {SCHEMA}.")
    if schema > SCHEMA:
        raise ConfigError(f"{path}: schema = {schema} is of a newer daybreak (this one reads {SCHEMA}); upgrade.")
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if isinstance(table, dict) and (table or section in SECTIONS):
            values |= {f"{section}.{leaf}": value for leaf, value in table.items()}
        else:
            values[section] = table
    try:
        return (base or Config(model=_family(values, GPT2Config.arch)())).override(values)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None


def parse_value(name: str, text: str) -> Any:
    """A command line value as the type of key `name`. ConfigError for an unknown key or anything but that type."""
    known = every_key()
    if name not in known:
        raise unknown_key(name, known)
    key = known[name]
    kind: type = type(key.default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if name == "run.tokens" and (short := re.fullmatch(r"([0-9.]+)([KMBT])", text.upper())):
            return round(float(short[1]) * 1000 ** (1 + "KMBT".index(short[2])))
        if kind is tuple:
            return _typed(name, tomllib.loads(f"x = {text}")["x"], key)
        return _typed(name, kind(text), key)
    except (ValueError, KeyError):  # TOMLDecodeError is a ValueError
        return _typed(name, text, key)  # as text it is of another type, which is an error


PLACES = ("data.name", "data.dir", "data.train", "data.val")  # of the data


def may_change(name: str, arch: str = GPT2Config.arch) -> bool:
    """Whether a resumed run may change a key."""
    fixed = keys_of(arch)[name].metadata["fixed"]
    return name.partition(".")[0] not in keys.FIXED_SECTIONS if fixed is None else not fixed


def is_untouched_import(run: Path | str) -> bool:
    """Whether `daybreak import` made the run and nobody has trained it yet: all but its model may still change."""
    return (run_of(run) / "imported.json").is_file() and not (run_of(run) / "metrics.jsonl").is_file()


def check_resume(saved: Config, new: Config, *, fork: bool = False, moved: bool = False) -> None:
    """Raise ConfigError if `new` changes what a resumed run may not: what its weights and its data order rest on.

    A run's name and folder may differ from the saved ones: people move and rename runs.
    With fork=True (a new run from the checkpoint, or an untouched import) only the model has to stay.
    With moved=True the data may be in another place: its content is compared later.
    """
    if not (fixed := _fixed(saved, new, fork, moved)):
        return
    fix = "leave it out, or start a new run from the checkpoint with --fork NAME"
    if fork:
        fix = "a new shape is trained from the start, without --fork"
        if fixed[0][0].startswith("lora."):
            fix = "leave it out, or make other adapters with `daybreak finetune`"
    elif fixed[0][0] == "optim.name":
        fix = "leave it out, or start a new run from its weights with --init-from"
    elif fixed[0][0].startswith("model."):
        fix = "leave it out, or train a new run of this shape under another --name"
    each = [f"{k} is {toml_value(was)} in the saved run and cannot become {toml_value(now)}" for k, was, now in fixed]
    raise ConfigError(f"{', '.join(each)}; {fix}.")


def _fixed(saved: Config, new: Config, fork: bool, moved: bool) -> list[tuple[str, Any, Any]]:
    """(key, value in `saved`, value in `new`) of what differs and may not: see `check_resume`."""

    def free(name: str) -> bool:
        if fork:
            return not name.startswith(("model.", "lora."))
        return may_change(name, new.model.arch) or (moved and name in PLACES)

    was = dict(saved.items())
    return [(k, was.get(k), now) for k, now in new.items() if now != was.get(k) and not free(k)]
