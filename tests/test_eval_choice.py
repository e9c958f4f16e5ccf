"""Multiple choice against arithmetic by hand, another model's losses, and a file laid out from llm.c's description."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import evaldata
import numpy as np
import pytest
import torch

from daybreak.cli.main import main
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import ConfigError, DataError
from daybreak.evaluate.multiple_choice import Example, accuracy, load_examples, losses_of, read_eval_bin, write_eval_bin
from daybreak.shapes import GPT2Config
from daybreak.state.run import Run


def eval_bin(examples: list[tuple[list[int], list[list[int]], int]]) -> bytes:
    bodies = []
    for i, (context, endings, label) in enumerate(examples):
        words = [i, label, len(endings), len(context), *context]
        for ending in endings:
            words += [len(ending), *ending]
        size = 2 * (len(words) + 2)
        bodies.append((size, struct.pack(f"<{len(words) + 2}H", 65535, size, *words)))
    header = struct.pack("<4i", 20240522, 1, len(bodies), max(size for size, _ in bodies))
    return header + bytes(1024 - 16) + b"".join(body for _, body in bodies)


EXAMPLES = [([5, 6, 7], [[1], [2, 3], [4, 4, 4], [9]], 2), ([8], [[1, 2], [3], [4], [5, 6, 7, 8]], 0)]


def test_the_eval_bin_of_llm_c_both_ways(tmp_path: Path) -> None:
    data = eval_bin(EXAMPLES)
    (tmp_path / "a.bin").write_bytes(data)
    examples = read_eval_bin(tmp_path / "a.bin")
    assert examples == [Example(*e) for e in EXAMPLES]
    write_eval_bin(tmp_path / "b.bin", examples)
    assert (tmp_path / "b.bin").read_bytes() == data
    with pytest.raises(ConfigError, match="below 65535"):
        write_eval_bin(tmp_path / "c.bin", [Example([65535], [[1]], 0)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d[:1000], "is not an eval file: 1000 bytes"),
        (lambda d: struct.pack("<i", 20240520) + d[4:], "magic 20240520, version 1 instead of 20240522, 1"),
        (lambda d: d[:-2], "example 1 is damaged"),
        (lambda d: d + b"\0\0", "has 1 values after its 2 examples"),
        (lambda d: d[:1024] + b"\0\0" + d[1026:], "example 0 is damaged"),
        (lambda d: d[:1030] + b"\4\0" + d[1032:], "example 0 is damaged"),  # label 4 of 4
        (lambda d: d[:1032] + b"\5\0" + d[1034:], "example 0 is damaged"),  # five endings
        (lambda d: d[:1034] + b"\xff\xff" + d[1036:], "example 0 is damaged"),  # a context beyond the end
        (lambda d: d[:12] + struct.pack("<i", 10) + d[16:], "example 0 is damaged"),  # longer than the longest
    ],
)
def test_damaged_eval_bins_are_refused(tmp_path: Path, change, said: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.bin").write_bytes(change(eval_bin(EXAMPLES)))
    with pytest.raises(DataError, match=said):
        read_eval_bin(tmp_path / "a.bin")


class Table:
    """An engine whose loss of a token is given by the token, whatever comes before it."""

    B, T = 3, 16

    def __init__(self, losses: dict[int, float]) -> None:
        self.table, self.shapes = losses, list[tuple[int, int]]()

    def eval_losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        b, t = tokens.shape
        assert (b <= self.B, t <= self.T) == (True, True)
        self.shapes.append((b, t))
        return torch.tensor([[self.table.get(int(x), 0.0) for x in row] for row in targets.tolist()])


def test_accuracy_by_hand() -> None:
    # Token k costs k. Example 0: sums 1, 5, 12, 9, means 1, 2.5, 4, 9: both say 0. Example 1: sums 3, 3, 4, 26: the
    # first of equals, 0; means 1.5, 3, 4, 6.5: 0. Example 2: sums 6, 5: 1; means 2, 5: 0.
    engine = Table({k: float(k) for k in range(10)})
    examples = [Example(*e) for e in EXAMPLES] + [Example([1, 1], [[1, 2, 3], [5]], 0)]
    found = accuracy(engine, examples)  # type: ignore[arg-type]
    assert (found.acc, found.acc_norm, found.examples) == (1 / 3, 2 / 3, 3)
    # Equal means (2 and 2): the first wins.
    tied = [Example([1], [[2], [1, 3]], 0), Example([1], [[2], [1, 3]], 1)]
    assert accuracy(engine, tied).acc_norm == 0.5  # type: ignore[arg-type]
    assert max(t for _, t in engine.shapes) == 8


def test_losses_equal_those_of_each_row_alone_and_long_rows_lose_their_beginning() -> None:
    engine = Engine(EngineSpec(GPT2Config(L=2, C=16, NH=2, max_T=24, V=97), B=4, T=24, train=False), seed=5)
    engine.param("wte").mul_(20)
    rng = np.random.default_rng(1)
    rows = [(rng.integers(0, 97, int(c)).tolist(), rng.integers(0, 97, int(n)).tolist())
            for c, n in zip(rng.integers(1, 40, 23), rng.integers(1, 20, 23), strict=True)]  # fmt: skip
    for (context, ending), losses in zip(rows, losses_of(engine, rows), strict=True):
        ids = torch.tensor([[*context, *ending][-25:]])
        alone = torch.log_softmax(engine.logits(ids[:, :-1]).double(), -1)[0].gather(1, ids[0, 1:, None])[:, 0]
        assert losses == pytest.approx(-alone[-len(ending) :].numpy(), abs=1e-4)


def test_original_files_subsets_and_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = get_tokenizer("gpt2")
    path = tmp_path / "hellaswag_val.jsonl"
    records = evaldata.hellaswag(10)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    examples = load_examples(path, tokenizer, 1024)
    for record, example in zip(records, examples, strict=True):
        assert tokenizer.decode(example.context) == record["ctx"]
        assert [tokenizer.decode(e) for e in example.endings] == [f" {e}" for e in record["endings"]]
        assert example.label == int(record["label"])
    assert load_examples(path, tokenizer, 1024, 4) == [examples[i] for i in (0, 2, 5, 7)]
    longest = [max(map(len, example.endings)) for example in examples]
    T = sorted(longest)[5]
    kept = [example for example, n in zip(examples, longest, strict=True) if n <= T]
    assert load_examples(path, tokenizer, T) == kept != examples
    assert f"{10 - len(kept)} of 10 examples have an ending of more than T = {T} tokens and are left out" in caplog.text
    with pytest.raises(DataError, match=r"10 of 10 examples .* use a larger T"):
        load_examples(path, tokenizer, 1)
    write_eval_bin(tmp_path / "h.bin", examples)
    assert load_examples(tmp_path / "h.bin", tokenizer, 1024) == examples
    with pytest.raises(ConfigError, match="holds GPT-2 tokens, this data 'bytes''s"):
        load_examples(tmp_path / "h.bin", get_tokenizer("bytes"), 1024)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 needs ctx"):
        load_examples(path, tokenizer, 1024)
    path.write_text(json.dumps(records[0] | {"label": 4}) + "\n")
    with pytest.raises(DataError, match="line 1 needs ctx"):
        load_examples(path, tokenizer, 1024)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no examples"):
        load_examples(path, tokenizer, 1024)
    with pytest.raises(DataError, match=r"cannot read .*none"):
        load_examples(tmp_path / "none.jsonl", tokenizer, 1024)


def test_in_the_loop_and_again_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat is in the barn. the dog looks for food.\n" * 200)
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaldata.hellaswag(20)))
    assert main(["prepare", "a.txt", "--tokenizer", "bytes", "--name", "a"]) == 0
    argv = ["train", "d6", "--model.L", "1", "--model.C", "8", "--model.NH", "1", "--model.max_T", "64", "--model.V",
            "257", "--data", "a", "--name", "r", "--steps", "4", "--eval.every", "2", "--eval.tokens", "128",
            "--eval.sample_tokens", "1", "--eval.hellaswag", "h.jsonl", "--eval.hellaswag_examples", "9"]  # fmt: skip
    assert main(argv) == 0
    run = Run("runs/r")
    evals = run.metrics("eval")
    assert [(r["step"], r["task"], r["examples"]) for r in evals] == [
        (s, task, 9) for s in (2, 4) for task in ("hellaswag", "hellaswag-acc")
    ]
    lines = [line for line in (tmp_path / "runs/r/main.log").read_text().splitlines() if "eval:" in line]
    assert lines == [f"s:{r['step']} eval:{r['accuracy']:.4f}" for r in evals if r["task"] == "hellaswag"]
    capsys.readouterr()
    assert main(["eval", "runs/r", "--hellaswag", "h.jsonl", "--limit", "9", "--json"]) == 0
    norm, plain = json.loads(capsys.readouterr().out)
    assert (norm["value"], plain["value"], norm["examples"]) == (evals[2]["accuracy"], evals[3]["accuracy"], 9)
    assert main([*argv, "--eval.hellaswag_every", "3", "--name", "own"]) == 0  # its own steps, and the end
    own = Run("runs/own")
    assert [r["step"] for r in own.metrics("eval") if r["task"] == "hellaswag"] == [3, 4]
    assert [r["step"] for r in own.metrics("val")] == [0, 2, 4]
    assert main([*argv[:-4], "--eval.hellaswag", "none.jsonl", "--name", "x"]) == 4
    assert not (tmp_path / "runs/x").exists()
