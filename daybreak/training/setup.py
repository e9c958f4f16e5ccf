"""Everything that a run needs before its first step: device, data, tokenizer, a concrete configuration, a run folder.

`open_run` checks all that can be wrong before it writes anything. Its steps, with their branches:

    step                          new run               resumed run             on which ranks
    1 configuration               checked against its rules                     all
    2 folder                      must be free          exists                  rank 0
    3 device, dtype, sinks        chosen and checked                            all
    4 embedded data set           prepared on its first use                     rank 0, the others wait
    5 data, loaders, tokenizer    opened                opened; if moved, also  all
                                                        compared with its checkpoint
    6 concrete configuration      T, total_tokens, steps, horizon and warmup    all
                                  are set, then `check` is called
    7 agreement                   on configuration, data, code and versions     all, if there are several
    8 memory                      planned, and compared with the device's       all
    9 config.toml, env ...        written to a new folder, or into its own      rank 0
    10 the folder                 must be visible within 10 s                   all

The first write is in step 9, except for data of step 4. So a new run that fails before it leaves no folder. Step 9 also
finds out whether a checkpoint exists, which is then loaded: `Setup.continues`. Steps of rank 0
use `group.first`, so an error there is raised on every rank.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from daybreak import __version__
from daybreak.config import Config, check_resume, is_untouched_import
from daybreak.config_keys import DataConfig, toml_value
from daybreak.data.catalogue import DRAWN
from daybreak.data.dataset import Dataset, check_tokenizer, dataset_name
from daybreak.data.loader import Batch, Loader
from daybreak.data.mixing import mix_of, names_of, open_loaders
from daybreak.data.pictures import CODEC_FILE, text_name
from daybreak.data.prepare import prepare
from daybreak.data.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from daybreak.engine.device import cpu_has_bf16, missing_on, pick_compute, pick_device, set_precision
from daybreak.engine.fit import check_fits, plan_memory
from daybreak.engine.formats import check_patterns
from daybreak.errors import ConfigError, DataError
from daybreak.evaluate.multiple_choice import Example, load_examples
from daybreak.files import write_atomic
from daybreak.formatting import several
from daybreak.images.prepare import prepare_images
from daybreak.interop.source import came_from
from daybreak.manifest import kept_files, newest_manifest, published, run_id
from daybreak.parallel import Check, Group, agent
from daybreak.state.checkpoint import Checkpoint, load_checkpoint
from daybreak.state.restore import Weights, check_host_memory, warn_of_disk
from daybreak.state.run import Run
from daybreak.state.run_folder import ORIGIN, RunFolder, cpu_model, source_hash
from daybreak.state.throughput import FP8_GAIN, fp8_gain, peak_flops
from daybreak.training.schedule import left_out
from daybreak.training.sinks import check_sinks
from daybreak.training.stop import Stop

log = logging.getLogger("daybreak")
EMBEDDED = {  # data sets that are prepared on first use
    "stdlib": "the Python standard library on this machine, as text",
    DRAWN: "pictures of coloured shapes, and their captions",
}
LEAST_GAIN = 1.05  # of fp8 over bf16, below which `train` says so


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start."""

    config: Config
    run: Run
    dataset: Dataset
    train_loader: Loader
    val_loader: Loader
    tokenizer: Tokenizer
    device: torch.device
    compute: str
    device_name: str
    peak: float | None
    hellaswag: list[Example]  # scored during training; may be empty
    continues: bool  # a checkpoint will be loaded
    new_code: str  # how daybreak's code changed since the run was started last; "" if it did not
    group: Group

    def tokens_of(self, samples: int) -> dict[str, int]:
        """The number of tokens of each source among the first `samples` samples."""
        names = [name for name, _ in mix_of(self.config.data)]
        counts = self.train_loader.counts(samples)
        return {name: n * self.config.T for name, n in zip(names or [self.dataset.name], counts, strict=True)}

    def length(self, step: int) -> str:
        """How long the run is, for people; the tokens are those of a step from `step` on."""
        c = self.config
        epochs = c.tokens_between(0, c.run.steps) / (self.train_loader.samples_per_epoch * c.T)
        ranks = f", on {self.group.world} ranks at ZeRO stage {c.parallel.zero}" if self.group.world > 1 else ""
        steps = f"{several(c.run.steps, 'step')} of {c.tokens_at(step):,} tokens"
        return f"{steps}, {epochs:,.3g} epochs of the data{ranks}"

    def batches(self, step: int, samples: int) -> Callable[[int], Batch]:
        """A function from a step to this rank's part of its batch, if `samples` samples are consumed before `step`.

        It is a pure function of the step, so a thread can compute batches ahead.
        """
        c = self.config

        def batch(at: int) -> Batch:
            first = 0 if c.run.overfit else samples + c.tokens_between(step, at) // c.T + left_out(c, step, at + 1)
            mine = c.tokens_at(at) // c.T // self.group.world
            return self.train_loader.batch(first + self.group.rank * mine, mine)

        return batch


def open_run(
    config: Config, *, resume: Path | None, stop: Stop, check: Callable[[Config], None], fork: Checkpoint | None = None,
    init: Weights | None = None,
) -> Setup:  # fmt: skip
    """Check everything that can be wrong, then create the run's folder, or open it for `resume`: the steps above.

    check: called with the concrete configuration before anything is written. Shards of other programs
    are of the tokenizer of `resume`, or of the run that `fork` is from. init: the first weights of a new run.
    Collective over stop.group. Raises ConfigError, DataError.
    """
    group = stop.group
    config.check(ranks=group.world)
    folder = RunFolder(resume or Path(config.run.dir) / (config.run.name or config.model.arch))
    if resume is None:
        group.first(lambda: folder.check_free("--name" if fork is None else "--fork"))
    device = pick_device(config.run.device, group)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The search imports libraries, which takes seconds. Meanwhile the data is opened.
        Thread(target=missing_on, args=(device,), daemon=True).start()
    compute = pick_compute(config.precision.compute, device)
    if resume is None and compute == "fp8":
        check_patterns(config.precision.fp8, config.model)
    set_precision(config, device)
    for backend, reason in missing_on(device).items():
        log.warning("slower without %s: %s (daybreak doctor says more)", backend, reason)
    _say_slow(config, device, compute)
    check_sinks(config)
    beside = resume if fork is None else fork.path.parents[1]
    group.first(lambda: _prepare_embedded(config, beside, stop.look if group.world > 1 else stop.check))
    d, shuffle = config.data, not config.run.overfit
    dataset, train_loader, val_loader = open_loaders(d, config.T, config.run.seed, config.model.V, shuffle, beside)
    config = config.override({"data.packed": train_loader.documents})
    tokenizer = get_tokenizer(dataset.tokenizer_name, dataset.folder)
    if tokenizer.V > config.model.V:
        said = f"model.V = {config.model.V} is smaller than the {tokenizer.V} ids of tokenizer {tokenizer.name!r}"
        raise ConfigError(f"{said} that {dataset.name!r} was made with; use --model.V {tokenizer.V}.")
    if resume is None and config.model.V > 2 * tokenizer.V and group.rank == 0:
        log.warning("model.V = %d, but the data has %d tokens: with --model.V %d the model is smaller and faster.",
                    config.model.V, tokenizer.V, tokenizer.V)  # fmt: skip
    if resume is not None:
        _check_moved(Run(resume), config, train_loader, val_loader)
    _check_windows(resume, fork, config)
    config = config.concrete(train_loader.samples_per_epoch * config.T, ranks=group.world)
    check(config)
    if group.world > 1:
        group.agree(dict(config.items()))
        data = {"training data": train_loader, "validation data": val_loader}
        group.agree({name: loader.fingerprint[:16] for name, loader in data.items()}, DataError)
        group.agree({"daybreak": f"{__version__} {source_hash()}", "torch": torch.__version__, "compute": compute})
    e = config.eval
    hellaswag = load_examples(Path(e.hellaswag), tokenizer, config.T, e.hellaswag_examples) if e.hellaswag else []
    arena, outside = plan_memory(config, device, missing_on(device), group)
    group.everywhere(lambda: check_fits(arena, device, config, group.world, outside))
    if config.checkpoint.background and group.world == 1:
        check_host_memory(arena, device)
    _say_samples(config, dataset, train_loader)
    if group.rank == 0 and {"cublaslt", "quack"} & set(arena.choices.values()):
        _say_untuned(device)

    agents = group.gather(agent(os.environ))

    def write() -> tuple[bool, str]:
        if resume is None:
            folder.create()
        old, given = published(folder.checkpoints), folder.path / ORIGIN
        folder.keep_agents(agents)  # before config.toml, so that every run has it, as the next one
        if (start := fork or init) is not None:
            # The adapters of a fork belong to the same model as those that it begins with.
            model = came_from(fork.path.parents[1]) if fork and fork.lora.rank else ""
            write_atomic(given, json.dumps({"from": model or str(start.path)}) + "\n")
        elif given.is_file() and not old:  # it was killed before it saved them
            fix = f"remove {folder.path} and start it again, as it was started before"
            raise ConfigError(f"{folder.path} has not saved the weights that it was to begin with ({given}); {fix}.")
        write_atomic(folder.config, config.to_toml())  # on resume too: changed settings hold from now on
        folder.keep_id(next(filter(None, map(run_id, old)), ""))
        new_code = folder.write_env()
        warn_of_disk(folder.path, config, arena)
        if tokenizer.source:
            write_atomic(folder.path / TOKENIZER_FILE, tokenizer.source)
        if tokenizer.pictures and dataset.folder is not None:
            shutil.copyfile(dataset.folder / CODEC_FILE, folder.path / CODEC_FILE)
        for name, text in _kept(fork or init, config, dataset).items():
            write_atomic(folder.path / name, text)
        return bool(old), new_code

    continues, new_code = group.first(write)
    if resume is not None and not continues and group.rank == 0:
        log.warning("%s has no checkpoint yet (checkpoint.every): it starts from step 0.", folder.path)
    if new_code and group.rank == 0:
        log.warning("daybreak changed since this run was started last: %s; CHANGELOG.md lists changes of losses under "
                    "'Numerics changed'.", new_code)  # fmt: skip
    group.everywhere(lambda: _see(folder))
    name, peak = describe_device(device, compute)
    return Setup(
        config, Run(folder.path), dataset, train_loader, val_loader, tokenizer, device, compute, name,
        peak and peak * group.world, hellaswag, continues, new_code, group,
    )  # fmt: skip


def _check_moved(run: Run, config: Config, train: Loader, val: Loader) -> None:
    """Raise ConfigError if the data has moved and its content differs from the data of the run's checkpoint."""
    try:
        check_resume(run.config, config, fork=is_untouched_import(run.path))
    except ConfigError:
        saved = load_checkpoint(run.checkpoints[0], "off").manifest["data"]
        if saved["fingerprint"] != train.fingerprint or saved.get("val", val.fingerprint) != val.fingerprint:
            log.warning("the data there is not what %s was trained on: its content differs", run.path)
            raise


def _check_windows(resume: Path | None, fork: Checkpoint | None, config: Config) -> None:
    """Raise ConfigError if data.skip has other windows than the checkpoint where that has chosen its data already."""
    start = (fork.path, fork.manifest) if fork is not None else resume and newest_manifest(resume)
    if not start:
        return
    (path, manifest), now = start, config.data
    saved = DataConfig(skip=manifest["config"].get("data.skip", ""))
    past = [[window for window in data.windows if window[0] <= manifest["step"]] for data in (saved, now)]
    if past[0] != past[1]:
        said = f"data.skip = {toml_value(now.skip)} must keep the windows of {path}, which has {toml_value(saved.skip)}"
        fix = f"begin new windows at step {manifest['step'] + 1} or later, or use --fork with an older checkpoint"
        raise ConfigError(f"{said}, up to its step {manifest['step']}: their batches are behind it; {fix}.")


def _kept(origin: Weights | None, config: Config, dataset: Dataset) -> dict[str, str]:
    """The files (manifest.KEPT) that a run keeps of the weights that it begins with, and of packed data, whose chat
    template is the one that is trained."""
    kept = dict(origin.kept) if origin else {}
    if config.data.packed and dataset.folder is not None:
        theirs, ends = kept_files(dataset.folder), "generation_config.json"
        if ends in theirs and ends in kept:  # a special token that only one of them names stays
            theirs[ends] = json.dumps(json.loads(kept[ends]) | json.loads(theirs[ends]))
        kept |= theirs
    return kept


def _see(folder: RunFolder) -> None:
    """Raise ConfigError unless this rank sees rank 0's folder within 10 s; some file systems are slow."""
    deadline = time.monotonic() + 10
    while not folder.config.is_file():
        if time.monotonic() > deadline:
            said = f"{folder.path} cannot be seen from {socket.gethostname()}"
            raise ConfigError(f"{said}; give a --run.dir that all machines share.")
        time.sleep(0.1)


def _say_slow(config: Config, device: torch.device, compute: str) -> None:
    """Warn of a precision that is slow here."""
    if device.type == "cpu" and compute == "bf16" and not cpu_has_bf16():
        log.warning("this CPU has no bf16 instructions: precision.compute = bf16 will be slower than fp32 here.")
    key = "precision.compute" if compute == "fp8" else "lora.base" if config.lora.base == "fp8" else ""
    if device.type == "cpu" and key:
        log.warning("a CPU has no fp8 instructions: %s = fp8 rounds as a GPU does, but is slow here.", key)
    if device.type == "cuda" and compute == "fp8" and (gain := fp8_gain(config.model)) < LEAST_GAIN:
        log.warning("fp8 may not be worth it: daybreak plan expects %.2f times bf16's speed for so small a model, and "
                    "%.2f times for d24.", gain, FP8_GAIN["d24"])  # fmt: skip


def _say_samples(config: Config, dataset: Dataset, loader: Loader) -> None:
    """How many samples an epoch has, and the tokens that none of them contains."""
    dropped, whole = loader.dropped_tokens, sum(shard.tokens for shard in dataset.train)
    where = "of cut documents" if config.data.bos or config.data.best_fit else "at the shards' ends"
    log.info(
        "%s: %d samples of %d tokens an epoch, %d tokens %s unused; fingerprint %s",
        dataset.name, loader.samples_per_epoch, config.T, dropped, where, loader.fingerprint[:16],
    )  # fmt: skip
    if config.data.best_fit and dropped > whole / 2:
        log.warning(
            "data.best_fit leaves out %d %% of the tokens, because many documents are longer than batch.T = %d; use a "
            "larger --batch.T, or --data.best_fit false.",
            100 * dropped // whole, config.T,
        )  # fmt: skip


def _say_untuned(device: torch.device) -> None:
    """Log one line if there is no table of measured matmuls for this GPU."""
    from daybreak.kernels.cuda import cublaslt, products  # here, since it imports Triton

    blas = cublaslt.blas_of(device.index)
    if blas is not None and (said := products.untuned(blas.gpu, blas.version)):
        log.warning("%s", said)


def describe_device(device: torch.device, compute: str) -> tuple[str, float | None]:
    """Name of the device, and its peak FLOP/s if it is known for this precision, else None."""
    if device.type == "cpu":
        return cpu_model(), None
    name = torch.cuda.get_device_name(device)
    return name, peak_flops(name) if compute == "bf16" else None


def _prepare_embedded(config: Config, beside: Path | None, check: Check) -> None:
    """Prepare the data sets that need no download, on their first use. `check` may raise to stop it."""
    d = config.data
    for known in EMBEDDED if not d.train else ():
        folder = Path(d.dir) / dataset_name(known, d.tokenizer)
        if known not in names_of(d) or Path(known).is_dir() or (folder / "manifest.json").is_file():
            continue
        if (theirs := d.tokenizer.startswith("hf-")) and beside is None:
            raise ConfigError(f"data.tokenizer = {d.tokenizer!r}: {known} is not made with it; name the right --data.")
        tokenizer = f"{beside}/{TOKENIZER_FILE}" if theirs else d.tokenizer or "gpt2"
        made: dict[str, Any] = {"data_dir": d.dir, "tokenizer": tokenizer, "progress": lambda *_: check()}
        log.info("preparing %s: %s", folder, EMBEDDED[known])
        prepare_images([known], **made) if known == DRAWN else prepare([known], **made)


def check_data(checkpoint: Weights, setup: Setup, same_data: bool, grows: bool = False) -> None:
    """Raise DataError (exit 4) unless the tokenizer, and with `same_data` the data, are those it was trained on. If the
    vocabulary may grow (`grows`), pictures may be new behind the same text."""
    saved = checkpoint.manifest
    had, has = saved["tokenizer"], setup.tokenizer
    if grows and has.pictures:
        text = get_tokenizer(text_name(has.name), setup.dataset.folder)
        has = text if text.fingerprint == had["fingerprint"] else has
    if had["fingerprint"] != has.fingerprint:
        check_tokenizer(setup.dataset, has, str(checkpoint.path), had["name"])
    checks = [("tokenizer", had["fingerprint"], has.fingerprint)]
    if same_data and saved["data"]["fingerprint"]:  # an import has not seen any data
        checks.append(("training data", saved["data"]["fingerprint"], setup.train_loader.fingerprint))
    if same_data and saved["data"].get("val", "") not in ("", setup.val_loader.fingerprint):
        log.warning("the validation data changed since %s was saved: its losses before and after are of two texts.",
                    checkpoint.path)  # fmt: skip
    for what, was, now in checks:
        if was != now:
            said = f"the {what} changed since {checkpoint.path} was saved: its fingerprint was {was}, it is {now} now"
            raise DataError(f"{said}; restore the old one, or start a new run.")
