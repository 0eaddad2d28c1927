"""The wheel as a user gets it: installed, and run without a compiler."""

from __future__ import annotations

from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py")


def test_demo(run_installed) -> None:
    assert "within their bound" in run_installed("moesaic", "demo").stdout


def test_every_format(run_installed) -> None:
    assert " 0 failures" in run_installed("python", SMOKE).stdout


def test_import_is_quiet_and_light(run_installed) -> None:
    code = (
        "import sys, moesaic; "
        "print([m for m in ('torch', 'gguf', 'jax', 'matplotlib') if m in sys.modules])"
    )
    done = run_installed("python", "-W", "error", "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
