"""``moesaic convert --imatrix``: importances by tensor and expert, in both forms of file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from files import write_small
from values import expert_weights, normal

import moesaic as mo
from moesaic.cli import main

gguf = pytest.importorskip("gguf")
from converting import E, H, I, checkpoint  # noqa: E402
from imatrix_files import write_dat_form, write_gguf_form  # noqa: E402

FORMS = {"gguf": write_gguf_form, "dat": write_dat_form}
NUM, HIDDEN, INNER = 8, 256, 256


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "source.gguf"
    write_small(path, layers=2, gate_type="F16", down_type="F16", intermediate=INNER)
    return path


def measured(layers=(0, 1), experts=NUM, hidden=HIDDEN, inner=INNER, idle=(), parts=()):
    """Sums and tokens of every tensor of routed experts, with experts that met no token."""
    rng = np.random.default_rng(5)
    found = {}
    for layer in layers:
        for part, cols in parts or (("gate", hidden), ("up", hidden), ("down", inner)):
            tokens = rng.integers(1, 100, experts).astype(np.float32)
            tokens[list(idle)] = 0
            sums = rng.lognormal(0, 2, (experts, cols)) * tokens[:, None]
            found[f"blk.{layer}.ffn_{part}_exps.weight"] = (sums.astype(np.float32), tokens)
    return found


def convert(source, target, *options) -> int:
    return main(["convert", str(source), str(target), "--quiet", *map(str, options)])


def importance_of(sums, tokens, expert):
    """What llama.cpp's tools divide, too."""
    return sums[expert] / tokens[expert] if tokens[expert] else None


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_is_encoded_by_its_own_importances(source, tmp_path, form, capsys):
    data = measured()
    imatrix = FORMS[form](tmp_path / f"imatrix.{form}", data)
    target = tmp_path / "target.gguf"
    types = ("--experts", "Q3_K", "--down", "Q4_K", "--imatrix", imatrix)
    assert convert(source, target, *types) == 0
    assert f"{imatrix}: importances of 6 tensors" in capsys.readouterr().err
    plain = tmp_path / "plain.gguf"
    convert(source, plain, *types[:4])
    with mo.GgufFile(source) as old, mo.GgufFile(target) as new, mo.GgufFile(plain) as without:
        for name, (sums, tokens) in data.items():
            type = "Q4_K" if "down" in name else "Q3_K"
            values = mo.dequantize(old.tensors[name].data, "F16", old.tensors[name].shape)
            counts = np.stack([importance_of(sums, tokens, e) for e in range(NUM)])
            want = mo.quantize(values, type, weights=counts[:, None])
            got = np.array(new.tensors[name].data)
            # The older form has means times the calls, rounded: nearly the same bytes then.
            same = np.mean(got == want.reshape(-1))
            assert same == 1 if form == "gguf" else same > 0.99
            assert (got != without.tensors[name].data).mean() > 0.1
        assert new.metadata["quantize.imatrix.file"] == imatrix.name
        assert new.metadata["quantize.imatrix.entries_count"] == 6
        assert not any(key.startswith("quantize.imatrix") for key in without.metadata)


def test_importances_lower_the_weighted_error(source, tmp_path):
    data = measured()
    imatrix = write_gguf_form(tmp_path / "i.gguf", data)
    errors = []
    for options in ((), ("--imatrix", imatrix)):
        target = tmp_path / f"{len(options)}.gguf"
        convert(source, target, "--experts", "Q2_K", *options)
        with mo.GgufFile(source) as old, mo.GgufFile(target) as new:
            error = 0.0
            for name, (sums, tokens) in data.items():
                shape = old.tensors[name].shape
                want = mo.dequantize(old.tensors[name].data, "F16", shape)
                got = mo.dequantize(new.tensors[name].data, "Q2_K", shape)
                error += float((((got - want) ** 2) * (sums / tokens[:, None])[:, None]).sum())
        errors.append(error)
    assert errors[1] < 0.7 * errors[0]


def test_experts_without_tokens_are_encoded_as_without_importances(source, tmp_path, capsys):
    idle = (2, 5)
    imatrix = write_gguf_form(tmp_path / "i.gguf", measured(layers=(1,), idle=idle))
    target, plain = tmp_path / "target.gguf", tmp_path / "plain.gguf"
    assert convert(source, target, "--experts", "Q4_K", "--imatrix", imatrix, "--json") == 0
    said = json.loads(capsys.readouterr().out)["imatrix"]
    convert(source, plain, "--experts", "Q4_K")
    names = [f"blk.{layer}.ffn_{r}_exps.weight" for layer in (0, 1) for r in ("gate", "up", "down")]
    whole = list(range(NUM))
    assert said["uniform"] == {n: list(idle) if n.startswith("blk.1") else whole for n in names}
    assert (said["path"], said["tensors"], said["types_without"]) == (str(imatrix), 3, [])
    with mo.GgufFile(target) as new, mo.GgufFile(plain) as old:
        for name in names:
            got, want = (np.array(f.tensors[name].data).reshape(NUM, -1) for f in (new, old))
            alike = [bool((got[e] == want[e]).all()) for e in range(NUM)]
            assert alike == [name.startswith("blk.0") or e in idle for e in range(NUM)]
    assert convert(source, tmp_path / "t.gguf", "--experts", "Q4_K", "--imatrix", imatrix) == 0
    error = capsys.readouterr().err
    assert f"{names[3]}: no data for experts 2, 5: their columns count alike" in error


def test_rows_of_zeros_say_nothing(source, tmp_path, capsys):
    data = measured()
    data["blk.0.ffn_up_exps.weight"][0][3] = 0
    imatrix = write_dat_form(tmp_path / "i.dat", data, data=None)
    convert(source, tmp_path / "t.gguf", "--up", "Q4_K", "--imatrix", imatrix)
    assert "blk.0.ffn_up_exps.weight: no data for experts 3:" in capsys.readouterr().err


def test_types_without_use_for_importances(source, tmp_path, capsys):
    imatrix = write_gguf_form(tmp_path / "i.gguf", measured())
    options = ("--experts", "Q4_K", "--down", "Q8_0", "--imatrix", imatrix)
    assert convert(source, tmp_path / "t.gguf", *options) == 0
    assert "types that take no importances: Q8_0" in capsys.readouterr().err
    assert convert(source, tmp_path / "u.gguf", "--experts", "Q8_0", "--imatrix", imatrix) == 2
    assert "imatrix: expected a type that takes importances" in capsys.readouterr().err
    assert not (tmp_path / "u.gguf").exists()


def test_gate_and_up_in_one_tensor(tmp_path):
    """Both read the same activations, whichever of the names the file has."""
    source = tmp_path / "source.gguf"
    write_small(source, gate_type="F16", down_type="F16", fused_gate_up=True)
    written = []
    for part in ("gate_up", "gate", "up"):
        data = measured(layers=(0,), parts=((part, HIDDEN),))
        imatrix = write_gguf_form(tmp_path / f"{part}.gguf", data)
        target = tmp_path / f"from-{part}.gguf"
        assert convert(source, target, "--experts", "Q4_K", "--imatrix", imatrix) == 0
        with mo.GgufFile(target) as file:
            written.append(np.array(file.tensors["blk.0.ffn_gate_up_exps.weight"].data))
    for other in written[1:]:
        np.testing.assert_array_equal(written[0], other)


@pytest.mark.parametrize("stacked", [True, False], ids=["of all experts", "of one expert each"])
def test_one_tensor_per_expert(tmp_path, stacked):
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    for key, value in {
        "block_count": 1, "embedding_length": 256, "feed_forward_length": 256, "expert_count": 2,
        "expert_used_count": 1,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("blk.0.ffn_gate_inp.weight", normal(2, 256))
    for role in ("gate", "up", "down"):
        for expert in range(2):
            writer.add_tensor(f"blk.0.ffn_{role}.{expert}.weight", normal(256, 256, seed=expert))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = measured(layers=(0,), experts=2)
    stored = data if stacked else {
        name.replace("_exps", f".{e}"): (sums[e : e + 1], tokens[e : e + 1])
        for name, (sums, tokens) in data.items() for e in range(2)
    }  # fmt: skip
    imatrix = write_gguf_form(tmp_path / "i.gguf", stored)
    target = tmp_path / "target.gguf"
    assert convert(source, target, "--experts", "Q4_K", "--imatrix", imatrix) == 0
    with mo.GgufFile(target) as file:
        for expert in range(2):
            counts = importance_of(*data["blk.0.ffn_down_exps.weight"], expert)
            want = mo.quantize(normal(256, 256, seed=expert), "Q4_K", weights=counts)
            got = np.array(file.tensors[f"blk.0.ffn_down.{expert}.weight"].data)
            np.testing.assert_array_equal(got, want.reshape(-1))


def test_a_folder_as_the_source(tmp_path):
    """Its tensors go by the names that they get."""
    folder = tmp_path / "folder"
    folder.mkdir()
    checkpoint(folder)
    data = measured(layers=(1, 2), experts=E, hidden=H, inner=I, idle=(1,))
    imatrix = write_gguf_form(tmp_path / "i.gguf", data)
    target = tmp_path / "target.gguf"
    assert convert(folder, target, "--experts", "Q4_0", "--imatrix", imatrix) == 0
    with mo.GgufFile(target) as file:
        for layer in (1, 2):
            weights = zip(("gate", "up", "down"), expert_weights(E, H, I, seed=layer), strict=True)
            for role, matrices in weights:
                name = f"blk.{layer}.ffn_{role}_exps.weight"
                for expert in range(E):
                    counts = importance_of(*data[name], expert)
                    want = mo.quantize(matrices[expert], "Q4_0", weights=counts).reshape(-1)
                    got = np.array(file.tensors[name].data).reshape(E, -1)[expert]
                    np.testing.assert_array_equal(got, want)


def test_a_conversion_goes_on_with_the_same_file_alone(source, tmp_path, monkeypatch):
    from moesaic.saving.convert import Types, planned, run, write_plan

    monkeypatch.setattr(run, "RECORD_EVERY", 1)
    target = tmp_path / "target.gguf"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one = write_gguf_form(tmp_path / "a" / "imatrix.gguf", measured())
    other = write_gguf_form(tmp_path / "b" / "imatrix.gguf", measured(idle=(1,)))
    steps: list[mo.Progress] = []

    def progress(step: mo.Progress) -> bool:
        steps.append(step)
        return len(steps) < 20

    with planned(source, Types("Q4_K"), imatrix=one) as plan, pytest.raises(mo.OperationCancelled):
        write_plan(plan, target, progress=progress)
    for imatrix in (other, None):
        with (
            planned(source, Types("Q4_K"), imatrix=imatrix) as plan,
            pytest.raises(mo.ConfigError, match="the rest of the same conversion"),
        ):
            write_plan(plan, target, resume=True)
    with planned(source, Types("Q4_K"), imatrix=one) as plan:
        write_plan(plan, target, resume=True)
    whole = tmp_path / "whole.gguf"
    convert(source, whole, "--experts", "Q4_K", "--imatrix", one)
    assert target.read_bytes() == whole.read_bytes()


# --- files that do not fit


def other_rows(path):
    return write_gguf_form(path, measured(experts=NUM - 1))


def other_columns(path):
    return write_dat_form(path, measured(hidden=128))


def other_names(path):
    data = {name.replace("_exps", "_x"): rows for name, rows in measured().items()}
    return write_gguf_form(path, data)


def without_counts(path):
    return write_gguf_form(path, measured(), counts=False)


def bad_value(value):
    def write(path):
        data = measured()
        data["blk.1.ffn_up_exps.weight"][0][3, 7] = value
        return write_gguf_form(path, data)

    return write


def bad_count(path):
    data = measured()
    data["blk.1.ffn_up_exps.weight"][1][3] = -1
    return write_gguf_form(path, data)


def a_model(path):
    write_small(path)
    return path


def cut(path):
    write_dat_form(path, measured())
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def text(path):
    path.write_text("importance matrix? no: a text that is long enough to be read as numbers")
    return path


def empty(path):
    path.write_bytes(b"")
    return path


def no_entries(path):
    return write_dat_form(path, {}, data=None)


def negative_length(path):
    path.write_bytes(b"\1\0\0\0\xff\xff\xff\xff" * 4)
    return path


MISFITS = [
    (
        other_rows,
        r"blk\.0\.ffn_gate_exps\.weight: expected 8 x 256 values, got 1792 \(it may be of",
    ),
    (other_columns, r"blk\.0\.ffn_gate_exps\.weight: expected 8 x 256 values, got 1024"),
    (other_names, r"expected data of blk\.0\.ffn_gate_exps\.weight or of others.*got none of them"),
    (without_counts, r"blk\.0\.ffn_gate_exps\.weight\.counts': expected 8 numbers, got none"),
    (bad_value(np.nan), r"blk\.1\.ffn_up_exps\.weight\[3, 7\]: expected a finite number.*got nan"),
    (bad_value(-1.5), r"blk\.1\.ffn_up_exps\.weight\[3, 7\].*got -1\.5"),
    (bad_count, r"blk\.1\.ffn_up_exps\.weight\.counts': expected finite numbers, 0 or more"),
    (a_model, r"expected tensors NAME\.in_sum2 of an importance matrix, got none"),
    (cut, r"entry 5, 'blk\.1\.ffn_down_exps\.weight': expected 1 to \d+ values"),
    (text, "entry 0: expected the name of a tensor"),
    (empty, "number of entries: expected at most the 0 bytes to its end, got 4"),
    (no_entries, r"expected an importance matrix, as a GGUF file or \.dat, got 0 entries"),
    (negative_length, "entry 0: expected the name of a tensor.*got -1 bytes"),
]


@pytest.mark.parametrize(
    ("write", "message"), MISFITS, ids=lambda one: getattr(one, "__name__", "")
)
def test_a_file_that_does_not_fit_is_one_line(source, tmp_path, capsys, write, message):
    imatrix = write(tmp_path / "imatrix")
    target = tmp_path / "target.gguf"
    assert convert(source, target, "--experts", "Q4_K", "--imatrix", imatrix) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert str(imatrix) in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix"]


def test_names_of_a_file_are_shortened_and_escaped(source, tmp_path, capsys):
    name = b"\x1b[2J\n" + b"x" * 60000
    entry = struct.pack("<i", len(name)) + name + struct.pack("<iif", 1, 1, 1.0)
    imatrix = tmp_path / "i.dat"
    for data in (struct.pack("<i", 1) + entry, struct.pack("<i", 2) + entry + entry[:-4]):
        imatrix.write_bytes(data)
        assert convert(source, tmp_path / "t.gguf", "--up", "Q4_K", "--imatrix", imatrix) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and len(error) < 500 and "\x1b" not in error


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_give_errors_of_the_family_or_importances(form, tmp_path):
    from moesaic.saving.convert.imatrix import opened

    path = FORMS[form](tmp_path / "i", measured(layers=(0,), experts=2, hidden=32, inner=32))
    whole = path.read_bytes()
    rng = np.random.default_rng(6)
    ends = {"error": 0, "rows": 0}
    for _ in range(300):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, len(data), rng.integers(1, 5)):
            data[at if rng.random() < 0.5 else at % 400 % len(data)] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with opened(path) as importances:
                rows = importances.of("blk.0.ffn_up_exps.weight", "Q4_K", 2, 32)
                found = [row for row in map(rows, range(2)) if row is not None]
                assert all(row.shape == (32,) and (row >= 0).all() for row in found)
            ends["rows"] += 1
        except mo.Error as error:
            assert len(str(error)) < 500
            ends["error"] += 1
    assert min(ends.values()) > 10, ends


def test_a_file_that_is_not_there(source, tmp_path, capsys):
    options = ("--experts", "Q4_K", "--imatrix", tmp_path / "no")
    assert convert(source, tmp_path / "t.gguf", *options) == 2
    assert "No such file" in capsys.readouterr().err
    assert convert(source, tmp_path / "t.gguf", *options[:3], tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
