"""Calls on a GPU: where results live, what is refused, what a profile waits for, memory."""

import pytest
from gpu import MARKS, forward, inputs, make, needs_gpu, routing_of, torch

import moesaic as mo

pytestmark = MARKS


def test_profile_waits_for_the_device():
    model = make()
    x, ids, weights = inputs(model, 20, 2)
    with mo.profile("sync") as p:
        forward(model, x, ids, weights)
    assert {"sync", "gate_up", "down"} <= set(p.zones)


@needs_gpu
def test_results_and_refusals():
    model = make()
    x, ids, weights = inputs(model, 4, 2)
    y = mo.moe_forward(x, None, model.stack, routing=mo.Routing(ids, weights))  # a host routing
    assert y.device == x.device and y.dtype == x.dtype and y.shape == x.shape
    routing = routing_of(ids, weights)
    with pytest.raises(mo.DeviceError, match="cuda:0"):
        mo.moe_forward(x.cpu(), None, model.stack, routing=routing)
    with pytest.raises(mo.DeviceError):
        mo.moe_forward(x.float().cpu().numpy(), None, model.stack, routing=routing)
    with pytest.raises(mo.DeviceError):
        mo.moe_forward(x, None, model.stack, routing=routing, out=torch.empty_like(x, device="cpu"))
    with pytest.raises(mo.WorkspaceError):
        mo.moe_forward(x, None, model.stack, routing=routing, workspace=mo.Workspace(1 << 24))
    with pytest.raises(mo.DTypeError):
        mo.moe_forward(x, None, model.stack, routing=routing, stream="main")
    assert torch.equal(mo.moe_forward(x, None, model.stack, routing=routing), y)


@needs_gpu
def test_memory_comes_back():
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        model = make(64, 1024, 1024)
        del model
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20
