"""What these tests need; skipped, with the reason, where it is missing."""

import pytest


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_installed(name):
    pytest.importorskip(name)
