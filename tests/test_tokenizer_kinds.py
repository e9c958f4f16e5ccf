"""Any tokenizer.json: its library's ids, the way in and out, and what GGUF says of it, computed by definition."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from interop_runs import inside, write_shard
from tokenizer_kinds import KINDS, LLAMA3, TEXTS, added, sentencepiece, split_by, their_model, unigram

from daybreak.data.tokenizer import TOKENIZER_FILE, HFTokenizer, get_tokenizer
from daybreak.errors import ConfigError
from daybreak.evaluate import harness
from daybreak.generate import Sampling, Text
from daybreak.interop import open_source
from daybreak.interop.gguf_vocabulary import write_vocabulary
from daybreak.interop.source import Export
from daybreak.state.run import Run

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", reason="the extra `eval` installs transformers")
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A kind, a folder with a run that was imported with it, and the library's own copy, for texts as they are."""
    folder, made = tmp_path_factory.mktemp(request.param), KINDS[request.param][0]()
    their_model(folder / "theirs", made)
    inside(folder, "import", "theirs", "--name", "run", "--run.device", "cpu")
    made.encode_special_tokens = True
    return request.param, folder, made


def test_a_tokenizer_goes_out_and_comes_back(case: tuple[str, Path, Any]) -> None:
    kind, tmp_path, library = case
    start, end = KINDS[kind][1:]
    inside(tmp_path, "export", "runs/run", "--to", "hf", "out")
    source = open_source(tmp_path / "out")
    ours, theirs = source.tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(ours, HFTokenizer)
    assert ours.source == (tmp_path / "theirs" / TOKENIZER_FILE).read_text()
    assert library.get_vocab_size() == ours.V
    assert (theirs.bos_token, theirs.eos_token) == (start, end)
    assert (ours.eot, ours.ends[0]) == (theirs.bos_token_id, theirs.eos_token_id)
    stops = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert {stops} if isinstance(stops, int) else set(stops) == {ours.eot, ours.ends[0]} == set(ours.ends)
    for text in [*TEXTS, " begins with a space"]:
        ids = ours.encode(text).tolist()
        assert ids == library.encode(text, add_special_tokens=False).ids, text
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
        if kind in ("added", "llama3", "sentencepiece"):  # the others lose text
            assert ours.decode(ids) == text
        written = Text([ours.eot], Sampling(len(ids) + 1), ours)
        pieces = [""]
        for i in ids:  # token by token, as `serve` sends them
            written.take(i)
            pieces.append(written.text)
        assert all(after.startswith(before) for before, after in pairwise(pieces))
        assert pieces[-1] in (ours.decode(ids), " " + ours.decode(ids)), text
    ended = Text([ours.eot], Sampling(9), ours)
    ended.take(ours.ends[0])
    assert ended.done == "stop"


def test_the_harness_scores_a_run_and_its_export_alike(case: tuple[str, Path, Any]) -> None:
    """With what the tokenizer's file puts around a text; to the rounding of fp32."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    _, tmp_path, _ = case
    if not (tmp_path / "out").exists():
        inside(tmp_path, "export", "runs/run", "--to", "hf", "out")
    engine, tokenizer = Run(tmp_path / "runs/run").load_engine(B=2)
    both = harness.engine_lm(engine, tokenizer), harness.hf_lm(tmp_path / "out", 2, "cpu")
    asked = [
        ("the quick brown", " fox jumps"),
        ("Hello 漢字", " again"),
        ("", "hello"),
        ("the lazy dog " * 9, " dog" * 6),
    ]
    scored = [lm.loglikelihood([Instance("loglikelihood", {}, a, i) for i, a in enumerate(asked)]) for lm in both]
    for (ours, greedy), (theirs, theirs_greedy) in zip(*scored, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert greedy == theirs_greedy
    texts = ["one", "the quick brown fox " * 30]  # the second is longer than T
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours, theirs = (lm.loglikelihood_rolling(requests) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def by_definition(fields: dict[str, Any], text: str) -> list[int]:
    """The ids of a text by GGUF's keys alone: tokens, merges or scores, as the kind's publication computes them."""
    tokens = fields["tokens"]
    ids = {token: i for i, token in enumerate(tokens) if fields["token_type"][i] != 5}
    if fields["model"] == "gpt2":
        model = tokenizers.models.BPE(ids, [tuple(m.split(" ")) for m in fields["merges"]], ignore_merges=True)
        made = tokenizers.Tokenizer(model)
        split = {
            "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            "llama-bpe": LLAMA3,
        }
        made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(split[fields["pre"]]), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        made.add_tokens([t for t, kind in zip(tokens, fields["token_type"], strict=True) if kind == 4])
        return list(made.encode(text).ids)
    if not text:
        return []
    spelled = "▁" * bool(fields.get("add_space_prefix")) + text.replace(" ", "▁")
    if fields["model"] == "llama":  # join the pair whose token has the highest score, until there is none
        parts = list(spelled)
        while pairs := [(fields["scores"][ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
            at = -max(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        fallen = [[p] if p in ids else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
        assert all(fields["token_type"][ids[t]] == 6 for part in fallen for t in part if t.startswith("<0x"))
        return [ids[token] for part in fallen for token in part]
    assert (
        fields["model"] == "t5"
    )  # the likeliest tokens; what is none is unknown, once for all letters beside each other
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    worst, unknown = min(fields["scores"]) - 10, fields["unknown_token_id"]
    for end in range(1, len(spelled) + 1):
        ways = [(best[start][0] + fields["scores"][ids[spelled[start:end]]], [*best[start][1], ids[spelled[start:end]]])
                for start in range(end) if spelled[start:end] in ids]  # fmt: skip
        before = best[end - 1]
        ways += [(before[0] + worst, before[1] if before[1][-1:] == [unknown] else [*before[1], unknown])]
        best.append(max(ways))
    return best[-1][1]


def test_gguf_describes_it_so_that_its_keys_give_its_ids(case: tuple[str, Path, Any]) -> None:
    kind, tmp_path, library = case
    start, end = KINDS[kind][1:]
    inside(tmp_path, "export", "runs/run", "--to", "gguf", "m.gguf")
    before = "tokenizer.ggml."
    found = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    fields = {name.removeprefix(before): value for name, value in found.items() if name.startswith(before)}
    names = {"added": ("gpt2", "gpt-2"), "llama3": ("gpt2", "llama-bpe"), "sentencepiece": ("llama", "default"),
             "unigram": ("t5", "default"), "wordpiece": ("bert", "default")}  # fmt: skip
    assert (fields["model"], fields["pre"]) == names[kind]
    vocab = library.get_vocab()
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (vocab[start], vocab[end])
    assert fields["add_bos_token"] == (kind in ("llama3", "sentencepiece", "wordpiece"))
    assert fields["add_eos_token"] == (kind == "wordpiece") == (fields.get("seperator_token_id") == vocab[end])
    sorts = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    assert sorts[start] == 3  # control
    if kind == "added":
        assert (sorts["[PAD]"], sorts["<tool>"]) == (3, 4)  # 4: of the user
    if kind == "wordpiece":  # words begin with SentencePiece's space, and what continues one has no sign
        assert {("▁" + t if t[:2] != "##" else t[2:]) for t in vocab} - set(fields["tokens"]) == {
            "▁[PAD]", "▁[UNK]", "▁[CLS]", "▁[SEP]"
        }  # fmt: skip
        return
    for text in [text for text in TEXTS if kind != "unigram" or "</s>" not in text]:
        assert by_definition(fields, text) == library.encode(text, add_special_tokens=False).ids, text


def test_what_gguf_cannot_hold(tmp_path: Path) -> None:
    plain = sentencepiece()
    plain.add_tokens(["<tool>"])
    lower = unigram()
    lower.normalizer = tokenizers.normalizers.Lowercase()
    for made, why in [
        (split_by(r"\w+|\W+"), "llama.cpp splits no text as it does"), (lower, "llama.cpp splits no text as it does"),
        (sentencepiece(complete=False), "llama.cpp splits no text as it does"),
        (plain, "its added tokens change spaces beside them"),
    ]:  # fmt: skip
        made.save(str(tmp_path / "t.json"))
        made_of = SimpleNamespace(tokenizer=get_tokenizer(str(tmp_path / "t.json")), model=SimpleNamespace(V=500))
        with pytest.raises(ConfigError, match=rf"GGUF cannot hold tokenizer hf-\w+: {why}; use --to hf\."):
            write_vocabulary(None, cast(Export, made_of), gguf.TokenType)


def test_gpt2_with_added_tokens_as_a_user_goes_on_with_it(tmp_path: Path) -> None:
    """Import, sample, prepare, train, resume on plain shards, fork, export, import again."""
    their_model(tmp_path / "theirs", added())
    said = inside(tmp_path, "import", "theirs", "--name", "mine", "--run.device", "cpu").stdout
    name = get_tokenizer(str(tmp_path / "theirs" / TOKENIZER_FILE)).name
    assert said.splitlines()[0].endswith(f"V=1029, {name} tokenizer")
    assert inside(tmp_path, "sample", "runs/mine", "--tokens", "4").stdout == (
        inside(tmp_path, "sample", "theirs", "--tokens", "4").stdout
    )
    (tmp_path / "a.txt").write_text("Some [PAD] and <tool> words. " * 300)
    inside(tmp_path, "prepare", "a.txt", "--name", "a", "--tokenizer", f"runs/mine/{TOKENIZER_FILE}")
    small = ["--batch.B", "2", "--batch.total_tokens", "128", "--eval.tokens", "128", "--eval.sample_tokens", "2"]
    inside(tmp_path, "train", "runs/mine", "--data", "a", "--steps", "2", *small)
    # Shards of another program carry no tokenizer: the run's own is used, and a fork takes it along.
    tokens = np.arange(1200) % 1027
    tokens[::100] = 1024
    for split in ("train", "val"):
        write_shard(tmp_path / f"plain/x_{split}_0.bin", tokens)
    inside(tmp_path, "train", "runs/mine", "--fork", "other", "--data", "plain", "--steps", "4", "--data.bos", "true",
           "--optim.horizon", "4")  # fmt: skip
    assert get_tokenizer(name, tmp_path / "runs/other").name == name
    inside(tmp_path, "export", "runs/other", "--to", "hf", "out")
    # As transformers writes it anew, with another spelling and so another fingerprint.
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "out")
    inside(tmp_path, "import", "out", "--name", "again")
    prompt = ["--prompt", "Some <tool>", "--tokens", "6"]
    assert inside(tmp_path, "sample", "runs/again", *prompt).stdout == (
        inside(tmp_path, "sample", "runs/other", *prompt).stdout
    )
    engine, tokenizer = Run(tmp_path / "runs/again").load_engine()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.from_numpy(tokenizer.encode("Some <tool>").astype(np.int64))[None]
    assert 1026 in ids
    with torch.no_grad():
        want = theirs(ids).logits
    assert (engine.logits(ids) - want).norm() <= 2e-6 * want.norm()


def test_which_tokenizer_of_ours_a_file_is(tmp_path: Path) -> None:
    """Everything that decides on ids counts; other spellings of the same do not."""
    ours = get_tokenizer("gpt2-1024")
    path, spec = tmp_path / "t.json", json.loads(ours.to_json())
    published = json.loads(json.dumps(spec))
    published["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    published["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del published["pre_tokenizer"]["use_regex"]
    published["post_processor"] = None
    path.write_text(json.dumps(published))
    assert get_tokenizer(str(path)) is ours
    merges = spec["model"]["merges"]
    for part in (
        {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": spec["pre_tokenizer"] | {"add_prefix_space": True}},
        {"model": spec["model"] | {"merges": [merges[1], merges[0], *merges[2:]]}},
        {"model": spec["model"] | {"ignore_merges": True}},
    ):  # fmt: skip
        path.write_text(json.dumps(spec | part))
        assert isinstance(get_tokenizer(str(path)), HFTokenizer)
