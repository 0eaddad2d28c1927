"""Experts in a torch module by hand, whose other parts are trained. Does nothing without torch.

The router, the attention and the embedding learn; the experts are quantised and frozen, and
gradients flow through them. The task is to say the word that came two before.
"""

import sys

try:
    import torch
    from torch import nn
except ImportError:
    print("torch is not installed: nothing to show")
    sys.exit(0)

import moesaic as mo
from moesaic.torch import Experts

WORDS, WIDTH, INNER, EXPERTS, TOP_K = 24, 64, 96, 8, 2


class MoE(nn.Module):
    """A router of torch before experts of moesaic."""

    def __init__(self, stack: mo.ExpertStack) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = Experts(stack)  # has no parameters: optimisers and to() pass it by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        y: torch.Tensor = self.experts(x, ids, weights / weights.sum(-1, keepdim=True))
        return y


class Model(nn.Module):
    """One block of a decoder."""

    def __init__(self, stack: mo.ExpertStack) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.moe = MoE(stack)
        self.out = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=later, need_weights=False)[0]
        y: torch.Tensor = self.out(x + self.moe(x))
        return y


torch.manual_seed(0)
stack = mo.ExpertStack.from_dense_stacks(
    torch.randn(EXPERTS, INNER, WIDTH) / 8,
    torch.randn(EXPERTS, INNER, WIDTH) / 8,
    torch.randn(EXPERTS, WIDTH, INNER) / 10,
    quant="Q8_0",
)
model = Model(stack)
print(model.moe)

optimiser = torch.optim.Adam(model.parameters(), 3e-3)
losses = []
for _ in range(150):
    ids = torch.randint(0, WORDS, (16, 12))
    logits = model(ids)
    loss = nn.functional.cross_entropy(logits[:, 2:].flatten(0, 1), ids[:, :-2].flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
assert losses[-1] < 0.5 * losses[0]
used = model.moe.experts.counts / model.moe.experts.counts.sum()
print("used:", ", ".join(f"{share:.0%}" for share in used))

# One operator, so that compilers take the module whole; copies share the weights.
model.eval()
ids = torch.randint(0, WORDS, (2, 12))
with torch.no_grad():
    compiled = torch.compile(model.moe, backend="eager", fullgraph=True)
    x = torch.randn(2, 12, WIDTH)
    torch.testing.assert_close(compiled(x), model.moe(x))

# The state of the model has what torch trained. Experts made of arrays are in no file, so that
# saving them would lose them, which is an error; those of a file are saved as a reference to it.
trained = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
print(f"{len(trained)} tensors to save, {model.moe.experts.nbytes / 1024:.0f} KiB of experts")
