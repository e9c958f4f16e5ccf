"""lm-evaluation-harness: a run through our adapter and its export through the harness's own Hugging Face model agree
example by example; definitions by hand; the whole way from a data set on the Hub to scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import evaldata
import numpy as np
import pytest
import torch
from hub_server import serve
from interop_runs import write_run
from test_data_hub import parquet
from test_eval_choice import Table
from test_prepare import prose
from torch.utils import collect_env

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, DataError
from daybreak.evaluate import harness
from daybreak.evaluate.multiple_choice import Accuracy, accuracy, load_examples
from daybreak.state.run import Run

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
SUBJECTS = ["abstract_algebra", "anatomy"]


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
    evaldata.write_sets(folder, 6, SUBJECTS)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with loud random weights in both precisions and what `daybreak export --to hf` makes of them. T < max_T."""
    folder = tmp_path_factory.mktemp("runs")
    for dtype in ("fp32", "bf16"):
        write_run(folder / dtype, "gpt2-1256", max_T=400, batch__T=320, precision__compute=dtype)
        argv = ["export", str(folder / dtype), "--to", "hf", str(folder / f"{dtype}-hf"), "--dtype", dtype]
        assert main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def both(runs: Path) -> tuple[Any, Any]:
    """The adapter and the harness's model, in fp32."""
    engine, tokenizer = Run(runs / "fp32").load_engine(B=3, rows=3)
    return harness.engine_lm(engine, tokenizer), harness.hf_lm(runs / "fp32-hf", 4, "cpu")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The results that the harness returned to each `daybreak eval`, as it comes."""
    kept, run = [], harness.run_harness

    def keep(*args: Any) -> Any:
        kept.append(run(*args))
        return kept[-1]

    monkeypatch.setattr(harness, "run_harness", keep)
    return kept


def evaluate(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", *map(str, argv), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def pairs(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The same example of two results, in turn."""
    assert a["samples"].keys() == b["samples"].keys()
    for task in a["samples"]:
        assert len(a["samples"][task]) == len(b["samples"][task]) > 0
        for x, y in zip(a["samples"][task], b["samples"][task], strict=True):
            assert x["arguments"] == y["arguments"]
            yield x, y


SHOTS = {  # shots of the task's own, and others
    None: "lambada,piqa,arc", 10: "hellaswag", 5: "winogrande,mmlu_anatomy", 0: "truthfulqa_mc1,truthfulqa_mc2",
}  # fmt: skip


def test_a_run_and_its_export_agree_on_every_example(
    runs: Path, sets: Path, results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    compared = 0
    for shots, tasks in {**SHOTS, 1: "gsm8k"}.items():
        options = ["--tasks", tasks, "--data-files", sets, *([] if shots is None else ["--shots", shots])]
        ours, theirs = (evaluate(capsys, runs / target, *options) for target in ("fp32", "fp32-hf"))
        for a, b in pairs(*results[-2:]):
            if tasks == "gsm8k":
                assert a["resps"] == b["resps"]
                assert len(a["resps"][0][0]) > 20
                continue
            for ((x, x_greedy),), ((y, y_greedy),) in zip(a["resps"], b["resps"], strict=True):
                assert float(x) == pytest.approx(float(y), rel=1e-4, abs=1e-3)
                assert x_greedy == y_greedy or shots is not None  # left out where a task only compares
                compared += 1
        for s, t in zip(ours, theirs, strict=True):
            assert s["value"] == pytest.approx(t["value"], rel=1e-3, abs=1e-9)
            assert s | {"value": 0} == t | {"value": 0}
    assert compared > 120


def test_in_bf16_they_agree_to_its_rounding(
    runs: Path, sets: Path, results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16 keeps 8 bits: a rounding moves a logit by up to u = 2^-8 of the logits' spread s, u s / sqrt(3) as a
    standard deviation. About 10 roundings a layer add up independently over L layers; a log-likelihood is a logit less
    a logarithm of a sum of them, so at most twice that in variance, and twice again as both models round: a standard
    deviation of 2 u s sqrt(10 L / 3) a token, sqrt(n) of it for n tokens. None may be six of them away."""
    engine, tokenizer = Run(runs / "bf16").load_engine()
    ids = torch.from_numpy(tokenizer.encode(prose(60))[:320].astype(np.int64))[None]
    deviation = 2 * 2**-8 * float(engine.logits(ids).float().std()) * math.sqrt(10 * engine.cfg.L / 3)
    for target in ("bf16", "bf16-hf", "fp32"):
        evaluate(capsys, runs / target, "--tasks", "piqa,arc,hellaswag", "--data-files", sets)
    errors, values, rounded = [], [], 0
    for (a, b), (_, c) in zip(pairs(*results[:2]), pairs(results[0], results[2]), strict=True):
        for (_, text), ((x, _),), ((y, _),), ((z, _),) in zip(
            a["arguments"], a["resps"], b["resps"], c["resps"], strict=True
        ):
            n = math.sqrt(len(tokenizer.encode(text)))
            errors.append((float(x) - float(y)) / n)
            values.append(float(x) / n)
            rounded += x != z
    assert max(map(abs, errors)) < 6 * deviation
    assert np.std(values) > 60 * deviation  # another example's likelihood would not do
    assert rounded > 0.9 * len(errors)  # it was bf16


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
    text = get_tokenizer("gpt2-1256").decode(made)
    stop = text[3:5]
    asked = [{"max_gen_toks": 4}, {"max_gen_toks": 4, "until": [stop]}, {"max_gen_toks": 2}, {"max_gen_toks": 4}]
    requests = [Instance("generate_until", {}, ("the cat is in the barn", how), i) for i, how in enumerate(asked)]
    short = get_tokenizer("gpt2-1256").decode(made[:2])
    assert lm.generate_until(requests) == [text, text.partition(stop)[0], short, text]  # of three rows
    wrong = [*made[:-1], (made[-1] + 1) % 1257]
    (likeliest, yes), (other, no) = lm._loglikelihood_tokens([(("", ""), ids, made), (("", ""), ids, wrong)])
    assert (yes, no) == (True, False)
    assert likeliest > other
    with pytest.raises(DataError, match=r"a continuation has 321 tokens, and the model computes T = 320"):
        lm._loglikelihood_tokens([(("", ""), ids, made), (("", ""), ids, [1] * 321)])
    with pytest.raises(ConfigError, match="generates greedily"):
        lm.generate_until([Instance("generate_until", {}, ("x", {"do_sample": True}), 0)])


def test_leaderboard_from_the_command_line(
    runs: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """MMLU is two of its 57 subjects, as a group of the same kind: all of them take minutes. Of the harness's folders
    of tasks only these are read."""
    from lm_eval import tasks

    group = {"group": "mmlu_two", "task": [f"mmlu_{subject}" for subject in SUBJECTS]}
    (tmp_path / "two.yaml").write_text(json.dumps(group | {"aggregate_metric_list": [{"metric": "acc"}]}))
    folders = [Path(tasks.__file__).parent / name for name in ("arc", "gsm8k", "hellaswag", "mmlu", "truthfulqa",
                                                               "winogrande")]  # fmt: skip
    known = tasks.TaskManager(include_path=[*map(str, folders), str(tmp_path)], include_defaults=False)
    monkeypatch.setattr(harness, "_task_manager", lambda: known)
    six = [("mmlu_two" if task == "mmlu" else task, how) for task, how in harness.LEADERBOARD.items()]
    monkeypatch.setattr(harness, "LEADERBOARD", dict(six))
    assert main(["eval", str(runs / "fp32"), "--leaderboard", "--data-files", str(sets), "--limit", "3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(words[0], words[1], *words[-4:]) for words in lines[:-1]] == [
        ("arc_challenge", "acc_norm", "3", "examples,", "25", "shots"),
        ("hellaswag", "acc_norm", "3", "examples,", "10", "shots"),
        ("mmlu_two", "acc", "6", "examples,", "5", "shots"),
        ("truthfulqa_mc2", "acc", "3", "examples,", "0", "shots"),
        ("winogrande", "acc", "3", "examples,", "5", "shots"),
        ("gsm8k", "exact_match", "3", "examples,", "5", "shots"),
    ]
    marks = []  # from what the harness says of each example
    for (_, (_, metric)), result in zip(six, results, strict=True):
        by_task = [
            np.mean([s[metric] for s in samples if "strict" in s["filter"] or metric != "exact_match"])
            for samples in result["samples"].values()
        ]
        marks.append(float(np.mean(by_task)))
    assert [float(words[-5]) for words in lines] == pytest.approx([*marks, np.mean(marks)], abs=5.1e-5)
    assert lines[-1][0] == "mean"
    assert 0 < float(lines[-1][1]) < 1


ONE = {"ind": 0, "activity_label": "X", "ctx_a": "A.", "ctx_b": "b", "ctx": "A. b", "label": "2", "split": "val",
       "split_type": "indomain", "source_id": "own~0", "endings": ["éé", "ab", "cccccc", "dd"]}  # fmt: skip


def test_three_definitions_of_the_best_ending_by_hand(tmp_path: Path) -> None:
    # Bytes as tokens; the space before an ending costs nothing, each byte of é 1, a and b 1.5, c 1, d 5.
    # Sums 4, 3, 6, 10: the second. llm.c, means of tokens (the space is one): 4 / 5, 3 / 3, 6 / 7, 10 / 3: the first.
    # The harness, sums by characters of the ending: 4 / 2, 3 / 2, 6 / 6, 10 / 2: the third.
    costs = {0xC3: 1.0, 0xA9: 1.0, ord("a"): 1.5, ord("b"): 1.5, ord("c"): 1.0, ord("d"): 5.0}
    tokenizer, where = get_tokenizer("bytes"), tmp_path / "Rowan/hellaswag"
    where.mkdir(parents=True)
    for label, acc, acc_norm, llmc in (("0", 0, 0, 1), ("1", 1, 0, 0), ("2", 0, 1, 0)):
        for split in ("train", "validation"):
            (where / f"{split}.jsonl").write_text(json.dumps(ONE | {"label": label}) + "\n")
        lm = harness.engine_lm(Table(costs), tokenizer, greedy=False)  # type: ignore[arg-type]
        scores = harness.scores_of(harness.run_harness(lm, ["hellaswag"], 0, tmp_path, None))
        assert [(s.metric, s.value) for s in scores] == [("acc", acc), ("acc_norm", acc_norm)]
        found = accuracy(Table(costs), load_examples(where / "train.jsonl", tokenizer, 1024))  # type: ignore[arg-type]
        assert (found.acc, found.acc_norm) == (acc, llmc)


def test_both_hellaswags_in_one_command(
    runs: Path, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in evaldata.hellaswag(6)))
    run, harness_only = runs / "fp32", ["--tasks", "hellaswag", "--data-files", sets]
    together = evaluate(capsys, run, "--hellaswag", path, *harness_only)
    assert [(s["task"], s["metric"]) for s in together] == [
        ("hellaswag, in-loop", "acc_norm (llm.c: mean loss per token)"), ("hellaswag, in-loop", "acc (sum of losses)"),
        ("hellaswag, lm-eval", "acc"), ("hellaswag, lm-eval", "acc_norm"),
    ]  # fmt: skip
    apart = evaluate(capsys, run, "--hellaswag", path) + evaluate(capsys, run, *harness_only)
    assert [s["value"] for s in together] == [s["value"] for s in apart]


def test_a_wrong_task_ends_the_command_before_anything_is_scored(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--hellaswag` had scored, maybe for an hour, was lost with the error."""
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in evaldata.hellaswag(2)))
    scored = list[int]()
    monkeypatch.setattr("daybreak.evaluate.multiple_choice.accuracy", lambda *_: scored.append(1) or Accuracy(0, 0, 2))
    command = ["eval", str(runs / "fp32"), "--hellaswag", str(path), "--tasks"]
    for tasks, code, said in (
        (["helaswag"], 2, "has no task 'helaswag'"),
        (["core"], 2, "--tasks core needs --data-files DIR"),
        (["core", "--data-files", str(tmp_path)], 4, "core.yaml"),
    ):
        assert main([*command, *tasks]) == code
        assert said in capsys.readouterr().err
        assert not scored


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


def test_without_the_hub_nothing_is_asked_for_twice(
    both: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries would try six times for each file, and sleep in between. Nothing listens at port 1."""
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    for library in (config, constants):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    slept = list[float]()
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(DataError) as error:
        harness.run_harness(both[0], ["piqa", "hellaswag"], None, None, None)
    assert str(error.value) == (
        "piqa, hellaswag: the Hub cannot be reached ([Errno 111] Connection refused); download the data elsewhere with "
        "`hf download` to DIR/owner/name, and give --data-files DIR."
    )
    assert slept == []
    assert (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)  # later calls ask the Hub again
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert harness.unreachable(hub.url) == ""  # although it answers with 404
        assert hub.asked == ["/"]


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
    assert {r["task"] for r in Run("runs/r").metrics("eval")} == {"hellaswag", "hellaswag-acc"}
    assert main(["export", "runs/r", "--to", "hf", "hf"]) == 0
    options = ["--tasks", "hellaswag,lambada,arc,piqa", "--data-files", sets]
    scores = [evaluate(capsys, target, *options) for target in ("runs/r", "hf")]
    assert [(s["task"], s["metric"]) for s in scores[0]] == [
        ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("lambada_openai", "perplexity"), ("lambada_openai", "acc"),
        ("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("arc_challenge", "acc"), ("arc_challenge", "acc_norm"),
        ("piqa", "acc"), ("piqa", "acc_norm"),
    ]  # fmt: skip
    for a, b in zip(*scores, strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-3)
        assert a["examples"] == 6
    evaldata.write_sets(tmp_path / "fewer", 3, SUBJECTS)  # under the same names, in another folder
    fewer = evaluate(capsys, "runs/r", "--tasks", "arc", "--data-files", tmp_path / "fewer")
    assert {a["examples"] for a in fewer} == {3}
    assert main(["eval", "runs/r", "--tasks", "piqa", "--data-files", str(sets), "--limit", "2"]) == 0
    assert "piqa" in capsys.readouterr().out
