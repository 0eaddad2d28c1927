"""The device side of the Python face on an emulated GPU, where the build has one.

``EMULATED_GPU_FOLDER`` names the folder with the emulator's plug-in and an empty ``libcuda.so.1``
(target ``moesaic_cuda_emulated``). The arrays are those of a small package made up by the script.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("EMULATED_GPU_FOLDER")
pytestmark = pytest.mark.skipif(not FOLDER, reason="EMULATED_GPU_FOLDER is not set")


def test_the_whole_way():
    """In a process of its own, whose loader finds the empty driver library."""
    environment = os.environ | {
        "LD_LIBRARY_PATH": FOLDER,
        "MOESAIC_CUDA_PLUGIN": str(Path(FOLDER) / "libmoesaic_cuda_emulated.so"),
    }
    script = Path(__file__).with_name("emulated_gpu_script.py")
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
