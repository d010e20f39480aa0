"""``python -m sparseticket`` is the command ``sparseticket``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
