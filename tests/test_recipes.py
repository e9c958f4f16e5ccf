"""The shipped recipes are the published runs, and each file states its cost."""

from __future__ import annotations

import re

import pytest

from daybreak.config import RECIPES, recipe_names, resolve
from daybreak.shapes import LlamaConfig

# The original runs: L, C, NH, T, data, B, tokens a step, learning rate, final fraction, steps, checkpoint.every.
PUBLISHED = {
    "gpt2-124M": (12, 768, 12, 1024, "fineweb-10B", 64, 524288, 6e-4, 0.0, 18865, 5000),
    "gpt2-350M": (24, 1024, 16, 1024, "fineweb-100B", 64, 524288, 3e-4, 0.0, 60000, 2000),
    "gpt2-774M": (36, 1280, 20, 1024, "fineweb-100B", 32, 524288, 2.5e-4, 0.0, 286102, 4000),
    "gpt2-1558M": (48, 1600, 25, 1024, "fineweb-edu-100B", 16, 1048576, 6e-4, 0.1, 32000, 2000),
    "gpt3-125M": (12, 768, 12, 2048, "fineweb-100B", 32, 524288, 6e-4, 0.1, 572204, 10000),
}


def test_recipes_are_the_published_ones() -> None:
    decoders = ["smollm-135M", "llama-1B"]  # see test_llama_train.py
    assert recipe_names() == sorted([*PUBLISHED, "tiny", "shapes", *decoders])


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_valid_and_states_its_cost(name: str) -> None:
    config, _ = resolve(name)
    made = config.concrete(10**12)
    text = (RECIPES / f"{name}.toml").read_text()
    assert "\nschema = 1\n" in text
    m, steps = made.model, made.run.steps
    parameters = (m.Vp + m.max_T) * m.C + m.L * (12 * m.C * m.C + 13 * m.C) + 2 * m.C
    if isinstance(m, LlamaConfig):
        each = 2 * (m.NH + m.NKV) * m.HS * m.C + 3 * m.C * m.F + 2 * m.C
        parameters = m.Vp * m.C + m.L * each + m.C
    flops = (6 * parameters + 6 * m.L * m.NH * m.HS * made.T) * made.tokens_at(0) * steps
    stated = re.search(r"(\d\.\de\d+) FLOPs", text)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(flops, rel=0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_runs_what_was_published(name: str) -> None:
    made = resolve(name)[0].concrete(10**12)
    m = made.model
    assert (
        m.L, m.C, m.NH, made.T, made.data.name, made.batch.B, made.batch.total_tokens, made.optim.lr,
        made.schedule.final_frac, made.run.steps, made.checkpoint.every,
    ) == PUBLISHED[name]  # fmt: skip
    assert (made.schedule.name, made.schedule.warmup, made.optim.weight_decay) == ("cosine", 700, 0.1)
    assert (made.eval.every, made.data.tokenizer, m.V) == (250, "gpt2", 50257)
    text = (RECIPES / f"{name}.toml").read_text()
    assert "# published (llm.c): " in text
    assert "# Expected" in text
    if name == "gpt3-125M":
        assert (made.guard.loss_z, made.guard.norm_z) == (7.0, 7.0)
        assert (made.checkpoint.keep, made.checkpoint.major) == (5, 50000)
