"""The script for the first hour on a Mac runs to its end elsewhere and says what was missing."""

import platform
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "mac_first_hour.sh"
pytestmark = [
    pytest.mark.skipif(platform.system() != "Linux", reason="on a Mac it takes an hour"),
    pytest.mark.skipif(not SCRIPT.exists(), reason="tests outside of the repository"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="cmake pastes the kernels into one text"),
]


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    report = tmp_path / "report"
    run = subprocess.run(["bash", SCRIPT, report], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    steps = dict(line.split(maxsplit=2)[1::-1] for line in run.stdout.splitlines()[:-2])
    assert steps.pop("facts") == "passed"
    assert steps.pop("kernel_text") == "passed"
    assert set(steps.values()) == {"MISSING"}, "no Mac, nothing built, and each is said"
    assert {"kernel_compile:", "build:", "contract_test:", "bench:"} <= set(steps)
    kernels = (report / "kernels.metal").read_text()
    assert kernels.count("kernel void") >= 12
    assert '#include "' not in kernels, "Apple's compiler finds no files of ours"
    assert 'metal"' not in kernels, "the text alone, without the C++ around it"
    with tarfile.open(f"{report}.tgz") as archive:
        assert "report/summary.txt" in archive.getnames()
