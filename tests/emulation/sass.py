"""What a kernel's machine code says of its main loop, without a GPU.

Issue slots bound the product kernels: each instruction of a loop takes one of a warp's scheduler.
And a load whose value is used at once stalls its warp for the whole way to memory, so the fewest
instructions between a load from global memory and the first use of what it brings is counted too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FUNCTION = re.compile(r"Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
TARGET = re.compile(r"0x([0-9a-f]+)")
REGISTER = re.compile(r"\bR(\d+)\b")
WIDTHS = {".128": 4, ".64": 2}


@dataclass(frozen=True)
class Loop:
    """The longest loop of a kernel that multiplies matrices."""

    instructions: int
    #: Matrix products with fragments of weights.
    hmma: int
    #: Instructions from a load of global memory to the first use, the least of all loads; a loop
    #: without one has no such distance.
    load_distance: int | None

    @property
    def per_hmma(self) -> float:
        return self.instructions / self.hmma


def functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction of each function of `cuobjdump -sass`."""
    found: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in sass.splitlines():
        if name := FUNCTION.search(line):
            current = found.setdefault(name[1], [])
        elif instruction := INSTRUCTION.match(line):
            current.append((int(instruction[1], 16), instruction[2]))
    return found


def _opcode(text: str) -> str:
    return text.split()[0]


def _loaded(text: str) -> set[int]:
    """The registers that a load writes."""
    opcode, _, operands = text.partition(" ")
    first = REGISTER.match(operands.lstrip())
    if first is None:
        return set()
    width = next((n for suffix, n in WIDTHS.items() if suffix in opcode), 1)
    return {int(first[1]) + i for i in range(width)}


def _read(text: str) -> set[int]:
    """The registers that an instruction reads, as far as its text names them.

    A matrix product reads four registers from the first of A and of the sums, two from that of B.
    """
    opcode, _, operands = text.partition(" ")
    parts = operands.split(",")
    # A store writes none of its operands.
    sources = parts if opcode.startswith("ST") else parts[1:]
    numbers = {int(n) for part in sources for n in REGISTER.findall(part)}
    if opcode.startswith("HMMA"):
        numbers |= {n + i for n in numbers for i in range(4)}
    return numbers


def _sources(text: str) -> list[int]:
    return [int(n) for n in REGISTER.findall(text.partition(",")[2])]


def _is_constant(body: list[str], at: int, register: int) -> bool:
    """Whether a register holds, before instruction `at` of a loop, what never changes in it.

    Copies are followed to the last instruction before them that writes their source.
    """
    for back in range(1, len(body)):
        text = body[(at - back) % len(body)]
        if text.startswith(("ST", "BRA")) or register not in _loaded(text):
            continue
        sources = _sources(text)
        if "MOV" in _opcode(text) and len(sources) == 1:
            return _is_constant(body, at - back, sources[0])
        return not sources
    return True


def _weight_products(body: list[str]) -> int:
    """Of m16n8k16, those whose A the loop makes.

    A fragment of a constant multiplies x alone, and minima take an m16n8k8.
    """
    return sum(
        text.startswith("HMMA.16816") and not _is_constant(body, at, _sources(text)[0])
        for at, text in enumerate(body)
    )


def _load_distance(body: list[str]) -> int | None:
    distances = []
    for at, text in enumerate(body):
        if not re.match(r"LDG?[. ]", text):  # LDGSTS copies to shared memory
            continue
        loaded = _loaded(text)
        for step in range(1, len(body)):
            if loaded & _read(body[(at + step) % len(body)]):
                distances.append(step)
                break
    return min(distances, default=None)


def main_loop(instructions: list[tuple[int, str]]) -> Loop | None:
    """None for a function without a loop that multiplies matrices."""
    best: Loop | None = None
    for address, text in instructions:
        target = TARGET.search(text) if _opcode(text).startswith("BRA") else None
        if target is None or int(target[1], 16) > address:
            continue
        body = [t for a, t in instructions if int(target[1], 16) <= a <= address]
        hmma = _weight_products(body)
        if hmma > 0 and (best is None or len(body) > best.instructions):
            best = Loop(len(body), hmma, _load_distance(body))
    return best
