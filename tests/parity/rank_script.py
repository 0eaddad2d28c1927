"""One rank of a layer over torch.distributed or MPI: ``rank_script.py TASK FILE TRANSPORT``."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
from values import normal

import moesaic as mo
from moesaic.distributed import MoeLayer, MpiComm, Placement, RankError, TorchGroup, plan_experts

TIMEOUT = 2.0
BLOCK = 1
LOSSES = ("die", "die0", "hang")


def plans(experts: int, size: int) -> list[Placement]:
    """Even, with copies, and with a rank that keeps everything beside ranks that keep nothing."""
    return [
        plan_experts(np.ones(experts), size),
        plan_experts(np.arange(experts), size, -(-experts // size) + 2),
        Placement.of_lists([range(experts)] + [[]] * (size - 1), experts),
    ]


def bits(path: str, group: TorchGroup | MpiComm) -> None:
    """Every protocol and way to combine, ranks with different numbers of tokens, some with none."""
    with mo.MoeLayer.from_gguf(path, BLOCK) as whole, mo.tuning(threads=1, batch_invariant=True):
        config = whole.config
        for plan in plans(config.num_experts, group.size):
            for combine in ("exact", "partial"):
                for protocol in ("alltoall", "allgather", "auto"):
                    layer = MoeLayer.from_gguf(
                        path, BLOCK, plan, group, combine=combine, protocol=protocol, max_tokens=96
                    )
                    for most in (0, 1, 3, 200):
                        tokens = most * (group.size - group.rank) // group.size
                        if group.size > 1 and group.rank == group.size - 1:
                            tokens = 0 if most == 200 else tokens
                        x = normal(tokens, config.hidden_size, seed=group.rank)
                        y, want = layer(x), whole(x)
                        if combine == "exact":
                            np.testing.assert_array_equal(y, want)
                        elif tokens:
                            assert np.linalg.norm(y - want) < 1e-6 * np.linalg.norm(want)
        # All tokens to the experts of one rank.
        plan = plans(config.num_experts, group.size)[0]
        layer = MoeLayer.from_gguf(path, BLOCK, plan, group)
        ids = np.tile(np.array(plan.experts(group.size - 1)[:2], np.int32), (20, 1))
        routing = mo.Routing(ids, np.full(ids.shape, 0.5, np.float32))
        x = normal(20, config.hidden_size, seed=group.rank)
        np.testing.assert_array_equal(layer(x, routing=routing), whole(x, routing=routing))


def tensors(path: str, group: TorchGroup | MpiComm) -> None:
    """torch tensors in, torch tensors out, bf16 too."""
    import torch

    plan = plan_experts(np.ones(mo.MoeConfig.from_gguf(path, BLOCK).num_experts), group.size)
    with mo.MoeLayer.from_gguf(path, BLOCK) as whole, mo.tuning(threads=1, batch_invariant=True):
        layer = MoeLayer.from_gguf(path, BLOCK, plan, group)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(2, 5, whole.config.hidden_size).to(dtype)
            y = layer(x)
            assert isinstance(y, torch.Tensor) and y.dtype == dtype
            assert torch.equal(y, whole(x))


def groups(path: str, group: TorchGroup | MpiComm) -> None:
    """Some of the ranks by a process group of torch, then all of them by none."""
    import torch.distributed as dist

    some = dist.new_group([0, 2])
    with mo.MoeLayer.from_gguf(path, BLOCK) as whole, mo.tuning(threads=1, batch_invariant=True):
        experts = whole.config.num_experts
        x = normal(7, whole.config.hidden_size, seed=group.rank)
        if group.rank == 1:
            try:
                TorchGroup(some)
            except mo.ConfigError as error:
                assert "group" in str(error)
            else:
                raise AssertionError("no error")
        else:
            layer = MoeLayer.from_gguf(path, BLOCK, plan_experts(np.ones(experts), 2), some)
            assert (layer.rank, layer.size) == ([0, None, 1][group.rank], 2)
            np.testing.assert_array_equal(layer(x), whole(x))
        for _ in range(2):  # one transport for both
            layer = MoeLayer.from_gguf(path, BLOCK, plan_experts(np.ones(experts), 3))
            np.testing.assert_array_equal(layer(x), whole(x))


def lose(path: str, group: TorchGroup | MpiComm, how: str) -> None:
    """A rank dies or hangs before the second call; the others say so in time."""
    lost = 0 if how == "die0" else 1
    plan = plan_experts(np.ones(mo.MoeConfig.from_gguf(path, BLOCK).num_experts), group.size)
    layer = MoeLayer.from_gguf(path, BLOCK, plan, group)
    x = normal(9, layer.config.hidden_size)
    layer(x)
    if group.rank == lost:
        if how == "hang":
            time.sleep(3 * TIMEOUT)
        os._exit(0)
    out = np.full_like(x, 7.0)
    start = time.monotonic()
    try:
        layer(x, out=out)
    except RankError as error:
        took = time.monotonic() - start
        assert took < TIMEOUT + 2, took
        assert (error.layer, error.call, error.ranks) == (BLOCK, 1, (lost,)), error
        assert error.hosts[0] in str(error)
    else:
        raise AssertionError("no error")
    assert (out == 7.0).all()
    try:
        layer(x)
    except RankError as error:
        assert "earlier call" in str(error)
    print("named in time", flush=True)
    time.sleep(0.5)  # the other survivors may still ask the store, which this process may hold
    os._exit(0)


def plan_differs(path: str, group: TorchGroup | MpiComm) -> None:
    """All ranks are told who has another plan."""
    experts = mo.MoeConfig.from_gguf(path, BLOCK).num_experts
    counts = np.ones(experts) if group.rank != 1 else np.arange(experts)[::-1] ** 2
    try:
        MoeLayer.from_gguf(path, BLOCK, plan_experts(counts, group.size), group)
    except mo.ConfigError as error:
        assert "plan of rank 1" in str(error), error
    else:
        raise AssertionError("no error")


def main() -> None:
    task, path, transport = sys.argv[1:]
    if transport == "mpi":
        group: TorchGroup | MpiComm = MpiComm(timeout=TIMEOUT if task in LOSSES else 30.0)
    else:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
        group = TorchGroup(timeout=TIMEOUT if task in LOSSES else 30.0)
    if task in LOSSES:
        lose(path, group, task)
    tasks = {"bits": bits, "tensors": tensors, "plan": plan_differs, "groups": groups}
    tasks[task](path, group)
    print("good", flush=True)
    if transport == "torch":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
