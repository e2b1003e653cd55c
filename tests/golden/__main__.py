"""python -m tests.golden DIR: one line per NAME.json / NAME.npz pair in DIR; exit status 1 if any
number is off.
"""

import sys
from pathlib import Path

from tests.golden.replay import LIMITS, compare


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m tests.golden DIR", file=sys.stderr)
        return 2
    archives = sorted(Path(sys.argv[1]).glob("*.npz"))
    pairs = [path for path in archives if path.with_suffix(".json").exists()]
    if not pairs:
        print(f"no NAME.json / NAME.npz pair in {sys.argv[1]}", file=sys.stderr)
        return 1
    failed = False
    for path in pairs:
        errors, decay_agrees = compare(path)
        # `not <=` and not `>`: a NaN is beyond every limit.
        beyond = [name for name, error in errors.items() if not error <= LIMITS[name]]
        failed |= bool(beyond) or not decay_agrees
        numbers = " ".join(f"{name}={error:.1e}" for name, error in errors.items())
        decay = "agree" if decay_agrees else "DIFFER"
        verdict = (
            f"FAILED ({', '.join(beyond) or 'decay sets'})" if beyond or not decay_agrees else "ok"
        )
        print(f"{path.stem}: {numbers} decay_sets={decay}: {verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
