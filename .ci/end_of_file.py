"""Gives text files one line break at their end and takes spaces from the ends of their lines; 1 if any was changed."""

from __future__ import annotations

import sys
from pathlib import Path


def main(names: list[str]) -> int:
    changed = []
    for path in map(Path, names):
        text = path.read_text()
        right = "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n") + "\n"
        if text and text != right:
            path.write_text(right)
            changed.append(str(path))
    print(*changed, sep="\n", end="\n" if changed else "")
    return int(bool(changed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
