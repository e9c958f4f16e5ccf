"""The engine against Hugging Face's GPT-2: one set of weights, the same logits, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from daybreak.engine import Engine, EngineSpec
from daybreak.shapes import GPT2Config

transformers = pytest.importorskip("transformers", reason="the test extra installs transformers")
torch.set_num_threads(1)
L, C, NH, MAX_T, V = 2, 48, 3, 32, 131
# daybreak's name of a layer's parameter -> Hugging Face's, and whether that is a Conv1D weight, (in, out).
LAYER = {
    "ln1w": ("ln_1.weight", False), "ln1b": ("ln_1.bias", False),
    "qkvw": ("attn.c_attn.weight", True), "qkvb": ("attn.c_attn.bias", False),
    "attprojw": ("attn.c_proj.weight", True), "attprojb": ("attn.c_proj.bias", False),
    "ln2w": ("ln_2.weight", False), "ln2b": ("ln_2.bias", False),
    "fcw": ("mlp.c_fc.weight", True), "fcb": ("mlp.c_fc.bias", False),
    "fcprojw": ("mlp.c_proj.weight", True), "fcprojb": ("mlp.c_proj.bias", False),
}  # fmt: skip
WHOLE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}


def in_our_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by Hugging Face's names -> by ours: Conv1D transposed, wte padded with zero rows."""
    out = {ours: tensors[f"transformer.{theirs}"] for ours, theirs in WHOLE.items()}
    out["wte"] = torch.cat([out["wte"], torch.zeros(256 - V, C)])
    for i in range(L):
        for ours, (theirs, conv) in LAYER.items():
            x = tensors[f"transformer.h.{i}.{theirs}"]
            out[f"h.{i}.{ours}"] = x.T if conv else x
    return out


def test_logits_loss_and_gradients_equal_hugging_face():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=MAX_T, n_embd=C, n_layer=L, n_head=NH, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # transformers starts biases at 0 and scales at 1, which would hide a swap
        for p in theirs.parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn_like(p)
    engine = Engine(EngineSpec(GPT2Config(L=L, C=C, NH=NH, max_T=MAX_T, V=V), B=3, T=20))
    engine.load_params(in_our_layout({name: p.data for name, p in theirs.named_parameters()}))

    ids = torch.randint(V, (3, 21))
    tokens, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, 4:9] = -1
    logits = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    engine.forward_backward(tokens[None], targets[None])

    assert engine.state["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = in_our_layout({name: p.grad for name, p in theirs.named_parameters()})
    assert gradients.keys() == set(engine.names())
    for name, want in gradients.items():
        assert (engine.grad(name) - want).norm() <= 1e-5 * want.norm(), name
    assert (engine.logits(tokens) - logits).norm() <= 2e-6 * logits.norm()
