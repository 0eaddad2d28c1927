"""Other engines, run on the same weights, tokens and routing as ours."""

from __future__ import annotations

from .base import Peer, PeerUnavailable
from .ggml_peer import GgmlPeer
from .kt_peer import KtPeer
from .torch_peers import TorchBf16Peer, TorchInt4Peer

__all__ = ["PEERS", "Peer", "PeerUnavailable"]

#: Name on the command line -> class. A peer that is not installed says so when it is made.
PEERS: dict[str, type[Peer]] = {
    "ggml": GgmlPeer,
    "torch-bf16": TorchBf16Peer,
    "torch-int4": TorchInt4Peer,
    "kt": KtPeer,
}
