"""Results of whole models as tables; needs no torch."""

from __future__ import annotations

from typing import Any

HEADER = ("engine", "a token", "a prompt", "MiB")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row an engine: milliseconds, lower quartile (median, upper quartile), and MiB."""
    found = []
    for row in result["engines"]:
        times = [
            f"{low:,.{digits}f} ({median:,.{digits}f}, {high:,.{digits}f})"
            for (low, median, high), digits in ((row["decode_ms"], 1), (row["prefill_ms"], 0))
        ]
        found.append([row["engine"], *times, f"{row['mib']:,.0f}"])
    return found


def about(result: dict[str, Any]) -> str:
    """What was measured where, in one paragraph."""
    types = result["types"]
    experts = " and ".join(
        dict.fromkeys(types[role] for role in ("gate", "up", "down") if role in types)
    )
    layers = f"{result['layers']} layer{'s' if result['layers'] > 1 else ''}"
    return (
        f"Milliseconds, lower quartile (median, upper quartile). {layers} of "
        f"{result['model']}, {experts}, matrices {types['matrices']}; "
        f"{result['threads']} threads of an {result['machine']} ({result['isa']}) with a load of "
        f"{result['load']:.0f}; {result['date']}."
    )


def markdown(result: dict[str, Any]) -> str:
    """The paragraph and the table."""
    header = ("", "a token", f"a prompt of {result['prompt']}", "MiB")
    lines = [header, ("---", "--:", "--:", "--:"), *rows(result)]
    return about(result) + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
