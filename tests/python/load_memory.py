"""How much memory a load needs beside its result."""

import subprocess
import sys
from pathlib import Path

MEASURE = """
import sys
import moesaic as mo
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
with mo.tuning(threads=1):
    mo.ExpertStack.load_from_safetensors(sys.argv[2], 0)   # code, buffers, imports
    before = peak()
    stack = mo.ExpertStack.load_from_safetensors(sys.argv[1], 0)
print((peak() - before) / stack.nbytes)
"""


def peak_of_load(large: Path, small: Path) -> float:
    """The memory at the peak of loading layer 0 of ``large``, in sizes of the stack it gives.

    In a process of its own, where loading ``small`` has brought in what every load needs. Reads
    ``/proc``, so Linux only.
    """
    command = [sys.executable, "-c", MEASURE, str(large), str(small)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
