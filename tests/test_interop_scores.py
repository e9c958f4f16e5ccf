"""GGUF's kind `llama`: SentencePiece's own ids from tokens and scores, and what no tokenizer.json could equal."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from interop_runs import inside
from made_sentencepiece import GOLDEN
from test_interop_gguf_in import by_hand, contents, ran
from test_tokenizer_kinds import by_definition
from tokenizer_kinds import TEXTS, sentencepiece, their_model

from daybreak.data.tokenizer import HFTokenizer, get_tokenizer
from daybreak.errors import CheckpointError
from daybreak.interop import open_source
from daybreak.interop.gguf_vocabulary import read_vocabulary
from daybreak.interop.sentencepiece import ranked, scores_of
from daybreak.state.run import Run

gguf = pytest.importorskip("gguf", reason="the test extra installs gguf")
tokenizers = pytest.importorskip("tokenizers")
THEIRS = json.loads(GOLDEN.read_text(encoding="utf-8"))  # see made_sentencepiece.py
NORMAL, CONTROL, ADDED, UNUSED = 1, 3, 4, 5


def keys_of(of: int = 0, more: dict[str, tuple[int, float]] | None = None, **keys: Any) -> dict[str, Any]:
    """GGUF's keys for a vocabulary of SentencePiece's, with more tokens as (type, score); ... removes a key."""
    theirs, more = THEIRS["models"][of], more or {}
    known = {
        "model": "llama", "tokens": [*theirs["tokens"], *more], "scores": [*theirs["scores"]],
        "token_type": [*theirs["types"]], "add_space_prefix": theirs["prefix"],
    }  # fmt: skip
    known["token_type"] += [kind for kind, _ in more.values()]
    known["scores"] += [score for _, score in more.values()]
    return {f"tokenizer.ggml.{key}": value for key, value in (known | keys).items() if value is not ...}


def read(keys: dict[str, Any]) -> HFTokenizer:
    return HFTokenizer(read_vocabulary(Path("m.gguf"), keys, gguf.TokenType), "m.gguf")


@pytest.mark.parametrize("model", range(3))
def test_ids_are_those_of_sentencepiece(model: int) -> None:
    """With and without a space before a text, and with runs of spaces that all have one score."""
    tokenizer = read(keys_of(model))
    assert len(THEIRS["models"][model]["tokens"]) == tokenizer.V
    for text, ids in zip(THEIRS["texts"], THEIRS["models"][model]["ids"], strict=True):
        assert tokenizer.encode(text).tolist() == ids, text
        assert tokenizer.decode(ids) == text.replace("▁", " "), text


ADDED_TOKENS = {"<tool>": (ADDED, -1000.0), "<|im_end|>": (ADDED, 0.0), "<ctl>": (CONTROL, 0.0)}


def vocabulary(writer: Any, of: int = 0) -> int:
    """One of these vocabularies in a file, with tokens that were added to it and few keys."""
    keys = keys_of(of, ADDED_TOKENS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(keys["tokenizer.ggml.tokens"])
    writer.add_token_scores(keys["tokenizer.ggml.scores"])
    writer.add_token_types(keys["tokenizer.ggml.token_type"])
    if not keys["tokenizer.ggml.add_space_prefix"]:  # llama.cpp takes it for true
        writer.add_add_space_prefix(False)
    return len(keys["tokenizer.ggml.tokens"])


def test_a_file_is_imported_and_exported_as_it_was(tmp_path: Path) -> None:
    """Absent keys mean what llama.cpp takes for them: a space before a text, `<s>` before its ids."""
    by_hand(tmp_path / "m.gguf", {}, vocabulary=vocabulary)
    first = open_source(tmp_path / "m.gguf").tokenizer
    run = ran(tmp_path, "m.gguf")
    ours = Run(run).load_engine()[1]
    assert Run(run).config.model.V == 403
    assert (ours.name, ours.eot, ours.ends, ours.around) == (first.name, 1, (2, 401, 1), ([1], []))  # and <|im_end|>
    for text, ids in zip(THEIRS["texts"], THEIRS["models"][0]["ids"], strict=True):
        assert ours.encode(text).tolist() == ids, text
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "back.gguf")
    keys, back = contents(tmp_path / "m.gguf")[0], contents(tmp_path / "back.gguf")[0]
    for key in ("model", "tokens"):
        assert back[f"tokenizer.ggml.{key}"] == keys[f"tokenizer.ggml.{key}"], key
    assert back["tokenizer.ggml.token_type"] == [*THEIRS["models"][0]["types"], ADDED, CONTROL, CONTROL]
    assert (back["tokenizer.ggml.add_space_prefix"], back["tokenizer.ggml.add_bos_token"]) == (True, True)
    again = open_source(tmp_path / "back.gguf").tokenizer
    assert (again.source, again.ends, again.around) == (first.source, first.ends, first.around)


@pytest.mark.parametrize("complete", [True, False], ids=["every way", "last joins"])
def test_a_tokenizer_of_hugging_face_comes_back_with_the_same_ids(complete: bool, tmp_path: Path) -> None:
    """Merges of any two parts, as in published files, and merges of the last parts alone."""
    library = sentencepiece()
    if not complete:
        spec = json.loads(library.to_str())
        model = spec["model"]
        model["merges"].remove(["ov", "e"])
        library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    their_model(tmp_path / "theirs", library)
    ran(tmp_path)
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    back, first = open_source(tmp_path / "m.gguf").tokenizer, open_source(tmp_path / "theirs").tokenizer
    assert (back.V, back.eot, back.ends, back.around) == (first.V, first.eot, first.ends, first.around)
    for text in [*TEXTS, *THEIRS["texts"]]:
        assert back.encode(text).tolist() == first.encode(text).tolist(), text


def test_added_tokens_are_found_first() -> None:
    """A space is put before the text behind each of them, as llama.cpp does. Control tokens are plain text."""
    more = {"a b": (ADDED, -1000.0), **ADDED_TOKENS, "[PAD404]": (UNUSED, 0.0)}
    for model in (0, 1):
        keys = keys_of(model, more)
        tokenizer, fields = read(keys), {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items()}
        spaced, tool = 400, 401
        for pieces in (["x ", tool, "y"], [tool, tool, " z"], [" ", spaced, "\n", tool], ["<|im_end|><ctl><s>", tool]):
            text = "".join(piece if isinstance(piece, str) else [*more][piece - 400] for piece in pieces)
            want = [by_definition(fields, piece) if isinstance(piece, str) else [piece] for piece in pieces]
            assert tokenizer.encode(text).tolist() == [i for part in want for i in part], text
    assert tokenizer.V == 404


@pytest.mark.parametrize(("keys", "around"), [
    ({}, ([1], [])), ({"add_bos_token": False}, ([], [])), ({"add_eos_token": True}, ([1], [2])),
    ({"add_eos_token": True, "bos_token_id": 2}, ([2], [2])),
], ids=str)  # fmt: skip
def test_what_goes_around_a_text(keys: dict[str, Any], around: tuple[list[int], list[int]]) -> None:
    assert read(keys_of(**keys)).around == around


@pytest.mark.parametrize(("pre", "around"), [("llama-bpe", ([256], [])), ("gpt-2", ([], []))])
def test_what_goes_around_a_text_of_byte_level_merges(pre: str, around: tuple[list[int], list[int]]) -> None:
    """llama.cpp puts Llama 3's start before a text unless the file says otherwise, and no other's."""
    tokens = [*json.loads(get_tokenizer("bytes").to_json())["model"]["vocab"]][:256]
    keys = {"model": "gpt2", "pre": pre, "tokens": [*tokens, "<|begin_of_text|>"], "token_type": [1] * 256 + [3],
            "merges": [], "bos_token_id": 256}  # fmt: skip
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    assert read(named).around == around
    assert read(named | {"tokenizer.ggml.add_bos_token": True}).around == ([256], [])
    assert read(named | {"tokenizer.ggml.add_bos_token": False}).around == ([], [])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"scores": ...}, "tokenizer.ggml.scores has no finite score for each token"),
    ({"scores": [0.0] * 400}, "have the same score, so that their place decides"),
    ({"scores": [float("nan")] * 400}, "has no finite score"),
    ({"token_type": [1] * 5}, "has a token twice, or tokens without a token_type"),
    ({"token_type": ...}, "or tokens without a token_type"),
    ({"more": {"▁the": (NORMAL, 0.5)}}, "has a token twice"),
    ({"more": {"q☃": (NORMAL, -0.5)}}, "its token 'q☃' is made with '☃', which is no token"),
    ({"more": {"<s": (NORMAL, -0.5), "<": (NORMAL, -0.7), "s>": (NORMAL, -0.6), ">": (NORMAL, -0.8)}},
     "letters of a text make its token '<s>', which is not of the normal type"),
    ({"more": {"qu@": (UNUSED, -0.5), "@": (NORMAL, -7.5)}}, "letters of a text make its token 'qu@'"),
    ({"more": {"@": (CONTROL, 0.0)}}, "letters of a text make its token '@'"),
    ({"more": {"▁▁x": (ADDED, 0.0)}}, "its added token '▁▁x' holds SentencePiece's letter for a space"),
    ({"more": {"<ab>": (ADDED, 0.0), "b><c": (ADDED, 0.0)}}, "added tokens '<ab>' and 'b><c' can overlap in a text"),
    ({"remove_extra_whitespaces": True}, "changes a text before it splits it, and llama.cpp does not"),
    ({"precompiled_charsmap": [1, 2]}, "changes a text before it splits it"),
    ({"bos_token_id": 400}, "add_bos_token is true, and bos_token_id names no token"),
    ({"model": "t5"}, "a tokenizer of kind 't5' that splits as None is not read"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "reason"), BAD, ids=[r[:40] for _, r in BAD])
def test_what_is_refused_and_why(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        read(keys_of(**keys))
    assert reason in str(refused.value)
    assert str(refused.value).startswith("m.gguf: ")
    assert str(refused.value).endswith("; name it: daybreak import m.gguf --data.tokenizer FILE.")


def test_names_and_bytes_that_are_refused() -> None:
    keys = keys_of(more={"<tool>": (ADDED, 0.0)})
    read(keys | {"general.name": "Mistral"})
    with pytest.raises(CheckpointError, match="removes the spaces after added tokens of a model that is named Phi-3"):
        read(keys | {"general.name": "my Phi-3 Mini"})
    keys["tokenizer.ggml.tokens"][3 + 0xE6] = "@@@@"
    with pytest.raises(CheckpointError, match="it lacks the byte token <0xE6>"):
        read(keys)


def joined(scores: dict[str, float], text: str) -> list[str]:
    """SentencePiece's definition: join the pair whose token has the highest score, the leftmost of equals."""
    parts = list(text)
    while ways := [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]:
        at = -max(ways)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def test_merges_and_scores_stand_for_each_other() -> None:
    """Random vocabularies of two or three letters, where tokens overlap in every way; each against the definition."""
    rng, read_, refused, written, impossible = random.Random(7), 0, 0, 0, 0
    for _ in range(400):
        letters = rng.choice(["ab", "abc"])
        words = {"".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(rng.randint(2, 14))}
        runs = {"a" * n for n in range(2, rng.choice([2, 4, 7]))}
        tokens = sorted(words | runs)
        scores = dict(zip(letters, rng.choices([0.0, -99.0], k=len(letters)), strict=False))
        scores |= dict(zip(tokens, rng.sample([-float(i) for i in range(len(tokens))], len(tokens)), strict=True))
        if rng.random() < 0.5:  # as the runs of spaces of Llama 2; and sometimes others beside them
            same = {t for t in tokens if set(t) == {"a"} or rng.random() < 0.1}
            scores |= dict.fromkeys(same, -50.0)
        vocab = {token: i for i, token in enumerate(scores)}
        texts = ["".join(rng.choices(letters + "aaa", k=rng.randint(1, 30))) for _ in range(30)]
        try:
            merges = ranked(scores, set(scores))
        except ValueError:
            refused += 1
        else:
            read_ += 1
            library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
            assert [library.encode(text).tokens for text in texts] == [joined(scores, text) for text in texts]
        every = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
        rng.shuffle(every)
        every.sort(key=lambda pair: rng.choice([0.0, scores["".join(pair)]]), reverse=True)
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, every))
        if (back := scores_of(vocab, every)) is None:
            impossible += 1
        else:
            written += 1
            full = {token: back.get(token, 0.0) for token in vocab}
            assert [library.encode(text).tokens for text in texts] == [joined(full, text) for text in texts]
    assert min(read_, refused, written, impossible) > 30
