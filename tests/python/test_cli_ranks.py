"""The commands of expert parallelism, without ranks."""

import json

import numpy as np
import pytest
from files import write_small

import moesaic as mo
from moesaic.cli import main
from moesaic.distributed import Placement


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "m.gguf"
    write_small(path, num_experts=8, layers=2)
    return path


def printed(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def test_plan(path, tmp_path, capsys):
    profile = mo.ExpertProfile.from_counts(np.array([np.arange(8), np.arange(8)[::-1] ** 2]))
    profile.save(tmp_path / "profile.npz")
    common = ["plan-ep", path, "--ranks", 2, "--profile", tmp_path / "profile.npz"]
    status, out = printed(
        capsys,
        *common,
        "--slots",
        5,
        "--save",
        tmp_path / "plan.npz",
        "--net",
        "1e-5,1e9",
        "--json",
    )
    assert status == 0, out.err
    facts = json.loads(out.out)["layers"]
    plan = Placement.load(tmp_path / "plan.npz")
    assert plan.layers == (0, 1)
    assert [one["copies"] for one in facts] == [10, 10]
    with mo.GgufFile(path) as file:
        stored = sum(
            t.nbytes for name, t in file.tensors.items() if "blk.0" in name and "exps" in name
        )
    assert facts[0]["rank_bytes"] == 5 * (stored // 8)
    assert all(one["seconds"] > 0 for one in facts)
    status, out = printed(capsys, *common, "--slots", 5, "--previous", tmp_path / "plan.npz")
    assert status == 0
    assert "moved" in out.out and out.out.count(" 10 ") >= 2


def test_memory_says_how_many_slots(path, capsys):
    with mo.GgufFile(path) as file:
        experts = sum(t.nbytes for name, t in file.tensors.items() if "exps" in name) // 8
    for slots, status in ((4, 0), (3, 2)):
        got, out = printed(
            capsys, "plan-ep", path, "--ranks", 2, "--memory-per-rank", slots * experts, "--json"
        )
        assert got == status
        if status == 0:
            assert {one["most"] for one in json.loads(out.out)["layers"]} == {4}
        else:
            assert "slots" in out.err


def test_simulate(tmp_path, capsys):
    small = ["--experts", 16, "--top-k", 2, "--ranks", "2,8", "--tokens", 4, "--steps", 2]
    status, out = printed(capsys, "simulate-ep", *small, "--json")
    assert status == 0, out.err
    two, eight = json.loads(out.out)
    assert (two["ranks"], eight["ranks"]) == (2, 8)
    assert two["touched"] >= eight["touched"]
    assert two["seconds"] == pytest.approx(two["dispatch_s"] + two["experts_s"] + two["combine_s"])
    status, out = printed(capsys, "simulate-ep", *small, "--combine", "partial")
    assert status == 0 and "busiest rank" in out.out

    from moesaic.simulate import zipf

    zipf(steps=3, num_experts=16, top_k=2, layers=1, tokens=4, seed=0).save(tmp_path / "t.npz")
    status, out = printed(
        capsys, "simulate-ep", "--trace", tmp_path / "t.npz", "--ranks", 4, "--json"
    )
    assert status == 0, out.err
    assert json.loads(out.out)[0]["ranks"] == 4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["simulate-ep", "--net", "fast"], "seconds and bytes"),
        (["simulate-ep", "--net", "1,0"], "seconds and bytes"),
        (["plan-ep", "m.gguf"], "--ranks"),
    ],
)
def test_bad_options(arguments, match, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert match in capsys.readouterr().err


def test_other_refusals(path, tmp_path, capsys):
    status, out = printed(capsys, "simulate-ep", "--experts", 4, "--top-k", 5)
    assert status == 2 and "--top-k" in out.err
    mo.ExpertProfile.from_counts(np.ones((1, 4), np.int64)).save(tmp_path / "p.npz")
    status, out = printed(capsys, "plan-ep", path, "--ranks", 2, "--profile", tmp_path / "p.npz")
    assert status == 2 and "--profile" in out.err
    status, out = printed(capsys, "check-ep", path)
    assert status == 2 and ("torch" in out.err or "ranks" in out.err)
