"""GPTQ, AWQ and compressed-tensors checkpoints of one layer on disk."""

import json

import numpy as np
import pytest
from files import write_safetensors
from int4 import Checkpoint, layer_f64
from oracle import rel_l2
from values import normal, random_routing

import moesaic as mo

E, H, INTER, SIZE, LAYER = 4, 64, 32, 32, 3
QWEN = (
    f"model.layers.{LAYER}.mlp.experts",
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gate_up": "gate_up_proj"},
)
MIXTRAL = (
    f"model.layers.{LAYER}.block_sparse_moe.experts",
    {"gate": "w1", "up": "w3", "down": "w2"},
)


class Model:
    """The tensors of one layer by name, its config, and its matrices as Checkpoints."""

    def __init__(self, *, names=QWEN, fused=False, config=None, inter=INTER, group=SIZE, **recipe):
        self.gate_up = Checkpoint(E, H, 2 * inter, group, seed=1, **recipe)
        down_recipe = recipe | ({"order": "per_expert"} if recipe.get("order") else {})
        self.down = Checkpoint(E, inter, H, min(group, inter), seed=2, **down_recipe)
        assert group in (-1, self.down.group_size)
        form = self.gate_up.form
        self.config = {"bits": 4, "group_size": group}
        if form == "awq":
            self.config |= {"quant_method": "awq", "zero_point": True, "version": "gemm"}
        elif form == "pack_quantized":
            scheme = {
                "num_bits": 4,
                "type": "int",
                "symmetric": recipe.get("zeros") is False,
                "strategy": "channel" if group == -1 else "group",
                "group_size": None if group == -1 else group,
                "actorder": "group" if "order" in recipe else None,
            }
            self.config = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": scheme, "targets": ["Linear"]}},
            }
        else:
            self.config |= {
                "quant_method": "gptq",
                "desc_act": "order" in recipe,
                "sym": recipe.get("zeros") is False,
                "checkpoint_format": form,
            }
        self.config |= config or {}
        prefix, spelling = names
        halves = (
            {"gate_up": slice(None)}
            if fused
            else {"gate": slice(0, inter), "up": slice(inter, 2 * inter)}
        )
        self.tensors = {}
        for e in range(E):
            for part, cols in halves.items():
                self.put(f"{prefix}.{e}.{spelling[part]}", self.gate_up, e, cols)
            self.put(f"{prefix}.{e}.{spelling['down']}", self.down, e, slice(None))

    def put(self, name, c, e, cols):
        words = slice(None) if cols == slice(None) else slice(cols.start // 8, cols.stop // 8)
        qweight, scales, qzeros, g_idx = "qweight", "scales", "qzeros", "g_idx"
        if c.form == "pack_quantized":
            qweight, scales, qzeros, g_idx = (
                f"weight_{kind}" for kind in ("packed", "scale", "zero_point", "g_idx")
            )
            self.tensors[f"{name}.{qweight}"] = c.qweight[e][cols]
            self.tensors[f"{name}.{scales}"] = c.stored_scales[e][cols]
            self.tensors[f"{name}.{qzeros}"] = c.qzeros[e][words]
            shape = (len(range(c.N)[cols]), c.K)
            self.tensors[f"{name}.weight_shape"] = np.array(shape, np.int64)
        else:
            self.tensors[f"{name}.{qweight}"] = c.qweight[e][:, words if c.form == "awq" else cols]
            self.tensors[f"{name}.{scales}"] = c.scales[e][:, cols]
            self.tensors[f"{name}.{qzeros}"] = c.qzeros[e][:, words]
        if c.form.startswith("gptq") or c.g_idx is not None:
            plain = np.arange(c.K, dtype=np.int32) // (c.K if c.group_size == -1 else c.group_size)
            order = plain if c.g_idx is None else c.g_idx if c.g_idx.ndim == 1 else c.g_idx[e]
            self.tensors[f"{name}.{g_idx}"] = order

    def write(self, folder, *, shards=1, in_config=True, file="model.safetensors"):
        tensors = dict(self.tensors)
        # Other tensors of a model are no concern of the loader.
        tensors[f"model.layers.{LAYER}.mlp.gate.weight"] = np.zeros((E, H), np.float16)
        tensors["model.layers.13.mlp.experts.0.gate_proj.weight"] = np.zeros((2, 2), np.float16)
        if in_config:
            (folder / "config.json").write_text(
                json.dumps({"num_experts": E, "quantization_config": self.config})
            )
        else:
            (folder / "quantize_config.json").write_text(json.dumps(self.config))
        if shards == 1:
            write_safetensors(folder / file, tensors)
            return folder
        index = {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {n: t for k, (n, t) in enumerate(tensors.items()) if k % shards == i}
            write_safetensors(folder / shard, part)
            index |= dict.fromkeys(part, shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return folder

    def check(self, path, kind="marlin"):
        stack = mo.ExpertStack.load_from_safetensors(path, LAYER)
        assert (stack.num_experts, stack.hidden_size) == (E, H)
        assert stack.kind == kind
        for e in range(E):
            gate, up = np.split(self.gate_up.weights[e].T, 2)
            np.testing.assert_allclose(stack.dequantize("gate", e), gate, rtol=2e-7)
            np.testing.assert_allclose(stack.dequantize("up", e), up, rtol=2e-7)
            np.testing.assert_allclose(
                stack.dequantize("down", e), self.down.weights[e].T, rtol=2e-7
            )
        x, routing = normal(5, H), random_routing(5, E, 2)
        want = layer_f64(self.gate_up, self.down, routing, x)
        assert rel_l2(mo.moe_forward_cpu(x, routing, stack), want) < 1e-5
        return stack


def expect_format_error(model, folder, match, error="FormatError"):
    with pytest.raises(getattr(mo, error), match=match):
        mo.ExpertStack.load_from_safetensors(model.write(folder), LAYER)
