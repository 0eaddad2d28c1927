"""Every layer comes apart and together again: the same bits, from public names alone."""

import numpy as np
import pytest
from conftest import ZOO
from files import write_small
from int4 import Checkpoint
from rebuild import ROLES, assert_same_bits, rebuilt, rebuilt_stack
from test_models_agree import LAYER, PAIRS, hf_config, readable, specs, write_gguf
from values import expert_weights, normal

import moesaic as mo

H, I, E, K = 32, 64, 6, 2
FILES = sorted(ZOO.parent.glob("zoo-*.gguf"))


@pytest.mark.skipif(not FILES, reason="no zoo files")
@pytest.mark.parametrize("layout", ["auto", "file"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_zoo(path, layout):
    file = mo.GgufFile(path)
    assert file.moe_layers
    for index in file.moe_layers:
        layer = mo.MoeLayer.from_gguf(file, index, layout=layout)
        for role in ROLES:
            tensor = file.tensors.get(f"blk.{index}.ffn_{role}_exps.weight")
            if tensor is None:
                continue
            assert layer.stack.quants[role] == tensor.quant
            stored = np.asarray(tensor.data).view(np.uint8).ravel()
            np.testing.assert_array_equal(layer.stack.encoded(role).ravel(), stored, role)
        assert_same_bits(layer, rebuilt(layer, layout))


@pytest.mark.parametrize("pair", [p for p in PAIRS if readable(p)], ids="-".join)
def test_every_architecture(pair, tmp_path):
    rng = np.random.default_rng(3)
    for number, spec in enumerate(specs(*pair)):
        path = tmp_path / f"{number}.gguf"
        write_gguf(
            path, *pair, spec, hf_config(pair[1], spec)[1],
            values=lambda shape: rng.standard_normal(shape) / np.sqrt(shape[-1]),
        )  # fmt: skip
        layer = mo.MoeLayer.from_gguf(path, LAYER)
        assert_same_bits(layer, rebuilt(layer))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_fused_and_quantised_file(tmp_path, fused, layout):
    file = write_small(tmp_path / "m.gguf", fused_gate_up=fused)
    layer = mo.MoeLayer.from_gguf(file.path, 0, layout=layout)
    for role in ROLES:
        want = getattr(file.weights[0], role)
        np.testing.assert_array_equal(layer.stack.dequantize(role), want)
        encoded = layer.stack.encoded(role)
        assert encoded.dtype == np.uint8 and encoded.shape[:2] == want.shape[:2]
        decoded = mo.testing.dequantize(encoded, layer.stack.quants[role], want.shape)
        np.testing.assert_array_equal(decoded, want)
    assert_same_bits(layer, rebuilt(layer, layout))


def epilogues(hidden=H, inter=I, experts=E):
    biases = {r: normal(experts, hidden if r == "down" else inter, seed=i, scale=0.3)
              for i, r in enumerate(ROLES)}  # fmt: skip
    return biases, {r: 1 + normal(experts, seed=7 + i, scale=0.3) for i, r in enumerate(ROLES)}


def made_layers():
    """What no file of the suite holds: biases with scales, identity experts, all parts at once."""
    biases, scales = epilogues()
    stack = mo.ExpertStack.from_dense_stacks(*expert_weights(E, H, I), biases=biases, scales=scales)
    few = mo.ExpertStack.from_dense_stacks(*expert_weights(E, H, I), scales={"up": scales["up"]})
    yield "biases", mo.MoeLayer(stack, mo.MoeConfig(H, I, E, K), normal(E, H))
    yield "one scale", mo.MoeLayer(few, mo.MoeConfig(H, I, E, K), normal(E, H), precision="fast")
    yield "no router", mo.MoeLayer(stack, mo.MoeConfig(H, I, E, K))
    quantised = [(mo.testing.quantize(w, "Q8_0"), "Q8_0") for w in expert_weights(E, H, I)]
    router = mo.RouterConfig(
        E + 3,
        K,
        identity_experts=3,
        router_bias=normal(E + 3),
        selection_bias=normal(E + 3, seed=1),
    )
    shared = mo.ExpertStack.from_encoded(
        *((mo.testing.quantize(w, "Q8_0"), "Q8_0") for w in expert_weights(1, H, 32, seed=5)),
        scales={"down": np.array([0.7], np.float32)},
    )
    config = mo.MoeConfig(
        H, I, E, K, router=router, shared="sigmoid_gated", shared_intermediate_size=32,
        shared_scale=2.5, input_norm=True, router_input="norm",
    )  # fmt: skip
    yield "identity, shared, norms", mo.MoeLayer(
        mo.ExpertStack.from_encoded(*quantised, biases=biases), config, normal(E + 3, H),
        shared=shared, shared_gate=normal(H), input_norm=1 + normal(H, scale=0.1),
        router_norm=1 + normal(H, scale=0.1, seed=1),
    )  # fmt: skip
    narrow = mo.ExpertStack.from_dense_stacks(*expert_weights(E, 16, I))
    config = mo.MoeConfig(H, I, E, K, latent_size=16, latent_norm=True)
    yield (
        "latent",
        mo.MoeLayer(
            narrow,
            config,
            normal(E, H),
            latent=(normal(16, H), normal(H, 16)),
            latent_norm=normal(16),
        ),
    )
    table = (np.arange(14).reshape(7, 2) * 5 % E).astype(np.int32)
    config = mo.MoeConfig(H, I, E, K, router=mo.RouterConfig(E, K, select_on="given"), vocab_size=7)
    yield "table", mo.MoeLayer(stack, config, normal(E, H), token_experts=table)
    config = mo.MoeConfig(H, I, E, K, activation="relu_squared", router_input="separate")
    ungated = mo.ExpertStack.from_dense_stacks(None, *expert_weights(E, H, I)[1:])
    yield "ungated, separate", mo.MoeLayer(ungated, config, normal(E, H))


MADE = dict(made_layers())


@pytest.mark.parametrize("name", MADE)
def test_made_layers(name):
    assert_same_bits(MADE[name], rebuilt(MADE[name]))


@pytest.mark.parametrize("order", [None, "shared", "per_expert"])
def test_int4(order):
    stack = mo.ExpertStack.from_marlin(
        Checkpoint(4, 64, 128, 32, order=order, seed=1).stack(),
        Checkpoint(4, 64, 64, 32, order=order, seed=2).stack(),
        biases={"up": normal(4, 64)},
        scales={"down": np.array([1, 2, 3, 4], np.float32)},
    )
    layer = mo.MoeLayer(stack, mo.MoeConfig(64, 64, 4, 2), normal(4, 64))
    assert_same_bits(layer, rebuilt(layer))
    with pytest.raises(mo.UnsupportedError, match=r"marlin\(role\)"):
        stack.encoded("up")


def test_biases_and_scales_mean_what_they_say():
    biases, scales = epilogues()
    arrays = expert_weights(E, H, I)
    stack = mo.ExpertStack.from_dense_stacks(*arrays, biases=biases, scales=scales)
    ids, x = np.array([4], np.int32), normal(H)
    want = arrays[1][4] @ x * scales["up"][4] + biases["up"][4]
    np.testing.assert_allclose(stack.gemv_up(x, ids)[0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stack.dequantize("up"), arrays[1] * scales["up"][:, None, None])
    for mine, given in ((stack.biases, biases), (stack.scales, scales)):
        assert set(mine) == set(ROLES)
        for role in ROLES:
            np.testing.assert_array_equal(mine[role], given[role])
            assert not mine[role].flags.writeable


def test_shared_scale_is_taken_up_once():
    layer = MADE["identity, shared, norms"]
    shared = layer.shared
    np.testing.assert_array_equal(shared.stack.scales["down"], np.float32(0.7) * np.float32(2.5))
    assert shared.scale == 2.5 and shared.gate.shape == (H,)
    # The stack alone brings the factor into the layer a second time.
    louder = layer.replace(shared=shared.stack, shared_gate=shared.gate)
    np.testing.assert_allclose(louder.shared.stack.scales["down"], 0.7 * 2.5 * 2.5, rtol=1e-6)


def test_parts_outlive_their_layer():
    stack = mo.ExpertStack.from_dense_stacks(*expert_weights(E, H, I))
    shared = mo.ExpertStack.from_dense_stacks(*expert_weights(1, H, I))
    config = mo.MoeConfig(H, I, E, K, shared="plain", shared_intermediate_size=I)
    layer = mo.MoeLayer(stack, config, normal(E, H), shared=shared)
    parts = layer.shared, layer.shared.stack, layer.router_weight
    layer.close()
    for name in ("shared", "latent", "norms", "token_experts", "router_weight", "stack"):
        with pytest.raises(mo.DeviceError, match="closed"):
            getattr(layer, name)
    del layer, config
    np.testing.assert_array_equal(parts[1].dequantize("up"), shared.dequantize("up"))
    np.testing.assert_array_equal(parts[2], normal(E, H))
    assert parts[0].gate is None


def test_what_constructors_refuse(dense):
    make = mo.ExpertStack.from_dense_stacks
    for parts, match in (
        ({"biases": {"up": normal(5, 24)}}, r"biases\['up'\]: expected \[5, 40\]"),
        ({"biases": {"down": normal(5, 40)}}, r"biases\['down'\]: expected \[5, 24\]"),
        ({"scales": {"gate": normal(4)}}, r"scales\['gate'\]: expected \[5\]"),
    ):
        with pytest.raises(mo.ShapeError, match=match):
            make(*dense, **parts)
    with pytest.raises(mo.ConfigError, match=r"gate \| up \| down"):
        make(*dense, biases={"side": normal(5, 40)})
    with pytest.raises(mo.DTypeError, match="biases: expected a dict"):
        make(*dense, biases=normal(5, 40))
    with pytest.raises(mo.ShapeError, match="gate: expected no bias and no scale"):
        make(None, *dense[1:], scales={"gate": normal(5)})
    up = mo.testing.quantize(dense[1], "F16")
    for role in (up, (up,), (up, "F16", (5, 40)), (up[0], "F16"), (up[:, :, :-1], "F16")):
        with pytest.raises(mo.Error, match="up: expected"):
            mo.ExpertStack.from_encoded(None, role, role)
    with pytest.raises(mo.ConfigError, match="beside a SharedExperts"):
        layer = MADE["identity, shared, norms"]
        layer.replace(shared=layer.shared, shared_gate=normal(H))
    stack = make(None, *dense[1:])
    with pytest.raises(mo.ShapeError, match="gate of ungated experts"):
        stack.encoded("gate")
    for expert in (5, -1):
        with pytest.raises(mo.ShapeError, match="expert: expected 0 to 4"):
            stack.dequantize("up", expert)


def test_rebuilt_stack_is_another(stack):
    again = rebuilt_stack(stack)
    assert again is not stack and again.quants == stack.quants and again.nbytes == stack.nbytes
