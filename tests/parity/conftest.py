"""Our layers beside those of transformers."""

import importlib.util
from pathlib import Path

import pytest

MISSING = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
# Without them test_requirements.py is left, which says so.
collect_ignore_glob = ["test_[!r]*.py"] if MISSING else []


def pytest_configure(config):
    config.addinivalue_line("markers", "parity: compares with the modules of transformers")
    for category in ("DeprecationWarning", "FutureWarning", "UserWarning"):  # of others
        config.addinivalue_line("filterwarnings", f"ignore::{category}")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.parity)
