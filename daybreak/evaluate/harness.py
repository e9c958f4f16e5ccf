"""lm-evaluation-harness over our engine: an `LM` that needs no export, and the tasks people compare by.

The harness (extra `eval`) is the only judge outside the training loop: prompts, shots, filters and metrics are its own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from daybreak.checked import TEXT, read_json
from daybreak.data.formats import extra
from daybreak.data.hub import unreachable
from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import CheckpointError, ConfigError, DataError, Error
from daybreak.evaluate.multiple_choice import losses_of
from daybreak.formatting import quoted
from daybreak.generate import Sampling, Text, write_all

log = logging.getLogger("daybreak")

# Names that `--tasks` knows beside the harness's own.
TASKS = {"lambada": ["lambada_openai"], "arc": ["arc_easy", "arc_challenge"], "truthfulqa": ["truthfulqa_mc2"]}
CHOICE = ("hellaswag", "arc", "piqa", "winogrande", "mmlu", "truthfulqa_mc")  # compare likelihoods only
# The first Open LLM Leaderboard: task -> (shots, metric).
LEADERBOARD = {"arc_challenge": (25, "acc_norm"), "hellaswag": (10, "acc_norm"), "mmlu": (5, "acc"),
               "truthfulqa_mc2": (0, "acc"), "winogrande": (5, "acc"), "gsm8k": (5, "exact_match")}  # fmt: skip


class Score(NamedTuple):
    """A figure of one task: `value` as the harness gives it, over `examples` examples with `shots` shots."""

    task: str
    metric: str
    value: float
    examples: int
    shots: int


def engine_lm(engine: Engine, tokenizer: Tokenizer, greedy: bool = True) -> Any:
    """An `lm_eval` model of the engine. greedy=False leaves out whether a continuation is the likeliest one (False).

    Whole vocabularies of logits are only needed for that and for generated text, which is greedy.
    """
    base = extra("lm_eval.api.model", "eval", "daybreak eval").TemplateLM
    harness_utils = extra("lm_eval.utils", "eval", "daybreak eval")

    class EngineLM(base):  # type: ignore[misc, valid-type]
        eot_token_id, max_length, tokenizer_name = tokenizer.eot, engine.T, tokenizer.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            before, after = ([], []) if add_special_tokens is False else tokenizer.around
            return [*before, *map(int, tokenizer.encode(string)), *after]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            rows = [(context, continuation) for _, context, continuation in requests]
            losses = losses_of(engine, rows)
            each = zip(rows, losses, strict=True)
            return [(-float(x.sum(dtype=np.float64)), greedy and self._is_greedy(row, x)) for row, x in each]

        def _is_greedy(self, row: tuple[Sequence[int], Sequence[int]], losses: Any) -> bool:
            if (losses < math.log(2) - 0.01).all():  # each has more than half of the probability
                return True
            if (losses > math.log(engine.cfg.V) + 0.01).any():  # one has less than the average token
                return False
            ids = [*row[0], *row[1]][-engine.T - 1 :]
            best = engine.logits(torch.tensor([ids[:-1]]))[0, -len(row[1]) :].argmax(-1)
            return best.tolist() == list(ids[-len(best) :])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                ids, size = self.tok_encode(request.args[0]), engine.T
                cut = harness_utils.get_rolling_token_windows(ids, tokenizer.eot, max_seq_len=size, context_len=1)
                windows = [harness_utils.make_disjoint_window(window) for window in cut]
                totals.append(-float(sum(x.sum(dtype=np.float64) for x in losses_of(engine, windows))))
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            if cut := sum(request.args[1].get("max_gen_toks", 256) >= engine.T for request in requests):
                log.warning("%d of %d answers end at T - 1 = %d tokens at the latest", cut, len(requests), engine.T - 1)
            texts = [self._begin(*request.args) for request in requests]
            write_all(engine, texts)
            return [text.text for text in texts]

        def _begin(self, context: str, options: dict[str, Any]) -> Text:
            if options.get("do_sample"):
                raise ConfigError("daybreak eval generates greedily; this task samples (do_sample), which is not done.")
            until = options.get("until") or []
            count = min(options.get("max_gen_toks", 256), engine.T - 1)
            ids = (self.tok_encode(context) or [tokenizer.eot])[-(engine.T - count) :]
            how = Sampling(count, temperature=0.0, stop=(until,) if isinstance(until, str) else tuple(until))
            return Text(ids, how, tokenizer)

    return EngineLM()


def hf_lm(path: Path, B: int, device: str | None) -> Any:
    """The harness's own Hugging Face model of an exported folder. ConfigError if it needs code of the folder, which is
    not run."""
    config = read_json(path / "config.json", {"model_type?": TEXT}, CheckpointError, "copy the model again")
    known = extra("transformers", "eval", "daybreak eval").CONFIG_MAPPING
    if config.get("auto_map") and config.get("model_type") not in known:
        way = f"`daybreak import {quoted(path)}` makes a run that it scores, if daybreak knows the model"
        raise ConfigError(f"{path} needs code of its own (auto_map in config.json), which eval does not run; {way}.")
    model = extra("lm_eval.models.huggingface", "eval", "daybreak eval").HFLM
    return model(pretrained=str(path.resolve()), batch_size=B, device=device or "cpu", dtype="auto")


def known_tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """The harness's task manager, which knows all these tasks. ConfigError if it does not, or is not installed. folder:
    see `run_harness`."""
    if folder is not None:  # read when the libraries are imported
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    known = _task_manager()
    if unknown := [task for task in tasks if task not in known.all_tasks]:
        raise ConfigError(f"lm-evaluation-harness has no task {unknown[0]!r}; `lm-eval ls tasks` lists them.")
    return known


def run_harness(lm: Any, tasks: Sequence[str], shots: int | None, folder: Path | None, limit: int | None) -> Any:
    """`lm_eval.simple_evaluate` with per-example records (`samples`), as it returns it.

    folder: data sets by their names on the Hub (`folder/Rowan/hellaswag/...`, as downloaded), instead of the network.
    ConfigError for an unknown task, DataError for data that is not there.
    """
    known, lm_eval, why = known_tasks(tasks, folder), extra("lm_eval", "eval", "daybreak eval"), ""
    try:
        # A data set's name that is a folder here is taken from it.
        with contextlib.chdir(folder or Path()), _own_cache() if folder else _offline() as why:
            return lm_eval.simple_evaluate(
                lm, tasks=list(tasks), num_fewshot=shots, limit=limit, bootstrap_iters=0, task_manager=known
            )
    except Error:
        raise
    except (OSError, ValueError, ConnectionError) as error:
        said = str(error).partition("\n")[0]
        if why:
            lost = f"the Hub cannot be reached ({why})"
            said = lost if isinstance(error, ConnectionError) else f"{said}, and {lost}"
        fix = "put the data under --data-files as owner/name, as the Hub has it"
        if folder is None:
            fix = "download the data elsewhere with `hf download` to DIR/owner/name, and give --data-files DIR"
        raise DataError(f"{', '.join(tasks)}: {said}; {fix}.") from error


@contextlib.contextmanager
def _offline() -> Iterator[str]:
    """Why the Hub cannot be reached, "" if it can. If not, the libraries read inside what they kept of earlier
    downloads, at once. By themselves they would ask for each file six times, which takes minutes."""
    why = unreachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    hub, sets = (importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config"))
    switches: list[Any] = [hub, sets]
    usual = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        for switch in switches if why else ():
            switch.HF_HUB_OFFLINE = True
        yield why
    finally:
        for switch, value in zip(switches, usual, strict=True):
            switch.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _own_cache() -> Iterator[str]:
    """Inside, `datasets` keeps nothing: its cache would give another folder's data for a set of the same name."""
    config: Any = importlib.import_module("datasets.config")
    usual = config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield ""
        finally:
            config.HF_DATASETS_CACHE = usual


@cache
def _task_manager() -> Any:  # it reads 10,000 files
    return extra("lm_eval.tasks", "eval", "daybreak eval").TaskManager()


def scores_of(results: Mapping[str, Any]) -> list[Score]:
    """Every figure of a result, tasks before groups, standard errors left out."""
    found, effective = [], results.get("n-samples", {})
    for task, values in results["results"].items():
        shots = int(results["n-shot"].get(task, 0))
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float | int) and kind and not metric.endswith("_stderr"):
                name = metric if kind in ("none", "") else f"{metric} ({kind})"
                found.append(Score(task, name, float(value), int(effective.get(task, {}).get("effective", 0)), shots))
    return found


def leaderboard(lm: Any, folder: Path | None, limit: int | None) -> list[Score]:
    """The six tasks with their shots and, last, their mean. MMLU is the unweighted mean over its subjects."""
    found = []
    for task, (shots, metric) in LEADERBOARD.items():
        results = run_harness(lm, [task], shots, folder, limit)
        groups = set(results.get("group_subtasks") or {}) - set(results["samples"])
        these = [s for s in scores_of(results) if s.task not in groups and s.metric.partition(" ")[0] == metric]
        if task == "gsm8k":
            these = [s for s in these if "strict" in s.metric]
        mean = statistics.fmean(s.value for s in these)
        found.append(Score(task, these[0].metric, mean, sum(s.examples for s in these), shots))
    return [*found, Score("mean", "", statistics.fmean(s.value for s in found), sum(s.examples for s in found), 0)]
