"""A run that does not fit, before it starts and later: the same sentence, with the flag that helps."""

from __future__ import annotations

import errno
import re

import pytest
import torch

import daybreak
import daybreak.engine.fit as fit_module
from daybreak.cli.main import main
from daybreak.config import Config, resolve
from daybreak.errors import Error
from daybreak.report.plan import plan
from daybreak.training import loop

MIB = 1 << 20


def test_too_large_for_the_free_memory(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit_module, "available_bytes", lambda device: 600 * MIB)
    assert main(["train", "tiny", "--name", "x", "--batch.B", "4096", "--batch.T", "128"]) == 6
    error = capsys.readouterr().err
    flags = re.search(r"has 600 MiB free; try --batch\.B (\d+)\.", error)
    assert flags, error
    assert not (tmp_path / "runs").exists()
    config = resolve("tiny")[0].override({"run.device": "cpu"})
    assert plan(config.override({"batch.B": int(flags[1])})).nbytes <= 600 * MIB
    assert plan(config.override({"batch.B": 2 * int(flags[1])})).nbytes > 600 * MIB


def test_memory_that_is_a_byte_too_small_is_told_as_smaller(monkeypatch) -> None:
    planned = plan(resolve("tiny")[0].override({"run.device": "cpu"}))
    monkeypatch.setattr(fit_module, "available_bytes", lambda device: planned.nbytes - 1)
    with pytest.raises(Error) as caught:
        fit_module.check_fits(planned.arena, torch.device("cpu"))
    told = re.search(r"needs (\d+) MiB .* has (\d+) MiB free", str(caught.value))
    assert told
    assert int(told[1]) == int(told[2]) + 1 == planned.nbytes // MIB + 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),  # mmap
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuBLASLt: cublasLtMatmul answered ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("NCCL error in ProcessGroupNCCL.cpp:2200, Last error: Cuda failure 2 'out of memory'"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_running_out_later_says_the_same(tmp_path, monkeypatch, capsys, error) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loop, "Engine", fail)
    assert main(["train", "tiny", "--name", "x", "--run.device", "cpu"]) == 6
    assert re.search(r"cpu ran out of memory: the run takes \d+ MiB; try --batch\.B 7\.", capsys.readouterr().err)
    assert '"code": 6' in (tmp_path / "runs/x/exit.json").read_text()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "out of memory"), RuntimeError("out of resource: shared memory")]
)
def test_other_failures_are_not_taken_for_it(error) -> None:
    assert not fit_module.is_out_of_memory(error)


def test_a_card_too_full_to_say_how_full_it_is(monkeypatch) -> None:
    def fail(device: torch.device) -> int:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(fit_module, "available_bytes", fail)
    sentence = "cpu ran out of memory: .*; try a smaller model or a device with more memory"
    with pytest.raises(daybreak.Error, match=sentence) as raised, fit_module.explaining_memory(Config()):
        fail(torch.device("cpu"))
    assert raised.value.exit_code == 6
