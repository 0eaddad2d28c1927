"""Checkpoints of Hugging Face models with something changed: names, counts, types, shapes, places,
headers, the index, config.json.

The seeds are the folders that the tests of tests/python write: every published layout that is
tested is fuzzed too. A change that only writes the same in another way must load with the same
results; one that takes something away must load with the same results or be refused; after any
other there is a layer or a `moesaic.Error`. Nothing takes long or needs memory that is not in the
files.
"""

import copy
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import ROOT, WORK, Board, Finding, Fuzzer

import moesaic as mo

TESTS = ["test_hf_*.py", "test_checkpoint_*.py", "test_safetensors*.py"]
PICKLE = WORK / "checkpoints.pickle"
#: Seeds above this size would spend their time on copying weights.
MOST_BYTES = 1 << 20
#: Processor time of one load.
MOST_SECONDS = 5.0
LAYERS = range(14)


@dataclass
class Folder:
    """What a checkpoint's folder holds."""

    headers: dict[str, dict[str, Any]] = field(default_factory=dict)  # of safetensors, by file
    data: dict[str, bytes] = field(default_factory=dict)  # behind the headers
    texts: dict[str, Any] = field(default_factory=dict)  # JSON files
    others: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Folder":
        folder = cls()
        for file in sorted(path.iterdir()):
            if not file.is_file():
                continue
            content = file.read_bytes()
            try:
                if file.suffix == ".safetensors":
                    length = int.from_bytes(content[:8], "little")
                    folder.headers[file.name] = json.loads(content[8 : 8 + length])
                    folder.data[file.name] = content[8 + length :]
                elif file.suffix == ".json":
                    folder.texts[file.name] = json.loads(content)
                else:
                    folder.others[file.name] = content
            except (ValueError, RecursionError):
                folder.others[file.name] = content
        return folder

    def write(self, path: Path) -> None:
        for name, header in self.headers.items():
            if name in self.others:
                continue
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text + self.data[name]
            (path / name).write_bytes(content)
        for name, value in self.texts.items():
            if name not in self.others:
                (path / name).write_text(json.dumps(value))
        for name, content in self.others.items():
            (path / name).write_bytes(content)

    def size(self) -> int:
        return sum(map(len, self.data.values())) + sum(map(len, self.others.values()))

    def tensors(self, layer: int | None = None) -> list[tuple[str, str]]:
        """(file, tensor) of all tensors, or of those of one layer."""
        return [
            (file, name)
            for file, header in self.headers.items()
            for name in header
            if name != "__metadata__" and (layer is None or f"layers.{layer}." in name)
        ]

    def holds_two_models(self) -> bool:
        """Where something is gone from one, the other may be loaded."""
        names = [name for _, name in self.tensors()]
        return len(names) != len(set(names))


@dataclass
class Seed:
    name: str
    folder: Folder
    layer: int
    results: dict[str, str]  # of the unchanged folder, by those of LOADS that work


LOADS: dict[str, Callable[[Path, int], Any]] = {
    "ExpertStack": mo.ExpertStack.load_from_safetensors,
    "MoeLayer": mo.MoeLayer.from_safetensors,
}


def results_of(stack: mo.ExpertStack) -> str:
    """A number for what all experts compute, bit by bit."""
    experts = stack.num_experts
    x = np.linspace(-1, 1, experts * stack.hidden_size, dtype=np.float32)
    routing = mo.Routing(np.arange(experts, dtype=np.int32)[:, None], np.ones((experts, 1), "f4"))
    activation = "swiglu" if "gate" in stack.quants else "relu_squared"
    y = mo.moe_forward_cpu(x.reshape(experts, -1), routing, stack, activation=activation)
    return hashlib.blake2b(y.tobytes(), digest_size=16).hexdigest()


def signature(folder: Folder) -> str:
    """What makes a layout: names without numbers, types, ranks, and the keys of the texts."""
    tensors = {
        (re.sub(r"\d+", "0", name), entry["dtype"], len(entry["shape"]))
        for header in folder.headers.values()
        for name, entry in header.items()
        if name != "__metadata__"
    }
    config = folder.texts.get("config.json", {})
    said = json.dumps([config.get("quantization_config"), config.get("model_type")])
    return repr((sorted(tensors), sorted(folder.headers), sorted(folder.texts), said))


def seed_of(path: Path, name: str) -> Seed | None:
    folder = Folder.read(path)
    if not folder.headers or folder.size() > MOST_BYTES:
        return None
    for layer in LAYERS:
        if not folder.tensors(layer):
            continue
        results = {}
        for load, function in LOADS.items():
            try:
                loaded = function(path, layer)
            except (mo.Error, OSError):
                continue
            results[load] = results_of(loaded if load == "ExpertStack" else loaded.stack)
        if results:
            return Seed(name, folder, layer, results)
    return None


def make_seeds() -> list[Seed]:
    """Run the tests and keep the folders that they leave behind and that load."""
    with tempfile.TemporaryDirectory() as made:
        tests = [str(p) for t in TESTS for p in sorted((ROOT / "tests" / "python").glob(t))]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-o", "tmp_path_retention_policy=all", "--basetemp", f"{made}/tests", *tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"the tests that make the seeds fail:\n{done.stdout[-3000:]}")
        seeds: dict[str, Seed] = {}
        for path in sorted({p.parent for p in Path(made).rglob("*.safetensors")}):
            seed = seed_of(path, str(path.relative_to(Path(made) / "tests")))
            if seed is not None:
                seeds.setdefault(signature(seed.folder), seed)
        return list(seeds.values())


# --- changes -----------------------------------------------------------------------------------


class Effect(Enum):
    NONE = "the same results"
    LESS = "the same results, or an error"
    ANY = "any results, or an error"


@dataclass
class Change:
    """The folder that is changed, and how."""

    random: np.random.Generator
    folder: Folder
    layer: int
    picked: list[Any] = field(default_factory=list)

    def pick(self, options) -> Any:
        options = list(options)
        if not options:
            raise Inapplicable
        self.picked.append(options[self.random.integers(len(options))])
        return self.picked[-1]

    def tensor(self) -> tuple[dict[str, Any], str]:
        """The header and the name of a tensor, most often of the layer."""
        own = self.random.random() < 0.9
        file, name = self.pick(self.folder.tensors(self.layer if own else None))
        return self.folder.headers[file], name

    def file(self) -> str:
        return self.pick(self.folder.headers)

    def number(self) -> Any:
        """What may stand where a number is expected."""
        if self.random.random() < 0.5:
            return int(self.random.integers(-2, 300))
        return self.pick(
            [0, -1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**30, 0.5, 1e300, float("nan"),
             float("inf"), True, None, "4", "", [], [4], {}, {"a": 1}, "\ud800"]
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        config = self.folder.texts.get("config.json")
        if not isinstance(config, dict):
            raise Inapplicable
        return config


class Inapplicable(Exception):
    """The folder lacks what the change is about."""


def reorder_header(c: Change) -> None:
    file = c.file()
    items = list(c.folder.headers[file].items())
    c.folder.headers[file] = dict(items[i] for i in c.random.permutation(len(items)))


def pad_header(c: Change) -> None:
    """Spaces behind the header, as writers align the data."""
    file = c.file()
    text = json.dumps(c.folder.headers[file]).encode() + b" " * int(c.random.integers(1, 300))
    c.folder.others[file] = len(text).to_bytes(8, "little") + text + c.folder.data[file]


def add_metadata(c: Change) -> None:
    c.folder.headers[c.file()]["__metadata__"] = {"format": "pt", "": "\u00e9"}


def add_another_layer(c: Change) -> None:
    header, name = c.folder.headers[c.file()], f"model.layers.{c.layer + 20}.mlp.x.weight"
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    index = c.folder.texts.get("model.safetensors.index.json")
    if index is not None:
        raise Inapplicable


def add_config_key(c: Change) -> None:
    value = c.number()
    c.config()["a_key_of_tomorrow"] = None if isinstance(value, str) else value


def move_data(c: Change) -> None:
    """The same tensors in another order behind the header."""
    file = c.file()
    header, data = c.folder.headers[file], c.folder.data[file]
    names = [n for n in header if n != "__metadata__"]
    out = bytearray()
    for i in c.random.permutation(len(names)):
        begin, end = header[names[i]]["data_offsets"]
        header[names[i]]["data_offsets"] = [len(out), len(out) + end - begin]
        out += data[begin:end]
    c.folder.data[file] = bytes(out)


def split(c: Change) -> None:
    """One file as shards with an index."""
    if list(c.folder.headers) != ["model.safetensors"]:
        raise Inapplicable
    header, data = c.folder.headers.pop("model.safetensors"), c.folder.data.pop("model.safetensors")
    count, where = int(c.random.integers(1, 5)), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        c.folder.headers[file], c.folder.data[file] = {}, b""
    files = list(c.folder.headers)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        file = c.pick(files)
        begin, end = entry["data_offsets"]
        at = len(c.folder.data[file])
        c.folder.data[file] += data[begin:end]
        c.folder.headers[file][name] = {**entry, "data_offsets": [at, at + end - begin]}
        where[name] = file
    c.folder.texts["model.safetensors.index.json"] = {"metadata": {}, "weight_map": where}


def drop_tensor(c: Change) -> None:
    header, name = c.tensor()
    if "bias" in name:
        raise Inapplicable  # nothing says that there must be one
    del header[name]


def rename_tensor(c: Change) -> None:
    header, name = c.tensor()
    if "bias" in name:
        raise Inapplicable
    numbers = [m.span() for m in re.finditer(r"\d+", name)]
    begin, end = c.pick([*numbers, (0, 0), (len(name), len(name))])
    new = c.pick(["", "0", "7", "-1", "1000000", "9" * 30, "x", ".", ".weight", "\u0663"])
    header[name[:begin] + new + name[end:]] = header.pop(name)


def add_expert(c: Change) -> None:
    """A name that claims more experts than there are."""
    header, name = c.tensor()
    number = c.pick([3, 7, 100, 10**6, 2**31, 10**25])
    new, found = re.subn(r"experts\.\d+", f"experts.{number}", name)
    if not found or new in header:
        raise Inapplicable
    header[new] = copy.deepcopy(header[name])


def truncate(c: Change) -> None:
    file = c.file()
    c.folder.data[file] = c.folder.data[file][: c.random.integers(len(c.folder.data[file]) + 1)]


def drop_file(c: Change) -> None:
    file = c.pick([*c.folder.headers, *(n for n in c.folder.texts if "index" in n)])
    c.folder.headers.pop(file, None)
    c.folder.data.pop(file, None)
    c.folder.texts.pop(file, None)


def change_count(c: Change) -> None:
    """Another number of experts, of layers, another size."""
    config = c.config()
    keys = [k for k, v in config.items() if type(v) is int]
    config[c.pick(keys)] = c.number()


def change_dimension(c: Change) -> None:
    header, name = c.tensor()
    shape = header[name]["shape"]
    if "bias" in name or not shape:
        raise Inapplicable
    shape[c.random.integers(len(shape))] = c.number()


def change_place(c: Change) -> None:
    header, name = c.tensor()
    header[name]["data_offsets"][c.random.integers(2)] = c.number()


def change_index(c: Change) -> None:
    index = c.folder.texts.get("model.safetensors.index.json")
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise Inapplicable
    where = index["weight_map"]
    name = c.pick(n for n in where if "bias" not in n)
    value = c.pick([*c.folder.headers, None, "", "..", "../x", "config.json", 3, "no.safetensors"])
    if value is None:
        del where[name]
    else:
        where[name] = value


def swap_tensors(c: Change) -> None:
    header, name = c.tensor()
    other = c.pick(n for n in header if n != "__metadata__")
    header[name], header[other] = header[other], header[name]


def change_type(c: Change) -> None:
    header, name = c.tensor()
    known = [
        *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I32", "U32", "I16"),
        *("U16", "I8", "U8", "BOOL", "F4", "", "f32", "\u00e9"),
    ]
    header[name]["dtype"] = c.pick([*known, 3, None, ["F32"]])


def change_shape(c: Change) -> None:
    """As many elements, otherwise arranged."""
    header, name = c.tensor()
    shape = header[name]["shape"]
    total = int(np.prod(shape, dtype=object))
    header[name]["shape"] = c.pick(
        [shape[::-1], [total], [1, *shape], [*shape, 1], [total, 1], [1] * 70 + [total], total]
    )


def change_header_bytes(c: Change) -> None:
    file = c.file()
    text = bytearray(json.dumps(c.folder.headers[file]).encode())
    for at in c.random.integers(0, len(text), c.random.integers(1, 4)):
        text[at] = c.pick(b'0123456789[]{}",:.-eE\xff\\ntf\x00 ')
    length = len(text) if c.random.random() < 0.8 else c.pick([0, 1, 2**31, 2**63, 2**64 - 1])
    c.folder.others[file] = length.to_bytes(8, "little") + bytes(text) + c.folder.data[file]


def change_data(c: Change) -> None:
    file = c.file()
    data = bytearray(c.folder.data[file])
    if not data:
        raise Inapplicable
    for at in c.random.integers(0, len(data), c.random.integers(1, 40)):
        data[at] = c.pick([0, 0x7F, 0x80, 0xFF, int(c.random.integers(256))])
    c.folder.data[file] = bytes(data)


def change_text(c: Change) -> None:
    """Anything in a JSON file becomes anything else."""
    file = c.pick(c.folder.texts)
    parent, key = c.folder.texts, file
    for _ in range(int(c.random.integers(1, 6))):
        value = parent[key]
        if isinstance(value, dict) and value:
            parent, key = value, c.pick(value)
        elif isinstance(value, list) and value:
            parent, key = value, int(c.random.integers(len(value)))
    words = ["gptq", "awq", "fp8", "compressed-tensors", "modelopt", "mxfp4", "gpt_oss", "float"]
    words += ["deepseek_v3", "mixtral", "qwen3_moe", "group", "channel", "tensor", "nvfp4", "int"]
    new = c.number() if c.random.random() < 0.6 else c.pick(words)
    if c.random.random() < 0.2 and isinstance(parent, dict) and parent is not c.folder.texts:
        del parent[key]
    else:
        parent[key] = new


CHANGES = {
    **dict.fromkeys(
        [reorder_header, pad_header, add_metadata, add_another_layer, add_config_key, move_data,
         split], Effect.NONE,
    ),
    **dict.fromkeys(
        [drop_tensor, rename_tensor, add_expert, truncate, drop_file, change_count,
         change_dimension, change_place, change_index], Effect.LESS,
    ),
    **dict.fromkeys(
        [swap_tensors, change_type, change_shape, change_header_bytes, change_data, change_text,
         change_text, change_text], Effect.ANY,
    ),
}  # fmt: skip


class Checkpoints(Fuzzer):
    megabytes = 512

    def prepare(self) -> None:
        # Results may differ with the library that they are from.
        library = Path(mo.__file__).parent
        sources = [*(ROOT / "tests" / "python").glob("*.py"), Path(__file__)]
        sources += [*library.rglob("*.py"), *library.glob("_core*")]
        made_from = hashlib.blake2b()
        for path in sorted(sources):
            made_from.update(path.read_bytes())
        key = made_from.hexdigest()
        if PICKLE.exists():
            with PICKLE.open("rb") as file:
                if pickle.load(file) == key:
                    return
        seeds = make_seeds()
        PICKLE.parent.mkdir(parents=True, exist_ok=True)
        with PICKLE.open("wb") as file:
            pickle.dump(key, file)
            pickle.dump(seeds, file)
        print(f"{len(seeds)} seeds", flush=True)

    def start(self) -> None:
        with PICKLE.open("rb") as file:
            pickle.load(file)
            self.seeds: list[Seed] = pickle.load(file)
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) else None
        self.place = tempfile.TemporaryDirectory(dir=place)
        # What a first call sets up is no memory of a case.
        with mo.tuning(threads=2):
            self.load(self.seeds[0], "ExpertStack", self.seeds[0].folder)

    def load(self, seed: Seed, load: str, folder: Folder) -> str:
        path = Path(self.place.name) / "checkpoint"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        folder.write(path)
        loaded = LOADS[load](path, seed.layer)
        return results_of(loaded if load == "ExpertStack" else loaded.stack)

    def case(self, random: np.random.Generator, board: Board) -> str:
        seed = self.seeds[random.integers(len(self.seeds))]
        load = list(seed.results)[random.integers(len(seed.results))]
        change = Change(random, copy.deepcopy(seed.folder), seed.layer)
        effect, names = Effect.NONE, []
        order = list(Effect)
        for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
            function = list(CHANGES)[random.integers(len(CHANGES))]
            try:
                function(change)
            except (Inapplicable, KeyError, AttributeError, IndexError, TypeError, ValueError):
                # Not there, or changed beyond recognition: what it did so far counts.
                effect = Effect.ANY if names else effect
            names.append(function.__name__)
            effect = max(effect, CHANGES[function], key=order.index)
        if effect is Effect.LESS and seed.folder.holds_two_models():
            effect = Effect.ANY
        done = f"{', '.join(names)} by {change.picked!r:.1500}"
        board.say(f"{seed.name} layer {seed.layer}, {load}: {done}")
        begin = time.process_time()
        try:
            results = self.load(seed, load, change.folder)
            outcome = "loaded"
        except mo.OutOfMemoryError as error:
            raise Finding(f"memory that is not in the files: {error}") from error
        except (mo.Error, OSError) as error:
            str(error).encode()
            if effect is Effect.NONE:
                raise Finding(f"{names} is refused: {error}") from error
            results, outcome = seed.results[load], "refused"
        took = time.process_time() - begin
        if took > MOST_SECONDS:
            raise Finding(f"took {took:.1f} s")
        if effect is not Effect.ANY and results != seed.results[load]:
            raise Finding(f"{names} has other results")
        return outcome


if __name__ == "__main__":
    harness.main(Checkpoints(), __doc__)
