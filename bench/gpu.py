"""Everything that needs a GPU, in one command of at most nine minutes: into a file and a page.

python -m bench.gpu --out DIR                   # DIR/gpu.json, DIR/gpu-results.md, DIR/logs
python -m bench.gpu --out DIR --wheels WHEELS   # where packages are missing, without a network
python -m bench.gpu --out DIR --parts golden vit_base
python -m bench.gpu --out DIR --device cpu --small   # a test of itself, which measures nothing

Each part (tests/gpu_parts.py) has a process of its own and a limit; the most important comes first.
One that raises, crashes or takes too long is a row with its reason, and the rest goes on. Both
files are written again after each row. Exit code 1: something failed or was not run.

Imports the standard library alone. --wheels installs those packages of which there is no version
into DIR/packages; a source archive has to be made a wheel before (pip wheel --no-deps).
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from util.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")  # torch is imported once
SHORTEST = 15  # seconds in which a part may come to something
NEEDED = {name: name for name in "torch torchvision timm numpy tensorboard omegaconf".split()}
NEEDED |= {"yaml": "PyYAML", "PIL": "pillow", "hydra": "hydra-core"}  # packages by module
NEEDED |= {"antlr4": "antlr4-python3-runtime", "submitit": "submitit", "tqdm": "tqdm"}
Rows = list[dict]  # with "failed", a reason, where something has


class Part(NamedTuple):
    name: str
    limit: float  # seconds
    module: str = "tests.gpu_parts"


PARTS = [
    Part("environment", 40),
    Part("golden", 60),
    Part("compiled", 120),
    Part("vit_base", 150),
    Part("waits", 90),
    Part("resume", 60),
    Part("nccl", 40),
    Part("checkpoint", 40),
    Part("loader", 60),
    Part("search", 60),
    Part("vit_large", 180),
    Part("vit_small", 120),
]


def command_line() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="a folder for what is found")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """-> exit code"""
    end, options = time.monotonic(), command_line().parse_args(arguments)
    end += 60 * options.minutes
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    results = {}
    if options.wheels:
        results["packages"] = install(options.wheels, options.out.resolve() / "packages")
    if missing := [package for module, package in NEEDED.items() if find_spec(module) is None]:
        print(f"error: --wheels={options.wheels}: expected wheels of {', '.join(missing)}")
        return 2
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.small:
        os.environ["OMP_NUM_THREADS"] = "1"  # where cores are busy, threads wait for each other
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    SERVER.set_forkserver_preload(sorted({part.module for part in PARTS}))
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        rows = results[part.name] = []
        for row in timed(run_part(part, options, end)):
            rows.append(row)
            print(part.name, *(f" {name} {shown(row[name])}" for name in row), flush=True)
            write(results, options)
    return int(count_failures(results) > 0)


def install(wheels: Path, folder: Path) -> Rows:
    """Of which there is no version."""
    folder.mkdir(exist_ok=True)
    sys.path.append(str(folder))
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", folder]
    rows = []
    for wheel in sorted(wheels.glob("*.whl")):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(wheel.name.partition("-")[0])
            continue
        ran = subprocess.run([*pip, wheel], capture_output=True, text=True)
        problem = ran.stderr.strip().rpartition("\n")[2] if ran.returncode else ""
        rows.append({"what": wheel.name} | ({"failed": problem} if problem else {}))
    importlib.invalidate_caches()
    return rows


def run_part(part: Part, options: argparse.Namespace, end: float) -> Iterator[dict]:
    """Its rows as they come; if it does not end well, the last one says why."""
    seconds = end - time.monotonic()
    if seconds < SHORTEST:
        yield {"failed": "not run: no time left"}
        return
    seconds = min(seconds, part.limit)
    reader, writer = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=work, args=[part, options, writer])
    try:
        process.start()
        writer.close()
        deadline = time.monotonic() + seconds
        while reader.poll(max(0, deadline - time.monotonic())):
            if (row := reader.recv()) is None:
                return
            yield row
        yield {"failed": f"not done after {seconds:.0f} s"}
    except EOFError:  # also where the imports have crashed, before there was a process
        if process.pid:
            process.join()
        code = process.exitcode if process.pid else None
        yield {"failed": f"crashed: {signal.Signals(-code).name if code and code < 0 else code}"}
    finally:
        if process.pid:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def work(part: Part, options: argparse.Namespace, results: Connection) -> None:
    """What the process of a part does."""
    os.setsid()
    with open(options.out / "logs" / f"{part.name}.log", "wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    try:
        module = importlib.import_module(part.module)
        for row in module.rows_of(part.name, options.device, options.small):
            results.send(row)
    except Exception as error:
        traceback.print_exc()
        words = " ".join(str(error).split())[:200]
        results.send({"failed": f"{type(error).__name__}: {words}"})
    sys.stdout.flush()
    results.send(None)


def timed(rows: Iterator[dict]) -> Iterator[dict]:
    """With the seconds that each took."""
    begin = time.monotonic()
    for row in rows:
        yield row | {"seconds": round(time.monotonic() - begin, 1)}
        begin = time.monotonic()


def count_failures(results: dict[str, Rows]) -> int:
    return sum("failed" in row for rows in results.values() for row in rows)


def write(results: dict[str, Rows], options: argparse.Namespace) -> None:
    about = {"date": str(date.today()), "device": options.device, "small": options.small}
    contents = json.dumps(about | {"parts": results}, indent=2)
    write_whole(options.out / "gpu.json", f"{contents}\n".encode())
    page = "# Measured on a GPU\n\n```bash\npython -m bench.gpu --out DIR\n```\n\n"
    page += "**A test: nothing here is measured.** " if options.small else ""
    page += f"{about['date']}, {options.device}. Failed or not run: {count_failures(results)}.\n"
    for name, rows in results.items():
        page += f"\n## {name}\n\n{table(rows)}"
    write_whole(options.out / "gpu-results.md", page.encode())


def table(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[shown(row.get(name, "")) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [names, ["---"] * len(names), *cells])


def shown(value: object) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
