"""Generation: what it draws from, the cache against the whole text computed anew, stop strings, and the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import GPT2, Shape, random_values

from daybreak.data.tokenizer import get_tokenizer
from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.errors import ConfigError
from daybreak.generate import Batch, Sampling, Text, adjusted, choose, sample_text, token_of, write_all
from daybreak.shapes import GPT2Config


def choose_all(logits: list[float] | np.ndarray, how: Sampling, draws: np.ndarray) -> np.ndarray:
    """The tokens that these random numbers choose, from the same logits each: as a GPU's tensors and as arrays."""
    rows = np.repeat(np.asarray(logits, np.float32)[None], len(draws), 0)
    found = choose(rows, [how] * len(draws), draws.tolist())
    assert choose(torch.from_numpy(rows), [how] * len(draws), draws.tolist()).tolist() == found.tolist()
    return found


@pytest.mark.parametrize(("coin", "token"), [(0.05, 1), (0.5, 3), (0.99, 3), (0.0, 0)])
def test_llmc_golden_sampler(coin: float, token: int) -> None:
    logits = [1.0, 2.0, 3.0, 4.0]  # cumulative: 0.032, 0.119, 0.356, 1
    assert choose_all(logits, Sampling(), np.array([coin])).tolist() == [token]


def test_frequencies_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = np.random.default_rng(0).random(20000)

    def shares(**how: float) -> np.ndarray:
        return np.bincount(choose_all(logits, Sampling(**how), draws), minlength=4) / 20000

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.012)  # 3 sigma
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.012)
    assert shares(temperature=0.5) == pytest.approx(np.array([25, 9, 2.25, 0.25]) / 36.5, abs=0.012)
    assert shares(min_p=0.2) == pytest.approx(np.array([0.5, 0.3, 0.15, 0]) / 0.95, abs=0.012)  # 0.05 < 0.2 x 0.5


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> set[int]:
    """By the definition: sorted by probability, then by id; probabilities are Python integers."""
    V = logits.size
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    w = [round(x * 2 ** (52 - V.bit_length())) for x in p.tolist()]
    order = sorted(range(V), key=lambda i: (-w[i], i))
    if top_k:
        order = [i for i in order if w[i] >= w[order[min(top_k, V) - 1]]]
    total, before, found = sum(w[i] for i in order), 0, set()
    for i in order:
        if before < top_p * total and w[i]:
            found.add(i)
        before += w[i]
    return found


@pytest.mark.parametrize("V", [5, 512, 513, 3000])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.3), (40, 1.0), (40, 0.7), (0, 1e-9), (7000, 0.999)])
def test_what_is_kept_is_the_sorted_definition_s_set(V: int, top_k: int, top_p: float) -> None:
    """Random logits, logits with many ties and equal ones: every token of the set is drawn, and no other."""
    rng = np.random.default_rng(V)
    for x in (rng.normal(size=V) * 3, rng.integers(-4, 5, V), np.zeros(V)):
        logits, how = x.astype(np.float32), Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
        want = kept(logits, 0.8, top_k, top_p)
        p = np.exp(logits.astype(np.float64) / 0.8) * [i in want for i in range(V)]
        ends = np.cumsum(p) / p.sum()
        middles = np.clip(ends - p / p.sum() / 2, 0, 1 - 1e-16)  # of each token's part of [0, 1)
        sure = p / p.sum() > 1e-9
        assert choose_all(logits, how, middles[sure]).tolist() == np.flatnonzero(sure).tolist()
        edges = choose_all(logits, how, np.array([0.0, np.nextafter(1.0, 0.0)]))
        assert edges.tolist() == [min(want), max(want)]
        assert set(choose_all(logits, how, rng.random(200)).tolist()) <= want


def test_top_p_keeps_the_fewest_that_have_it_together() -> None:
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    draws = np.random.default_rng(0).random(20000)
    for top_p, shares in ((0.49, [0, 1, 0, 0]), (0.7, [0, 0.625, 0, 0.375]), (0.9, [0.158, 0.526, 0, 0.316])):
        counts = np.bincount(choose_all(logits, Sampling(top_p=top_p), draws), minlength=4) / 20000
        assert counts == pytest.approx(shares, abs=0.012)
    # after top_k: 0.5 and 0.3 are left, 0.5 of 0.8 is more than 0.6 of it
    assert set(choose_all(logits, Sampling(top_k=2, top_p=0.6), draws[:200])) == {1}


def test_the_edges() -> None:
    logits, half = [3.0, -1e30, 88000.0, 2.0], np.array([0.5])
    for how in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=1), Sampling(temperature=1e-300, top_p=0.5)):
        assert choose_all(logits, how, half).tolist() == [2]  # no overflow
    assert choose_all([0.0] * 4, Sampling(), np.array([np.nextafter(1.0, 0.0)])).tolist() == [3]
    assert choose_all([-np.inf, 0.0, -np.inf], Sampling(top_p=0.9), half).tolist() == [1]


def test_each_row_has_its_own_rules() -> None:
    """A batch of greedy, plain, top-k, top-p and min-p rows chooses as each row alone does."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(6, 1000)) * 2).astype(np.float32)
    hows = [Sampling(temperature=0.0), Sampling(), Sampling(top_k=3), Sampling(0, 0.5, top_p=0.6), Sampling(min_p=0.2),
            Sampling(top_k=9, top_p=0.8, min_p=0.01)]  # fmt: skip
    for _ in range(20):
        draws = rng.random(6).tolist()
        alone = [int(choose(x[None], [how], [u])[0]) for x, how, u in zip(logits, hows, draws, strict=True)]
        assert choose(logits, hows, draws).tolist() == alone


def test_penalties_and_bias_by_hand() -> None:
    """Token 4 is in the prompt, 1 was generated twice and 2 once."""
    logits = np.array([1.0, 3.0, -2.0, 0.5, 4.0], np.float32)
    how = Sampling(9, frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0, logit_bias=((3, 7.0),))
    plain, text = Text([4], Sampling(9)), Text([4], how)
    for token in (1, 2, 1):
        text.take(token)
    assert adjusted(logits, text).tolist() == [1.0, 1.5 - 1.25, -4.0 - 0.75, 7.5, 2.0]
    assert logits.tolist() == [1.0, 3.0, -2.0, 0.5, 4.0]
    assert adjusted(logits, plain) is logits


def test_a_bias_decides_one_text_and_leaves_its_neighbours() -> None:
    engine, _ = engine_and_oracle(3)
    hows = [Sampling(4, 0.0), Sampling(4, 0.0, logit_bias=((9, 100.0),), logprobs=0), Sampling(4, 0.0)]
    texts = [Text([5, i], how) for i, how in enumerate(hows)]
    write_all(engine, texts)
    assert texts[1].ids[2:] == [9] * 4
    assert texts[1].made[0].logprob < -1  # before the bias
    for i in (0, 2):
        assert texts[i].ids[2:] == without_cache(engine, [5, i], 4)


def test_greedy_follows_the_logits_beyond_the_window() -> None:
    engine = Engine(EngineSpec(GPT2Config(L=2, C=32, NH=2, max_T=8, V=257), B=1, T=8, train=False))
    prompt = [256, 10, 20]
    made = Text(prompt, Sampling(12, temperature=0.0))
    write_all(engine, [made])
    text = list(prompt)
    for token in made.made:
        logits = engine.logits(torch.tensor([text[-8:]]))[0, -1]
        assert token.id == int(logits.argmax())
        text.append(token.id)
    assert made.ids == text
    assert len(text) == 15


def test_a_text_depends_on_its_seed_alone() -> None:
    engine = Engine(EngineSpec(GPT2Config(L=1, C=32, NH=2, max_T=16, V=257), B=1, T=16, train=False))
    tokenizer = get_tokenizer("bytes")

    def text(seed: int) -> str:
        return "".join(sample_text(engine, tokenizer, "ab", Sampling(30, seed=seed)))

    first = text(7)
    np.random.default_rng(1).random()
    assert text(8) != first
    assert text(7) == first


# --- the cache

SHAPE = Shape(L=3, C=48, NH=4, max_T=24, V=257)


def engine_and_oracle(rows: int, compute: str = "fp32") -> tuple[Engine, GPT2]:
    values = random_values(SHAPE, 3)
    engine = Engine(EngineSpec(GPT2Config(**SHAPE._asdict()), B=1, T=24, train=False, rows=rows, compute=compute))
    engine.load_params(values)
    for name in ("activations", "scratch", "kv"):
        engine.frame.buffers[name].fill_(0xFF)
    return engine, GPT2(SHAPE, torch.float64).load(values)


@pytest.mark.parametrize(("compute", "limit"), [("fp32", 1e-5), ("bf16", 0.05), ("fp64", 2e-7)])
def test_decoding_computes_the_logits_of_the_whole_text(compute: str, limit: float) -> None:
    """Three rows of unequal length, token by token up to the last place, against autograd's GPT-2 in fp64."""
    engine, oracle = engine_and_oracle(4, compute)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 257, n).tolist() for n in (3, 7, 7)]

    def check(got: torch.Tensor) -> None:
        for text, x in zip(texts, got, strict=True):
            want = oracle.logits(torch.tensor([text]))[0, -1].detach()
            assert (x.double() - want).norm() <= limit * want.norm()

    check(engine.prefill(1, texts))
    while len(texts[2]) < 24:
        for text in texts:
            text.append(int(rng.integers(257)))
        # Row 0 holds no text: it gets any token, and the others do not notice.
        check(engine.decode([5, *(t[-1] for t in texts)], [0, *(len(t) - 1 for t in texts)])[1:])


def without_cache(engine: Engine, prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(engine.logits(torch.tensor([text[-engine.T :]]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_is_the_same_with_and_without_the_cache() -> None:
    """Five prompts of unequal length in three rows: some join when others leave, some outgrow the window."""
    engine, _ = engine_and_oracle(3)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 257, n).tolist() for n in (1, 9, 4, 30, 2)]
    counts = [40, 5, 12, 6, 20]
    want = [without_cache(engine, prompt, count) for prompt, count in zip(prompts, counts, strict=True)]
    texts = [Text(p, Sampling(n, 0.0)) for p, n in zip(prompts, counts, strict=True)]
    batch, waiting = Batch(engine), list(texts)
    while waiting or batch.texts:
        batch.step()
        joining, waiting = waiting[: batch.room], waiting[batch.room :]
        batch.add(joining)
    assert [[token.id for token in text.made] for text in texts] == want
    assert len({tuple(w[:5]) for w in want}) == 5


def test_sampled_texts_do_not_depend_on_their_company() -> None:
    engine, _ = engine_and_oracle(3)
    alone, together = ([Text([7 * i, 3], Sampling(15, seed=i)) for i in range(5)] for _ in range(2))
    for text in alone:
        write_all(engine, [text])
    write_all(engine, together)  # more than the cache has rows
    assert [text.ids for text in together] == [text.ids for text in alone]
    assert {len(text.made) for text in together} == {15}


def test_work_that_begins_ahead_changes_no_text() -> None:
    """Texts that join, end early, reach T, draw, or need their logits: the same tokens, and fewer calls that wait."""
    engine, _ = engine_and_oracle(rows=3)
    asked = [
        ([5, 6, 7], Sampling(12, temperature=0.0), 0), ([9], Sampling(20, top_p=0.8, seed=4), 0),
        ([1, 2], Sampling(5, temperature=0.7, logprobs=2), 3), ([8, 8, 8, 8], Sampling(60, top_k=5), 7),
        ([3], Sampling(30, temperature=0.0), 18),
    ]  # fmt: skip
    calls: list[str] = []
    decode, follow = engine.decode, engine.read_ahead
    engine.decode = lambda t, p: (calls.append("ahead" if engine._ahead else "waits"), decode(t, p))[1]
    engine.read_ahead = lambda ids: (calls.append("begun"), follow(ids))[1]
    made, counts = [], []
    for ahead in (False, True):
        batch, ran = Batch(engine), [Text(ids, how) for ids, how, _ in asked]
        batch.ahead = ahead
        calls.clear()
        for turn in range(70):
            batch.add([text for text, (*_, joins) in zip(ran, asked, strict=True) if joins == turn])
            batch.step()
        assert all(text.done for text in ran)
        made.append([text.made for text in ran])
        counts.append({name: calls.count(name) for name in ("begun", "ahead", "waits")})
    assert made[0] == made[1]
    assert counts[0]["begun"] == 0
    assert counts[1]["ahead"] >= 5
    assert counts[1]["begun"] - counts[1]["ahead"] <= 3  # thrown away, as another text joined
    assert sum(counts[1][name] for name in ("ahead", "waits")) == counts[0]["waits"]


def test_the_cache_is_planned() -> None:
    cfg = GPT2Config(L=3, C=64, NH=4, max_T=64, V=257)
    one, five = (plan_engine(EngineSpec(cfg, B=1, T=48, train=False, rows=n))[2].sizes()["kv"] for n in (1, 5))
    assert (one, five) == (2 * 3 * 48 * 64 * 4, 5 * 2 * 3 * 48 * 64 * 4)


def test_log_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 5
    want = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0)
    best = want.topk(4)
    token = token_of(logits, 17, 4)
    assert token.logprob == pytest.approx(want[17].item(), rel=1e-12)
    assert [i for i, _ in token.top] == best.indices.tolist()
    assert [x for _, x in token.top] == pytest.approx(best.values.tolist(), rel=1e-12)
    assert token_of(logits, 17, 0).top == ()


# --- text


def spell(tokens: list[int], stop: tuple[str, ...] = (), tokenizer: str = "bytes") -> tuple[list[str], Text]:
    """The state of a text after each of these tokens, which a greedy text is made to take."""
    tok = get_tokenizer(tokenizer)
    text, known = Text([tok.eot], Sampling(len(tokens), 0.0, stop=stop), tok), []
    for token in tokens:
        text.take(token)
        known.append(text.text)
        if text.done:
            break
    return known, text


def test_a_character_may_span_tokens() -> None:
    known, text = spell(list("aé漢".encode()))
    assert known == ["a", "a", "aé", "aé", "aé", "aé漢"]
    assert text.done == "length"
    assert text.starts == [0, 1, 1, 2, 2, 2]
    assert spell(list("é".encode())[:1])[0] == ["\N{REPLACEMENT CHARACTER}"]  # an end inside a character


def test_stop_strings() -> None:
    known, text = spell(list(b"ab\n\nx"), ("\n\n",))
    assert known == ["a", "ab", "ab", "ab"]  # what may become a stop string is held back
    assert text.done == "stop"
    assert spell(list(b"ab\nx"), ("\n\n",))[0] == ["a", "ab", "ab", "ab\nx"]
    assert spell(list(b"ab\n"), ("\n\n",))[0][-1] == "ab\n"
    assert spell(list(b"aabaac"), ("abaac", "c"))[0][-1] == "a"  # the first to begin, not the first in the list
    assert spell([97, 256, 98])[0] == ["a", "a"]  # the document's end
    assert spell([97, 256, 98])[1].done == "stop"


@pytest.mark.parametrize("bad", [{"tokens": -1}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1},
                                 {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}, {"stop": ("",)}, {"min_p": 1.5},
                                 {"frequency_penalty": 3.0}, {"presence_penalty": float("nan")},
                                 {"repetition_penalty": 0.0}, {"logit_bias": ((1, 101.0),)}])  # fmt: skip
def test_what_sampling_refuses(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad).check()
