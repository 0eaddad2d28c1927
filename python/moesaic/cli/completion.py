"""``moesaic completion bash|zsh|fish``: a script that completes commands, options and their words.

The script is made from the parsers, so that it knows what they know:
``eval "$(moesaic completion bash)"``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

SHELLS = ("bash", "zsh", "fish")


@dataclass
class Command:
    """What one command takes."""

    name: str
    summary: str
    options: list[Option] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # of a positional with choices
    files: bool = False  # has a positional that is a file


@dataclass(frozen=True)
class Option:
    """One spelling of an option."""

    name: str
    summary: str
    takes_value: bool
    words: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    print({"bash": bash, "zsh": zsh, "fish": fish}[options.shell](commands()))
    return 0


def commands() -> list[Command]:
    """Read the parsers of all commands."""
    from . import ALL, COMMANDS, build_parser

    parser = build_parser(ALL)
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found = []
    for name, sub in subparsers.choices.items():
        command = Command(name, COMMANDS[name][1])
        for action in sub._actions:
            words = tuple(map(str, action.choices or ()))
            if not action.option_strings:
                command.words += words
                command.files |= not words
                continue
            summary = (action.help or "").replace("%%", "%")
            value = action.nargs != 0
            command.options += [Option(o, summary, value, words) for o in action.option_strings]
        found.append(command)
    return found


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def bash(found: list[Command]) -> str:
    cases, values = [], []
    for command in found:
        words = " ".join([*(o.name for o in command.options), *command.words])
        cases.append(f"    {command.name}) words={_quoted(words)};;")
        for option in command.options:
            if option.takes_value:
                choices = _quoted(" ".join(option.words))
                values.append(f"    {command.name}:{option.name}) given={choices}; has=1;;")
    names = " ".join(command.name for command in found)
    newline = "\n"
    return f"""\
_moesaic() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
  local command=${{COMP_WORDS[1]}} words= given= has=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{names} --version --help" -- "$current"))
    return
  fi
  case "$command:$previous" in
{newline.join(values)}
  esac
  if [ -n "$has" ]; then
    if [ -n "$given" ]; then COMPREPLY=($(compgen -W "$given" -- "$current"))
    else COMPREPLY=($(compgen -f -- "$current")); fi
    return
  fi
  case "$command" in
{newline.join(cases)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  case "$current" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$current"));; esac
}}
complete -o filenames -F _moesaic moesaic"""


def zsh(found: list[Command]) -> str:
    def plain(text: str) -> str:
        for special in "[]:\\":
            text = text.replace(special, f"\\{special}")
        return text

    lines = []
    for command in found:
        specs = []
        for option in command.options:
            action = f":value:({' '.join(option.words)})" if option.words else ":value:_files"
            ending = action if option.takes_value else ""
            specs.append(_quoted(f"*{option.name}[{plain(option.summary)}]{ending}"))
        if command.words:
            specs.append(_quoted(f"1:value:({' '.join(command.words)})"))
        elif command.files:
            specs.append(_quoted("*:file:_files"))
        lines.append(f"    {command.name}) _arguments {' '.join(specs)};;")
    names = " ".join(_quoted(f"{c.name}:{plain(c.summary)}") for c in found)
    newline = "\n"
    return f"""\
#compdef moesaic
_moesaic() {{
  local -a names
  names=({names})
  if (( CURRENT == 2 )); then
    _describe command names
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case "$command" in
{newline.join(lines)}
  esac
}}
compdef _moesaic moesaic"""


def fish(found: list[Command]) -> str:
    lines = ["complete -c moesaic -e"]
    for command in found:
        lines.append(
            f"complete -c moesaic -n __fish_use_subcommand -f -a {command.name} "
            f"-d {_quoted(command.summary)}"
        )
        here = _quoted(f"__fish_seen_subcommand_from {command.name}")
        for option in command.options:
            flag = (
                f"-l {option.name[2:]}" if option.name.startswith("--") else f"-s {option.name[1:]}"
            )
            value = " -r" if option.takes_value else ""
            value += f" -f -a {_quoted(' '.join(option.words))}" if option.words else ""
            line = f"complete -c moesaic -n {here} {flag}{value}"
            lines.append(f"{line} -d {_quoted(option.summary)}")
        if command.words:
            lines.append(f"complete -c moesaic -n {here} -f -a {_quoted(' '.join(command.words))}")
    return "\n".join(lines)
