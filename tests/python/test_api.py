"""The public names, and what the library says of itself."""

import contextlib
import importlib.metadata
import re

import moesaic as mo


def test_all_names_exist_and_say_where_they_are_from():
    assert sorted(mo.__all__) == sorted(set(mo.__all__))
    for name in mo.__all__:
        value = getattr(mo, name)
        if isinstance(value, type):
            assert value.__module__.startswith("moesaic") and "_core" not in value.__module__, name


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", mo.__version__)
    assert mo.build_info()["version"] in mo.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a build folder
        assert mo.__version__ == importlib.metadata.version("moesaic")


def test_repr_of_objects(layer):
    for value in (layer, layer.stack, layer.config, layer.config.router, layer.report,
                  mo.Workspace(64), mo.Tuning(), mo.backends()[0], mo.Profile()):  # fmt: skip
        assert repr(value).startswith("moesaic.")


def test_backends():
    names = [b.name for b in mo.backends()]
    assert names[0] == "cpu" and len(set(names)) == len(names)
    for backend in mo.backends():
        assert backend.available or backend.reason
    assert "cpu" in mo.backends()[0].devices
