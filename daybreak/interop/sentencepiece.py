"""SentencePiece's joins by score as merges by rank: GGUF's kind `llama`, in both directions.

SentencePiece begins with letters. As long as two neighbours make a token, it joins those whose token has the highest
score, the leftmost of equals. Nothing outside a token's letters decides on the joins within them. So its last join is
the same in every text, and it is that of the token's own text. Those last joins by score are merges with the same ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Any

SPACE = "\u2581"  # SentencePiece's letter for a space
Pair = tuple[str, str]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def joins(scores: Mapping[str, float]) -> dict[str, Pair]:
    """Of each token that joins can make, the two parts of its last join. scores: of all tokens that a join may make."""
    made = {}
    for token in scores:
        parts, last = list(token), None
        while len(parts) > 1:
            ways = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
            if not ways:
                break
            at = -max(ways)[1]
            last = parts[at], parts[at + 1]
            parts[at : at + 2] = ["".join(last)]
        if last and len(parts) == 1:
            made[token] = last
    return made


def ranked(scores: Mapping[str, float], normal: set[str]) -> list[Pair]:
    """Merges in order of rank that give the ids of these scores. normal: the tokens that text may become.

    Raises ValueError with the reason if no merges do, or if SentencePiece and llama.cpp join in different ways.
    """
    made = joins(scores)
    for token in [t for t in scores if t in made or len(t) == 1]:
        if token not in normal:
            raise ValueError(f"letters of a text make its token {token!r}, which is not of the normal type")
        for part in made.get(token, ()):
            if part not in scores:
                raise ValueError(f"its token {token!r} is made with {part!r}, which is no token")
    order = sorted(made, key=lambda token: (-scores[token], -len(token)))
    for _, group in groupby(order, key=scores.__getitem__):
        tied = list(group)
        # All runs of a letter up to a length grow from the left, as if longer ones scored more. Llama 2 has them.
        runs = [tied[0][0] * n for n in range(len(tied) + 1, 1, -1)]
        if len(tied) > 1 and (tied != runs or any(set(t) == {tied[0][0]} for t in made.keys() - runs)):
            raise ValueError(f"its tokens {tied[0]!r} and {tied[1]!r} have the same score, so that their place decides")
    return [made[token] for token in order]


def scores_of(vocab: Mapping[str, int], pairs: list[Pair]) -> dict[str, float] | None:
    """Scores that give the ids of these merges; None if none do. Tokens without one are written with score 0."""
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    first: dict[str, float] = {}
    for pair, rank in ranks.items():
        first.setdefault("".join(pair), -float(rank))
    made = joins({token: first.get(token, 0.0) for token in vocab})
    if not made.keys() <= first.keys() or not ranks.keys() >= set(made.values()):
        return None
    scores = first | {token: -float(ranks[pair]) for token, pair in made.items()}
    return scores if joins({token: scores.get(token, 0.0) for token in vocab}) == made else None


def read_model(own: Mapping[str, Any], types: Any, texts: list[str]) -> dict[str, Any]:
    """The parts of a tokenizer.json that GGUF's keys `tokenizer.ggml.*` describe, the vocabulary left out.

    own: the keys without their common start. types: gguf.TokenType. texts: tokens that are found in a text first.
    Raises ValueError with the reason if a tokenizer.json cannot give the same ids.
    """
    tokens, sorts, values = own["tokens"], own["token_type"], own.get("scores", [])
    known = [isinstance(score, int | float) and math.isfinite(score) for score in values]
    if len(known) != len(tokens) or not all(known):
        raise ValueError("tokenizer.ggml.scores has no finite score for each token")
    if own.get("remove_extra_whitespaces") or own.get("precompiled_charsmap"):
        raise ValueError("its tokenizer changes a text before it splits it, and llama.cpp does not")
    if spaced := [token for token in texts if SPACE in token]:
        raise ValueError(f"its added token {spaced[0]!r} holds SentencePiece's letter for a space")
    kinds = dict(zip(tokens, sorts, strict=True))
    if lacking := [byte for byte in BYTES if kinds.get(byte, types.UNUSED) == types.UNUSED]:
        raise ValueError(f"it lacks the byte token {lacking[0]}")
    # A space in a text is SPACE by the time that letters join, and added tokens are no longer in it.
    able = {t: s for t, s in zip(tokens, values, strict=True) if " " not in t and kinds[t] != types.USER_DEFINED}
    merges = ranked(able, {token for token in able if kinds[token] == types.NORMAL})
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if own["add_space_prefix"] else []
    after: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    unknown = next((t for t in tokens[own["unknown_token_id"] :][:1] if kinds[t] != types.UNUSED), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
        "model": {"type": "BPE", "merges": merges, "byte_fallback": True, "fuse_unk": True, "unk_token": unknown},
    }  # fmt: skip
