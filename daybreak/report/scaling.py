"""The time of a step on N GPUs, by a model: the table that `plan --gpus 8,16,64,512` prints.

A step takes as long as one GPU takes for its share of the tokens (Plan.rate), and longer if communication is not
hidden. Buckets, as `Sharding` cuts them, are sent one after the other, each once its gradients are final:

    compute        | forward       | backward                              |           | next forward
    communication                          | bucket 0 | bucket 1 | bucket 2 | bucket 3 |
                                                                            <-exposed->

A rank sends as fast as its link inside the host, or as all network ports of the host together if those are slower:
NCCL makes a ring for each port, and each ring crosses the network once a host. gpus.SEVERAL_GPUS has the cost of
stragglers and of what NCCL takes from the matmuls. Other traffic and NCCL's trees are not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daybreak.config import Config
from daybreak.engine import DTYPES
from daybreak.engine.collectives import Sharding
from daybreak.errors import ConfigError
from daybreak.formatting import format_duration
from daybreak.report.gpus import SEVERAL_GPUS, find_gpu
from daybreak.report.plan import ENOUGH_TOKENS, MIB, Plan, plan

HOST = 8  # GPUs of one machine
NETWORK = 50.0  # GB/s of a GPU's own network port: 400 Gb/s, as in NVIDIA's DGX H100
REACHED = 0.73  # share of a link's nominal rate that collectives reach (330 of 450 GB/s): assumed, as HOP is
HOP = 5e-6  # seconds a ring needs for each rank that it passes


def bandwidth(gpu: str, gpus: int, network: float = NETWORK) -> float:
    """Bytes a second that each of `gpus` GPUs of the kind `gpu` sends to its neighbour in a ring."""
    link = find_gpu(gpu).link
    return REACHED * 1e9 * (link if gpus <= HOST else min(link, HOST * network))


def exposed_gradients(
    sharding: Sharding, itemsize: int, final: Mapping[int, float], end: float, rate: float, latency: float = 0.0
) -> float:
    """Seconds by which the reduction of gradients outlasts a backward that ends at `end`.

    final: moment -> seconds after backward's start at which its gradients are final. rate: bytes a second that a rank
    sends. latency: further seconds of each bucket.
    """
    at, trips = 0.0, 1 if sharding.zero else 2
    for k in sharding.order:
        sent = trips * sharding.size(k) * (sharding.world - 1) * itemsize
        at = max(at, final[sharding.buckets[k].moment]) + trips * latency + sent / rate
    return max(at - end, 0.0)


def exposed_weights(sharding: Sharding, itemsize: int, forward: float, rate: float, latency: float = 0.0) -> float:
    """Seconds that a forward of `forward` seconds waits for updated weights. It always waits for the first bucket, and
    for the last one if that comes later than forward needs it. Stage 0 gathers no weights."""
    if not sharding.zero:
        return 0.0
    times = [latency + sharding.size(k) * (sharding.world - 1) * itemsize / rate for k in reversed(sharding.order)]
    return times[0] + max(0.0, sum(times[1:]) - forward)


@dataclass(frozen=True)
class Scale:
    """A step on `gpus` GPUs with B sequences a micro-step.

    alone: seconds of one GPU that does its share and waits for nobody. exchange: seconds of all communication.
    exposed: the part of these that no computation hides. mib: memory of each GPU. None: one GPU's speed is not known.
    """

    gpus: int
    B: int
    micro_steps: int
    alone: float | None
    seconds: float | None
    exchange: float
    exposed: float | None
    mib: int
    fits: bool


def scale(p: Plan, gpu: str, network: float = NETWORK) -> Scale:
    """The step of a plan for the GPU that `gpu` names."""
    c, total = p.config, p.nbytes + p.outside
    sharding, size = p.arena.sharding, DTYPES[p.compute].itemsize
    rate, latency = bandwidth(gpu, p.gpus, network), HOP * (p.gpus - 1)
    exchange = sharding.volume(DTYPES[p.compute], p.micro_steps) / rate
    fits = p.budget is None or total <= p.budget
    if (one := p.rate(1)) is None:
        return Scale(p.gpus, c.batch.B, p.micro_steps, None, None, exchange, None, total // MIB, fits)
    micro = c.batch.B * c.T / (one[0] * (SEVERAL_GPUS if p.gpus > 1 else 1.0))
    forward = micro / (4 if c.batch.recompute == 3 else 3)  # backward costs two forwards; whole blocks again, three
    backward = micro - forward
    final = {m: backward * (m + 1) / (sharding.last_moment + 1) for m in range(sharding.last_moment + 1)}
    late = exposed_gradients(sharding, size, final, backward, rate, latency) if p.gpus > 1 else 0.0
    if sharding.zero == 2:  # each micro-step's exchange may go on under the next one's forward; the last one's may not
        late += (p.micro_steps - 1) * max(0.0, late - forward)
    late += exposed_weights(sharding, size, forward, rate, latency)
    alone, seconds = p.micro_steps * c.batch.B * c.T / one[0], p.micro_steps * micro + late
    return Scale(p.gpus, c.batch.B, p.micro_steps, alone, seconds, exchange, late, total // MIB, fits)


def scaling(config: Config, gpu: str, counts: Sequence[int], network: float = NETWORK) -> list[Scale]:
    """One `Scale` for each number of GPUs. If B does not divide the total batch, the largest smaller one that does.

    Raises ConfigError for an unknown GPU, or a number of GPUs among which no number of rows divides the batch.
    """
    found = []
    for gpus in counts:
        total = config.batch.total_tokens
        rows = [b for b in range(config.batch.B, 0, -1) if not total or total % (b * config.T * gpus) == 0]
        if not rows:
            fewer = next((n for n in range(gpus - 1, 0, -1) if total % (config.T * n) == 0), 0)
            more = next((n for n in range(gpus + 1, total // config.T + 1) if total % (config.T * n) == 0), 0)
            fix = " or ".join(f"{n}" for n in (fewer, more) if n) or "another batch.total_tokens"
            rule = f"is not a multiple of batch.T * ranks = {config.T} * {gpus}"
            raise ConfigError(f"--gpus {gpus}: batch.total_tokens = {total} {rule}; take {fix} in its place.")
        found.append(scale(plan(config.override({"batch.B": rows[0]}), gpu=gpu, gpus=gpus), gpu, network))
    return found


def print_scaling(config: Config, gpu: str, rows: Sequence[Scale], network: float = NETWORK) -> None:
    """Print the table on stdout, and its assumptions."""
    columns = {"GPUs": 5, "B": 5, "micro": 6, "ms/step": 10, "exchange": 9, "exposed": 8, "tok/s": 11, "of N x 1": 9,
               "time": 7, "MiB/GPU": 8}  # fmt: skip
    lines = [[*columns]]
    for r in rows:
        few = "*" if r.B < config.batch.B and r.B * config.T < ENOUGH_TOKENS else ""
        times = ("n/a" if s is None else f"{1e3 * s:,.1f}" for s in (r.seconds, r.exchange, r.exposed))
        speed = ["n/a"] * 3
        if r.seconds and r.alone:
            tok_s, part = r.B * config.T * r.micro_steps * r.gpus / r.seconds, r.alone / r.seconds
            speed = [f"{tok_s:,.0f}", f"{part:.1%}", format_duration(r.seconds * config.run.steps or None)]
        memory = f"{r.mib}{'' if r.fits else '!'}"
        lines.append([f"{r.gpus}", f"{r.B}{few}", f"{r.micro_steps}", *times, *speed, memory])
    print("\nA step by number of GPUs (modelled; exchange and its exposed part in ms)")
    for line in lines:
        print("".join(f"{x:>{width}}" for x, width in zip(line, columns.values(), strict=True)))
    link = find_gpu(gpu).link
    print(
        f"ZeRO stage {config.parallel.zero}, buckets of {config.parallel.bucket_bytes >> 20} MiB; {REACHED:.0%} of "
        f"{link:g} GB/s inside a host of {HOST} and of {min(link, HOST * network):g} between hosts (--network "
        f"{network:g} a GPU), {HOP * 1e6:g} us a rank and bucket; {SEVERAL_GPUS} of one GPU's speed besides, "
        "measured on 4 GPUs of one host. Between hosts not checked."
    )
    if any(r.B < config.batch.B for r in rows):
        print("*: so few rows keep a GPU less busy than is believed here.")
    if not all(r.fits for r in rows):
        print("!: does not fit; --gpus with that number alone says what helps.")
