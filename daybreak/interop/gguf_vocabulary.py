"""A tokenizer as GGUF describes it: its kind, the tokens with their types, and merges or scores.

llama.cpp computes each kind in its own way. A tokenizer.json is written to a file, or made from one, where that way
gives the same ids, and refused elsewhere. Two differences remain. Metaspace puts no space before a text that begins
with one, and llama.cpp does. llama.cpp does not compose letters (NFC).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daybreak.data.chat import special_names
from daybreak.data.tokenizer import Tokenizer
from daybreak.errors import CheckpointError, ConfigError
from daybreak.formatting import quoted
from daybreak.interop.huggingface import TOKENIZER_CONFIG
from daybreak.interop.sentencepiece import SPACE, read_model, scores_of
from daybreak.interop.source import Export

Steps = list[dict[str, Any]]  # of a normalizer, or of a splitter
Kind = tuple[str, str, dict[str, int], dict[str, float], bool]  # model, splitting, tokens, scores, space before a text

# GPT-2's splitting. Offsets, which it would trim, are of no use here.
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> Steps:
    pattern = {"Regex": _LETTERS + numbers + _REST}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [split, {**_WORDS, "use_regex": False}]


# llama.cpp's name of a splitting before byte-level merges -> the splitting, ignore_merges.
BYTE_LEVEL: dict[str, tuple[Steps, bool]] = {
    "gpt-2": ([_WORDS], False), "smollm": ([{"type": "Digits", "individual_digits": True}, _WORDS], False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), True), "dbrx": (_split(r"\p{N}{1,3}"), False),
    "qwen2": (_split(r"\p{N}"), False),
}  # fmt: skip
# All that it can do before WordPiece.
_BERT = dict.fromkeys(("clean_text", "handle_chinese_chars", "lowercase"), True)
BERT = [{"type": "BertNormalizer", "strip_accents": None, **_BERT}, {"type": "BertPreTokenizer"}]


_ADDED = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# Kind or splitting -> what llama.cpp takes for keys that a file lacks.
_USUAL: dict[Any, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True,
              "add_space_prefix": True},
    "llama-bpe": {"add_bos_token": True},
}  # fmt: skip
# Tokens of code at which llama.cpp ends a text because of their names.
_FIM = {"<PAD>", "[PAD]", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<REPO>", "<reponame>", "<|file_sep|>"}  # fmt: skip
# These and all other tokens at which it does so, whatever a file says of them.
_ENDS = _FIM | {
    "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>", "<|tool_response>", "<end_of_turn>", "<|endoftext|>",
    "<|end_of_text|>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
# Tokens that llama.cpp never finds in a text, although a file may say that they are added tokens.
_CONTROL = _ENDS | {"<PRE>", "<SUF>", "<MID>", *(f"<{b}fim{c}{part}{b}>" for b, c in (("|", "_"), ("", "_"), ("", "-"))
                                                 for part in ("prefix", "suffix", "middle"))}  # fmt: skip


def read_vocabulary(path: Path, keys: Mapping[str, Any], types: Any) -> str:
    """The text of a tokenizer.json with the ids that llama.cpp gives for a GGUF file. types: gguf.TokenType.

    CheckpointError for a kind that is neither SentencePiece with scores nor byte-level merges, split in a way of
    BYTE_LEVEL, and for a tokenizer of these kinds that a tokenizer.json cannot describe.
    """
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    kind, pre = own.get("model"), own.get("pre")
    own = {**_USUAL.get(kind if kind == "llama" else pre, {}), **own}
    try:
        if kind != "llama" and (kind != "gpt2" or pre not in BYTE_LEVEL):
            raise ValueError(f"a tokenizer of kind {kind!r} that splits as {pre!r} is not read")
        sorts = own.get("token_type")
        own["tokens"] = tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(own.get("tokens", [""]))]
        if not isinstance(sorts, list) or len(tokens) != len(sorts) or len(tokens) != len(set(tokens)):
            raise ValueError("tokenizer.ggml.tokens has a token twice, or tokens without a token_type")
        texts = [t for i, t in enumerate(tokens) if sorts[i] == types.USER_DEFINED and t not in _CONTROL]
        if texts and any(name in str(keys.get("general.name")).lower() for name in ("phi-3", "phi3")):
            raise ValueError("llama.cpp removes the spaces after added tokens of a model that is named Phi-3")
        _check_apart(texts)
        steps = read_model(own, types, texts) if kind == "llama" else _byte_level(own)
        added = [
            {"id": i, "content": t, "special": sorts[i] != types.USER_DEFINED or t in _CONTROL, **_ADDED}
            for i, t in enumerate(tokens) if sorts[i] in (types.CONTROL, types.UNKNOWN, types.USER_DEFINED)
        ]  # fmt: skip
        steps["model"]["vocab"] = {t: i for i, t in enumerate(tokens) if sorts[i] != types.UNUSED}
        spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **steps}
        return json.dumps(spec | {"post_processor": _around(own)}, ensure_ascii=False)
    except ValueError as why:
        fix = f"name it: daybreak import {quoted(path)} --data.tokenizer FILE"
        raise CheckpointError(f"{path}: {why}; {fix}.") from None


def read_ends(keys: Mapping[str, Any]) -> list[int]:
    """The ids at which llama.cpp ends a text: those that the keys of a GGUF file name, and those of _ENDS."""
    tokens = keys["tokenizer.ggml.tokens"]
    names, said = _ENDS & set(tokens), [keys.get(f"tokenizer.ggml.{end}_token_id", -1) for end in ("eos", "eot", "eom")]
    channels = names & {"<|call|>", "<|calls|>"} and names & {"<|return|>", "<|flush|>"}
    names -= {"<|end|>" if channels else "", "</s>" if "<|tool_response>" in names else ""}
    return [i for i in said if i >= 0] + [i for i, token in enumerate(tokens) if token in names]


def read_special(keys: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """A model's files that say which tokens begin, end and fill texts and stand for what is unknown, by name."""
    begin, *pad, unk = (keys.get(f"tokenizer.ggml.{name}_token_id", -1) for name in ("bos", "padding", "unknown"))
    wanted = {"bos": (tokenizer.eot, begin), "eos": tokenizer.ends[::-1], "pad": pad, "unk": (unk,)}  # the last goes
    able = {*tokenizer.special, tokenizer.eot}
    found = {key: i for key, ids in wanted.items() for i in ids if i in able}
    names = {f"{key}_token": keys["tokenizer.ggml.tokens"][i] for key, i in found.items()}
    said = {f"{key}_token_id": i for key, i in found.items() if key != "unk"} | {"eos_token_id": list(tokenizer.ends)}
    return {"generation_config.json": said, "tokenizer_config.json": {**TOKENIZER_CONFIG, **names}}


def _byte_level(own: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer.json for byte-level merges, the vocabulary left out."""
    split, whole = BYTE_LEVEL[own["pre"]]
    merges = [pair.split(" ") for pair in own.get("merges", [])]
    return {
        "normalizer": {"type": "NFC"} if own["pre"] == "qwen2" else None,  # as Qwen has it; llama.cpp does without
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split} if len(split) > 1 else split[0],
        "decoder": _WORDS, "model": {"type": "BPE", "merges": merges, "ignore_merges": whole},
    }  # fmt: skip


def _check_apart(texts: list[str]) -> None:
    """ValueError if two added tokens can overlap in a text: llama.cpp takes the longer one, `tokenizers` the first."""
    begins: dict[str, set[str]] = {}
    for token in texts:
        for n in range(1, len(token)):
            begins.setdefault(token[:n], set()).add(token)
    for token in texts:
        for n in range(1, len(token)):
            for other in begins.get(token[n:], set()) - {token}:
                if len(set(token + other)) > 1:  # runs of one letter are found alike
                    raise ValueError(f"its added tokens {token!r} and {other!r} can overlap in a text")


def _around(own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokens before and after a text."""
    names = [name for name in ("bos", "eos") if own.get(f"add_{name}_token")]
    if odd := [name for name in names if not 0 <= own.get(f"{name}_token_id", -1) < len(own["tokens"])]:
        raise ValueError(f"tokenizer.ggml.add_{odd[0]}_token is true, and {odd[0]}_token_id names no token")
    ids = [own[f"{name}_token_id"] for name in names]
    special = {own["tokens"][i]: {"id": own["tokens"][i], "ids": [i], "tokens": [own["tokens"][i]]} for i in ids}
    row: list[Any] = [{"SpecialToken": {"id": own["tokens"][i], "type_id": 0}} for i in ids]
    row.insert(1 if own.get("add_bos_token") else 0, {"Sequence": {"id": "A", "type_id": 0}})
    pair = [*row, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": row, "pair": pair, "special_tokens": special} if ids else None


def write_vocabulary(writer: Any, source: Export, types: Any) -> None:
    """Add the keys `tokenizer.ggml.*` for a model. types: gguf.TokenType. ConfigError for another kind of tokenizer."""
    tokenizer, V = source.tokenizer, source.model.V
    spec = json.loads(tokenizer.to_json())
    model, added = spec["model"], spec["added_tokens"]
    found = _kind(model, _steps(spec["normalizer"]), _steps(spec["pre_tokenizer"]))
    sought = [t for t in added if not t["special"]]  # in texts
    # llama.cpp puts a space before the text behind each of them, as Prepend does where tokens are found before it.
    prepends = spec["pre_tokenizer"] is None and not any(t["normalized"] for t in sought)
    changing = any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in sought)
    if found is None or changing or (found[-1] and sought and not prepends):
        why = "llama.cpp splits no text as it does" if found is None else "its added tokens change spaces beside them"
        raise ConfigError(f"GGUF cannot hold tokenizer {tokenizer.name}: {why}; use --to hf.")
    kind, pre, vocab, scores, prefix = found
    byte = types.BYTE if kind == "llama" else types.NORMAL
    table = {i: (f"[PAD{i}]", types.UNUSED) for i in range(V)}  # ids that the tokenizer does not have
    table |= {i: (token, byte if token.startswith("<0x") else types.NORMAL) for token, i in vocab.items()}
    table |= {t["id"]: (t["content"], types.CONTROL if t["special"] else types.USER_DEFINED) for t in added}
    unknown = model["unk_id"] if kind == "t5" else model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        table[unknown] = table[unknown][0], types.UNKNOWN
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in table.values()])
    writer.add_token_types([sort for _, sort in table.values()])
    if kind == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in _pairs(model)])
    if scores:
        writer.add_token_scores([scores.get(token, 0.0) for token, _ in table.values()])
        writer.add_add_space_prefix(prefix)
        writer.add_remove_extra_whitespaces(False)
    ids, (before, after), ends = {text: i for i, (text, _) in table.items()}, tokenizer.around, tokenizer.ends
    own = {key: ids[name] for key, name in special_names(source.kept).items() if name in ids}
    bos = before[0] if len(before) == 1 else own.get("bos_token", tokenizer.eot)
    eos = next((i for i in (*after, own.get("eos_token")) if i in ends), ends[0])
    pad = own.get("pad_token", json.loads(source.kept.get("generation_config.json", "{}")).get("pad_token_id"))
    # Of further ends two have a place: first the end of a turn, then those that llama.cpp does not know by name.
    rank = lambda i: (i != source.end_of_turn, table[i][0] in _ENDS, table[i][0] == "<|eom_id|>")  # noqa: E731
    more = sorted((i for i in ends if i not in (eos, tokenizer.eot) and table[i][0] not in _FIM), key=rank)
    named = {"bos": bos, "eos": eos, "pad": pad, "unk": own.get("unk_token") if unknown is None else unknown}
    for name, i in (*named.items(), *zip(("eot", "eom"), more, strict=False)):
        if type(i) is int and 0 <= i < V:
            getattr(writer, f"add_{name}_token_id")(i)
    if kind == "bert":  # llama.cpp puts both around a text, whatever add_bos_token says
        writer.add_sep_token_id(eos)
    if tokenizer.source:
        writer.add_add_bos_token(before == [bos])
        writer.add_add_eos_token(after == [eos])


def _kind(model: dict[str, Any], normal: Steps, split: Steps) -> Kind | None:
    """The kind of a tokenizer.json; None if llama.cpp has none with the same ids."""
    vocab, falls = model["vocab"], bool(model.get("byte_fallback"))
    match model["type"]:
        case "BPE" if not falls:
            known, plain = (split, bool(model.get("ignore_merges"))), normal in ([], [{"type": "NFC"}])
            plain = plain and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
            names = (pre for pre, way in BYTE_LEVEL.items() if plain and way == known)
            return next((("gpt2", pre, vocab, {}, False) for pre in names), None)
        case "WordPiece" if [*normal, *split] == BERT:
            return "bert", "default", {t[2:] if t[:2] == "##" else SPACE + t: i for t, i in vocab.items()}, {}, False
        case "BPE":
            kind, scores = "llama", scores_of(vocab, _pairs(model))
        case "Unigram" if not (normal or falls):
            kind, scores, vocab = "t5", dict(vocab), {token: i for i, (token, _) in enumerate(vocab)}
        case _:
            return None
    prefix = _prefix(vocab, normal, split)
    return None if scores is None or prefix is None else (kind, "default", vocab, scores, prefix)


def _steps(part: dict[str, Any] | None) -> Steps:
    """A normalizer or a splitter as a list, without what does not change ids."""
    if part is None or part["type"] == "Sequence":
        inner = (part or {}).get("normalizers") or (part or {}).get("pretokenizers") or []
        return [step for one in inner for step in _steps(one)]
    kept = part | ({"trim_offsets": False} if "trim_offsets" in part else {})
    return [{"use_regex": True, **kept} if part["type"] == "ByteLevel" else kept]


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(a, b) for a, b in pairs]


def _prefix(vocab: dict[str, int], normal: Steps, split: Steps) -> bool | None:
    """Whether a space is put before the text; None if spaces are treated in another way than SentencePiece's."""
    before = [{"type": "Prepend", "prepend": SPACE}]
    if not split and normal[-1:] == [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]:
        return bool(normal[:-1]) if normal[:-1] in ([], before) else None
    if normal or [(step["type"], step.get("replacement")) for step in split] != [("Metaspace", SPACE)]:
        return None
    cut = split[0].get("split", True) and any(SPACE in token[1:] for token in vocab)
    return None if cut else split[0]["prepend_scheme"] != "never"
