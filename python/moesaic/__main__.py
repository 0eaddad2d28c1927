"""``python -m moesaic`` is the ``moesaic`` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
