"""`prepare --as chat`: what is found in files, what is said of them, and what lies on the disk afterwards."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import chats
import hub_server
import numpy as np
import pytest
import torch
import transformers

import daybreak
from daybreak.cli.main import main
from daybreak.data.chat import ChatEncoder
from daybreak.data.dataset import open_dataset
from daybreak.data.packing import open_marks, read_examples, row_tokens
from daybreak.data.prepare import prepare
from daybreak.data.shards import open_shard
from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine
from daybreak.engine.device import engine_spec
from daybreak.errors import ConfigError, DataError

pytest.importorskip("tokenizers")
ROWS = 384


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(chats.make_model(tmp_path / "model"))


def records(n: int = 60) -> list[dict[str, Any]]:
    return [{"messages": chats.conversation(i, 1 + i % 3)} for i in range(n)]


def examples(folder: Path, split: str = "train") -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids and learned places of every example of a split, from the files."""
    found = set()
    for shard in getattr(open_dataset(str(folder)), split):
        ids, marks = np.array(open_shard(shard)), np.array(open_marks(shard))
        T = row_tokens(shard)
        starts = np.flatnonzero(marks & 1)
        assert set(range(0, shard.tokens, T)) <= set(starts.tolist())  # no example continues in the next row
        for a, b in zip(starts, [*starts[1:], shard.tokens], strict=True):
            learned = np.flatnonzero(marks[a:b] & 2)
            if learned.size:
                found.add((tuple(ids[a:b].tolist()), tuple(learned.tolist())))
    return found


def wanted(model: str, given: list[dict[str, Any]], T: int = ROWS) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    encoder = ChatEncoder(get_tokenizer(model), Path(model).parent, T)
    made = [encoder(record)[0] for record in given]
    return {(tuple(e.ids.tolist()), tuple(np.flatnonzero(e.learned).tolist())) for e in made}


def test_every_example_is_in_one_split_whole(model: str, caplog: pytest.LogCaptureFixture) -> None:
    chats.write_lines(Path("c.jsonl"), records())
    with caplog.at_level(logging.INFO):
        manifest = prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    assert caplog.messages[0] == "c.jsonl: chats, since its records have messages; --as text reads them as text"
    train, val = (examples(Path("data/c"), split) for split in ("train", "val"))
    assert train | val == wanted(model, records())
    assert not train & val
    assert (len(train), len(val)) == (manifest.train.documents, manifest.val.documents)
    assert 1 <= len(val) <= 8
    assert manifest.rows == ROWS
    assert manifest.train.tokens % ROWS == 0
    spelt = get_tokenizer(model)
    assert manifest.train.bytes == sum(len(spelt.token_bytes(i)) for ids, _ in train for i in ids)
    files = {path.name for path in Path("data/c").iterdir()}
    assert files == {
        "manifest.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "generation_config.json",
        *(f"c_{split}_000000.{kind}" for split in ("train", "val") for kind in ("bin", "marks")),
    }  # fmt: skip
    assert Path("data/c/chat_template.jinja").read_text() == chats.CHATML
    again = prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS, workers=3)
    assert again == manifest


def test_files_of_every_kind_give_the_same_examples(model: str) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    given = records(12)
    given[3]["messages"][0]["name"] = "ann"  # a field that the others lack
    Path("folder").mkdir()
    chats.write_lines(Path("folder/a.jsonl"), given[:3])
    Path("folder/b.json").write_text(json.dumps(given[3:6]))
    with gzip.open("folder/c.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in given[6:9]))
    parquet.write_table(arrow.Table.from_pylist(given[9:]), "folder/d.parquet")
    Path("folder/notes.txt").write_text("no chat")
    Path("folder/settings.json").write_text('{"a": 1}')
    prepare("folder", tokenizer=model, name="all", row_tokens=ROWS)
    found = examples(Path("data/all")) | examples(Path("data/all"), "val")
    assert found == wanted(model, given)
    parquet.write_table(arrow.Table.from_pylist(given), "whole.parquet")
    prepare("whole.parquet", tokenizer=model, name="whole", row_tokens=ROWS)
    assert examples(Path("data/whole")) | examples(Path("data/whole"), "val") == wanted(model, given)


def test_the_template_of_the_page_asks_with_the_tokens_that_were_learned(tmp_path: Path) -> None:
    """The prompt that transformers makes of a question is what comes before the answer in a row of ours."""
    page = (Path(__file__).parents[1] / "docs/data.md").read_text()
    found = re.search(r"```jinja text\n(.*?)```", page, re.DOTALL)
    assert found
    model = chats.make_model(tmp_path / "model", found[1])
    turns = [{"role": "user", "content": "Who has it?"}, {"role": "assistant", "content": "Cid has it."}]
    example, _ = ChatEncoder(get_tokenizer(str(model)), Path(model).parent, ROWS)({"messages": turns})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = theirs.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    learned = np.flatnonzero(example.learned)
    assert example.ids[: learned[0]].tolist() == asked
    assert theirs.decode(example.ids[learned]) == "Cid has it." + theirs.eos_token


def test_prompts_in_a_table_need_no_template(model: str) -> None:
    """A .csv, with a tokenizer of ours that has no chat template."""
    lines = [f'"{i} plus {i}?"," It is {2 * i}."\n' for i in range(20)]
    Path("sums.csv").write_text("question,answer\n" + "".join(lines))
    manifest = prepare("sums.csv", name="sums", tokenizer="bytes", row_tokens=64)
    assert manifest.tokenizer == "bytes"
    texts = set()
    for split in ("train", "val"):
        for ids, learned in examples(Path("data/sums"), split):
            texts.add((bytes(ids[1 : learned[0]]), bytes(ids[learned[0] : -1])))
            assert (ids[0], ids[-1], learned[-1]) == (256, 256, len(ids) - 1)
    assert texts == {(f"{i} plus {i}?".encode(), f" It is {2 * i}.".encode()) for i in range(20)}


def test_two_texts_beside_a_template_are_warned_of(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Such a model would be asked with a template that it has not seen."""
    Path("sums.csv").write_text("question;answer\n" + "".join(f"{i} plus {i}?;It is {2 * i}.\n" for i in range(20)))
    with caplog.at_level(logging.WARNING):
        prepare("sums.csv", name="sums", tokenizer=model, row_tokens=64)
        prepare("sums.csv", name="bytes", tokenizer="bytes", row_tokens=64)  # there is no template to miss
    assert caplog.messages == [
        "sums.csv: two texts are joined without the chat template, and `daybreak chat` asks with it. For a model that "
        "talks, call the fields instruction and output."
    ]


@pytest.mark.parametrize(
    ("said", "T"),
    [
        ('{"n_positions": 96}', 96),
        ('{"max_position_embeddings": 128}', 128),
        ('{"max_position_embeddings": 4096}', 1024),
        ("{}", 1024),
        ("[]", 1024),
    ],
)
def test_rows_are_no_longer_than_the_model_reads(
    model: str, said: str, T: int, caplog: pytest.LogCaptureFixture
) -> None:
    given = records(12)
    given[3] = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 900}]}
    chats.write_lines(Path("c.jsonl"), given)
    (Path(model).parent / "config.json").write_text(said)
    with caplog.at_level(logging.WARNING):
        assert prepare("c.jsonl", tokenizer=model, name="c").rows == T
    way = "the model reads no more" if T < 1024 else "--row-tokens N makes longer rows"
    assert caplog.messages[-1].endswith(f"; {way}")
    assert prepare("c.jsonl", tokenizer=model, name="c", row_tokens=64).rows == 64


def test_names_of_files_tell_the_splits(model: str) -> None:
    Path("set").mkdir()
    chats.write_lines(Path("set/train.jsonl"), records(9))
    chats.write_lines(Path("set/validation.jsonl"), records(12)[9:])
    chats.write_lines(Path("set/test.jsonl"), records(20)[12:])
    prepare("set", tokenizer=model, name="set", row_tokens=ROWS)
    assert examples(Path("data/set")) == wanted(model, records(9))
    assert examples(Path("data/set"), "val") == wanted(model, records(12)[9:])


def test_what_is_left_out_and_cut_is_counted_and_named(model: str, caplog: pytest.LogCaptureFixture) -> None:
    given = records(30)
    given[4] = {"messages": [{"role": "user", "content": "nobody answers"}]}
    given[9] = {"messages": [{"role": "user", "content": "long " * 500}, {"role": "assistant", "content": "x"}]}
    given[20] = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "long " * 500}]}
    chats.write_lines(Path("c.jsonl"), given)
    with caplog.at_level(logging.WARNING):
        manifest = prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    assert manifest.train.documents + manifest.val.documents == 28
    assert caplog.messages == [
        "2 of 30 examples have nothing to learn, and are left out (first: c.jsonl line 5); the answers of 1 lie beyond "
        f"the {ROWS} tokens of a row",
        f"2 of 30 examples have more than {ROWS} tokens, and are cut (first: c.jsonl line 10); --row-tokens N makes "
        "longer rows",
    ]


def test_answers_beyond_the_row_are_told_from_none(model: str, caplog: pytest.LogCaptureFixture) -> None:
    asked = {"role": "user", "content": "word " * 400}
    chats.write_lines(Path("c.jsonl"), [{"messages": [asked, {"role": "assistant", "content": a}]} for a in ("Y", "N")])
    said = (
        "c.jsonl: none of 2 examples has anything to learn (first: c.jsonl line 1); the answers of 2 lie beyond the 128"
    )
    with pytest.raises(DataError) as error:
        prepare("c.jsonl", tokenizer=model, name="c", row_tokens=128)
    assert str(error.value) == f"{said} tokens of a row; --row-tokens N makes longer rows."
    assert prepare("c.jsonl", tokenizer=model, name="c", row_tokens=4096).train.documents == 1  # the message's advice
    (Path(model).parent / "config.json").write_text('{"n_positions": 128}')
    with pytest.raises(DataError) as error:
        prepare("c.jsonl", tokenizer=model, name="d")
    assert str(error.value) == f"{said} tokens of a row; the model reads no more, so shorten the questions."


def test_empty_answers_are_warned_of(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """The masks stay as transformers': the end of such a turn is learned."""
    given = [{"instruction": f"a{i}", "input": "", "output": "" if i in (2, 5) else "b"} for i in range(9)]
    chats.write_lines(Path("c.jsonl"), given)
    with caplog.at_level(logging.WARNING):
        manifest = prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    assert caplog.messages == [
        "2 of 9 examples have an empty answer, from which a model learns to say nothing (first: c.jsonl line 3); mend "
        "or delete them"
    ]
    assert manifest.train.documents + manifest.val.documents == 9


@pytest.mark.parametrize("skip", [False, True])
def test_a_split_that_lost_its_examples_says_so(model: str, skip: bool) -> None:
    """Three good chats, and the fourth, which is for validation, has no answer or is no chat."""
    bad = {"messages": 1} if skip else {"messages": chats.conversation(0, 1)[:1]}
    chats.write_lines(Path("c.jsonl"), [*({"messages": chats.conversation(i, 1)} for i in range(3)), bad])
    with pytest.raises(DataError) as error:
        prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS, skip_bad=skip)
    assert str(error.value) == (
        "c.jsonl has too few examples to split into train and val, since nothing is learned from the 1 for validation "
        "(first: c.jsonl line 4); mend or delete such ones, or add more."
    )
    chats.write_lines(Path("c.jsonl"), [{"messages": chats.conversation(i, 1)} for i in range(3)])  # it is deleted
    manifest = prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    assert (manifest.train.documents, manifest.val.documents) == (2, 1)
    chats.write_lines(Path("c.jsonl"), [{"messages": chats.conversation(0, 1)}])
    with pytest.raises(DataError, match=r"^c\.jsonl has too few examples to split into train and val; add more\.$"):
        prepare("c.jsonl", tokenizer=model, name="one", row_tokens=ROWS)


def test_a_set_with_nothing_to_learn_is_an_error(model: str) -> None:
    chats.write_lines(Path("c.jsonl"), [{"messages": chats.conversation(i, 1)[:1]} for i in range(9)])
    said = (
        r"c\.jsonl: none of 9 examples has anything to learn \(first: c\.jsonl line 1\); an answer is a message of the"
    )
    with pytest.raises(DataError, match=said):
        prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    assert not Path("data/c").exists()
    assert list(Path("data").iterdir()) == []


def test_a_template_without_an_end_of_turn_is_warned_of(model: str, caplog: pytest.LogCaptureFixture) -> None:
    each = "{{ m.role }}: {{ m.content }}\n"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    Path("model/chat_template.jinja").write_text("{% for m in messages %}" + each + "{% endfor %}" + prompt)
    chats.write_lines(Path("c.jsonl"), records(20))
    with caplog.at_level(logging.WARNING):
        prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    assert caplog.messages == [
        "the answer of c.jsonl line 1 does not end with a special token: the model may not learn to stop. Mend the "
        "chat template."
    ]


def test_a_bad_record_stops_or_is_counted(model: str, caplog: pytest.LogCaptureFixture) -> None:
    given: list[Any] = records(20)
    given[7], given[11] = {"messages": "no list"}, {"messages": [{"role": "user", "content": 3}]}
    chats.write_lines(Path("c.jsonl"), given)
    with pytest.raises(
        DataError,
        match=re.escape("c.jsonl line 8 is no chat (it has: 'messages'); mend or delete it, or add --skip-bad."),
    ):
        prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS)
    with caplog.at_level(logging.WARNING):
        manifest = prepare("c.jsonl", tokenizer=model, name="c", row_tokens=ROWS, skip_bad=True)
    assert manifest.train.documents + manifest.val.documents == 18
    said = "c: skipped 2 that are no chats (first: c.jsonl line 8 is no chat (it has: 'messages').)"
    assert said in caplog.messages


def test_text_stays_text(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Records that have both, other fields, plain texts: nothing changes for them. And --as decides."""
    both = [{"text": f"page {i}", **record} for i, record in enumerate(records(20))]
    chats.write_lines(Path("pages.jsonl"), both)
    with caplog.at_level(logging.INFO):
        assert prepare("pages.jsonl", tokenizer=model, name="pages").rows == 0
        assert prepare("pages.jsonl", tokenizer=model, name="forced", kind="chat", row_tokens=ROWS).rows == ROWS
        chats.write_lines(Path("c.jsonl"), records(20))
        with pytest.raises(
            DataError, match=r"has no text in field 'text' .*; these are chats: add --as chat to .* or --skip-bad to "
        ):
            prepare("c.jsonl", tokenizer=model, name="text", kind="text")
    assert not [message for message in caplog.messages if "chats" in message]
    Path("a.txt").write_text("some text")
    with pytest.raises(DataError, match=r"a\.txt is text and lists no chats; prepare it with --as text"):
        prepare("a.txt", tokenizer=model, name="a", kind="chat")
    with pytest.raises(ConfigError, match=r"no chat template; put the model's chat_template\.jinja beside its"):
        prepare("c.jsonl", tokenizer="gpt2", name="bare")


def test_chats_among_texts(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """The message says both ways: the texts without the chats, and the chats without the texts."""
    Path("mix").mkdir()
    Path("mix/a.txt").write_text("It was a dark night.\n" * 200)
    chats.write_lines(Path("mix/b.jsonl"), [{"text": "one two three"}] * 30)
    chats.write_lines(Path("mix/c.jsonl"), records(20))
    with pytest.raises(DataError) as error:
        prepare("mix", tokenizer="bytes", name="mix")
    assert str(error.value) == (
        "mix/c.jsonl line 1 has no text in field 'text' (it has: 'messages'); these are chats: add --as chat to learn "
        "from them alone, or --skip-bad to leave them out."
    )
    texts = prepare("mix", tokenizer="bytes", name="mix", skip_bad=True)
    assert texts.train.bytes + texts.val.bytes == 200 * 21 + 30 * 13
    with pytest.raises(DataError, match=r"b\.jsonl line 1 is no chat \(it has: 'text'\); .* add --skip-bad\.$"):
        prepare("mix", tokenizer=model, name="talk", kind="chat", row_tokens=ROWS)
    talk = prepare("mix", tokenizer=model, name="talk", kind="chat", row_tokens=ROWS, skip_bad=True)
    assert talk.train.documents + talk.val.documents == 20


def test_a_set_of_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet files of a config with validation, and a URL; both need --as chat."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    pytest.importorskip("huggingface_hub")
    for name, given in (("train", records(20)), ("validation", records(26)[20:])):
        parquet.write_table(arrow.Table.from_pylist(given), f"{name}.parquet")
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        files = {f"data/{name}.parquet": Path(f"{name}.parquet").read_bytes() for name in ("train", "validation")}
        hub.add("org/talk", files, {"license": "mit"})
        with pytest.raises(
            DataError, match=r"has no text column 'text' .*; these are chats: add --as chat to .* or --skip-bad to "
        ):
            prepare("hf:org/talk", tokenizer=model, name="talk")
        manifest = prepare("hf:org/talk", tokenizer=model, name="talk", kind="chat", row_tokens=ROWS)
    assert (manifest.source, manifest.revision, manifest.licence) == ("hf:org/talk", hub_server.COMMIT, "mit")
    assert examples(Path("data/talk")) == wanted(model, records(20))
    assert examples(Path("data/talk"), "val") == wanted(model, records(26)[20:])


def test_the_command_shows_what_is_learned(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In green on a terminal that has colours; else between brackets. The context is dim."""
    chats.write_lines(Path("c.jsonl"), records(8))
    line = ["prepare", "c.jsonl", "--tokenizer", model, "--name", "c", "--row-tokens", str(ROWS), "--show", "2"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(line) == 0
    out, _ = capsys.readouterr()
    tokenizer = get_tokenizer(model)
    want = ""
    for i, example in enumerate(read_examples(open_dataset("data/c").train, 2), 1):
        texts = [(tokenizer.decode(ids), learned) for ids, learned in example]
        shown = "".join(f"[[{text}]]" if learned else text for text, learned in texts)
        want += f"--- example {i} of 2: context, learned\n{shown}\n"
    assert out.startswith(want)
    assert "assistant\n[[" in out
    assert "<|im_end|>]]\n" in out
    rest = out.removeprefix(want)
    manifest = json.loads(Path("data/c/manifest.json").read_text())
    more = "So few examples need more epochs than the usual two: docs/finetune.md, under A few chats of your own.\n"
    assert rest == (
        f"data/c: {manifest['train']['documents']} training and {manifest['val']['documents']} validation examples in "
        f"rows of {ROWS} tokens ({manifest['tokenizer']})\nNext: daybreak finetune MODEL --data c\n{more}"
    )
    Path("model/config.json").write_text("{}")  # now the tokenizer lies beside a model
    assert main(line) == 0
    assert capsys.readouterr().out.endswith(f"\nNext: daybreak finetune {Path(model).parent} --data c\n{more}")
    there = manifest["train"]["documents"]
    assert main([*line[:-1], "30"]) == 0  # more than there are
    heads = re.findall("--- example .*", capsys.readouterr().out)
    assert heads == [f"--- example {i} of {there}: context, learned" for i in range(1, there + 1)]
    chats.write_lines(Path("many.jsonl"), records(120))
    assert main(["prepare", "many.jsonl", "--tokenizer", model, "--name", "many", "--row-tokens", str(ROWS)]) == 0
    assert capsys.readouterr().out.endswith(" --data many\n")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(line) == 0
    out, _ = capsys.readouterr()
    assert "[[" not in out
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", out, re.S)
    assert green[0] == "learned"
    assert any(text.endswith("<|im_end|>") for text in green)
    assert not any("What of" in text for text in green)


def test_a_run_keeps_the_template_that_it_learned(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From `prepare` to a run, its scores, and `doctor`, which reads the marks in full."""
    chats.write_lines(Path("c.jsonl"), records(40))
    prepare("c.jsonl", tokenizer=model, name="c", row_tokens=64)
    V = get_tokenizer(model).V
    shape = f"--model.L 1 --model.C 32 --model.NH 2 --model.max_T 64 --model.V {V} --batch.B 2".split()
    quick = ["--steps", "3", "--eval.tokens", "128", "--eval.sample_tokens", "0", "--run.device", "cpu"]
    quick += ["--batch.total_tokens", "256"]
    assert main(["train", "d12", "--name", "r", "--data", "c", *shape, *quick]) == 0
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        assert (Path("runs/r") / name).read_text() == (Path("model") / name).read_text()
    assert "packed = true" in Path("runs/r/config.toml").read_text()
    run = daybreak.Run("runs/r")
    planned, live = daybreak.plan(run.config), Engine(engine_spec(run.config, torch.device("cpu")))
    assert planned.arena.sizes() == live.arena.sizes()  # `plan` has found the packed rows
    assert daybreak.plan(run.config.override({"data.packed": False})).arena.sizes() == planned.arena.sizes()
    records_ = [json.loads(line) for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    val = next(r for r in reversed(records_) if r["kind"] == "val")
    assert not [r for r in records_ if r.get("what") == "unigram_entropy"]
    capsys.readouterr()
    assert main(["eval", "runs/r", "--data", "c", "--json"]) == 0
    score = json.loads(capsys.readouterr().out)[0]
    assert score["value"] == pytest.approx(val["loss"], rel=1e-6)
    assert score["examples"] == 128 // 64  # rows, of which only a part is learned
    # A run on text, asked about chats; rows that are longer than its sequences are refused.
    Path("a.txt").write_text("some text and more of it. " * 200)
    prepare("a.txt", tokenizer=model, name="a")
    assert main(["train", "d12", "--name", "t", "--data", "a", *shape, *quick]) == 0
    assert main(["eval", "runs/t", "--data", "c"]) == 0
    short = [*shape[:7], "32", *shape[8:]]
    assert main(["train", "d12", "--name", "s", "--data", "a", *short, *quick]) == 0
    capsys.readouterr()
    assert main(["eval", "runs/s", "--data", "c"]) == 2
    said = "c has rows of 64 tokens, and the run's batch.T is 32; prepare it again with --row-tokens 32."
    assert said in capsys.readouterr().err
    assert main(["train", "d12", "--name", "u", "--data", "c", *short, *quick]) == 4
    said = (
        "has rows of 64 tokens, not of batch.T = 32; use --batch.T 64, or prepare the data again with --row-tokens 32."
    )
    assert said in capsys.readouterr().err
    assert main(["doctor", "runs/r"]) == 0
    marks = Path("data/c/c_train_000000.marks")
    data = bytearray(marks.read_bytes())
    data[-1] ^= 2
    marks.write_bytes(data)
    capsys.readouterr()
    assert main(["doctor", "runs/r"]) != 0
    assert f"BAD: {marks} is damaged (its sha256 does not match); prepare c again." in capsys.readouterr().out
