"""`daybreak train tiny` on one page, without its command line: data, engine, forward, backward, update, sample.

    python examples/loop.py                  the same losses, weights and sample as daybreak train tiny
    python examples/loop.py run.steps=100    any key, as on the command line (daybreak train --print-config lists them)

It leaves out what a long run needs: validation, checkpoints, signals, several GPUs, CUDA graphs. Copy it and change it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from daybreak.config import Config, resolve
from daybreak.data.loader import Loader
from daybreak.data.mixing import open_loaders
from daybreak.data.prepare import prepare
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.engine import Engine
from daybreak.engine.device import engine_spec
from daybreak.generate import Sampling, sample_text
from daybreak.training.schedule import learning_rate


def open_data(config: Config) -> tuple[Loader, Tokenizer]:
    """Samples of the training data, and the tokenizer that it was made with. Prepares the demo's text at first use."""
    d = config.data
    if d.name == "stdlib" and not d.train and not Path(d.dir, f"{d.name}-{d.tokenizer}").exists():
        prepare([d.name], data_dir=d.dir, tokenizer=d.tokenizer)
    dataset, loader, _ = open_loaders(d, config.T, config.run.seed, config.model.V)
    return loader, get_tokenizer(dataset.tokenizer_name, dataset.folder)


def forward(engine: Engine, tokens: Tensor, targets: Tensor, first: bool) -> None:
    """Losses of one micro-batch (B, T), and their gradient with respect to the model's output."""
    f, s = engine.frame, engine.state  # tensors of this step by name, and those that stay
    s["tokens"].copy_(tokens)
    s["targets"].copy_(targets)
    hidden, share = engine.model.forward(f, s["tokens"]), s["hyper"][2]  # of one target in the step's mean loss
    engine.model.head_loss(f, hidden, s["targets"].view(-1), s["losses"], share, backward=True, first=first)
    f.k.loss_sum(s["loss"], s["losses"], share, accumulate=not first)


def backward(engine: Engine, first: bool) -> None:
    """Gradients of all weights; the first micro-batch of a step overwrites them, later ones add."""
    engine.model.backward(engine.frame, engine.state["tokens"], first=first)


def train(*overrides: str) -> tuple[Engine, list[float], str]:
    """The trained engine, the loss of each step, and a sample. overrides: as key=value."""
    config, _ = resolve("tiny", [(key, value) for key, _, value in (text.partition("=") for text in overrides)])
    loader, tokenizer = open_data(config)
    config = config.concrete(loader.samples_per_epoch * config.T)  # fills in what depends on the data's size
    engine = Engine(engine_spec(config, torch.device("cpu")), seed=config.run.seed)
    B, losses, seen = config.batch.B, list[float](), 0
    for step in range(config.run.steps):
        samples = config.tokens_at(step) // config.T
        tokens, targets = loader.batch(seen, samples)  # both (samples, T); a target of -1 would not count
        seen += samples
        lr = learning_rate(step, config.optim, config.schedule)
        engine.begin_step(lr=lr, step=step, valid=int((targets >= 0).sum()))
        for start in range(0, samples, B):
            part = slice(start, start + B)
            forward(engine, torch.from_numpy(tokens[part]), torch.from_numpy(targets[part]), first=start == 0)
            backward(engine, first=start == 0)
        engine.update()  # clip the gradient, then AdamW
        losses.append(engine.stats()["loss"])
        print(f"step {step + 1:4}  loss {losses[-1]:.4f}  learning rate {lr:.2e}", flush=True)
    e = config.eval
    sampling = Sampling(e.sample_tokens, e.temperature, e.top_k)
    return engine, losses, e.prompt + "".join(sample_text(engine, tokenizer, e.prompt, sampling))


if __name__ == "__main__":
    print(train(*sys.argv[1:])[2])
