"""Merge: make one expert of the two that are most alike, and compare that with dropping one.

Run with a file of yours, or without one to make a small file first.
"""

import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

import moesaic as mo

Matrix = npt.NDArray[np.float32]
ROLES: tuple[Literal["gate", "up", "down"], ...] = ("gate", "up", "down")


def most_alike(stack: mo.ExpertStack) -> tuple[int, int]:
    """The two experts whose matrices point most nearly the same way."""
    flat = np.concatenate(
        [stack.dequantize(role).reshape(stack.num_experts, -1) for role in stack.quants], axis=1
    )
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    likeness = flat @ flat.T - 2 * np.eye(len(flat))
    a, b = np.unravel_index(np.argmax(likeness), likeness.shape)
    print(f"experts {a} and {b} are most alike: cosine {likeness[a, b]:.2f}")
    return int(a), int(b)


def merge(layer: mo.MoeLayer, a: int, b: int, part_of_a: float) -> mo.MoeLayer:
    """The layer with the mean of experts ``a`` and ``b`` in place of both."""
    stack = layer.stack

    def mean(of_a: Matrix, of_b: Matrix) -> Matrix:
        return np.asarray(part_of_a * of_a + (1 - part_of_a) * of_b, np.float32)

    gate, up, down = (
        mean(stack.dequantize(role, a), stack.dequantize(role, b)) if role in stack.quants else None
        for role in ROLES
    )
    biases = {role: mean(bias[a], bias[b]) for role, bias in stack.biases.items()}
    # The mean is encoded in the types of the stack; all other experts keep their bytes.
    merged = stack.with_expert(a, gate=gate, up=up, down=down, biases=biases)
    others = [e for e in range(stack.num_experts) if e != b]
    return layer.replace(stack=merged).select_experts(others)


def main(layer: mo.MoeLayer) -> None:
    x = np.random.default_rng(0).standard_normal((256, layer.config.hidden_size), np.float32)
    whole, routing = layer(x, return_routing=True)
    usage = np.bincount(np.ravel(routing.topk_ids), minlength=layer.config.num_experts)
    a, b = most_alike(layer.stack)
    if usage[a] < usage[b]:
        a, b = b, a  # the router keeps the row of the busier one

    rest = [e for e in range(layer.config.num_experts) if e != b]
    merged = merge(layer, a, b, usage[a] / (usage[a] + usage[b]))
    for name, edited in (("dropped", layer.select_experts(rest)), ("merged", merged)):
        error = np.linalg.norm(edited(x) - whole) / np.linalg.norm(whole)
        print(f"{name}: {edited.stack.num_experts} experts, error {error:.1%}")


def small_layer(path: Path) -> mo.MoeLayer:
    """Random experts, of which number 5 is nearly number 2."""
    mo.testing.write_moe_gguf(path, num_experts=16, top_k=4, hidden=256, intermediate=256)
    layer = mo.MoeLayer.from_gguf(path, 0)
    rng = np.random.default_rng(1)
    near = []
    for role in ROLES:
        matrix = layer.stack.dequantize(role, 2)
        noise = rng.standard_normal(matrix.shape, np.float32)
        near.append((matrix + 0.3 * matrix.std() * noise).astype(np.float32))
    router = np.array(layer.router_weight)
    router[5] = router[2] + 0.3 * router[5]
    stack = layer.stack.with_expert(5, gate=near[0], up=near[1], down=near[2])
    return layer.replace(stack=stack, router_weight=router)


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) > 1:
        file = mo.GgufFile(sys.argv[1])
        main(mo.MoeLayer.from_gguf(file, file.moe_layers[0]))
    else:
        main(small_layer(Path(folder) / "small.gguf"))
