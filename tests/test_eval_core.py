"""CORE: the rules of nanochat's evaluator, on a made bundle with every kind of task.

The accuracies in PEERS were computed by nanochat's own core_eval.py (commit 92d63d4) with the same model and bundle.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import markov, write_shard

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import DataError
from daybreak.evaluate.core import core, correct, read_bundle, read_examples
from daybreak.shapes import GPT2Config

torch.set_num_threads(1)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "past", "its", "old", "house"]
TASKS = {  # label -> (kind, shots, delimiter, accuracy of guessing in percent)
    "choices": ("multiple_choice", 2, "\nAnswer: ", 25.0),
    "choices, no shots": ("multiple_choice", 0, None, 25.0),
    "schemas": ("schema", 1, None, 50.0),
    "words": ("language_modeling", 1, None, 0.0),
    "words, long": ("language_modeling", 4, "", 0.0),
}
COUNT, T = 40, 96


def text(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def example(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind == "multiple_choice":
        choices = [text(rng, rng.randint(1, 3)) for _ in range(4)]
        if rng.random() < 0.2:
            choices[1] = choices[0] + " " + choices[1]  # one choice begins another
        return {"query": text(rng, 5) + "?", "choices": choices, "gold": rng.randrange(4)}
    if kind == "schema":
        options = [f"The {text(rng, 2)} because it", f"The {text(rng, 2)} because she"]
        return {"context_options": options, "continuation": text(rng, 3), "gold": rng.randrange(2)}
    context = text(rng, 6)
    return {"context": f" {context} \n", "continuation": rng.choice([context[-1], *"aeiou t"])}


def make_bundle(folder: Path) -> Path:
    rng, lines, guesses = random.Random(5), ["icl_tasks:"], ["Eval Task,Task Category,Random baseline"]
    (folder / "eval_data/made").mkdir(parents=True)
    for i, (label, (kind, shots, delimiter, guess)) in enumerate(TASKS.items()):
        lines += [f'- label: "{label}"', f"  dataset_uri: made/{i}.jsonl", f"  num_fewshot: [{shots}]"]
        lines += [
            f"  icl_task_type: {kind}",
            *([] if delimiter is None else [f"  continuation_delimiter: {json.dumps(delimiter)}"]),
        ]
        guesses.append(f'"{label}",made,{guess}')
        records = [json.dumps(example(kind, rng)) for _ in range(COUNT)]
        (folder / f"eval_data/made/{i}.jsonl").write_text("\n".join(records) + "\n")
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(guesses) + "\n")
    return folder


def engine_of() -> Engine:
    """Random weights, ten times as large as usual, so that no two choices are nearly equal."""
    engine = Engine(EngineSpec(GPT2Config(L=2, C=32, NH=2, max_T=T, V=257), B=4, T=T, compute="fp64", train=False))
    g = torch.Generator().manual_seed(1)
    for name in engine.names():
        x = engine.param(name)
        value = 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
        if name == "lnfb":
            value.zero_()
        if name == "wte":  # so that often one of these letters is the likeliest token
            value[list(map(ord, "aeiou t"))] *= 3
        engine.set_exact(name, value)
    return engine


PEERS: dict[str, float] = {
    "choices 0": 9 / 40,
    "choices, no shots 0": 13 / 40,
    "schemas 0": 20 / 40,
    "words 0": 0 / 40,
    "words, long 0": 1 / 40,
    "choices 15": 3 / 15,
    "choices, no shots 15": 5 / 15,
    "schemas 15": 7 / 15,
    "words 15": 0 / 15,
    "words, long 15": 0 / 15,
}


@pytest.mark.parametrize("limit", [0, 15])
def test_accuracies_are_the_peers(tmp_path: Path, limit: int) -> None:
    engine, tokenizer = engine_of(), get_tokenizer("bytes")
    scores = core(engine, tokenizer, make_bundle(tmp_path), limit)
    got = {s.task: s.value for s in scores if s.metric == "accuracy"}
    assert got == {label: pytest.approx(PEERS[f"{label} {limit}"]) for label in TASKS}
    centred = [(got[label] - guess / 100) / (1 - guess / 100) for label, (*_, guess) in TASKS.items()]
    assert [s.value for s in scores if s.metric == "centred"] == pytest.approx(centred)
    assert scores[-1][:4] == ("CORE", "mean of the centred scores", pytest.approx(sum(centred) / 5), 5 * (limit or 40))


def test_a_damaged_bundle_names_its_fault(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    path = bundle / "eval_data/made/2.jsonl"
    path.write_text(path.read_text().replace('"gold": 1', '"gold": 7', 1))
    with pytest.raises(DataError, match=r"2\.jsonl line \d+ is no example of schema: it needs context_options, cont"):
        read_examples(read_bundle(bundle)[2], 0)
    (bundle / "core.yaml").write_text("icl_tasks:\n- label: x\n")
    with pytest.raises(DataError, match=r"is no bundle for CORE \(KeyError: 'icl_task_type'\); unpack"):
        read_bundle(bundle)
    with pytest.raises(DataError, match=r"core\.yaml"):
        read_bundle(tmp_path / "none")


def test_a_text_that_is_too_long(tmp_path: Path) -> None:
    engine, task = engine_of(), read_bundle(make_bundle(tmp_path))[1]
    item = {"query": "x", "choices": ["a" * 200, "b"], "gold": 0}
    with pytest.raises(DataError, match="a continuation has 200 tokens, and the model reads T = 96"):
        correct(engine, get_tokenizer("bytes"), task, [item])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 1200), ("val", 600)):
        write_shard(tmp_path / f"x_{split}_000000.bin", markov(n, 1))
    flags = "--model.L 1 --model.C 32 --model.NH 2 --model.max_T 96 --model.V 257 --batch.B 2 --steps 2 --quiet"
    data = f"--data.train {tmp_path}/*train* --data.val {tmp_path}/*val* --data.tokenizer bytes --eval.tokens 192"
    assert main(["train", "d6", *flags.split(), *data.split(), "--name", "r", "--run.device", "cpu"]) == 0
    make_bundle(tmp_path / "sets/eval_bundle")
    capsys.readouterr()
    assert main(["eval", "runs/r", "--tasks", "core", "--data-files", "sets", "--limit", "6", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in rows] == [label for label in TASKS for _ in range(2)] + ["CORE"]
    assert math.isfinite(rows[-1]["value"])
    assert main(["eval", "runs/r", "--tasks", "core"]) == 2
    assert "--tasks core needs --data-files DIR" in capsys.readouterr().err
    shutil.rmtree("sets")
