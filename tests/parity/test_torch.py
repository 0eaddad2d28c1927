"""Modules of moesaic.torch: what they compute, what flows back, and what torch does with them."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import moesaic as mo
from moesaic.torch import Embedding, Experts, Linear, MoeBlock
from moesaic.torch.arrays import array_of, threads_of_torch
from moesaic.torch.gradients import activate, expert_gradients

torch.set_num_threads(1)  # the modules are small
E, H, I, T, K = 6, 32, 24, 10, 3
KINDS = ["swiglu", "swiglu_clamp_input", "swiglu_clamp_output", "swiglu_oai", "geglu_tanh", "reglu",
         "gelu_tanh", "relu_squared", "situ"]  # fmt: skip


def activation(kind: str) -> mo.Activation:
    return mo.Activation(kind, limit=0.8, alpha=1.3, beta=1.5, linear_beta=0.9)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


class Problem:
    """Experts, and the same in torch, written for reading."""

    def __init__(self, kind: str = "swiglu", biases: bool = False, delta: bool = False) -> None:
        self.activation = activation(kind)
        gated = self.activation.gated
        roles = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        if not gated:
            del roles["gate"]
        self.dense = {
            role: random(E, *shape, seed=i, scale=shape[1] ** -0.5)
            for i, (role, shape) in enumerate(roles.items())
        }
        self.biases = {
            role: random(E, shape[0], seed=9 + i)
            for i, (role, shape) in enumerate(roles.items())
            if biases
        }
        stack = mo.ExpertStack.from_dense_stacks(
            self.dense.get("gate"), self.dense["up"], self.dense["down"], biases=self.biases
        )
        if delta:
            low = {role: random(E, 2, w.shape[2], seed=20) * 0.1 for role, w in self.dense.items()}
            high = {role: random(E, w.shape[1], 2, seed=21) for role, w in self.dense.items()}
            stack = stack.with_deltas({role: (low[role], high[role], 0.5) for role in low})
            for role, weights in self.dense.items():
                self.dense[role] = weights + 0.5 * high[role] @ low[role]
        self.experts = Experts(stack, self.activation)
        self.x = random(T, H, seed=5)
        self.ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
        self.weights = torch.rand(T, K, generator=torch.Generator().manual_seed(6))

    def reference(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        dense = {role: values.to(x.dtype) for role, values in self.dense.items()}
        out = torch.zeros_like(x)
        for slot in range(ids.shape[1]):
            chosen = ids[:, slot].clamp(min=0)
            part = {
                role: torch.einsum("trc,tc->tr", dense[role][chosen], x)
                + self.bias(role, chosen, x.dtype)
                for role in dense
                if role != "down"
            }
            hidden = activate(self.activation, part.get("gate"), part["up"])
            y = torch.einsum("trc,tc->tr", dense["down"][chosen], hidden)
            y = y + self.bias("down", chosen, x.dtype)
            used = (ids[:, slot] >= 0).to(x.dtype)
            out = out + (weights[:, slot] * used)[:, None] * y
        return out

    def bias(self, role: str, chosen: torch.Tensor, dtype: torch.dtype) -> Any:
        return self.biases[role][chosen].to(dtype) if role in self.biases else 0


def rel(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_the_core(kind):
    """In the range where their clamps are and are not."""
    ours = activation(kind)
    gate, up = torch.meshgrid(torch.linspace(-3, 3, 25), torch.linspace(-2, 2, 17), indexing="ij")
    got = activate(ours, gate if ours.gated else None, up)
    want = [ours(float(g), float(u)) for g, u in zip(gate.flatten(), up.flatten(), strict=True)]
    np.testing.assert_allclose(got.flatten().numpy(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biases", [False, True])
def test_forward(kind, biases):
    p = Problem(kind, biases)
    with torch.no_grad():
        assert rel(p.experts(p.x, p.ids, p.weights), p.reference(p.x, p.ids, p.weights)) < 1e-5


class TestTensors:
    def test_leading_dimensions(self):
        p = Problem()
        flat = p.experts(p.x, p.ids, p.weights)
        parts = [one.view(2, 5, -1) for one in (p.x, p.ids, p.weights)]
        assert torch.equal(p.experts(*parts), flat.view(2, 5, H))
        one = p.experts(p.x[0], p.ids[0], p.weights[0])
        assert one.shape == (H,) and rel(one, flat[0]) < 1e-5
        assert p.experts(p.x[:0], p.ids[:0], p.weights[:0]).shape == (0, H)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves(self, dtype):
        p = Problem()
        got = p.experts(p.x.to(dtype), p.ids, p.weights.to(dtype))
        assert got.dtype == dtype
        want = p.experts(p.x.to(dtype).float(), p.ids, p.weights.to(dtype).float())
        assert rel(got.float(), want) < 4e-3

    def test_strides(self):
        p = Problem()
        want = p.experts(p.x, p.ids, p.weights)
        turned = [one.T.contiguous().T for one in (p.x, p.ids, p.weights)]
        assert not turned[0].is_contiguous()
        assert torch.equal(p.experts(*turned), want)
        assert torch.equal(p.experts(p.x, p.ids.int(), p.weights), want)

    def test_skipped_pairs(self):
        p = Problem()
        p.ids[3] = -1
        p.ids[4, 1] = -1
        got = p.experts(p.x, p.ids, p.weights)
        assert rel(got, p.reference(p.x, p.ids, p.weights)) < 1e-5
        assert not got[3].any()

    def test_shapes_that_do_not_fit(self):
        p = Problem()
        for x, ids, weights in (
            (p.x[:, 1:], p.ids, p.weights),
            (p.x, p.ids[1:], p.weights),
            (p.x, p.ids, p.weights[:, 1:]),
            (p.x.view(2, 5, H), p.ids, p.weights),
        ):
            with pytest.raises(mo.ShapeError, match=r"moesaic\.experts: x, ids, weights"):
                p.experts(x, ids, weights)

    def test_types_that_do_not_fit(self):
        p = Problem()
        with pytest.raises(mo.DTypeError):
            p.experts(p.x.double(), p.ids, p.weights)
        with pytest.raises(mo.DTypeError):
            p.experts(p.x, p.ids.float(), p.weights)
        with pytest.raises(mo.ShapeError, match="topk_ids"):
            p.experts(p.x, p.ids + E, p.weights)

    def test_on_meta(self):
        p = Problem()
        assert p.experts(p.x.to("meta"), p.ids.to("meta"), p.weights.to("meta")).shape == (T, H)

    def test_under_autocast(self):
        p = Problem()
        with torch.autocast("cpu", torch.bfloat16):
            x = functional.linear(p.x, torch.eye(H))
            assert p.experts(x, p.ids, p.weights).dtype == torch.bfloat16


class TestGradients:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("parts", ["plain", "biases", "delta"])
    def test_beside_autograd_in_f64(self, kind, parts):
        """The formulas, free of the rounding of the forward."""
        p = Problem(kind, biases=parts == "biases", delta=parts == "delta")
        p.ids[2, 0] = -1
        x, weights = p.x.double().requires_grad_(), p.weights.double().requires_grad_()
        dy = random(T, H, seed=8).double()
        p.reference(x, p.ids, weights).backward(dy)
        stack = p.experts.stack
        dx, dw = expert_gradients(dy, x.detach(), p.ids, weights.detach(), stack, p.activation)
        # The stack has its weights in f32, also those with a delta.
        assert rel(dx, x.grad) < 1e-6 and rel(dw, weights.grad) < 1e-6
        if parts != "delta":
            assert rel(dx, x.grad) < 1e-12 and rel(dw, weights.grad) < 1e-12

    @pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh", "gelu_tanh"])
    def test_gradcheck(self, kind):
        """Differences of an f32 forward: a step of 1e-2 leaves 1e-3 to rounding and curvature."""
        p = Problem(kind)
        x, weights = p.x[:2].clone().requires_grad_(), p.weights[:2].clone().requires_grad_()
        call = lambda x, weights: p.experts(x, p.ids[:2], weights)  # noqa: E731
        assert torch.autograd.gradcheck(
            call, (x, weights), eps=1e-2, atol=5e-3, rtol=5e-3, check_grad_dtypes=True
        )

    def test_through_the_module(self):
        p = Problem()
        x, weights = p.x.clone().requires_grad_(), p.weights.clone().requires_grad_()
        p.experts(x, p.ids, weights).square().sum().backward()
        got = x.grad.clone(), weights.grad.clone()
        x.grad = weights.grad = None
        p.reference(x, p.ids, weights).square().sum().backward()
        assert rel(got[0], x.grad) < 1e-5 and rel(got[1], weights.grad) < 1e-5

    def test_of_a_module_that_is_gone(self):
        p = Problem()
        x = p.x.clone().requires_grad_()
        y = Experts(p.experts.stack, p.activation)(x, p.ids, p.weights)
        y.sum().backward()
        assert x.grad.any()
        z = Linear.from_linear(torch.nn.Linear(H, 3))(x)
        z.sum().backward()

    def test_only_where_they_are_asked_for(self):
        p = Problem()
        assert not p.experts(p.x, p.ids, p.weights).requires_grad
        x = p.x.clone().requires_grad_()
        with torch.no_grad():
            assert not p.experts(x, p.ids, p.weights).requires_grad
        with torch.inference_mode():
            assert p.experts(p.x * 1, p.ids, p.weights).is_inference()


class Seen(TorchDispatchMode):
    """Notes which operators of ours run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "moesaic":
            self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


class TestCallsWithoutGradients:
    """What torch does around an operator with a gradient is for calls that want one."""

    def test_which_operator_runs(self):
        p = Problem()
        x = p.x.clone().requires_grad_()
        with Seen() as seen:
            p.experts(p.x, p.ids, p.weights)
            with torch.no_grad():
                p.experts(x, p.ids, p.weights)
            assert seen.names == ["experts_forward"] * 2
            seen.names.clear()
            p.experts(x, p.ids, p.weights).sum().backward()
            p.experts(p.x, p.ids, p.weights.clone().requires_grad_())
            assert seen.names == ["experts", "experts_backward", "experts"]

    def test_they_say_the_same(self, tmp_path):
        p = Problem()
        x = p.x.clone().requires_grad_()
        assert torch.equal(p.experts(x, p.ids, p.weights), p.experts(p.x, p.ids, p.weights))
        linear = Linear.from_linear(torch.nn.Linear(H, 8))
        assert torch.equal(linear(x), linear(p.x))
        mo.testing.write_moe_gguf(tmp_path / "m.gguf")
        block, x = MoeBlock.from_gguf(tmp_path / "m.gguf", 0), random(3, 256)
        assert torch.equal(block(x.clone().requires_grad_()), block(x))

    def test_opcheck(self):
        p = Problem()
        number = p.experts._weights.number
        op = torch.ops.moesaic.experts_forward.default
        torch.library.opcheck(op, (p.x, p.ids, p.weights, number))
        linear = Linear.from_linear(torch.nn.Linear(H, 8))
        op = torch.ops.moesaic.linear_forward.default
        torch.library.opcheck(op, (p.x, linear._weights.number))


def test_views_of_bf16():
    whole = random(4, 6, 2).bfloat16()
    for tensor in (whole, whole.transpose(0, 2), whole[::2, 1:3], whole[1, 2], whole[:0]):
        view = array_of(tensor)
        assert view.shape == tuple(tensor.shape) and view.dtype == "bf16"
        np.testing.assert_array_equal(mo.asarray(view, "f32"), tensor.float().numpy())
    view = array_of(random(3).bfloat16() * 0 + 1)  # which nothing else keeps
    torch.full((3,), 2.0, dtype=torch.bfloat16)
    np.testing.assert_array_equal(mo.asarray(view, "f32"), np.ones(3))
    out = torch.zeros(2, dtype=torch.bfloat16)
    np.asarray(array_of(out)).view(np.uint16)[:] = 0x3F80
    assert out.tolist() == [1, 1]
    with pytest.raises(TypeError):
        array_of(torch.ones(2, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_of_one_token(dtype):
    """Of Python and of what it calls, which is what one token of a small layer waits for."""
    p = Problem()
    x, ids, weights = p.x[:1].to(dtype), p.ids[:1], p.weights[:1].to(dtype)
    linear = Linear.from_linear(torch.nn.Linear(H, 8))

    def calls_of(call: Callable[[], object]) -> int:
        count = 0

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        call()
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        return count

    with torch.no_grad():
        assert calls_of(lambda: p.experts(x, ids, weights)) <= 52
        assert calls_of(lambda: linear(x)) <= 40


class Model(torch.nn.Module):
    def __init__(self, experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts, self.scale = experts, torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.experts(x * self.scale, ids, weights) + 1


class TestCompilers:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compile(self, backend):
        p = Problem()
        model = Model(p.experts)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        want = model(p.x, p.ids, p.weights)
        assert torch.equal(compiled(p.x, p.ids, p.weights), want)
        compiled(p.x, p.ids, p.weights).sum().backward()
        got = model.scale.grad.clone()
        model.scale.grad = None
        model(p.x, p.ids, p.weights).sum().backward()
        assert rel(got, model.scale.grad) < 1e-5
        assert compiled(p.x[:4], p.ids[:4], p.weights[:4]).shape == (4, H)

    def test_export(self):
        p = Problem()
        model = Model(p.experts)
        tokens = torch.export.Dim("tokens", min=2)
        program = torch.export.export(
            model, (p.x, p.ids, p.weights), dynamic_shapes=[{0: tokens}] * 3
        )
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("moesaic.experts.default") == 1
        run = program.module()
        assert torch.equal(run(p.x, p.ids, p.weights), model(p.x, p.ids, p.weights))
        assert run(p.x[:4], p.ids[:4], p.weights[:4]).shape == (4, H)

    def test_a_graph_without_its_model(self):
        p = Problem()
        number = p.experts._weights.number
        args = p.x, p.ids, p.weights
        del p
        with pytest.raises(mo.DeviceError, match="a module that is still there"):
            torch.ops.moesaic.experts(*args, number)

    def test_opcheck(self, tmp_path):
        p = Problem()
        x, weights = p.x.clone().requires_grad_(), p.weights.clone().requires_grad_()
        op, number = torch.ops.moesaic.experts.default, p.experts._weights.number
        torch.library.opcheck(op, (x, p.ids, weights, number))
        back = torch.ops.moesaic.experts_backward.default
        torch.library.opcheck(back, (p.x, p.x, p.ids, p.weights, number))
        mo.testing.write_moe_gguf(tmp_path / "m.gguf")
        block = MoeBlock.from_gguf(tmp_path / "m.gguf", 0)
        layer = torch.ops.moesaic.moe_layer.default
        torch.library.opcheck(layer, (torch.ones(2, 256), block._weights.number))


class TestBlock:
    def test_is_the_layer(self, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", shared_intermediate=64, arch="qwen2moe")
        layer = mo.MoeLayer.from_gguf(tmp_path / "m.gguf", 0)
        x = random(2, 3, 256)
        block = MoeBlock(layer)
        assert torch.equal(block(x), torch.from_numpy(layer(x.numpy())))
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), block(x))
        assert "8 experts, top_k=2, hidden_size=256" in repr(block)
        assert block.nbytes == layer.stack.nbytes


class TestLinear:
    def test_is_the_product(self):
        linear = torch.nn.Linear(32, 24)
        ours = Linear.from_linear(linear)
        x = random(2, 5, 32)
        assert rel(ours(x), linear(x)) < 1e-5
        assert ours(x[0, 0]).shape == (24,) and ours(x[:0]).shape == (0, 5, 24)
        half = ours(x.bfloat16())
        assert half.dtype == torch.bfloat16 and rel(half.float(), linear(x)) < 1e-2

    def test_encoded(self):
        linear = torch.nn.Linear(256, 24, bias=False)
        ours = Linear.from_linear(linear, quant="Q8_0")
        decoded = torch.from_numpy(ours.matrix.dequantize())
        x = random(5, 256)
        with mo.tuning(precision="exact"):
            assert rel(ours(x), functional.linear(x, decoded)) < 1e-3
        assert repr(ours) == "Linear(in_features=256, out_features=24, Q8_0, 0.0 MiB)"
        assert (ours.in_features, ours.out_features, ours.nbytes) == (256, 24, 24 * 8 * 34)

    def test_gradients(self):
        linear = torch.nn.Linear(32, 24)
        ours = Linear.from_linear(linear)
        x = random(2, 5, 32).requires_grad_()
        ours(x).square().sum().backward()
        got = x.grad.clone()
        x.grad = None
        linear(x).square().sum().backward()
        assert rel(got, x.grad) < 1e-5

    def test_compilers(self):
        ours = Linear.from_linear(torch.nn.Linear(32, 24))
        x = random(5, 32)
        assert torch.equal(torch.compile(ours, backend="aot_eager", fullgraph=True)(x), ours(x))
        assert torch.equal(torch.export.export(ours, (x,)).module()(x), ours(x))
        op, number = torch.ops.moesaic.linear.default, ours._weights.number
        torch.library.opcheck(op, (x.clone().requires_grad_(), number))
        torch.library.opcheck(torch.ops.moesaic.linear_backward.default, (ours(x), number))

    def test_state(self, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", layers=2, gate_type="Q4_K")
        name = "blk.{}.ffn_gate_inp.weight"
        ours, other = (Linear.from_gguf(tmp_path / "m.gguf", name.format(i)) for i in (0, 1))
        x = random(3, 256)
        assert not torch.equal(other(x), ours(x))
        save_file(ours.state_dict(), tmp_path / "state.safetensors")
        other.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert torch.equal(other(x), ours(x))
        with pytest.raises(mo.UnsupportedError, match="weights made of arrays"):
            torch.save(Linear.from_linear(torch.nn.Linear(4, 2)).state_dict(), tmp_path / "s.pt")
        with pytest.raises(mo.FormatError, match="sizes"):
            other.load_state_dict(Linear.from_linear(torch.nn.Linear(4, 2)).state_dict())

    def test_what_does_not_fit(self):
        ours = Linear.from_linear(torch.nn.Linear(32, 24))
        with pytest.raises(mo.ShapeError):
            ours(random(5, 31))
        with pytest.raises(mo.DTypeError, match="Linear: matrix: expected a QuantMatrix"):
            Linear(random(4, 4))


class TestEmbedding:
    def test_rows(self, tmp_path):
        (weights,) = mo.testing.write_moe_gguf(tmp_path / "m.gguf")
        ours = Embedding.from_gguf(tmp_path / "m.gguf", "blk.0.ffn_gate_inp.weight")
        ids = torch.tensor([[0, 7, 3], [3, 3, 1]])
        assert torch.equal(ours(ids), torch.from_numpy(weights.router)[ids])
        half = Embedding.from_gguf(tmp_path / "m.gguf", "blk.0.ffn_gate_inp.weight", torch.bfloat16)
        assert torch.equal(half(ids), ours(ids).bfloat16())
        assert ours(ids[:0]).shape == (0, 3, 256)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids), ours(ids))
        op = torch.ops.moesaic.embedding.default
        torch.library.opcheck(op, (ids, ours._weights.number, torch.float32))
        other = copy.deepcopy(ours)
        other.load_state_dict(ours.state_dict())
        assert torch.equal(other(ids), ours(ids))
        assert repr(ours) == "Embedding(8, 256, F32, 0.0 MiB)"

    @pytest.mark.parametrize("bad", [8, -1])
    def test_ids_out_of_range(self, bad, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf")
        ours = Embedding.from_gguf(tmp_path / "m.gguf", "blk.0.ffn_gate_inp.weight")
        with pytest.raises(mo.ShapeError, match=f"ids: expected 0 to 7, got {bad}"):
            ours(torch.tensor([1, bad]))

    @pytest.mark.parametrize("name", ["nothing", "blk.0.ffn_gate_exps.weight"])
    def test_tensors_that_are_no_table(self, name, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf")
        with pytest.raises(mo.FormatError, match=r"a tensor \[rows, K\]"):
            Embedding.from_gguf(tmp_path / "m.gguf", name)


class TestModule:
    def test_says_what_it_is(self):
        text = repr(Problem("swiglu_oai").experts)
        assert text.startswith(f"Experts({E} experts, hidden_size={H}, intermediate_size={I}, ")
        assert "gate F32, up F32, down F32, swiglu_oai, " in text

    def test_defaults(self):
        p, ungated = Problem(), Problem("gelu_tanh")
        assert Experts(p.experts.stack).activation == mo.Activation("swiglu")
        assert Experts(ungated.experts.stack).activation == mo.Activation("relu_squared")
        with pytest.raises(mo.DTypeError, match="Experts: stack: expected an ExpertStack"):
            Experts(p.x)

    def test_no_parameters(self):
        experts = Problem().experts
        assert list(experts.parameters()) == list(experts.buffers()) == []
        assert experts.to(torch.bfloat16).nbytes == 3 * E * H * I * 4

    def test_copies_share_the_weights(self):
        p = Problem()
        other = copy.deepcopy(Model(p.experts)).experts
        assert other is not p.experts and other._weights is p.experts._weights
        assert torch.equal(other(p.x, p.ids, p.weights), p.experts(p.x, p.ids, p.weights))

    def test_counts(self):
        p = Problem()
        p.experts(p.x, p.ids, p.weights)
        p.experts(p.x, p.ids, p.weights)
        assert p.experts.counts.tolist() == (2 * p.ids.flatten().bincount(minlength=E)).tolist()

    def test_threads_follow_torch(self):
        seen = []

        def watch() -> int | None:
            with threads_of_torch():
                return mo.current_tuning().threads

        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                seen.append(watch())
                with mo.tuning(block_size=32):
                    seen.append(watch())
                with mo.tuning(threads=1):
                    assert watch() == 1
        finally:
            torch.set_num_threads(before)
        assert seen == [1, 1, 2, 2]
        assert mo.current_tuning().threads is None

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and borrows threads on Linux")
    def test_threads_are_those_of_torch(self):
        script = """
import time
from pathlib import Path
import numpy as np, torch
import moesaic as mo
from moesaic.torch import Linear
torch.set_num_threads(2)
weight, x = torch.randn(512, 512), torch.randn(512, 512)
linear = Linear(mo.QuantMatrix.from_dense(weight.numpy()))
linear(x), x @ weight

def ticks():
    return {task.name: int((task / "stat").read_text().rsplit(")")[-1].split()[11])
            for task in Path("/proc/self/task").iterdir()}

before, end = ticks(), time.monotonic() + 1
while time.monotonic() < end:
    linear(x), x @ weight
print(sum(spent - before.get(task, 0) > 3 for task, spent in ticks().items()))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == 2  # with threads of both there would be three


class TestState:
    def test_from_files(self, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", layers=2)
        model = Model(Experts.from_gguf(tmp_path / "m.gguf", 0))
        x, ids, weights = random(3, 256), torch.tensor([[0, 5]] * 3), torch.full((3, 2), 0.5)
        want = model(x, ids, weights)
        state = model.state_dict()
        assert sorted(state) == ["experts._extra_state", "scale"]
        torch.save(state, tmp_path / "state.pt")
        save_file(state, tmp_path / "state.safetensors")
        for loaded in (
            torch.load(tmp_path / "state.pt", weights_only=True),
            load_file(tmp_path / "state.safetensors"),
        ):
            other = Model(Experts.from_gguf(tmp_path / "m.gguf", 1))
            assert not torch.equal(other(x, ids, weights), want)
            other.load_state_dict(loaded)
            assert torch.equal(other(x, ids, weights), want)
        torch.save(model, tmp_path / "model.pt")
        whole = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(whole(x, ids, weights), want)
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", layers=3)
        with pytest.raises(mo.FormatError, match="the file that was pickled"):
            other.load_state_dict(loaded)

    def test_of_a_block(self, tmp_path):
        mo.testing.write_moe_gguf(tmp_path / "m.gguf", layers=2)
        block = MoeBlock.from_gguf(tmp_path / "m.gguf", 1)
        save_file(block.state_dict(), tmp_path / "state.safetensors")
        other = MoeBlock.from_gguf(tmp_path / "m.gguf", 0)
        other.load_state_dict(load_file(tmp_path / "state.safetensors"))
        x = random(3, 256)
        assert torch.equal(other(x), block(x))

    def test_from_arrays(self, tmp_path):
        """Nothing that would come back without its experts is written."""
        p = Problem()
        model = Model(p.experts)
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(mo.UnsupportedError, match="weights made of arrays"):
            torch.save(state, tmp_path / "state.pt")
        with pytest.raises(mo.DTypeError, match="made of arrays"):
            torch.save(model, tmp_path / "model.pt")
        with pytest.raises(ValueError):
            save_file(state, tmp_path / "state.safetensors")
        other = Model(Problem("reglu").experts)
        other.load_state_dict(state)  # in one process there is nothing to lose
        assert other.experts._weights is p.experts._weights
        del state["experts._extra_state"]
        with pytest.raises(RuntimeError, match=r"Missing key.*experts\._extra_state"):
            other.load_state_dict(state)

    def test_other_entries(self, tmp_path):
        model, state = Model(Problem().experts), Model(Problem().experts).state_dict()
        small = mo.ExpertStack.from_dense_stacks(
            *(random(2, *s) for s in ((8, 16), (8, 16), (16, 8)))
        )
        for bad in (
            torch.zeros(3),
            torch.tensor([1, 2, 3], dtype=torch.uint8),
            torch.tensor(list(b"cos\nsystem\n(S'true'\ntR."), dtype=torch.uint8),
            torch.tensor(list(b"cmoesaic\ntesting.write_moe_gguf\n(S'x'\ntR."), dtype=torch.uint8),
            Experts(small).get_extra_state(),
        ):
            state["experts._extra_state"] = bad
            with pytest.raises((mo.FormatError, RuntimeError), match=r"load_state_dict|expected"):
                model.load_state_dict(state)


def test_import_order_and_names():
    """The subpackage has torch's name, and does not stand in its way."""
    code = (
        "import moesaic, sys; assert 'torch' not in sys.modules\n"
        "import moesaic.torch; import torch\n"
        "assert torch.__name__ == 'torch' and moesaic.torch.Experts and torch.Tensor"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
