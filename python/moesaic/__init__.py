"""moesaic: a mixture-of-experts layer engine.

Open the expert weights of one layer of a GGUF file, route tokens, run the experts, combine::

    import moesaic as mo
    with mo.GgufFile("model.gguf") as f, mo.MoeLayer.from_gguf(f, 0) as layer:
        y = layer(x)                      # x [T, H]: numpy, torch, anything with DLPack

Letters in shapes: T tokens, H hidden, I intermediate, E experts, P = T * top_k pairs.
"""

import logging as _logging
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from moesaic import testing
from moesaic._context import profile, tuning
from moesaic._core import (
    Activation,
    AlignedRouting,
    Array,
    BackendInfo,
    BucketPlan,
    CaptureError,
    ConfigEntry,
    ConfigError,
    DeviceError,
    DTypeError,
    Error,
    ExpertStack,
    FormatError,
    GgufFile,
    GgufTensor,
    KernelInfo,
    LoadReport,
    MarlinExpertStack,
    MarlinLinear,
    MoeConfig,
    MoeLayer,
    OperationCancelled,
    OutOfMemoryError,
    Profile,
    Progress,
    RoleReport,
    RouterConfig,
    Routing,
    ShapeError,
    Tuning,
    UnsupportedError,
    Workspace,
    WorkspaceError,
    ZoneTotal,
    align_block_size,
    asarray,
    backends,
    build_info,
    combine,
    current_tuning,
    gather_rows,
    known_architectures,
    moe_forward,
    moe_forward_bucketed,
    moe_forward_cpu,
    pick_block_size,
    route,
    silu_mul,
    weighted_sum,
)
from moesaic._report import ConfigTable, Facts, explain, show_config

try:
    __version__ = _version("moesaic")
except _PackageNotFoundError:  # run from a build folder
    __version__ = build_info()["version"]

_logging.getLogger("moesaic").addHandler(_logging.NullHandler())

__all__ = [
    "Activation",
    "AlignedRouting",
    "Array",
    "BackendInfo",
    "BucketPlan",
    "CaptureError",
    "ConfigEntry",
    "ConfigError",
    "ConfigTable",
    "DTypeError",
    "DeviceError",
    "Error",
    "ExpertStack",
    "Facts",
    "FormatError",
    "GgufFile",
    "GgufTensor",
    "KernelInfo",
    "LoadReport",
    "MarlinExpertStack",
    "MarlinLinear",
    "MoeConfig",
    "MoeLayer",
    "OperationCancelled",
    "OutOfMemoryError",
    "Profile",
    "Progress",
    "RoleReport",
    "RouterConfig",
    "Routing",
    "ShapeError",
    "Tuning",
    "UnsupportedError",
    "Workspace",
    "WorkspaceError",
    "ZoneTotal",
    "__version__",
    "align_block_size",
    "asarray",
    "backends",
    "build_info",
    "combine",
    "current_tuning",
    "explain",
    "gather_rows",
    "known_architectures",
    "moe_forward",
    "moe_forward_bucketed",
    "moe_forward_cpu",
    "pick_block_size",
    "profile",
    "route",
    "show_config",
    "silu_mul",
    "testing",
    "tuning",
    "weighted_sum",
]
