"""Draw the committed pictures: the diagrams in docs/diagrams/ and README's docs/pictures/traffic.svg.

python docs/generator/pictures.py            # write those that changed
python docs/generator/pictures.py --check    # exit code 1 if one is not what the code and the results say
"""

import argparse
import sys
from pathlib import Path

import charts
import diagrams

DOCS = Path(__file__).resolve().parents[1]


def pictures() -> dict[Path, str]:
    """Every committed picture and what it should be."""
    found = {DOCS / "diagrams" / f"{name}.svg": draw() for name, draw in diagrams.DIAGRAMS.items()}
    return found | {DOCS / "pictures" / "traffic.svg": charts.traffic(charts.load())}


def main() -> int:
    """Write the pictures, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the files")
    check = parser.parse_args().check
    stale = [path for path, svg in pictures().items() if not path.exists() or path.read_text() != svg]
    for path in stale:
        if check:
            print(f"error: {path} is out of date: run python docs/generator/pictures.py", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pictures()[path])
            print(f"written to {path}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
