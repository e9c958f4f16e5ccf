"""The warning where no table of measured matmuls is for a GPU and its library, on the CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from daybreak.kernels.cuda import cublaslt, products
from daybreak.training.setup import _say_untuned

SHIPPED = [json.loads(path.read_text()) for path in products.TABLES.glob("*.json")]


def test_the_sentence() -> None:
    assert SHIPPED
    for table in SHIPPED:
        gpu, version = table["card"], table["cublaslt"]
        assert products.untuned(gpu, version) == ""
        for other in ((gpu, version + 1), ("NVIDIA H100 PCIe", version)):
            assert products.untuned(*other).startswith(
                "no table of measured matmuls is for {} and cuBLASLt {}: the library's first".format(*other)
            )


def test_train_says_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    table = SHIPPED[0]
    for version, lines in ((table["cublaslt"], 0), (table["cublaslt"] + 1, 1)):
        monkeypatch.setitem(cublaslt._devices, 0, SimpleNamespace(gpu=table["card"], version=version))
        _say_untuned(torch.device("cuda", 0))
        assert [r.getMessage()[:28] for r in caplog.records] == lines * ["no table of measured matmuls"]
