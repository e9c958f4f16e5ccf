"""Sampling: the distribution it draws from, its edges, and that a text depends on its own seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine
from daybreak.generate import pick, sample_text, sample_tokens
from daybreak.shapes import GPT2Config


class Coin:
    """A generator that returns one fixed number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize(("coin", "token"), [(0.05, 1), (0.5, 3), (0.99, 3), (0.0, 0)])
def test_llmc_golden_sampler(coin: float, token: int) -> None:
    logits = np.array([1.0, 2.0, 3.0, 4.0], np.float32)  # cumulative: 0.032, 0.119, 0.356, 1
    assert pick(logits, 1.0, 0, Coin(coin)) == token  # type: ignore[arg-type]


def test_frequencies_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([pick(logits, 1.0, 0, rng) for _ in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.012)  # 3 sigma
    counts = np.bincount([pick(logits, 1.0, 2, rng) for _ in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx([0.625, 0.375, 0, 0], abs=0.012)
    counts = np.bincount([pick(logits, 0.5, 0, rng) for _ in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx(np.array([25, 9, 2.25, 0.25]) / 36.5, abs=0.012)


def test_the_edges() -> None:
    logits = np.array([3.0, -1e30, 88000.0, 2.0], np.float32)
    assert pick(logits, 1.0, 0, np.random.default_rng(0)) == 2  # no overflow
    assert pick(logits, 0.0, 0, np.random.default_rng(0)) == 2
    assert pick(logits, 1.0, 1, np.random.default_rng(0)) == 2
    assert pick(np.zeros(4, np.float32), 1.0, 0, Coin(np.nextafter(1.0, 0.0))) == 3  # type: ignore[arg-type]


def test_greedy_follows_the_logits_beyond_the_window() -> None:
    engine = Engine(GPT2Config(L=2, C=32, NH=2, max_T=8, V=257), B=1, T=8, train=False)
    prompt = [256, 10, 20]
    tokens = list(sample_tokens(engine, prompt, 12, temperature=0.0))
    text = list(prompt)
    import torch

    for token in tokens:
        logits = engine.logits(torch.tensor([text[-8:]]))[0, -1]
        assert token == int(logits.argmax())
        text.append(token)


def test_a_text_depends_on_its_seed_alone() -> None:
    engine = Engine(GPT2Config(L=1, C=32, NH=2, max_T=16, V=257), B=1, T=16, train=False)
    tokenizer = get_tokenizer("bytes")

    def text(seed: int) -> str:
        return "".join(sample_text(engine, tokenizer, "ab", 30, temperature=1.0, top_k=0, seed=seed))

    first = text(7)
    np.random.default_rng(1).random()
    assert text(8) != first
    assert text(7) == first
