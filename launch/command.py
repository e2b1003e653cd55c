"""How a command ends: an error that the user can fix is one sentence and an exit code."""

import errno
import gc
import importlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeGuard

from omegaconf import DictConfig, OmegaConf

from launch.config import ConfigError, UserError, job_directory, parse_command_line
from launch.places import check_places
from launch.sweep import compose_all
from launch.validate import MODULE, check_config

GRACE_SECONDS = 15
STREAMS = ("stdin", "stdout", "stderr")


def run_worker(
    main: Callable[[DictConfig], None], description: str, config_name: str = "lmim"
) -> NoReturn:
    """The command line of a worker that was started by hand or by torchrun."""

    def run(configs: list[DictConfig]) -> int:
        if len(configs) > 1:
            raise ConfigError("--multirun: expected with launcher.py, which starts one run each")
        return call(main, configs[0])

    leave(run_command_line(run, description, config_name))


def run_command_line(
    run: Callable[[list[DictConfig]], int], description: str, config_name: str = "lmim"
) -> int:
    """Compose and check the configs that the command line asks for, and run them. -> exit code"""
    open_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # by the launcher, until now
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command = parse_command_line(sys.argv[1:], description, config_name)
        configs = compose_all(command)
        if command.cfg:
            print("---\n".join(OmegaConf.to_yaml(cfg) for cfg in configs), end="", flush=True)
        for cfg in configs:
            check_config(cfg)
        if command.cfg:
            return 0
        for cfg in configs:
            check_places(cfg)
        return run(configs)
    except UserError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:  # before there was anything to save
        return 130


def run_configured_worker(config: dict) -> int:
    """The worker that a resolved config names, in this process. -> exit code"""
    cfg = OmegaConf.create(config)
    # Imported modules stay until the end: keep the garbage collector from scanning them.
    gc.disable()
    worker = importlib.import_module(cfg.worker)
    gc.freeze()
    gc.enable()
    try:
        if hasattr(worker, "main"):
            return call(worker.main, cfg)
        say_error(ConfigError(f"worker={cfg.worker}: expected {MODULE[0]}"))
        return ConfigError.exit_code
    finally:
        gc.unfreeze()


def leave(exit_code: int) -> NoReturn:
    """End the process without Python's own cleanup, which takes a second."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a terminal that is closed
            stream.flush()
    os._exit(exit_code)


def call(main: Callable[[DictConfig], None], cfg: DictConfig) -> int:
    """-> exit code. 0: done; 1: a crash, data that did not come, or files that are gone after the
    first step of a training (a file server may be back); 2: bad input; 3: a training that cannot go
    on; 4: another process is writing in the job's folder. After 1 and 4 the same command may
    succeed later."""
    from data.base import DataError, DataTimeout  # brings numpy along

    if "resume" in cfg:
        from launch.results import resumes

        cfg.resume = resumes(cfg)
    try:
        main(cfg)
    except (UserError, DataError, DataTimeout) as error:
        say_error(error)
        return getattr(error, "exit_code", UserError.exit_code)
    except SystemExit as stopped:  # by a signal. Caught, so that its frames let go of the workers
        return int(stopped.code or 0)
    except Exception as error:
        if is_in_the_way(error, cfg.output_dir):
            say_error(ConfigError(f"{error.filename} cannot be written or read ({error.strerror})"))
            return getattr(error, "exit_code", ConfigError.exit_code)
        say_crash(cfg)
        return 1
    return 0


def is_in_the_way(error: Exception, folder: str) -> TypeGuard[OSError]:
    """A file of the job is gone or cannot be written, and not because a file server is gone."""
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return False
    is_lasting = error.errno not in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    return is_lasting and Path(error.filename).absolute().is_relative_to(Path(folder).absolute())


def say_crash(cfg: DictConfig) -> None:
    """Print this process's traceback and, last, that of the process that failed first: the others
    only fail because they lose contact with it."""
    rank = int(os.environ.get("RANK", 0))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        traceback.print_exc()
        return
    text = f"[rank {rank}] {traceback.format_exc()}"
    print(text, file=sys.stderr, flush=True)
    folder = job_directory(cfg) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    # One start of a job: the same in all its processes.
    names = ("MASTER_PORT", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT")
    first = folder / f"first-error-{'-'.join(os.environ.get(name, '') for name in names)}.txt"
    try:
        with open(first, "x") as file:
            file.write(text)
    except FileExistsError:
        time.sleep(0.2)  # for the other to finish writing
        print(f"the first error was\n{first.read_text()}", file=sys.stderr, flush=True)


def say_error(error: Exception) -> None:
    """One line on stderr."""
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        # Rank 0 reports an error that all have, and their parent then ends the others. One that is
        # still alive after this reports an error of its own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_SECONDS)
    where = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{where}error: {error}", file=sys.stderr, flush=True)


# ---- The console: closed (>&-), or a pipe whose reader has gone (| head). Neither is to stop a
# run, whose log is in its folder as well.


class Pipe(io.FileIO):
    """Written to: what its reader has not waited for is lost."""

    def write(self, data, /) -> int:
        with suppress(BrokenPipeError):
            return super().write(data)
        return memoryview(data).nbytes


def open_streams() -> None:
    """To be called before anything is printed. Python sets a closed stream to None, which has no
    flush(), and the next file that is opened would get the stream's number."""
    for name in STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the stream's own
            os.set_inheritable(number, True)  # to the processes of a run
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))
        elif name != "stdin" and stream is getattr(sys, f"__{name}__") and not stream.isatty():
            pipe = Pipe(stream.fileno(), "w", closefd=False)
            kept = ("encoding", "errors", "line_buffering", "write_through")
            settings = {setting: getattr(stream, setting) for setting in kept}
            buffer = pipe if stream.write_through else io.BufferedWriter(pipe)
            setattr(sys, name, io.TextIOWrapper(buffer, **settings))
