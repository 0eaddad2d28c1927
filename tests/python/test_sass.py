"""Counting the machine code of kernels, on a loop made up here."""

import importlib
import sys
from pathlib import Path

import pytest

EMULATION = Path(__file__).parents[1] / "emulation"

SASS = """
\t\tFunction : _ZN13narrow_kernelI4int4Li1EEEv
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.128 [R30], desc[UR4][R2.64] ;
        /*0040*/                   SHF.R.U32.HI R20, RZ, 0x4, R5 ;
        /*0048*/                   HMMA.1688.F32.BF16 R12, R20, R24, RZ ;
        /*0050*/                   HMMA.16816.F32.BF16 R16, R20, R24, R16 ;
        /*0054*/                   MOV R40, 0x40004000 ;
        /*0058*/                   HMMA.16816.F32.BF16 R12, R40, R24, RZ ;
        /*0060*/                   LOP3.LUT R5, R11, 0xf000f, RZ, 0xc0, !PT ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   BRA 0x80 ;
\t\tFunction : _ZN11fill_kernelEv
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EMULATION))
    names = ("sass", "nvcc_gate")
    yield [importlib.import_module(name) for name in names]
    for name in names:
        sys.modules.pop(name, None)


def test_the_loop_that_multiplies_is_counted(modules):
    sass, _ = modules
    narrow, fill = sass.functions(SASS).values()
    assert sass.main_loop(fill) is None
    loop = sass.main_loop(narrow)
    # R11 is the last of the four registers that the load writes.
    # A fragment of R40 holds a constant, and minima take an m16n8k8: one multiplies weights.
    assert (loop.instructions, loop.hmma, loop.load_distance) == (10, 1, 7)
    at_once = SASS.replace("SHF.R.U32.HI R20, RZ, 0x4, R5", "HMMA.16816.F32 R20, R7, R24, R16")
    assert sass.main_loop(sass.functions(at_once).popitem()[1]) is None
    used = next(iter(sass.functions(at_once).values()))
    # Fragments are four registers: R7 .. R10 are read.
    assert sass.main_loop(used).load_distance == 2


def test_bounds_only_get_better(modules, tmp_path):
    sass, gate = modules
    table = tmp_path / "loops.tsv"
    first = {"int4 narrow 1": sass.Loop(40, 4, 20), "int4 wide 1": sass.Loop(70, 10, None)}
    gate.write_bounds(table, gate.bounds_with({}, first))
    bounds = gate.read_bounds(table)
    assert bounds == {"int4 narrow 1": (10.0, 20), "int4 wide 1": (7.0, 0)}
    assert gate.loop_complaints(bounds, first) == []
    worse = {"int4 narrow 1": sass.Loop(41, 4, 19)}
    assert len(gate.loop_complaints(bounds, worse)) == 3  # of two numbers, and a loop that is gone
    assert gate.bounds_with(bounds, worse) == {"int4 narrow 1": (10.0, 20)}
    better = {"int4 narrow 1": sass.Loop(38, 4, 21), "q4_k narrow 1": sass.Loop(50, 4, 3)}
    expected = {"int4 narrow 1": (9.5, 21), "q4_k narrow 1": (12.5, 3)}
    assert gate.bounds_with(bounds, better) == expected


def test_the_table_in_the_tree_is_read(modules):
    _, gate = modules
    bounds = gate.read_bounds(EMULATION / "loops.tsv")
    # A unit of two row blocks multiplies 8 times for 8 tokens, 64 times for 64. The K types may
    # take so much more than INT4.
    for name, more in (("int4", 1.0), ("q4_k", 1.25), ("q6_k", 1.5)):
        assert bounds[f"{name} narrow 1"][0] <= more * 150 / 8
        assert bounds[f"{name} wide 1"][0] <= more * 480 / 64
