"""One layer over many processes, on the collectives of torch.distributed or MPI.

Each rank keeps some experts of a layer, and all of its router, shared experts and norms. It calls
the layer with its own tokens and gets their results; between the two, tokens travel to the experts
that they ask for and rows come back. torch and mpi4py are imported when they are used.

=================  ============================================================================
``placement``      which experts a rank keeps: ``Placement``
``planning``       which it should keep: ``plan_experts``
``groups``         the transports, ``TorchGroup`` and ``MpiComm``
``link``           a transport with an end: who failed, where, and no call after that
``messages``       what ranks send each other in a call, as bytes
``agreement``      what all ranks have in common, compared when they open a layer
``rounds``         a call: tokens out, rows back, summed where the tokens are from
``layer``          ``MoeLayer``
``estimate``       what a placement costs: loads, bytes, memory, time
=================  ============================================================================
"""

from moesaic.distributed.estimate import Estimate, Network, Shape, estimate
from moesaic.distributed.groups import Group, MpiComm, TorchGroup
from moesaic.distributed.layer import MoeLayer
from moesaic.distributed.link import RankError
from moesaic.distributed.placement import Placement
from moesaic.distributed.planning import plan_experts

__all__ = [
    "Estimate",
    "Group",
    "MoeLayer",
    "MpiComm",
    "Network",
    "Placement",
    "RankError",
    "Shape",
    "TorchGroup",
    "estimate",
    "plan_experts",
]
