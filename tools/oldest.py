"""Requirements at the oldest versions that settings.ini states, for `make test-oldest`: one
`name==version` a line.

`python tools/oldest.py [EXTRA ...]`; the main requirements, and those of the extras.
"""
import re, sys
from configparser import ConfigParser
from pathlib import Path

def oldest(requirement: str) -> str:
    """`name>=version` as `name==version`; a marker stays. Raises ValueError where no lower bound is
    stated."""
    found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(;.*)?", requirement)
    if not found:
        raise ValueError(f"settings.ini: {requirement}: no lower bound of the form name>=version")
    return f"{found[1]}=={found[2]}{found[3] or ''}"

def all_oldest(*extras: str) -> list[str]:
    config = ConfigParser(delimiters=["="])
    config.read(Path(__file__).resolve().parents[1]/"settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{extra}_requirements" for extra in extras)]
    return [oldest(r) for key in keys for r in config["DEFAULT"][key].split()]

if __name__ == "__main__": print("\n".join(all_oldest(*sys.argv[1:])))
