"""The groups of nanochat's family, as its run has them: Muon for matrices, and AdamW with its own rates for the rest.

`optim.lr` is the learning rate of a head of 768 channels, 0.008 in nanochat's run of 524,288 tokens a step. The other
groups follow it by fixed factors, and three of them by the root of the width too. Only smear and backout have a rate of
their own, which nothing but the schedule changes.
"""

from __future__ import annotations

from daybreak.config_keys import OptimConfig
from daybreak.optimizers import ParamGroup
from daybreak.optimizers.adamw import AdamW
from daybreak.shapes import Shape

HEAD_LR, WIDTH = 0.008, 768  # the rates below are those of a run with this optim.lr and this many channels
EPS = 1e-10
# pattern -> learning rate, whether it falls with the root of the width, beta1, beta2, weight decay
GROUPS: dict[str, tuple[float, bool, float, float, float]] = {
    "headw": (HEAD_LR, True, 0.8, 0.96, 0.01),
    "wte": (0.3, True, 0.8, 0.995, 0.001),
    "h.*.ve": (0.15, True, 0.8, 0.995, 0.01),
    "h.*.resid": (0.005, False, 0.8, 0.95, 0.05),
    "h.*.x0": (0.5, False, 0.96, 0.95, 0.0),
}
OWN = ("smear*", "backout")  # their rate is OWN_LR, for any optim.lr
OWN_LR, OWN_ADAMW = 0.2, AdamW(0.8, 0.95, EPS)


def family_groups(cfg: Shape, optim: OptimConfig) -> tuple[ParamGroup, ...]:
    """The groups of a family that has some of its own, where Muon is chosen. They come before Muon's."""
    if cfg.arch != "nanochat" or optim.name != "muon":
        return ()
    root = (cfg.C / WIDTH) ** -0.5
    groups = [
        ParamGroup(names, AdamW(beta1, beta2, EPS), lr / HEAD_LR * (root if falls else 1.0), weight_decay)
        for names, (lr, falls, beta1, beta2, weight_decay) in GROUPS.items()
    ]
    own = OWN_LR / optim.lr if optim.lr else 0.0
    return (*groups, *(ParamGroup(names, OWN_ADAMW, own) for names in OWN))
