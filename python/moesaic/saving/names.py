"""Names of the tensors of an MoE layer in a GGUF file, behind ``blk.N.``."""

import re

ROLES = ("gate", "up", "down")

ROUTER = "ffn_gate_inp.weight"
ROUTER_BIAS = "ffn_gate_inp.bias"
ROUTER_NORM = "ffn_gate_inp.scale"
SELECTION_BIAS = "exp_probs_b.bias"
TOKEN_EXPERTS = "ffn_gate_tid2eid.weight"
SHARED_ROUTER = "ffn_gate_inp_shexp.weight"

#: Stems of the projections down and up. Nemotron-H and Kimi K3 name the same ones differently.
_LATENT = {"kimi-k3": ("ffn_routed_down", "ffn_routed_up")}
LATENT_NORM = "ffn_routed_norm.weight"
_INPUT_NORM = {"arctic": "ffn_norm_exps.weight"}

# Router, experts (stacked, fused, or one tensor per expert), shared experts, projections of latent
# ones and norms of a block.
MOE_TENSOR = re.compile(
    r"blk\.(?P<layer>\d+)\."
    r"(?P<role>ffn_gate_inp(_shexp)?|ffn_gate_tid2eid|exp_probs_b(_vl)?"
    r"|ffn_(latent|routed)_(down|up|norm)|ffn_norm_exps|pre_ffw_norm_2"
    r"|ffn_(gate|up|gate_up|down)(_exps|_shexp|_chexps|(?=\.\d+\.)))"
    r"(\.\d+)?(\.(weight|bias|scale|input_scale))?$"
)
#: The weights of routed experts: of all in one tensor, or of one.
EXPERT_WEIGHTS = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|gate_up|down)(?:_exps|\.(?P<expert>\d+))\.weight"
)


def experts(part: str, kind: str = "weight") -> str:
    return f"ffn_{part}_exps.{kind}"


def shared(part: str, kind: str = "weight") -> str:
    return f"ffn_{part}_shexp.{kind}"


def latent(architecture: str) -> tuple[str, str]:
    return _LATENT.get(architecture, ("ffn_latent_down", "ffn_latent_up"))


def input_norm(architecture: str) -> str:
    return _INPUT_NORM.get(architecture, "pre_ffw_norm_2.weight")
