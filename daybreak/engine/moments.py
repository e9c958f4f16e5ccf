"""When each gradient is final, found by running backward on nothing.

With several ranks a gradient can be reduced as soon as backward has finished it. A model calls `f.final()` whenever it
has finished some, without saying which. So backward runs once here, with tensors that have no memory and kernels that
do nothing. This notes at which call of `final` each gradient was last asked for. With three blocks:

    backward       block 2   final   block 1   final   embedding   final   rest of block 0   final
    moment                     0                 1                   2                         3
    matrices       h.2.*             h.1.*             wte, wpe            h.0.*
    the others                                                             all vectors

Matrices of one layer are final together, at the last one's moment. A head's own weight is final at moment 0.
Parameters without decay are vectors, many and small. They lie together, behind all matrices, and are reduced together
at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from daybreak.engine.arena import FROZEN, Entry, PlanFrame, constant_entries
from daybreak.engine.params import ParamTable
from daybreak.models.registry import Model


class _CountingFrame(PlanFrame):
    """Notes how many calls of `final` came before each gradient was last asked for."""

    def __init__(self, table: ParamTable, constants: Mapping[str, Tensor]) -> None:
        flat = [Entry(name, name, (table.numel,), torch.float32) for name in ("weights", "grads")]
        flat += [Entry(FROZEN + row.name, "frozen", row.shape, torch.float32) for row in table.frozen]
        state = [*flat, *constant_entries(constants), Entry("batch", "state", (2, 1, 1), torch.int64)]
        super().__init__(table, torch.float32, state, None)  # type: ignore[arg-type]  # no collectives
        self.k = self.recorder.each(lambda *_: lambda *_, **__: None)
        self.finals, self.last = list[None](), dict[str, int]()  # a list: the frames of layers share it

    def g(self, name: str) -> Tensor | None:
        self.last[self.prefix + name] = len(self.finals)
        return super().g(name)

    def final(self) -> None:
        self.finals.append(None)


def final_moments(model: Model, table: ParamTable) -> dict[str, int]:
    """Trainable parameter -> its moment: the number, from 0, of the call of `f.final` that its gradient is final at."""
    f = _CountingFrame(table, model.constants())
    model.backward(f, f.state["tokens"], first=True)
    together = {name: name.rpartition(".")[0] or name for name in table.offsets}
    together |= {name: "vectors" for name in table.offsets if not table.rows[name].decay}
    moments = {"vectors": len(f.finals) - 1}
    for name in table.offsets:
        last = f.last.get(name, 0)  # a head's own weight has its gradient before backward begins
        moments[together[name]] = max(moments.get(together[name], 0), last)
    return {name: moments[part] for name, part in together.items()}
