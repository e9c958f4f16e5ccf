"""CORE, the score of the DCLM paper (Li et al. 2024, arXiv 2406.11794), from the bundle of files that nanochat uses.

    core.yaml            the tasks: label, file, kind, examples in the prompt, what joins a question and its answer
    eval_meta_data.csv   the accuracy of guessing at each, in percent
    eval_data/...        their examples, a JSON object a line

Rules, as nanochat has them: the examples of a task are shuffled by seed 1337. Those in the prompt of example i are
drawn by seed 1234 + i from all others. A text begins with the tokenizer's id for that, and is read to its end. Only
where positions are parameters, as in GPT-2, the last T tokens are read. There are three kinds of tasks:

    multiple_choice     the choices end the text: the least mean loss per token wins, of the tokens where choices differ
    schema              the choices begin it: the same of the tokens that all choices have in common at their end
    language_modeling   right if every token of the continuation is the likeliest one

A centred score is (accuracy - guessing) / (1 - guessing). CORE is their mean.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from daybreak.data.formats import extra, read_records
from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError, DataError, explained
from daybreak.evaluate.harness import Score
from daybreak.evaluate.multiple_choice import Row, losses_of
from daybreak.models.registry import build_model

log = logging.getLogger("daybreak")

# Kind -> the fields of an example, each text or a list of texts.
FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list},
    "schema": {"context_options": list, "continuation": str},
    "language_modeling": {"context": str, "continuation": str},
}


class Task(NamedTuple):
    """One task of core.yaml. guess: the accuracy of guessing, from 0 to 1."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str
    guess: float


def read_bundle(folder: Path | None) -> list[Task]:
    """The tasks of a bundle, in its order. ConfigError without a folder or PyYAML, DataError for what does not fit the
    format."""
    if folder is None:
        raise ConfigError("--tasks core needs --data-files DIR, the folder of nanochat's eval_bundle.zip, unpacked.")
    folder = folder / "eval_bundle" if (folder / "eval_bundle").is_dir() else folder
    yaml = extra("yaml", "eval", "daybreak eval --tasks core")
    config, guesses = folder / "core.yaml", folder / "eval_meta_data.csv"
    with explained(DataError, f"cannot read {config}"):
        text = config.read_text()
    try:
        entries = yaml.safe_load(text)["icl_tasks"]
        guess = {row["Eval Task"]: float(row["Random baseline"]) / 100 for _, row in read_records(guesses)}
        tasks = [
            Task(e["label"], e["icl_task_type"], folder / "eval_data" / e["dataset_uri"], int(e["num_fewshot"][0]),
                 str(e.get("continuation_delimiter", " ")), guess[e["label"]])
            for e in entries
        ]  # fmt: skip
    except (yaml.YAMLError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        said = f"{folder} is no bundle for CORE ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        raise DataError(f"{said}; unpack nanochat's eval_bundle.zip, and name its folder.") from None
    for task in tasks:
        if task.kind not in FIELDS or not task.guess < 1:
            raise DataError(f"{config}: task {task.label} has the kind {task.kind!r}; known are {', '.join(FIELDS)}.")
    if not tasks:
        raise DataError(f"{config} has no tasks.")
    return tasks


def read_examples(task: Task, limit: int) -> list[dict[str, Any]]:
    """The examples of a task, shuffled, `limit` of them (0: all). DataError names file and line."""
    found = []
    with explained(DataError, f"cannot read {task.path}"):
        for line, item in read_records(task.path):
            fields, options = FIELDS[task.kind], None
            right = isinstance(item, dict) and all(isinstance(item.get(name), kind) for name, kind in fields.items())
            if right and task.kind != "language_modeling":
                options, gold = item.get("choices", item.get("context_options")), item.get("gold")
                right = isinstance(gold, int) and 0 <= gold < len(options) and all(isinstance(x, str) for x in options)
            if not right:
                raise DataError(f"{task.path} line {line} is no example of {task.kind}: it needs {', '.join(fields)}.")
            found.append(item)
    random.Random(1337).shuffle(found)
    if len(found := found[: limit or None]) <= task.shots:
        raise DataError(f"{task.path}: {len(found)} examples are too few for {task.shots} others in each prompt.")
    return found


def prompts_of(task: Task, item: Mapping[str, Any], shots: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of one example: one for each choice; of language modeling that without its continuation, and all."""
    if task.kind == "multiple_choice":
        before = "".join(f"{x['query']}{task.delimiter}{x['choices'][x['gold']]}\n\n" for x in shots)
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        each = [(x["context_options"][x["gold"]], x["continuation"]) for x in shots]
        before = "".join(f"{context}{task.delimiter}{continuation}\n\n" for context, continuation in each)
        return [f"{before}{option}{task.delimiter}{item['continuation']}" for option in item["context_options"]]
    before = "".join(f"{x['context'].strip()}{task.delimiter}{x['continuation']}\n\n" for x in shots)
    text = f"{before}{item['context'].strip()}{task.delimiter}"
    return [text.strip(), text + item["continuation"]]


def _drawn(task: Task, items: Sequence[dict[str, Any]], i: int) -> list[dict[str, Any]]:
    """The examples in the prompt of example i."""
    others = [k for k in range(len(items)) if k != i]
    return [items[k] for k in random.Random(1234 + i).sample(others, task.shots)]


def _alike(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False)))


def _rows(task: Task, texts: Sequence[list[int]]) -> list[Row]:
    """(what comes before, what is scored) of each text of an example."""
    if task.kind == "schema":
        same = _alike([ids[::-1] for ids in texts])
        return [(ids[: len(ids) - same], ids[len(ids) - same :]) for ids in texts]
    if task.kind == "language_modeling":
        without, whole = texts
        if whole[: len(without)] != without or len(whole) == len(without):
            said = "a text without its continuation is not the beginning of the text with it, in this tokenizer"
            raise DataError(f"{task.path}: {said}; the task has no score.")
        return [(without, whole[len(without) :])]
    same = _alike(texts)
    return [(ids[:same], ids[same:]) for ids in texts]


def rows_of(tokenizer: Tokenizer, task: Task, items: Sequence[dict[str, Any]]) -> list[list[Row]]:
    """(what comes before, what is scored) of each text of each example. DataError where the texts cannot be told so."""

    def ids(text: str) -> list[int]:
        return [tokenizer.eot, *map(int, tokenizer.encode(text))]

    texts = (prompts_of(task, item, _drawn(task, items, i)) for i, item in enumerate(items))
    return [_rows(task, [ids(text) for text in each]) for each in texts]


def correct(engine: Engine, task: Task, items: Sequence[dict[str, Any]], examples: Sequence[list[Row]]) -> int:
    """How many examples of a task, with rows as of `rows_of`, the model gets right. Of more than T tokens it reads the
    last T, and a warning counts these examples. DataError for a continuation that is longer than T - 1."""
    if (longest := max(len(scored) for rows in examples for _, scored in rows)) >= engine.T:
        raise DataError(f"{task.path}: a continuation has {longest} tokens, and the model reads T = {engine.T}.")
    if cut := sum(_tokens([rows]) > engine.T for rows in examples):
        said = "%s: %d of %d examples have more than T = %d tokens and lose their beginning"
        log.warning(said, task.label, cut, len(examples), engine.T)
    examples = [[(before[max(0, len(before) + len(x) - engine.T) :], x) for before, x in rows] for rows in examples]
    if task.kind == "language_modeling":
        return sum(_greedy(engine, *rows[0]) for rows in examples)
    each = iter(losses_of(engine, [row for rows in examples for row in rows]))
    right = 0
    for item, rows in zip(items, examples, strict=True):
        means = [float(x.mean(dtype=float)) if len(x) else math.nan for x in (next(each) for _ in rows)]
        right += means.index(min(means)) == item["gold"]
    return right


def _tokens(examples: Sequence[list[Row]]) -> int:
    """Of the longest text."""
    return max(len(before) + len(scored) for rows in examples for before, scored in rows)


def _greedy(engine: Engine, before: Sequence[int], scored: Sequence[int]) -> bool:
    """Whether every token is the likeliest one."""
    best = engine.logits(torch.tensor([[*before, *scored][:-1]]))[0, -len(scored) :].argmax(-1)
    return bool(best.tolist() == list(scored))


def core(
    engine: Engine, tokenizer: Tokenizer, folder: Path | None, limit: int, longer: Callable[[int], Engine] | None = None
) -> list[Score]:
    """Accuracy and centred score of each task, and their mean. limit: the first examples of each, shuffled (0: all).
    longer: the same model with another T, for texts that are longer; models with positions as parameters have no use
    for it.

    ConfigError without a folder, DataError for what does not fit the format."""
    found, centred, count = list[Score](), list[float](), 0
    for task in read_bundle(folder):
        items = read_examples(task, limit)
        examples = rows_of(tokenizer, task, items)
        T = -(-_tokens(examples) // 128) * 128
        if longer and T > engine.T and build_model(replace(engine.cfg, max_T=T)).rows() == engine.model.rows():
            engine = longer(T)
        accuracy = correct(engine, task, items, examples) / len(items)
        centred.append((accuracy - task.guess) / (1 - task.guess))
        count += len(items)
        for metric, value in (("accuracy", accuracy), ("centred", centred[-1])):
            found.append(Score(task.label, metric, value, len(items), task.shots))
    return [*found, Score("CORE", "mean of the centred scores", sum(centred) / len(centred), count, 0)]
