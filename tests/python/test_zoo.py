"""Layers of a file with one layer per quantisation, against f64 outputs made elsewhere."""

import numpy as np
import pytest
from conftest import ZOO
from oracle import rel_l2
from values import poisoned

import moesaic as mo

REFERENCE, ONE_TOKEN, MANY = 1e-5, 2e-3, 2e-2


@pytest.fixture(scope="module")
def golden(zoo_path):
    with np.load(zoo_path.with_suffix(".npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def zoo(zoo_path):
    return mo.GgufFile(zoo_path)


def number_of_layers():
    if not ZOO.exists():
        return 1
    with np.load(ZOO.with_suffix(".npz")) as arrays:
        return len(arrays["types"])


@pytest.mark.parametrize("index", range(number_of_layers()))
@pytest.mark.parametrize("layout", ["auto", "file"])
def test_layer(zoo, golden, index, layout):
    x, logits, want = golden["x"], golden[f"logits{index}"], golden[f"y{index}"]
    layer = mo.MoeLayer.from_gguf(zoo, index, layout=layout)
    names = [zoo.tensors[f"blk.{index}.ffn_{r}_exps.weight"].quant for r in ("gate", "up", "down")]
    assert "/".join(names) == golden["types"][index]

    routing = mo.route(logits, layer.config.router)
    np.testing.assert_array_equal(routing.topk_ids, golden[f"ids{index}"])
    np.testing.assert_allclose(routing.topk_weights, golden[f"weights{index}"], atol=1e-6)
    assert rel_l2(mo.moe_forward_cpu(x, routing, layer), want) <= REFERENCE

    one_by_one = np.concatenate([layer(x[t : t + 1], logits[t : t + 1]) for t in range(len(x))])
    assert rel_l2(one_by_one, want) <= ONE_TOKEN
    assert rel_l2(layer(x, logits), want) <= MANY
    assert rel_l2(layer(x), want) <= MANY
    for gemm in ("bucketed", "aligned"):
        for row_space in ("token_pairs", "packed_rows"):
            out = poisoned(*x.shape)
            mo.moe_forward_bucketed(x, logits, layer, gemm=gemm, row_space=row_space, out=out)
            assert rel_l2(out, want) <= MANY, (gemm, row_space)


def test_all_layers_are_tested(zoo, golden):
    assert zoo.moe_layers == list(range(len(golden["types"])))


CONVERTED = sorted(path for path in ZOO.parent.glob("zoo-*.npz") if "layer" in np.load(path).files)


@pytest.mark.skipif(not CONVERTED, reason="no files of real converters")
@pytest.mark.parametrize("path", CONVERTED, ids=lambda path: path.stem)
def test_files_of_real_converters(path):
    """Shapes with ones in front and keys as converters write them; outputs by the models' code."""
    with np.load(path) as arrays:
        want = dict(arrays)
    file = mo.GgufFile(path.with_suffix(".gguf"))
    layer = mo.MoeLayer.from_gguf(file, int(want["layer"]), precision="exact")
    y, routing = layer(want["x"], return_routing=True)
    np.testing.assert_array_equal(np.sort(routing.topk_ids), np.sort(want["ids"]))
    assert rel_l2(y, want["y"]) <= REFERENCE
    for index in file.moe_layers:
        mo.MoeLayer.from_gguf(file, index)
