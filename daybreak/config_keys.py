"""The keys of a configuration: one dataclass per section, every key with its default, meaning and allowed values.

The meanings are the comments of config.toml and of `--print-config`: this file is their only documentation. The keys
of [model] belong to a family of models, and are in shapes/. `Config`, which joins the sections, is in config.py.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from daybreak import checked
from daybreak.checked import Rule
from daybreak.errors import ConfigError


def at_least(low: int) -> Rule:
    return Rule(f"must be at least {low}", lambda x: bool(x >= low))


def within(low: int, high: int) -> Rule:
    return Rule(f"must be from {low} to {high}", lambda x: bool(low <= x <= high))


def one_of(*choices: object) -> Rule:
    return Rule(f"must be {' or '.join(map(str, choices))}", lambda x: x in choices)


POSITIVE = Rule("must be greater than 0", lambda x: bool(x > 0))
FRACTION = Rule("must be between 0 and 1", lambda x: bool(0 <= x <= 1))
BETA = Rule("must be at least 0 and below 1", lambda x: bool(0 <= x < 1))
FOLDER_NAME = Rule(
    "must be a plain folder name, without '/' and not starting with '.' or '-'",
    lambda s: s == "" or (s.isprintable() and "/" not in s and s[0] not in ".-"),
)
TOKENIZER = Rule("must be empty, gpt2, bytes, gpt2-N or a set's hf-...", lambda s: not s or checked.TOKENIZER.holds(s))
SINKS = Rule(
    "must be tensorboard or wandb, or both with a comma between",
    lambda s: s == "" or set(s.split(",")) <= {"tensorboard", "wandb"},
)
DEVICE = Rule(
    "is not supported: daybreak trains on the CPU and on NVIDIA GPUs (auto, cpu, cuda or cuda:N)",
    lambda s: bool(re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", s)),
)


def _is_step_range(text: str) -> bool:
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    return match is not None and int(match[1]) < int(match[2])


def _windows(text: str) -> list[tuple[int, int]]:
    return [(int(first), int(last)) for first, last in re.findall("([0-9]{1,9})-([0-9]{1,9})", text)]


def _are_windows(text: str) -> bool:
    windows = _windows(text)
    firsts = [first for first, _ in windows]
    whole = text == ",".join(f"{first}-{last}" for first, last in windows)
    return whole and all(0 < first <= last for first, last in windows) and firsts == sorted({*firsts})


WINDOWS = Rule("must be windows A-B of steps, with commas between, A from 1 to B and above the A before", _are_windows)
STEP_RANGE = Rule("must be A:B, two step numbers with A below B", lambda s: s == "" or _is_step_range(s))


# Names in nanoGPT and in Hugging Face's Trainer -> our keys; docs/coming-from.md says where values differ.
NOTHING = "nothing"
THEIRS = {
    "batch_size": "batch.B", "per_device_train_batch_size": "batch.B", "block_size": "model.max_T",
    "gradient_accumulation_steps": "batch.total_tokens", "n_layer": "model.L", "n_head": "model.NH",
    "n_embd": "model.C", "learning_rate": "optim.lr", "min_lr": "schedule.final_frac", "max_iters": "run.steps",
    "max_steps": "run.steps", "lr_decay_iters": "optim.horizon", "warmup_iters": "schedule.warmup",
    "warmup_steps": "schedule.warmup", "grad_clip": "optim.clip", "max_grad_norm": "optim.clip",
    "eval_interval": "eval.every", "eval_iters": "eval.tokens", "out_dir": "run.name", "output_dir": "run.name",
    "wandb_log": "log.sinks", "report_to": "log.sinks", "dtype": "precision.compute", "compile": NOTHING,
    "dropout": NOTHING, "bias": NOTHING,
}  # fmt: skip


def theirs(name: str) -> str:
    """Our key for a name of another program, in any section and with or without dashes: "" if it is none of them."""
    leaf = name.rpartition(".")[2]
    return next((key for word, key in THEIRS.items() if _joined(word) == _joined(leaf)), "")


def _joined(name: str) -> str:
    return re.sub("[-_]", "", name.lower())


# Weights and the order of the data rest on these sections, so a resumed run keeps them.
FIXED_SECTIONS = ("model", "lora", "data", "optim", "schedule", "precision")


def key(default: Any, doc: str, rule: Rule | None = None, *, fixed: bool | None = None) -> Any:
    """A configuration key: its default, its meaning with unit (the comment in TOML), its allowed values, and whether it
    is fixed: a resumed run may not change it (None: as the rest of its section)."""
    return field(default=default, metadata={"doc": doc, "rule": rule, "fixed": fixed})


def toml_value(value: Any) -> str:
    """A TOML value. json's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return repr(value)


def check_rules(section: str, values: Any) -> None:
    """Raise ConfigError for the first key of a section, a dataclass, whose value is not allowed."""
    for f in fields(values):
        value, rule = getattr(values, f.name), f.metadata["rule"]
        if rule is not None and not rule.holds(value):
            said = f"{section}.{f.name} = {toml_value(value)} {rule.text}"
            raise ConfigError(f"{said}; the default is {toml_value(f.default)}.")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of linear layers (models/adapters.py), which then are all that is trained."""

    rank: int = key(0, "rank of the adapters, 8 to 64 as a rule; 0 = none: all parameters are trained", within(0, 4096))
    alpha: float = key(0.0, "adapters are multiplied by alpha / rank; 0 = twice the rank", at_least(0))
    targets: str = key("*", "linear layers with adapters, as patterns with commas between: q,v or attproj or h.0.*")
    rslora: bool = key(False, "multiply by alpha / sqrt(rank) instead, for high ranks (rsLoRA)")
    base: str = key(
        "compute",
        "how frozen matrices are held: compute (as precision.compute), nf4 (4 bits, as QLoRA) or fp8 (for matmuls too)",
        one_of("compute", "nf4", "fp8"),
    )  # fmt: skip

    @property
    def scale(self) -> float:
        """The factor of adapters (Hu et al. 2021; with the root Kalajdzievski 2023)."""
        return (self.alpha or 2.0 * self.rank) / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class DataConfig:
    """Which tokens to train and validate on."""

    name: str = key("stdlib", "prepared dataset (a folder in data.dir), a folder of token shards, or NAME=WEIGHT,...")
    train: str = key("", "glob of training shards; use it with data.val, instead of data.name")
    val: str = key("", "glob of validation shards")
    tokenizer: str = key("", "gpt2, bytes or gpt2-N; empty = the tokenizer of the data, else gpt2", TOKENIZER)
    dir: str = key("data", "folder that holds the prepared datasets")
    bos: bool = key(False, "start training samples only at the start of a document; skip the rest of a cut document")
    best_fit: bool = key(
        False, "fill each training row with whole documents that fit best, and cut one only where none fits"
    )
    packed: bool = key(False, "rows hold several examples, as `prepare --as chat` makes them; the data decides")
    skip: str = key(
        "",
        "A-B,C-D = before step A, leave out the batches of steps A to B; then before step C ...",
        WINDOWS,
        fixed=False,
    )

    @property
    def windows(self) -> list[tuple[int, int]]:
        """The first and last step of each window of `skip`."""
        return _windows(self.skip)


@dataclass(frozen=True)
class BatchConfig:
    """Tokens per step, and how many of them are in memory at once."""

    B: int = key(4, "sequences per micro-step on each GPU", within(1, 1 << 16))
    T: int = key(0, "sequence length in tokens; 0 = model.max_T", at_least(0), fixed=True)
    total_tokens: int = key(0, "tokens per step over all ranks; 0 = one micro-step each (B * T * ranks)", at_least(0))
    ramp: tuple[tuple[int, int], ...] = key((), "growing batch: [[step, total_tokens], ...], each from that step on")
    recompute: int = key(0, "recomputed in backward: 0 nothing, 1 GELU, 2 also layernorm, 3 whole blocks", within(0, 3))


@dataclass(frozen=True)
class OptimConfig:
    """The optimizers and gradient clipping."""

    name: str = key(
        "adamw", "adamw, or muon: Muon for the blocks' matrices, AdamW for the rest", one_of("adamw", "muon")
    )
    lr: float = key(6e-4, "peak learning rate", at_least(0))
    beta1: float = key(0.9, "AdamW decay of the first moment", BETA)
    beta2: float = key(0.95, "AdamW decay of the second moment", BETA)
    eps: float = key(1e-8, "AdamW denominator offset", POSITIVE)
    weight_decay: float = key(0.1, "decoupled weight decay, on matrices only", at_least(0))
    muon_lr: float = key(0.02, "Muon's peak learning rate; it follows the schedule of optim.lr", at_least(0))
    muon_momentum: float = key(0.95, "Muon's Nesterov momentum", BETA)
    muon_warmup: int = key(300, "steps over which Muon's momentum rises from 0.85", at_least(0))
    muon_beta2: float = key(0.95, "Muon's decay of the second moment", BETA)
    muon_final_momentum: float = key(
        0.0, "Muon's momentum at the end, to which it falls while the learning rate does; 0 = it stays", BETA
    )
    muon_weight_decay: float = key(0.1, "Muon's decoupled weight decay, where the update agrees", at_least(0))
    muon_decay_schedule: str = key(
        "constant", "Muon's weight decay over time: constant, or cosine (to 0 at the end)", one_of("constant", "cosine")
    )
    clip: float = key(1.0, "largest global gradient norm; 0 = no clipping", at_least(0))
    z_loss: float = key(
        0.0, "weight of logsumexp(logits)^2, which is minimised too but in no reported loss; 0 = none", at_least(0)
    )
    horizon: int = key(0, "steps the learning-rate schedule spans; 0 = run.steps", at_least(0), fixed=False)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time."""

    name: str = key(
        "cosine", "cosine, linear, constant, wsd or wsd-linear (wsd with a linear decay)",
        one_of("cosine", "linear", "constant", "wsd", "wsd-linear"),
    )  # fmt: skip
    warmup: int = key(-1, "steps of linear warmup; -1 = min(700, horizon // 20)", at_least(-1))
    final_frac: float = key(0.0, "learning rate at the end, as a fraction of the peak", FRACTION)
    wsd_frac: float = key(0.8, "wsd and wsd-linear: fraction of the horizon before the decay starts", FRACTION)

    def decays_from(self, horizon: int) -> int:
        """The step from which on the learning rate falls; the horizon if it never does."""
        match self.name:
            case "constant":
                return horizon
            case "wsd":
                return int(self.wsd_frac * horizon)
            case "wsd-linear":  # as nanochat, which rounds the part that falls
                return horizon - round((1 - self.wsd_frac) * horizon)
        return self.warmup


@dataclass(frozen=True)
class PrecisionConfig:
    """The number formats of arithmetic."""

    compute: str = key(
        "auto",
        "auto (bf16 on CUDA, else fp32), fp32, bf16, fp64, or fp8 (bf16, but blocks' matmuls in fp8 while training)",
        one_of("auto", "fp32", "bf16", "fp64", "fp8"),
    )
    fp8: str = key(
        "h.*",
        "for compute = fp8: patterns of weights whose matmuls are in fp8, with commas between",
    )
    fp8_until: float = key(
        1.0, "for compute = fp8: part of the steps that are in fp8; the last ones are in bf16", FRACTION
    )
    tf32: bool = key(True, "fp32 matmuls may use TF32 on CUDA")
    masters: str = key(
        "auto",
        "master weights for bf16: fp32, split (16 more bits per weight; as exact as fp32, 2 bytes less) or none "
        "(stochastic rounding); auto = split on CUDA, fp32 on CPU",
        one_of("auto", "fp32", "split", "none"),
        fixed=False,
    )
    moments: str = key(
        "fp32", "AdamW's moments: fp32 or bf16 (stochastic rounding; 4 bytes less a weight)", one_of("fp32", "bf16")
    )


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation computes an operation; auto = the best one installed, the others are for comparison."""

    matmul: str = key("auto", "matmuls", one_of("auto", "quack", "cublaslt", "triton", "torch"))
    attention: str = key("auto", "attention", one_of("auto", "fa4", "cudnn", "triton", "torch"))
    norm: str = key("auto", "layernorm", one_of("auto", "triton", "torch"))
    embedding: str = key("auto", "token and position embedding", one_of("auto", "triton", "torch"))
    classifier: str = key("auto", "softmax cross-entropy", one_of("auto", "triton", "torch"))
    guard: str = key("auto", "the decision to clip or skip", one_of("auto", "triton", "torch"))
    optimizer: str = key("auto", "AdamW and the gradient norm", one_of("auto", "triton", "torch"))


@dataclass(frozen=True)
class ParallelConfig:
    """How training state is split between GPUs."""

    zero: int = key(0, "ZeRO stage, split between ranks: 0 nothing, 1 optimizer state, 2 gradients too", within(0, 2))
    bucket_bytes: int = key(33554432, "bytes of gradients that ranks reduce at a time, roughly", at_least(1))
    timeout: float = key(300.0, "seconds to wait for another rank before the run ends and names it", POSITIVE)


@dataclass(frozen=True)
class EvalConfig:
    """Validation and samples during training."""

    every: int = key(250, "steps between validations; 0 = only at the end", at_least(0))
    hellaswag: str = key("", "HellaSwag file (.jsonl, or llm.c's .bin) to score at each validation but the first")
    hellaswag_every: int = key(0, "steps between HellaSwag scores, and one at the end; 0 = at validation", at_least(0))
    hellaswag_examples: int = key(0, "HellaSwag examples to score, evenly spaced; 0 = all", at_least(0))
    tokens: int = key(1048576, "tokens per validation, in whole samples and at most the whole split", at_least(1))
    sample_every: int = key(0, "steps between text samples; 0 = only at the end", at_least(0))
    sample_tokens: int = key(128, "tokens per sample; 0 = no samples", at_least(0))
    prompt: str = key("", "text the samples continue; empty = start of a document")
    temperature: float = key(1.0, "sampling temperature; 0 = always the likeliest token", at_least(0))
    top_k: int = key(0, "sample from the k likeliest tokens; 0 = from all", at_least(0))


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = key(1000, "steps between checkpoints; 0 = only at the end", at_least(0))
    keep: int = key(3, "newest checkpoints to keep; 0 = all", at_least(0))
    major: int = key(0, "checkpoints at multiples of this step are kept for good; 0 = none", at_least(0))
    background: bool = key(True, "save in the background, from a copy in host memory; false = training waits")
    on_error: str = key("warn", "if a save before the last fails: warn and continue, or stop", one_of("warn", "stop"))


@dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped."""

    loss_z: float = key(0.0, "skip updates whose loss z-score exceeds this; 0 = off", at_least(0))
    norm_z: float = key(0.0, "skip updates whose gradient-norm z-score exceeds this; 0 = off", at_least(0))
    max_skips: int = key(10, "skipped updates in a row that end the run (exit 3)", at_least(1))
    hang_factor: float = key(20.0, "hung (exit 7) after this many median steps without progress; 0 = off", at_least(0))
    hang_seconds: float = key(300.0, "seconds without progress before a run can count as hung", POSITIVE)


@dataclass(frozen=True)
class LogConfig:
    """Output and records."""

    every: int = key(1, "steps between console lines", at_least(1))
    norms_every: int = key(0, "steps between per-tensor norms in metrics.jsonl; 0 = never", at_least(0))
    sinks: str = key("", "write metrics also to tensorboard, wandb (offline unless WANDB_MODE=online) or both", SINKS)
    display: str = key("auto", "auto, live or plain; auto = live on a terminal", one_of("auto", "live", "plain"))


@dataclass(frozen=True)
class CostConfig:
    """The price of the machine."""

    price: float = key(0.0, "price of the whole machine in dollars per hour; 0 = unknown", at_least(0))


@dataclass(frozen=True)
class RunConfig:
    """The run itself: name, length, device."""

    name: str = key("", "folder of the run inside run.dir; empty = named after the target", FOLDER_NAME)
    dir: str = key("runs", "folder that holds the runs")
    steps: int = key(0, "optimizer steps; 0 = one epoch", at_least(0))
    epochs: float = key(0.0, "instead of steps: passes over the training data; becomes steps at the start", at_least(0))
    tokens: int = key(0, "instead of steps: training tokens, 1B or 300M too; becomes steps at the start", at_least(0))
    max_hours: float = key(0.0, "save and stop (exit 75) after this many hours; 0 = no limit", at_least(0))
    seed: int = key(42, "seed of the initial weights and the data order", at_least(0), fixed=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", DEVICE)
    overfit: bool = key(False, "train on the first batch over and over (a debugging aid)", fixed=True)
    profile: str = key("", "A:B = profile steps A to B; empty = off", STEP_RANGE)
