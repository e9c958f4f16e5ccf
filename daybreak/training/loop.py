"""The training loop: preparation, then iterations in llm.c's order: validate, score, sample, save, update, log.

The command line and the Python API call `train`. Each function below adds one kind of care and calls the next:

    train              connects the ranks; if one fails, all end with its reason
      _prepared        reads the run or weights to start from; rank 0 locks the folder of a resumed run
        _train         locks the folder of a new run; leaves exit code and reason in exit.json, however it ends
          open_run     checks everything and opens data and folder (training/setup.py)
          Trainer.load the checkpoint or the given weights
          Trainer.run  opens files and threads, and closes them in reverse order, however the loop ends
            _loop      decides what is due, until the last step; step 7 of docs/tour.md has a table of its rules
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from daybreak.config import Config, check_resume, is_untouched_import, run_of
from daybreak.data.dataset import text_bytes, unigram_entropy
from daybreak.data.loader import Batch, ahead
from daybreak.engine import Engine, named_stats
from daybreak.engine.capture import Pending
from daybreak.engine.device import Sensors, engine_spec, numerics, used_mib
from daybreak.engine.fit import explaining_memory
from daybreak.errors import Error, Hung, Stopped, TooManySkips, os_error
from daybreak.evaluate.multiple_choice import accuracy
from daybreak.evaluate.validation import validate
from daybreak.parallel import connect, launched
from daybreak.state.checkpoint import Checkpoint, load_checkpoint
from daybreak.state.metrics import MainLog, MetricsWriter
from daybreak.state.restore import Staging, Weights, restore, restore_weights, snapshot
from daybreak.state.run import Run
from daybreak.state.run_folder import RunFolder
from daybreak.state.saver import Saver
from daybreak.state.throughput import Throughput
from daybreak.training.display import Display, make_display, say, working
from daybreak.training.origin import check_rate, finished_at, fork_of, nothing_to_do, say_origin, way_on, weights_of
from daybreak.training.profile import Profiler
from daybreak.training.samples import Sampled, sampled
from daybreak.training.schedule import learning_rate, left_out
from daybreak.training.setup import Setup, check_data, open_run
from daybreak.training.sinks import Sinks
from daybreak.training.stop import Interrupted, Stop
from daybreak.training.watchdog import Watchdog

log = logging.getLogger("daybreak")
COUNTED_TOKENS = 100_000_000  # above this much training data, the unigram entropy is not computed


def train(
    config: Config, *, resume: Path | str | None = None, fork_from: Path | str | None = None,
    init_from: Path | str | None = None, stop: Stop | None = None, on_save: Callable[[Path], None] | None = None,
) -> Run:  # fmt: skip
    """Train to the end of `config` and return the run.

    resume: an existing run's folder, continued from its newest good checkpoint (`config` may differ from the saved
    one as `config.check_resume` allows). fork_from: start the new run `config.run.name` from that run's newest
    checkpoint, or from the checkpoint whose folder it is. init_from: start at step 0 with the weights of such a run or
    checkpoint, or of a model that interop.open_source knows (a Hugging Face folder, llm.c's .bin). stop: flags set by
    signals (see training.stop).
    on_save: called with each checkpoint, once it is complete.
    Raises daybreak.Error with the documented exit code; whatever happens, exit.json in the run's folder says it.
    """
    stop = stop or Stop()
    stop.limit_hours(config.run.max_hours)
    if stop.group.world == 1:
        config.check(ranks=int(launched(os.environ)["WORLD_SIZE"]))  # before any rank waits for another
        stop.group = connect(os.environ, config.parallel.timeout, lambda: stop.reason)
    group = stop.group
    try:
        with group.failing_together():
            return _prepared(config, resume, fork_from, init_from, stop, on_save)
    finally:
        group.close()


def _prepared(
    config: Config, resume: Path | str | None, fork_from: Path | str | None, init_from: Path | str | None, stop: Stop,
    on_save: Callable[[Path], None] | None,
) -> Run:  # fmt: skip
    """`train` among the ranks of stop.group: find the start, and hold the lock of a resumed run on rank 0."""
    old, check = resume if resume is not None else fork_from, Config.check
    if old is not None:
        run = Run(run_of(old))
        saved, free = run.config, resume is None or is_untouched_import(old)
        check_resume(saved, config, fork=free, moved=bool(run.checkpoints))
        check_rate(old, saved, config, fork=resume is None)
        check = partial(check_rate, old, saved, fork=resume is None, warn=stop.group.rank == 0)
    fork = fork_of(fork_from, config) if fork_from is not None else None
    init = weights_of(init_from, config.model, grows=not config.lora.rank) if init_from is not None else None
    folder = Path(resume).expanduser() if resume is not None else None
    with RunFolder(folder).locked() if folder is not None and stop.group.rank == 0 else nullcontext():
        if folder is not None and (at := stop.group.first(lambda: finished_at(Run(folder), config.run.steps))):
            say(nothing_to_do(Run(folder), config, at))
            stop.group.first(RunFolder(folder).say_done)
            return Run(folder)
        return _train(config, folder, check, fork, init, stop, on_save)


def _train(
    config: Config, resume: Path | None, check: Callable[[Config], None], fork: Checkpoint | None, init: Weights | None,
    stop: Stop, on_save: Callable[[Path], None] | None,
) -> Run:  # fmt: skip
    """`train` with its exits: each one leaves its code and reason in exit.json once this process holds a folder."""
    chief = stop.group.rank == 0
    folder = RunFolder(resume) if resume is not None else None
    if folder is not None and chief:
        folder.forget_exit()  # it is of an earlier attempt
    code, reason, final = 1, "unknown", False
    try:
        with stop.group.failing_together(), explaining_memory(config, stop.group):
            with working("opening the data"):
                setup = open_run(config, resume=resume, stop=stop, check=check, fork=fork, init=init)
            new = setup.run.folder
            who = f"rank {stop.group.rank} on {socket.gethostname()}: ranks wait for each other in vain"
            stop.group.leave_stacks = partial(new.append_stacks, who)
            with new.locked() if resume is None and chief else new.watched():
                folder = new  # only now: if another process holds the run, exit.json belongs to it
                with working("loading the model"):
                    trainer = Trainer(setup, stop, on_save)
                    trainer.load(fork, init)
                trainer.run()
        code, reason = 0, "done"
        return setup.run
    except Interrupted as stopped:  # before the first update, with nothing to save
        again = "" if folder is None else way_on(folder.path, fork or init, stop.group.again(folder.path))
        ended = Stopped(f"{stopped} before the first update{again}.")
        code, reason, ended.elsewhere = ended.exit_code, str(stopped), not stop.group.speaks
        raise ended from None
    except OSError as error:
        explained = os_error(error)
        code, reason = explained.exit_code, str(explained)
        raise explained from error
    except Error as error:
        code, reason, final = error.exit_code, str(error), error.final
        error.elsewhere |= isinstance(error, Stopped | TooManySkips) and not stop.group.speaks  # all ranks ended alike
        raise
    except BaseException as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        reason = f"{type(error).__name__}: {error}"
        if folder is not None and code == 1:
            folder.write_crash(traceback.format_exc())
        raise
    finally:
        if folder is not None and stop.group.speaks:
            folder.write_exit(code, reason, final, free=not chief and code != Hung.exit_code)


@dataclass(frozen=True)
class Update:
    """An update that may still be computed: steps and samples when it is complete, learning rate, results."""

    step: int
    samples: int
    lr: float
    results: Pending


class Trainer:
    """One run in progress. `step` counts completed updates, `samples` those they took or data.skip left out."""

    def __init__(self, setup: Setup, stop: Stop, on_save: Callable[[Path], None] | None = None) -> None:
        self.setup, self.config, self.run_folder, self.stop = setup, setup.config, setup.run.folder, stop
        self.on_save, self.group = on_save, setup.group
        self.chief = self.group.rank == 0  # rank 0 writes the files that a run has once
        c = self.config
        self.shown = sampled(setup) if c.eval.sample_tokens else None  # now: it may refuse the prompt
        spec = engine_spec(c, setup.device)
        self.engine = Engine(spec, device=setup.device, seed=c.run.seed, init=not setup.continues, group=self.group)
        alone = self.group.world == 1  # several ranks save together, while training waits
        self.staging = Staging(self.engine) if c.checkpoint.background and alone else None
        stop.check()
        self.step = self.samples = self.skips_in_a_row = 0
        self.saved_step = -1
        self.passed_over: list[str] = []  # why it did not continue from newer checkpoints: a sentence each
        self._unread: deque[Update] = deque()  # updates whose results the host has not read yet
        self._late = 1 if setup.device.type == "cuda" else 0  # so many stay unread, so that the GPU stays busy
        self.sensors = Sensors(setup.device)
        self.lengths = text_bytes(setup.dataset, setup.tokenizer, c.model.V)

    # ------------------------------------------------------------------------------------------------- starting

    def load(self, fork: Checkpoint | None, init: Weights | None) -> None:
        """Continue from this run's newest checkpoint, or start from another run's checkpoint or from given weights."""
        self.given_weights = fork is not None or init is not None
        if self.setup.continues:
            path, self.passed_over = self.group.first(lambda: ((c := self.setup.run.checkpoint()).path, c.passed_over))
            self._continue(load_checkpoint(path, "off"), same_data=True)
            self.saved_step = self.step
        elif fork is not None:
            self._continue(fork, same_data=False)
        elif init is not None:
            check_data(init, self.setup, same_data=False, grows=True)
            restore_weights(self.engine, init, adapters=False, grows=True)
        self.stop.check()

    def _continue(self, checkpoint: Checkpoint, *, same_data: bool) -> None:
        check_data(checkpoint, self.setup, same_data)
        restore(self.engine, checkpoint)
        self.step, self.samples = checkpoint.step, checkpoint.manifest["samples"]
        self.stop.step, self.skips_in_a_row = self.step, checkpoint.manifest["skips_in_a_row"]
        say_origin(checkpoint, self.config)
        saved, now = checkpoint.manifest["kernels"], self._numerics()
        if (changed := [f"{k} {saved[k]} -> {now.get(k)}" for k in saved if saved[k] != now.get(k)]) and self.chief:
            log.warning("from here on bits may differ from an uninterrupted run: %s", ", ".join(changed))

    def _numerics(self) -> dict[str, str]:
        return numerics(self.config, self.setup.device, self.engine.frame.k.choices, self.group.world)

    @property
    def tokens(self) -> int:
        """Tokens trained on, and those that data.skip left out."""
        return self.samples * self.config.T

    # ------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Train to the last step. Raises Stopped after saving, TooManySkips. On the way out the saver closes before the
        buffers and files that its last save needs."""
        c, engine = self.config, self.engine
        self.clock = Throughput(engine.flops_per_token, self.setup.peak)
        title = f"{c.run.name}: {engine.num_parameters:,} parameters on {self.setup.device_name}"
        if self.group.world > 1:
            title = f"{title} and {self.group.world - 1} more"
        k, guard, folder = c.checkpoint, c.guard, self.run_folder
        metrics, main_log = folder.metrics, folder.main_log
        if not self.chief:
            metrics = main_log = Path(os.devnull)
        with ExitStack() as open_:
            self.metrics = open_.enter_context(closing(MetricsWriter(metrics)))
            self.main_log = open_.enter_context(closing(MainLog(main_log, fresh=self.step == 0)))
            if self.staging is not None:
                open_.callback(self.staging.close)
            self.saver = open_.enter_context(Saver(folder, k.keep, k.major, self.metrics.sync, self.group))
            # Among several ranks, those that wait find and name the rank that hangs (parallel.py).
            factor = guard.hang_factor if self.group.world == 1 else 0.0
            self.watchdog = open_.enter_context(Watchdog(folder, lambda: self.stop.checks, factor, guard.hang_seconds))
            batch = self.setup.batches(self.step, self.samples)
            batches = open_.enter_context(closing(ahead(batch, count(self.step), threads=1, depth=3)))
            self.display = Display()
            if self.chief:
                sinks = open_.enter_context(closing(Sinks(c, folder.path)))
                self.display = make_display(c.log.display, c.log.every, title, c.cost.price)
                open_.callback(self.display.close)
                self.metrics.listeners += [self.display.record, sinks.record]
            self.stop.announce = self.display.announce
            self.profiler = open_.enter_context(closing(Profiler(c.run.profile if self.chief else "", folder.path)))
            try:
                self._write_run_record()
                if self.given_weights:
                    self._save(wait=True)  # nothing else in the folder holds them
                self._loop(batches)
            except Interrupted as reason:
                self._save_and_stop(str(reason))

    def _loop(self, batches: Iterator[Batch]) -> None:
        c = self.config
        self.resumed = self.step
        self.clock.start()
        while True:
            self._report_save()
            last, e, begun = self.step >= c.run.steps, c.eval, self.step > 0
            validate = last or _due(self.step, e.every)
            score = self.setup.hellaswag and begun and (last or _due(self.step, e.hellaswag_every or e.every))
            sample = e.sample_tokens > 0 and (last or (begun and _due(self.step, e.sample_every)))
            save = self.stop.take_save_request()  # taken in any case: a save that is due answers it too
            save |= last or (_due(self.step, c.checkpoint.every) and self.step != self.resumed)
            if validate or score or sample or save:
                self._read_results(0)
                with self.clock.pause():
                    self.engine.finish()
                    if validate:
                        self._validate()
                    if score:
                        self._score()
                    if sample and self.chief and self.shown is not None:
                        self._sample(self.shown)
                    if save:
                        self._save(wait=last)
            if last:
                return
            if self.profiler.due(self.step):  # its seconds of starting and writing are not a step's
                self._read_results(0)
                with self.clock.pause():
                    self.profiler.before(self.step)
            self._update(next(batches), learning_rate(self.step, c.optim, c.schedule))
            norms = _due(self.step, c.log.norms_every)  # they need this update's gradients
            self._read_results(0 if norms else self._late)

    def _update(self, batch: Batch, lr: float) -> None:
        """One update from this rank's part of a step's batch. A stop between micro-steps abandons it without a trace.

        The loss is the mean over the step's valid targets of all ranks together."""
        B, rows = self.config.batch.B, len(batch[0])
        valid = int(self.group.numbers([int((batch[1] >= 0).sum())])[0])
        tensors = [torch.from_numpy(part) for part in batch]
        display = self.display if self.step == self.resumed else Display()  # later steps show no progress
        with display.working(f"computing step {self.step + 1}", rows // B, self.stop.check) as check:
            self.engine.begin_step(lr=lr, step=self.step, valid=valid)
            for start in range(0, rows, B):
                check()
                part = [x[start : start + B] for x in tensors]
                self.engine.micro_step(*part, first=start == 0, last=start + B == rows)
            check()
            results = self.engine.update()
        self.step += 1
        self.stop.step = self.step
        self.samples += rows * self.group.world + left_out(self.config, self.step - 1, self.step)
        self._unread.append(Update(self.step, self.samples, lr, results))

    def _read_results(self, leave: int) -> None:
        """Log the results of all updates but the last `leave`, and end the run after too many skips."""
        while len(self._unread) > leave:
            self._log(self._unread.popleft())

    # ------------------------------------------------------------------------------------- the parts of an iteration

    def _validate(self) -> None:
        loader, budget, each = self.setup.val_loader, self.config.eval.tokens, self.engine.B * self.group.world
        batches = sum(-(-samples // each) for _, samples in loader.parts(budget))
        with self.display.working(f"validating at step {self.step}", batches, self.stop.check) as check:
            pictures = self.setup.tokenizer.pictures
            result = validate(self.engine, loader, self.lengths, budget, check, self.group, pictures)
        loss, bpb = result.loss, result.bits_per_byte
        apart = {"text_loss": _or_none(result.text), "image_loss": _or_none(result.image)}
        self.metrics.write("val", self.step, self.tokens, loss=loss, tokens_evaluated=result.tokens, bpb=bpb, **apart)
        self.main_log.val(self.step, loss)
        said = [] if math.isnan(bpb) else [f"{bpb:.4f} bits per byte"]
        said += [f"{value:.4f} nats per {key[:-5]} token" for key, value in apart.items() if value is not None]
        self.display.note(f"step {self.step}: val loss {loss:.6f}" + f" ({', '.join(said)})" * bool(said))

    def _score(self) -> None:
        rows = sum(len(example.endings) for example in self.setup.hellaswag)
        batches = -(-rows // (self.engine.B * self.group.world))
        with self.display.working("scoring HellaSwag", batches, self.stop.check) as check:
            score = accuracy(self.engine, self.setup.hellaswag, check, self.group)
        # llm.c's definition under the plain name, as in main.log; lm-eval's differs (docs/evaluation.md).
        for task, value in (("hellaswag", score.acc_norm), ("hellaswag-acc", score.acc)):
            self.metrics.write("eval", self.step, self.tokens, task=task, accuracy=value, examples=score.examples)
        self.main_log.eval(self.step, score.acc_norm)
        right = f"{round(score.acc_norm * score.examples)}/{score.examples} = {score.acc_norm:f}"
        self.display.note(f"step {self.step}: HellaSwag: {right} (llm.c's acc_norm)")

    def _sample(self, shown: Sampled) -> None:
        check = self.stop.check if self.group.world == 1 else lambda: None
        with self.display.working("generating a sample", shown.tokens, check) as task:
            if shown.pictures:
                for caption, path in (drawn := shown.draw(self.engine, self.step, task)):
                    self.metrics.write("image", self.step, self.tokens, caption=caption, path=path)
                self.display.note(f"step {self.step}: new pictures in {self.run_folder.path / 'images'}: {len(drawn)}")
                return
            # At a stop of several ranks, of which only rank 0 samples, it keeps the text so far.
            text = shown.text(self.engine, task, lambda: self.group.world > 1 and bool(self.stop.reason))
        self.run_folder.append_sample(self.step, text)
        self.metrics.write("sample", self.step, self.tokens, text=text)
        if self.step < self.config.run.steps:  # the summary shows the last sample
            self.display.sample(text)

    def _save(self, wait: bool = False) -> None:
        """Begin to save the state after the last completed update. `wait`: until it ends, and raise if it fails."""
        self._read_results(0)  # the count of skips belongs to the checkpoint
        began = time.perf_counter()
        with self.watchdog.paused(), self.display.working(f"saving step {self.step}"):  # a disk can be slow
            self._report_save(wait=True)  # one at a time
            if self.saved_step != self.step:
                self.engine.finish()
                self.saver.start(snapshot(self.engine, self.step, self._manifest(), self.staging), self.tokens, began)
                self.saved_step = self.step
            if wait or self.staging is None:
                self._report_save(wait=True, must=wait)

    def _report_save(self, wait: bool = False, must: bool = False) -> None:
        """Report the current save if it is over. `wait` until it is. `must`: a failed save ends the run."""
        try:
            saved = self.saver.result(wait)
        except Error as error:
            self.saved_step = -1
            error.final = self.config.checkpoint.on_error == "stop" and not self.saver.lost
            if must or self.saver.lost or error.final:
                raise
            log.warning("not saved, training continues (checkpoint.on_error): %s", error)
            self.metrics.write("event", self.step, self.tokens, what="save_failed", detail=str(error))
            return
        if saved is None:
            return
        self.metrics.write(
            "checkpoint", saved.step, saved.tokens, path=f"checkpoints/{saved.path.name}",
            seconds=saved.seconds, stall=saved.seconds if self.staging is None else saved.stall, bytes=saved.nbytes,
        )  # fmt: skip
        self.display.note(f"step {saved.step}: saved {saved.path}")
        if self.on_save is not None and self.chief:
            with self.watchdog.paused():
                self.on_save(saved.path)

    def _manifest(self) -> dict[str, Any]:
        c = self.config
        return {
            "config": dict(c.items()), "run": self.run_folder.id,
            "samples": self.samples, "skips_in_a_row": self.skips_in_a_row,
            "tokenizer": {"name": self.setup.tokenizer.name, "fingerprint": self.setup.tokenizer.fingerprint},
            "data": {
                "fingerprint": self.setup.train_loader.fingerprint, "val": self.setup.val_loader.fingerprint,
                "samples": self.setup.train_loader.counts(self.samples),  # of each source of a mixture
                "tokens": self.setup.tokens_of(self.samples),
            },
            "seed": c.run.seed, "compute": self.setup.compute, "kernels": self._numerics(),
        }  # fmt: skip

    def _log(self, update: Update) -> None:
        """Report an update, and end the run if too many in a row were skipped."""
        stats, c, step = named_stats(update.results), self.config, update.step
        tokens = update.samples * c.T
        timing = self.clock.lap(step_tokens := c.tokens_at(step - 1))
        self.watchdog.step(timing.seconds)
        skipped = stats["skip"] != 0.0
        values = {
            "loss": stats["loss"], "norm": stats["norm"], "lr": update.lr, "ms": 1000 * timing.seconds,
            "tok_s": timing.tok_s, "mfu": timing.mfu, "loss_z": _or_none(stats["loss_z"]),
            "norm_z": _or_none(stats["norm_z"]), "mem_mib": used_mib(self.setup.device),
            "eta_s": self.clock.eta(c.tokens_between(step, c.run.steps)),
            "saturated": int(stats["saturated"]) if self.engine.spec.in_fp8(step - 1) else None,
        }  # fmt: skip
        epoch = (update.samples - 1) // self.setup.train_loader.samples_per_epoch
        self.metrics.write("step", step, tokens, **values, **self.sensors.read(), skipped=skipped, epoch=epoch)
        self.main_log.train(step - 1, stats["loss"], update.lr, stats["norm"])
        shown = {**values, "precision": self.setup.compute, "step_tokens": step_tokens}
        self.display.step(step, c.run.steps, shown)
        if _due(step, c.log.norms_every):
            norms = {name: {"weight": weight, "grad": grad} for name, weight, grad in self.engine.norms()}
            self.metrics.write("event", step, tokens, what="norms", detail=json.dumps(norms))
        self._count_skips(skipped, stats, step, tokens)

    def _count_skips(self, skipped: bool, stats: dict[str, float], step: int, tokens: int) -> None:
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        why = f"loss {stats['loss']:.4g} (z {stats['loss_z']:.1f}), norm {stats['norm']:.4g} (z {stats['norm_z']:.1f})"
        self.metrics.write("event", step, tokens, what="skip", detail=why)
        self.display.note(f"step {step}: update skipped, weights untouched: {why}")
        if (count := self.skips_in_a_row) >= self.config.guard.max_skips:
            self._save(wait=True)
            raise TooManySkips(
                f"{count} updates in a row were skipped (guard.max_skips), the last with {why}; lower "
                f"optim.lr or raise the guard's limits. The weights before them are saved in {self.run_folder.path}."
            )

    def _save_and_stop(self, reason: str) -> None:
        """Save the state after the last completed update, and raise Stopped."""
        if self.step == 0:
            raise Interrupted(reason)
        self._save(wait=True)
        self.metrics.write("event", self.step, self.tokens, what="stopped", detail=reason)
        raise Stopped(f"{reason} after step {self.step}, saved; resume with: {self.group.again(self.run_folder.path)}")

    def _write_run_record(self) -> None:
        c = self.config
        config_hash = hashlib.sha256(c.to_toml().encode()).hexdigest()
        self.metrics.write(
            "run", self.step, self.tokens, name=c.run.name, config_hash=config_hash, device=self.setup.device_name,
            parameters=self.engine.num_parameters, flops_per_token=float(self.engine.flops_per_token),
        )  # fmt: skip
        for reason in self.passed_over:
            self.metrics.write("event", self.step, self.tokens, what="fallback", detail=reason)
        if self.setup.new_code:
            self.metrics.write("event", self.step, self.tokens, what="code", detail=self.setup.new_code)
        self.display.note(f"{self.run_folder.path}: {self.setup.length(self.step)}")
        following = c.tokens_between(self.step, c.run.steps) // c.T + left_out(c, self.step, c.run.steps)
        sources = self.setup.tokens_of(self.samples + following)
        if len(sources) > 1:
            self.display.note("tokens in all: " + ", ".join(f"{name} {n:,}" for name, n in sources.items()))
        if not c.data.packed and sum(shard.tokens for shard in self.setup.dataset.train) <= COUNTED_TOKENS:
            entropy = unigram_entropy(self.setup.dataset)
            self.metrics.write("event", self.step, self.tokens, what="unigram_entropy", detail=repr(entropy))
            self.display.note(f"baseline {entropy:.4f}: a model that knows only token frequencies")


def _due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is due; 0: never."""
    return every > 0 and step % every == 0


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else x
