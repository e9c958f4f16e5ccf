"""lm-evaluation-harness: our adapter and the harness's own Hugging Face model agree example by example; the whole way
from a data set on the Hub to scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import evaldata
import numpy as np
import pytest
import torch
from hub_server import serve
from test_data_formats import tokenizer_json
from test_data_hub import parquet
from test_engine_hf import LAYER, WHOLE
from test_prepare import prose
from torch.utils import collect_env

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError, DataError
from daybreak.evaluate import harness
from daybreak.shapes import GPT2Config
from daybreak.state.run import Run

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
SHAPE = GPT2Config(L=2, C=32, NH=2, max_T=320, V=1257)


def export(engine: Engine, folder: Path) -> None:
    """Our weights as a Hugging Face folder, by the names of test_engine_hf, with the same tokenizer."""
    cfg = engine.cfg
    config = transformers.GPT2Config(
        vocab_size=cfg.V, n_positions=cfg.max_T, n_embd=cfg.C, n_layer=cfg.L, n_head=cfg.NH, bos_token_id=1256,
        eos_token_id=1256,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for ours, name in WHOLE.items():
            theirs[f"transformer.{name}"].copy_(engine.master(ours)[: cfg.V] if ours == "wte" else engine.master(ours))
        for i in range(cfg.L):
            for ours, (name, conv) in LAYER.items():
                x = engine.master(f"h.{i}.{ours}")
                theirs[f"transformer.h.{i}.{name}"].copy_(x.T if conv else x)
    model.save_pretrained(folder)
    tokenizer_json(folder / "t.json")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "t.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    (folder / "t.json").unlink()
    fast.save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def _packages_are_listed_once() -> Iterator[None]:
    """The harness runs pip for every result, to keep what is installed: half of the time of these tests."""
    whole = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = cache(whole)
    yield
    collect_env.get_pretty_env_info = whole


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    evaldata.write_sets(folder, 6, ["abstract_algebra", "anatomy"])
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The adapter over an engine with loud random weights, and the harness's model of the same weights."""
    engine = Engine(SHAPE, B=3, T=320, seed=3, train=False)
    for name in engine.names():
        if name.endswith("w") and "ln" not in name:
            engine.param(name).mul_(6)
    folder = tmp_path_factory.mktemp("hf")
    export(engine, folder)
    return harness.engine_lm(engine, get_tokenizer("gpt2-1256")), harness.hf_lm(folder, 4, "cpu")


TASKS = {"hellaswag": 10, "lambada_openai": None, "arc_easy": None, "arc_challenge": 25, "piqa": None, "winogrande": 5,
         "mmlu_anatomy": 5, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0, "gsm8k": 1}  # fmt: skip


def test_both_ways_agree_on_every_example(both: tuple[Any, Any], sets: Path) -> None:
    compared = 0
    for task, shots in TASKS.items():
        ours, theirs = (harness.run_harness(lm, [task], shots, sets, None) for lm in both)
        assert len(ours["samples"][task]) == len(theirs["samples"][task]) > 0
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert a["arguments"] == b["arguments"]
            if task == "gsm8k":
                assert a["resps"] == b["resps"]
                continue
            for ((x, x_greedy),), ((y, y_greedy),) in zip(a["resps"], b["resps"], strict=True):
                assert float(x) == pytest.approx(float(y), rel=1e-4, abs=1e-3), task
                assert x_greedy == y_greedy
                compared += 1
        for s, t in zip(harness.scores_of(ours), harness.scores_of(theirs), strict=True):
            assert (s.task, s.metric, s.examples, s.shots) == (t.task, t.metric, t.examples, t.shots)
            assert s.value == pytest.approx(t.value, rel=1e-3, abs=1e-9)
    assert compared > 150


def test_rolling_likelihoods_agree(both: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    texts = ["one", prose(3), prose(120)]  # the last is longer than T
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours, theirs = (lm.loglikelihood_rolling(requests) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_greedy_is_told_rightly(both: tuple[Any, Any]) -> None:
    from lm_eval.api.instance import Instance

    lm, theirs = both
    ids, made = lm.tok_encode("the cat is in the barn"), []
    for _ in range(4):
        made.append(int(theirs.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    said, word = get_tokenizer("gpt2-1256").decode(made), get_tokenizer("gpt2-1256").decode(made[2:3])
    ways = [{"max_gen_toks": 4}, {"max_gen_toks": 4, "until": word}, {"max_gen_toks": 4, "until": ["@", word]}]
    asked = [Instance("generate_until", {}, ("the cat is in the barn", way), 0) for way in ways]
    assert lm.generate_until(asked) == [said, *[said.partition(word)[0]] * 2]
    wrong = [*made[:-1], (made[-1] + 1) % 1257]
    (likeliest, yes), (other, no) = lm._loglikelihood_tokens([(("", ""), ids, made), (("", ""), ids, wrong)])
    assert (yes, no) == (True, False)
    assert likeliest > other
    with pytest.raises(ConfigError, match="generates greedily"):
        lm.generate_until([Instance("generate_until", {}, ("x", {"do_sample": True}), 0)])


def test_leaderboard(both: tuple[Any, Any], sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(harness.LEADERBOARD, "mmlu_anatomy", (5, "acc"))
    monkeypatch.delitem(harness.LEADERBOARD, "mmlu")  # its 57 subjects take a minute
    scores = harness.leaderboard(both[0], sets, 3)
    assert [(s.task, s.metric, s.shots, s.examples) for s in scores[:-1]] == [
        ("arc_challenge", "acc_norm", 25, 3), ("hellaswag", "acc_norm", 10, 3), ("truthfulqa_mc2", "acc", 0, 3),
        ("winogrande", "acc", 5, 3), ("gsm8k", "exact_match (strict-match)", 5, 3), ("mmlu_anatomy", "acc", 5, 3),
    ]  # fmt: skip
    assert scores[-1].task == "mean"
    assert scores[-1].value == pytest.approx(np.mean([s.value for s in scores[:-1]]))


def test_what_cannot_be_evaluated(both: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no task 'helaswag'"):
        harness.run_harness(both[0], ["helaswag"], None, tmp_path, None)
    with pytest.raises(DataError, match="put the data under --data-files as owner/name"):
        harness.run_harness(both[0], ["piqa"], None, tmp_path, None)
    for argv, code in (
        (["eval", str(tmp_path), "--tasks", "piqa"], 2),
        (["eval", str(tmp_path)], 2),
        (["eval", str(tmp_path), "--tasks", "piqa", "--leaderboard"], 2),
    ):
        assert main(argv) == code


def test_from_a_data_set_on_the_hub_to_scores(
    tmp_path: Path, sets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"{r['ctx']} {r['endings'][0]}" for r in evaldata.hellaswag(900, 5)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaldata.hellaswag(12)))
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("own/animals", {f"data/train-{k}.parquet": parquet(texts[k::2]) for k in range(2)})
        assert main(["prepare", "hf:own/animals", "--tokenizer", "gpt2-1256"]) == 0
    shape = [f"--model.{k}={v}" for k, v in (("L", 1), ("C", 16), ("NH", 2), ("max_T", 192), ("V", 1257))]
    assert main(["train", "d6", *shape, "--data", "animals-gpt2-1256", "--name", "r", "--steps", "6", "--batch.B", "2",
                 "--eval.tokens", "384", "--eval.sample_tokens", "2", "--eval.hellaswag", "h.jsonl"]) == 0  # fmt: skip
    run = Run("runs/r")
    assert {r["task"] for r in run.metrics("eval")} == {"hellaswag", "hellaswag-acc"}
    engine, _ = run.load_engine()
    export(engine, tmp_path / "hf")
    capsys.readouterr()
    scores = []
    for target in ("runs/r", "hf"):
        assert main(["eval", target, "--tasks", "hellaswag,lambada,arc,piqa", "--data-files", str(sets), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert [(s["task"], s["metric"]) for s in scores[0]] == [
        ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada_openai", "perplexity"), ("lambada_openai", "acc"),
        ("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("arc_challenge", "acc"), ("arc_challenge", "acc_norm"),
        ("piqa", "acc"), ("piqa", "acc_norm"),
    ]  # fmt: skip
    for a, b in zip(*scores, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-3)
        assert a["examples"] == 6
    assert main(["eval", "runs/r", "--tasks", "piqa", "--data-files", str(sets), "--limit", "2"]) == 0
    assert "piqa" in capsys.readouterr().out
