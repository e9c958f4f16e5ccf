"""CORE: the rules of nanochat's evaluator, on a made bundle with every kind of task.

The accuracies in PEERS were computed by nanochat's own core_eval.py (commit 92d63d4) with the same model and bundle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from nanochat_oracle import Nano, random_values
from test_training import markov, write_shard

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import DataError
from daybreak.evaluate.core import core, correct, read_bundle, read_examples, rows_of
from daybreak.shapes import GPT2Config, NanochatConfig
from daybreak.state.run import Run

torch.set_num_threads(1)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "past", "its", "old", "house"]
TASKS = {  # label -> (kind, shots, delimiter, accuracy of guessing in percent)
    "choices": ("multiple_choice", 2, "\nAnswer: ", 25.0),
    "choices, no shots": ("multiple_choice", 0, None, 25.0),
    "schemas": ("schema", 1, None, 50.0),
    "words": ("language_modeling", 1, None, 0.0),
    "words, long": ("language_modeling", 4, "", 0.0),
    "three bytes": ("language_modeling", 0, "", 0.0),
}
COUNT, T = 40, 96
SHORT = 48  # T of the model without a table of positions


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


def three_bytes(engine: Engine, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Continuations that are the model's own likeliest bytes; in every second one of the three is another."""
    tokenizer, i = get_tokenizer("bytes"), 0
    while True:
        context, found = text(rng, 4), list[int]()
        for _ in range(3):
            ids = [[tokenizer.eot, *tokenizer.encode(context), *found]]
            found.append(int(engine.logits(ids)[0, -1].argmax()))
        if all(32 < byte < 126 for byte in found):
            if i % 2:
                found[i // 2 % 3] ^= 1
            yield {"context": context, "continuation": bytes(found).decode()}
            i += 1


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
        made = three_bytes(engine_of(), rng) if label == "three bytes" else (example(kind, rng) for _ in range(COUNT))
        records = [json.dumps(record) for record in islice(made, COUNT)]
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


def nano_of(T: int) -> Engine:
    """A model that has no table of positions, so its weights do not depend on T."""
    values = random_values(NANO, 3)
    shape = NanochatConfig(**NANO._asdict())
    engine = Engine(EngineSpec(shape, B=4, T=T, compute="fp64", train=False), init=False)
    engine.load_params(dict(values))
    return engine


NANO = Nano(L=2, C=32, NH=2, max_T=SHORT, V=257, layers="wf", window=17)
PEERS: dict[str, float] = {
    "choices 0": 9 / 40,
    "choices, no shots 0": 13 / 40,
    "schemas 0": 20 / 40,
    "words 0": 0 / 40,
    "words, long 0": 1 / 40,
    "three bytes 0": 20 / 40,
    "choices 15": 3 / 15,
    "choices, no shots 15": 5 / 15,
    "schemas 15": 7 / 15,
    "words 15": 0 / 15,
    "words, long 15": 0 / 15,
    "three bytes 15": 7 / 15,
}
# Of the model without a table of positions, for texts that are longer than its T: as nanochat reads them, and with the
# last T tokens alone, as nanochat does with a `max_seq_len`.
WHOLE, CUT = {"choices": 11 / 40, "schemas": 21 / 40}, {"choices": 12 / 40, "schemas": 20 / 40}


def no_other(T: int) -> Engine:
    raise AssertionError(f"this model has positions for its T alone, and an engine of {T} was asked for")


@pytest.mark.parametrize("limit", [0, 15])
def test_accuracies_are_the_peers(tmp_path: Path, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    engine, tokenizer = engine_of(), get_tokenizer("bytes")
    bundle = make_bundle(tmp_path)
    scores = core(engine, tokenizer, bundle, limit, no_other)
    got = {s.task: s.value for s in scores if s.metric == "accuracy"}
    assert got == {label: pytest.approx(PEERS[f"{label} {limit}"]) for label in TASKS}
    centred = [(got[label] - guess / 100) / (1 - guess / 100) for label, (*_, guess) in TASKS.items()]
    assert [s.value for s in scores if s.metric == "centred"] == pytest.approx(centred)
    assert scores[-1][:4] == ("CORE", "mean of the centred scores", pytest.approx(sum(centred) / 6), 6 * (limit or 40))
    for task in read_bundle(bundle):  # every text that is cut is counted
        examples = rows_of(tokenizer, task, read_examples(task, limit))
        cut = sum(any(len(before) + len(scored) > T for before, scored in rows) for rows in examples)
        said = f"{task.label}: {cut} of {limit or COUNT} examples have more than T = 96 tokens and lose their beginning"
        assert (said in caplog.messages) == (cut > 0)
    assert len(caplog.messages) > 1


def test_long_texts_are_read_to_their_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where positions are no parameters, as nanochat's evaluator does. The engine then has another T."""
    bundle, tokenizer, lengths = make_bundle(tmp_path), get_tokenizer("bytes"), list[int]()

    def longer(T: int) -> Engine:
        lengths.append(T)
        return nano_of(T)

    def scores(other: Callable[[int], Engine] | None) -> dict[str, float]:
        found = core(nano_of(SHORT), tokenizer, bundle, 0, other)
        return {s.task: s.value for s in found if s.metric == "accuracy" and s.task in WHOLE}

    assert scores(longer) == pytest.approx(WHOLE)
    assert not caplog.messages
    assert lengths == sorted({*lengths})  # never shorter than the one before
    assert scores(None) == pytest.approx(CUT)
    assert "choices: 40 of 40 examples have more than T = 48 tokens and lose their beginning" in caplog.messages


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
        correct(engine, task, [item], rows_of(get_tokenizer("bytes"), task, [item]))


@pytest.mark.parametrize("shape", ["d6", "nanochat:d4"])
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 1200), ("val", 600)):
        write_shard(tmp_path / f"x_{split}_000000.bin", markov(n, 1))
    flags = "--model.L 1 --model.C 32 --model.NH 2 --model.max_T 96 --model.V 257 --batch.B 2 --steps 2 --quiet"
    data = f"--data.train {tmp_path}/*train* --data.val {tmp_path}/*val* --data.tokenizer bytes --eval.tokens 192"
    assert main(["train", shape, *flags.split(), *data.split(), "--name", "r", "--run.device", "cpu"]) == 0
    bundle = make_bundle(tmp_path / "sets/eval_bundle")
    capsys.readouterr()
    assert main(["eval", "runs/r", "--tasks", "core", "--data-files", "sets", "--limit", "6", "--json"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert [row["task"] for row in rows] == [label for label in TASKS for _ in range(2)] + ["CORE"]
    assert ("lose their beginning" in said.err) == (shape == "d6")
    engine, tokenizer = Run("runs/r").load_engine(B=2, T=512 if shape != "d6" else 0)
    assert [row["value"] for row in rows] == [score.value for score in core(engine, tokenizer, bundle, 6)]
    assert main(["eval", "runs/r", "--tasks", "core"]) == 2
    assert "--tasks core needs --data-files DIR" in capsys.readouterr().err
