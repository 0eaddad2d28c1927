"""moesaic: a mixture-of-experts layer engine.

It opens the expert weights of one layer, routes tokens, runs their experts, and sums up.

Arrays are numpy's, torch's, or anything else with the buffer protocol or ``__dlpack__``; a result
is the kind of array that went in. Every error is a ``moesaic.Error``.

Letters in shapes: T tokens, H hidden size, I intermediate size, E experts, P = T * top_k pairs. A
pair is ``t * top_k + slot``.

Examples
--------
>>> import moesaic as mo, numpy as np
>>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
>>> x = np.ones((3, 256), np.float32)  # [T, H]
>>> with mo.GgufFile("model.gguf") as f, mo.MoeLayer.from_gguf(f, 0) as layer:
...     y = layer(x)
>>> y.shape
(3, 256)
"""

import logging as _logging
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from moesaic import testing
from moesaic._compare import Comparison, compare
from moesaic._context import profile, tuning
from moesaic._core import (
    Activation,
    AlignedRouting,
    ArgumentError,
    Array,
    BackendInfo,
    BucketPlan,
    CaptureError,
    ConfigEntry,
    ConfigError,
    DeviceError,
    DTypeError,
    Error,
    ExpertPool,
    ExpertRole,
    ExpertStack,
    ExpertUsage,
    FormatError,
    GgufFile,
    GgufTensor,
    KernelInfo,
    LayerMoeWeights,
    LoadReport,
    MarlinExpertStack,
    MarlinLinear,
    MoeConfig,
    MoeExpertStore,
    MoeLayer,
    OperationCancelled,
    OutOfMemoryError,
    PoolStats,
    Profile,
    Progress,
    QuantMatrix,
    RefreshPolicy,
    RefreshResult,
    RoleReport,
    RouterConfig,
    Routing,
    ShapeError,
    SharedExperts,
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
    dequantize,
    gather_rows,
    known_architectures,
    layer_kinds,
    merged_resident_mask,
    moe_forward,
    moe_forward_bucketed,
    moe_forward_cpu,
    pick_block_size,
    quantize,
    route,
    silu_mul,
    target_from_counts,
    trim,
    weighted_sum,
)
from moesaic._core import version as _core_version
from moesaic._offload_store import OffloadStore, open_store
from moesaic._report import ConfigTable, Facts, Table, architecture_table, explain, show_config
from moesaic.offload import ExpertProfile, MoeExecMode
from moesaic.offload import MoEExecMode as MoEExecMode
from moesaic.saving import save_safetensors, write_gguf

try:
    __version__ = _version("moesaic")
except _PackageNotFoundError:  # run from a build folder
    __version__ = _core_version

_logging.getLogger("moesaic").addHandler(_logging.NullHandler())

__all__ = [
    "Activation",
    "AlignedRouting",
    "ArgumentError",
    "Array",
    "BackendInfo",
    "BucketPlan",
    "CaptureError",
    "Comparison",
    "ConfigEntry",
    "ConfigError",
    "ConfigTable",
    "DTypeError",
    "DeviceError",
    "Error",
    "ExpertPool",
    "ExpertProfile",
    "ExpertRole",
    "ExpertStack",
    "ExpertUsage",
    "Facts",
    "FormatError",
    "GgufFile",
    "GgufTensor",
    "KernelInfo",
    "LayerMoeWeights",
    "LoadReport",
    "MarlinExpertStack",
    "MarlinLinear",
    "MoeConfig",
    "MoeExecMode",
    "MoeExpertStore",
    "MoeLayer",
    "OffloadStore",
    "OperationCancelled",
    "OutOfMemoryError",
    "PoolStats",
    "Profile",
    "Progress",
    "QuantMatrix",
    "RefreshPolicy",
    "RefreshResult",
    "RoleReport",
    "RouterConfig",
    "Routing",
    "ShapeError",
    "SharedExperts",
    "Table",
    "Tuning",
    "UnsupportedError",
    "Workspace",
    "WorkspaceError",
    "ZoneTotal",
    "__version__",
    "align_block_size",
    "architecture_table",
    "asarray",
    "backends",
    "build_info",
    "combine",
    "compare",
    "current_tuning",
    "dequantize",
    "explain",
    "gather_rows",
    "known_architectures",
    "layer_kinds",
    "merged_resident_mask",
    "moe_forward",
    "moe_forward_bucketed",
    "moe_forward_cpu",
    "open_store",
    "pick_block_size",
    "profile",
    "quantize",
    "route",
    "save_safetensors",
    "show_config",
    "silu_mul",
    "target_from_counts",
    "testing",
    "trim",
    "tuning",
    "weighted_sum",
    "write_gguf",
]
