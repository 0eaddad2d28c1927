import logging
import os
import subprocess
import sys

import pytest

import moesaic as mo


def test_defaults():
    assert mo.Tuning().to_dict() == {
        "block_size": None, "large_m_block_size": None, "large_m_min_pairs": 1024, "gemm": "auto",
        "route": "auto", "row_space": "auto", "precision": "auto", "batch_invariant": False,
        "profile": "off", "strict": False, "threads": None, "numa": None, "cpu_isa": None,
        "backend": None, "cuda_plugin": None, "log": "warn", "poison": False,
    }  # fmt: skip


def test_values_round_trip():
    values = {
        "block_size": 32, "gemm": "aligned", "row_space": "packed_rows", "precision": "exact",
        "batch_invariant": True, "strict": True, "threads": 2, "numa": 4,
        "cpu_isa": "scalar", "backend": "cpu", "cuda_plugin": "/x/y.so", "log": "debug",
        "poison": True,
    }  # fmt: skip
    tuning = mo.Tuning(**values)
    assert {k: getattr(tuning, k) for k in values} == values
    assert mo.Tuning(**tuning.to_dict()) == tuning != mo.Tuning()
    assert eval(repr(tuning), {"moesaic": mo}) == tuning
    with pytest.raises(AttributeError):
        tuning.block_size = 8


def test_contexts_nest():
    before = mo.current_tuning()
    with mo.tuning(block_size=32, gemm="aligned") as outer:
        with mo.tuning(block_size=None):
            assert mo.current_tuning() == outer.replace(block_size=None)
            assert mo.current_tuning().gemm == "aligned"
        assert mo.current_tuning() == outer
    assert mo.current_tuning() == before
    with pytest.raises(KeyError), mo.tuning(strict=True):
        raise KeyError
    assert mo.current_tuning() == before


def test_from_env(caplog):
    tuning = mo.Tuning.from_env({"MOESAIC_BLOCK_SIZE": "8", "MOESAIC_STRICT": "on", "HOME": "/"})
    assert tuning == mo.Tuning(block_size=8, strict=True)
    with caplog.at_level(logging.WARNING, "moesaic"):
        mo.Tuning.from_env({"MOESAIC_BLOK_SIZE": "8"})
    assert "MOESAIC_BLOK_SIZE" in caplog.text and "MOESAIC_BLOCK_SIZE" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BLOCK_SIZE", "12"), ("BLOCK_SIZE", "x"), ("LARGE_M_MIN_PAIRS", "0"), ("GEMM", "1"),
        ("STRICT", "yes"), ("THREADS", "-1"), ("CPU_ISA", "sse"), ("PRECISION", "f32"),
    ],
)  # fmt: skip
def test_bad_environment(variable, value):
    with pytest.raises(mo.ConfigError) as raised:
        mo.Tuning.from_env({"MOESAIC_" + variable: value})
    assert "MOESAIC_" + variable in str(raised.value) and value in str(raised.value)


def test_show_config():
    with mo.tuning(block_size=32):
        entries = {e.knob: e for e in mo.show_config()}
    assert set(entries) == set(mo.Tuning().to_dict())
    assert (entries["block_size"].value, entries["block_size"].source) == ("32", "tuning")
    assert entries["block_size"].variable == "MOESAIC_BLOCK_SIZE"
    lines = str(mo.show_config()).splitlines()
    assert lines[0].split() == ["knob", "value", "source", "variable", "help"]
    assert [line.split()[0] for line in lines[2:]] == [entry.knob for entry in mo.show_config()]


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_process_environment():
    code = (
        "import logging, os; logging.basicConfig(); import moesaic as mo\n"
        "os.environ['MOESAIC_GEMM'] = 'aligned'\n"  # read at first use, not at import
        "print(mo.current_tuning().block_size, mo.current_tuning().gemm)\n"
        "os.environ['MOESAIC_GEMM'] = 'bucketed'\n"
        "print(mo.current_tuning().gemm)\n"
    )
    done = run(code, MOESAIC_BLOCK_SIZE="16", MOESAIC_BLOK="1")
    assert done.stdout.split() == ["16", "aligned", "aligned"], done.stderr
    assert done.stderr.count("MOESAIC_BLOK") == 1

    code = "import moesaic as mo\ntry: mo.current_tuning()\nexcept mo.ConfigError as e: print(e)"
    done = run(code, MOESAIC_GEMM="fast")
    assert "MOESAIC_GEMM" in done.stdout and done.stderr == ""
