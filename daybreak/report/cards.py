"""Cards that `plan --gpu` knows, and the speeds measured on them. Peaks are in state.throughput.PEAK_FLOPS."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

from daybreak.errors import ConfigError
from daybreak.shapes import GPT2Config
from daybreak.state.throughput import peak_flops


@dataclass(frozen=True)
class Card:
    """A GPU: the driver's name, its memory as the driver states it, its compute capability, and the nominal GB/s that
    it sends to another one of its host (NVLink, else PCIe x16; NVIDIA's data sheets, one direction)."""

    name: str
    mib: int
    capability: tuple[int, int]
    link: float

    @property
    def missing(self) -> set[str]:
        """Kernel backends that this kind of card cannot run, whatever is installed (kernels.cuda.*.usable)."""
        return set() if self.capability[0] in (9, 10) else {"cudnn", "fa4"}


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 81559, (9, 0), 450),
    "h100-pcie": Card("NVIDIA H100 PCIe", 81559, (9, 0), 64),
    "h100-nvl": Card("NVIDIA H100 NVL", 95830, (9, 0), 64),
    "h200": Card("NVIDIA H200", 143771, (9, 0), 450),
    "gh200": Card("NVIDIA GH200 480GB", 97871, (9, 0), 450),
    "b200": Card("NVIDIA B200", 183359, (10, 0), 900),
    "a100": Card("NVIDIA A100-SXM4-80GB", 81920, (8, 0), 300),
    "a100-40gb": Card("NVIDIA A100-SXM4-40GB", 40960, (8, 0), 300),
    "a6000": Card("NVIDIA RTX A6000", 49140, (8, 6), 32),
    "3090": Card("NVIDIA GeForce RTX 3090", 24576, (8, 6), 32),
    "4090": Card("NVIDIA GeForce RTX 4090", 24564, (8, 9), 32),
    "l40s": Card("NVIDIA L40S", 46068, (8, 9), 32),
    "l4": Card("NVIDIA L4", 23034, (8, 9), 32),
}


def find_card(name: str) -> Card:
    """The card of a short name. Raises ConfigError, with the nearest, for an unknown one."""
    key = name.lower().removeprefix("rtx").removeprefix("-")
    if key not in CARDS:
        near = difflib.get_close_matches(key, CARDS, 1, 0.0)[0]
        raise ConfigError(f"--gpu {name} is not known; did you mean {near}? Known: {', '.join(CARDS)}.")
    return CARDS[key]


@dataclass(frozen=True)
class Measured:
    """A row of `source`: tokens a second, utilisation, MiB in use (the driver's) on one `card`, T = 1024, in bf16."""

    shape: str
    L: int
    C: int
    B: int
    recompute: int
    tok_s: float
    mfu: float
    mib: int
    card: str = "NVIDIA H100 80GB HBM3"
    source: str = "bench/results/gpu_step.csv, 25 Nov 2026"


MEASURED = (
    Measured("d12", 12, 768, 64, 0, 590721, 0.4800, 23730),
    Measured("d12", 12, 768, 64, 2, 580835, 0.4720, 16818),
    Measured("d48", 48, 1600, 16, 2, 52767, 0.5239, 48228),
    Measured("d48", 48, 1600, 28, 2, 53579, 0.5320, 66482),
    Measured("d48", 48, 1600, 34, 2, 54092, 0.5371, 75608),
)
# llm.c's published 381,400 tok/s on 8 H100 over 8 times its 50,700 on one: what gradient exchange costs on one host.
EIGHT_GPUS = 0.94


def token_rate(
    model: GPT2Config, T: int, B: int, recompute: int, flops_per_token: int, card: str, gpus: int
) -> tuple[float, str] | None:
    """Tokens a second of `gpus` cards, and on what that rests; None without a measurement and without a known peak."""
    scale, more = (1.0, "") if gpus == 1 else (gpus * EIGHT_GPUS, f"; times {gpus} x {EIGHT_GPUS}, llm.c's on 8 GPUs")

    def distance(m: Measured) -> tuple[float, ...]:
        size = math.log(m.L * m.C**2 / (model.L * model.C**2))
        return abs(size), abs(m.recompute - recompute), abs(math.log(m.B / B))

    near = min(MEASURED, key=distance)
    where = f"{near.shape} B {near.B}, recompute {near.recompute} on one {near.card} ({near.source})"
    if (near.L, near.C, 1024, card) == (model.L, model.C, T, near.card):
        exact = (near.B, near.recompute, gpus) == (B, recompute, 1)
        return near.tok_s * scale, f"{'measured' if exact else 'modelled, from'} {where}{more}"
    if (peak := peak_flops(card)) is None:
        return None
    return near.mfu * peak / flops_per_token * scale, f"modelled: {near.mfu:.1%} of its peak, as {where}{more}"
