"""The shipped recipes are the published runs, and each file states its cost."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from daybreak.config import RECIPES, recipe_names, resolve
from daybreak.data.dataset import open_dataset
from daybreak.data.hub import _expand
from daybreak.errors import DataError
from daybreak.shapes import LlamaConfig, NanochatConfig

# The original runs: L, C, NH, T, data, B, tokens a step, learning rate, final fraction, steps, checkpoint.every.
PUBLISHED = {
    "gpt2-124M": (12, 768, 12, 1024, "fineweb-10B", 64, 524288, 6e-4, 0.0, 18865, 5000),
    "gpt2-350M": (24, 1024, 16, 1024, "fineweb-100B", 64, 524288, 3e-4, 0.0, 60000, 2000),
    "gpt2-774M": (36, 1280, 20, 1024, "fineweb-100B", 32, 524288, 2.5e-4, 0.0, 286102, 4000),
    "gpt2-1558M": (48, 1600, 25, 1024, "fineweb-edu-100B", 16, 1048576, 6e-4, 0.1, 32000, 2000),
    "gpt3-125M": (12, 768, 12, 2048, "fineweb-100B", 32, 524288, 6e-4, 0.1, 572204, 10000),
}

# nanochat's base_train, for depth 12, and for depth 24 with 8 tokens for a parameter: steps, tokens a step, and the
# factors of learning rates and of Muon's weight decay, as its output says them.
NANOCHAT = {"nanochat-d12": (2520, 524288, 1.0, 1.0), "nanochat-d24": (5568, 1048576, 1.4142136, 0.2133515)}


def test_recipes_are_the_published_ones() -> None:
    decoders = ["smollm-135M", "llama-1B"]  # see test_llama_train.py
    assert recipe_names() == sorted([*PUBLISHED, *NANOCHAT, "tiny", "shapes", *decoders])


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
    seen = m.L * made.T
    if isinstance(m, NanochatConfig):  # tables of embeddings are no matmuls; three of four layers have a window
        parameters, T, w = m.Vp * m.C + 12 * m.L * m.C * m.C, made.T, m.window
        seen = m.L // 4 * (T + 3 * (2 * w - w * w // T))
    flops = (6 * parameters + 6 * seen * m.NH * m.HS) * made.tokens_at(0) * steps
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


@pytest.mark.parametrize("name", NANOCHAT)
def test_nanochats_run(name: str) -> None:
    """Its rules by hand: README's run has 5,568 steps, and a weight decay of 0.28 sqrt(2) 110.1M / 729.8M."""
    steps, tokens, rate, decay = NANOCHAT[name]
    made = resolve(name)[0].concrete(10**12)
    o, s = made.optim, made.schedule
    assert (made.run.steps, made.tokens_at(0), made.T, made.model.V) == (steps, tokens, 2048, 32768)
    assert (o.lr, o.muon_lr, o.muon_weight_decay) == pytest.approx((0.008 * rate, 0.02 * rate, 0.28 * decay), rel=1e-6)
    assert (o.name, o.muon_decay_schedule, o.muon_warmup, o.clip, o.horizon) == ("muon", "cosine", 400, 0.0, steps)
    assert (o.muon_momentum, o.muon_final_momentum, o.muon_beta2) == (0.97, 0.9, 0.9)
    assert (made.data.name, made.data.best_fit) == ("climbmix-bpe32768", True)
    assert (s.name, s.warmup, s.wsd_frac, s.final_frac) == ("wsd-linear", 40, 0.35, 0.05)


def test_what_is_missing_leads_to_the_part_that_is_enough(tmp_path: Path) -> None:
    """nanochat takes 170 of ClimbMix's 6,543 files. The page on the modern recipe prepares the same."""
    with pytest.raises(DataError, match="make it with: ") as caught:
        open_dataset(resolve("nanochat-d12")[0].data.name, tmp_path)
    words = shlex.split(str(caught.value).partition("make it with: daybreak prepare ")[2].partition(" (")[0])
    page = (Path(__file__).parents[1] / "docs/modern.md").read_text()
    folder, quoted = re.search("from=(.*)\n", page), re.search(r'prepare "\$from(.*)" \\\n *(.*)\n', page)
    assert folder is not None
    assert quoted is not None
    assert words == [folder[1] + quoted[1], "--name", "climbmix-bpe32768", "--train-tokenizer", "32768"]
    assert sorted(quoted[2].split()) == sorted(words[1:])
    assert len(_expand(words[0])) == 170
