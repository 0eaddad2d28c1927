"""Boot machines with several NUMA nodes in QEMU and run guest.cpp in them as the first process.

    python tests/numa/run.py --program build/dev/tests/numa_guest --kernel vmlinuz

The CPUs are interpreted, so a guest says where pages and threads are, never how fast anything is.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MIB_PER_NODE = 384
SECONDS = 300  #: a guest takes some ten on an idle machine


@dataclass(frozen=True)
class Guest:
    """A machine: the CPUs of each node, "" for none, and whether the node has memory."""

    name: str
    cpus: tuple[str, ...]
    expect: dict[str, str]  #: case -> what the library says of its nodes
    without_memory: tuple[int, ...] = ()
    near: tuple[tuple[int, int], ...] = ()  #: pairs of nodes that are closer than others

    def options(self) -> list[str]:
        options: list[str] = []
        nodes = range(len(self.cpus))
        for node, cpus in enumerate(self.cpus):
            described = f"node,nodeid={node}" + (f",cpus={cpus}" if cpus else "")
            if node not in self.without_memory:
                memory = f"memory-backend-ram,id=m{node},size={MIB_PER_NODE}M"
                options += ["-object", memory]
                described += f",memdev=m{node}"
            options += ["-numa", described]
        for a in nodes:
            for b in range(a + 1, len(self.cpus)):
                distance = 15 if (a, b) in self.near else 21
                options += ["-numa", f"dist,src={a},dst={b},val={distance}"]
        count = 1 + max(int(cpus.split("-")[-1]) for cpus in self.cpus if cpus)
        memory = MIB_PER_NODE * (len(self.cpus) - len(self.without_memory))
        return ["-smp", f"{count},sockets={count},cores=1", "-m", f"{memory}M", *options]


GUESTS = [
    Guest("one node", ("0-1",), {"auto": "1 node (2 cores)"}),
    Guest(
        "two nodes",
        ("0-1", "2-3"),
        {
            "auto": "2 nodes: 0 (2 cores), 1 (2 cores)",
            "affinity": "1 node (2 cores)",
            "membind": "1 node (4 cores)",
            "interleave": "1 node (4 cores)",
            "cpuset": "1 node (4 cores)",
        },
    ),
    Guest(
        "four nodes",
        ("0", "1", "2", "3"),
        {"auto": "4 nodes: 0 (1 core), 1 (1 core), 2 (1 core), 3 (1 core)"},
    ),
    Guest(
        "uneven nodes, one of memory alone, one of CPUs alone",
        ("0", "1-2", "", "3"),
        {"auto": "2 nodes: 0 (1 core), 1 (3 cores)"},
        without_memory=(3,),
        near=((1, 3),),
    ),
]


def archive(program: Path) -> bytes:
    """Return a cpio archive (format newc) with the program as /init and a console."""
    entries = [
        ("dev", 0o040755, b"", (0, 0)),
        ("dev/console", 0o020600, b"", (5, 1)),
        ("init", 0o100755, program.read_bytes(), (0, 0)),
        ("TRAILER!!!", 0, b"", (0, 0)),
    ]
    out = bytearray()
    for inode, (name, mode, data, device) in enumerate(entries, 1):
        path = name.encode() + b"\0"
        fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return gzip.compress(bytes(out), 1)


def boot(guest: Guest, kernel: Path, initrd: Path) -> bool:
    """Return whether the guest says that all its cases passed."""
    cases = ";".join(f"{case}={nodes}" for case, nodes in guest.expect.items())
    words = ["console=ttyS0", "quiet", "panic=-1", "guest.expect=" + cases.replace(" ", "~")]
    command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-nographic"]
    command += ["-no-reboot", "-nodefaults", "-serial", "stdio", *guest.options()]
    command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", " ".join(words)]
    began = time.monotonic()
    print(f"== {guest.name}", flush=True)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=SECONDS,
        )  # fmt: skip
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"") + f"\nno end in {SECONDS} s\n".encode()
    text = output.decode(errors="replace")
    print(text.rstrip())
    print(f"-- {time.monotonic() - began:.0f} s", flush=True)
    return "GUEST PASSED" in text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=Path, required=True, help="guest.cpp, linked statically")
    parser.add_argument("--kernel", type=Path, required=True, help="a Linux kernel for x86-64")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        initrd = Path(folder) / "initrd.gz"
        initrd.write_bytes(archive(options.program))
        failed = [g.name for g in GUESTS if not boot(g, options.kernel, initrd)]
    print(f"== {len(GUESTS) - len(failed)} of {len(GUESTS)} guests passed", *failed, sep="; ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
