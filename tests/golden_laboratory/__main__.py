"""python -m tests.golden_laboratory DIR: one line per NAME.json / NAME.npz pair in DIR; exit status
1 if any number is off, or if a pair is of a kind that nobody knows.
"""

import sys
from pathlib import Path

from tests.golden_laboratory.replay import KINDS, Golden

NOT_BUILT = ("capi_", "ijepa_", "deep_targets_")


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m tests.golden_laboratory DIR", file=sys.stderr)
        return 2
    files = [path for path in Path(sys.argv[1]).iterdir() if path.suffix in (".npz", ".json")]
    failed, arrays, pairs = False, 0, 0
    for stem in sorted({path.with_suffix("") for path in files}):
        kind = stem.name.removesuffix("_held")
        if kind.startswith(NOT_BUILT):
            print(f"{stem.name}: not built, not compared")
            continue
        if kind not in KINDS or not all(
            stem.with_suffix(end).exists() for end in (".npz", ".json")
        ):
            print(f"{stem.name}: FAILED (expected a pair, of {', '.join(KINDS)})")
            failed = True
            continue
        golden = Golden(stem)
        try:
            KINDS[kind](golden)
            problems = golden.problems()
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            problems = [f"{type(error).__name__}: {error}"]
        failed |= bool(problems)
        arrays, pairs = arrays + len(golden.results), pairs + 1
        verdict = f"FAILED ({', '.join(problems)})" if problems else "ok"
        print(f"{stem.name}: {golden.summary()}: {verdict}")
    print(f"compared {arrays} arrays in {pairs} files")
    return int(failed or not arrays)


if __name__ == "__main__":
    sys.exit(main())
