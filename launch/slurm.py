"""Slurm: submit a job, run it there, and look at the queue.

Imports no torch on the submitting side. submitit writes the batch script and the pickle; what the
pickle holds is the resolved config and nothing else.
"""

import codecs
import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import submitit
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import FailedJobError

from launch.config import (
    ConfigError,
    TrainingStopped,
    change_paths,
    job_directory,
    processes_per_node,
)
from launch.job import is_restart, refuse_to_start_over
from launch.lock import JobBusy
from launch.queue import OVER, USUAL, job_state, noted_job, why_waiting
from launch.results import is_finished, resumes
from util.files import write_json
from util.signals import NOT_DONE

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH = Path(__file__).with_name("batch.sh")
CODE = "*.py Makefile requirements.txt bench configs data eval launch models util".split()
CODE_FILES = {".py", ".yaml", ".yml", ".json", ".toml", ".txt", ".csv", ".npz", ".so", ".cu", ".sh"}
# Of what the surrounding job (salloc, Jupyter) has set, only this reaches Slurm.
KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
# By which a user asks a job to stop. TERM is no such signal: Slurm sends it too, to preempt.
STOPS = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
FIRST_WORD_SECONDS = 3  # until Slurm has had a look at a new job
ASK_SECONDS = 15  # between two questions about a job that is followed


# --- submission ---------------------------------------------------------------------------------


def submit(configs: list[DictConfig]) -> int:
    """One job, or an array of jobs (a sweep). -> exit code"""
    if shutil.which("sbatch") is None:
        raise ConfigError("env.slurm=True: there is no sbatch on this machine; expected False")
    for name in os.environ:
        if name.startswith("SLURM_") and name not in KEPT:
            del os.environ[name]
    waiting = [cfg for cfg in configs if needs_to_run(cfg, single=len(configs) == 1)]
    for cfg in waiting:
        make_paths_absolute(cfg)
    groups: dict[str, list[DictConfig]] = {}  # one array asks for the same resources for all
    for cfg in waiting:
        groups.setdefault(OmegaConf.to_yaml(cfg.env), []).append(cfg)
    try:
        notes = [note for group in groups.values() for note in submit_group(group)]
    except OSError as error:
        valid = f"a folder for a job's files and a copy of the code, but {error}"
        raise ConfigError(f"output_dir={waiting[0].output_dir}: expected {valid}") from error
    return follow_all(notes) if waiting and waiting[0].env.wait else 0


def submit_group(configs: list[DictConfig]) -> list[dict[str, str]]:
    """-> what is noted of each job"""
    folder = submission_folder(configs)
    tasks = [SlurmTask(OmegaConf.to_container(cfg)) for cfg in configs]
    new = [path for path in [*map(job_directory, configs), folder] if not path.exists()]
    try:
        for cfg in configs:
            (job_directory(cfg) / "logs").mkdir(parents=True, exist_ok=True)
        jobs = submit_tasks(build_executor(configs[0], folder), tasks)
    except ConfigError:  # refused; after other errors a job may be in the queue
        for path in new:
            if not (path / "logs" / "slurm.json").exists():  # by another submission meanwhile
                shutil.rmtree(path, ignore_errors=True)
        raise
    notes = []
    for cfg, job in zip(configs, jobs, strict=True):
        log = str(folder / f"{job.job_id}_0_log.out")  # of the first process
        notes.append({"job_id": job.job_id, "log": log})
        describe(cfg, job.job_id, log)
        write_json(job_directory(cfg) / "logs" / "slurm.json", notes[-1])
    say_if_stuck(jobs[0].job_id)
    return notes


def say_if_stuck(job_id: str) -> None:
    """Until the job has started, or waits for what is usual: its first reason may change."""
    deadline = time.monotonic() + FIRST_WORD_SECONDS
    while time.monotonic() < deadline:
        record = job_state(job_id)
        if record["JobState"] != "PENDING" or record.get("Reason") in USUAL - {"None"}:
            break
        time.sleep(0.3)
    if reason := why_waiting(record):
        print(f"  job {job_id} does not start: Slurm says {reason}", flush=True)


def submit_tasks(executor: submitit.AutoExecutor, tasks: list["SlurmTask"]) -> list[submitit.Job]:
    try:
        # submitit prints what sbatch says and then raises it: once is enough.
        with contextlib.redirect_stderr(io.StringIO()):
            if len(tasks) == 1:
                return [executor.submit(tasks[0])]
            with executor.batch():
                return [executor.submit(task) for task in tasks]
    except FailedJobError as error:
        lines = str(error).splitlines()
        said = "; ".join(line.removeprefix("sbatch: error:").strip() for line in lines)
        raise ConfigError(f"Slurm refused the job: {said}") from error


def needs_to_run(cfg: DictConfig, single: bool) -> bool:
    """False, after saying why, for a job that is finished or (in a sweep) queued. A single job that
    is queued is an error."""
    if is_finished(cfg):
        return False
    if job_id := job_in_queue(cfg):
        text = f"job_name={cfg.job_name}: job {job_id} of this name is queued or running"
        if single:
            ways = f"choose another job_name, scancel {job_id} first, or wait for its end with"
            raise ConfigError(f"{text}: {ways} env.slurm_extra.dependency=afterany:{job_id}")
        print(f"{text}; nothing submitted")
        return False
    if "resume" in cfg and not resumes(cfg):  # else an evaluation, which may always run again
        refuse_to_start_over(cfg)
    return True


def make_paths_absolute(cfg: DictConfig) -> None:
    """The job runs in another folder. A path that begins with a variable means the node's."""
    change_paths(cfg, lambda path: path if path.startswith("$") else str(Path(path).absolute()))


def submission_folder(configs: list[DictConfig]) -> Path:
    """Where submitit's files, Slurm's logs and the copy of the code go."""
    logs = job_directory(configs[0]) / "logs"
    sweeps = Path(configs[0].output_dir) / "sweeps" / time.strftime("%Y%m%d-%H%M%S")
    if "%" in configs[0].output_dir:  # %j and the like mean something in Slurm's --output
        raise ConfigError(f"output_dir={configs[0].output_dir}: expected a path without '%'")
    if len(configs) == 1 and "%" not in configs[0].job_name:
        return logs
    free = (sweeps.with_name(f"{sweeps.name}-{number}") for number in itertools.count())
    return next(folder for folder in free if not folder.exists())


def build_executor(cfg: DictConfig, folder: Path) -> submitit.AutoExecutor:
    folder.mkdir(parents=True, exist_ok=True)
    extra = {key.replace("-", "_"): value for key, value in cfg.env.slurm_extra.items()}
    code = copy_code(folder, "dependency" in extra) if cfg.env.snapshot else REPOSITORY
    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_python=cfg.env.python)
    executor.update_parameters(  # None: not set
        name=cfg.job_name,
        nodes=cfg.env.world_size,
        tasks_per_node=processes_per_node(cfg),
        cpus_per_task=cfg.env.workers,
        gpus_per_node=None if cfg.env.gres else cfg.env.ngpu or None,
        slurm_gres=None if cfg.env.gres == "none" else cfg.env.gres,
        mem_gb=cfg.env.mem,
        timeout_min=cfg.env.timeout,
        slurm_partition=cfg.env.partition,
        slurm_constraint=cfg.env.constraint,
        slurm_nodelist=cfg.env.nodelist,
        slurm_exclude=cfg.env.exclude,
        slurm_account=cfg.env.account,
        slurm_qos=cfg.env.qos,
        slurm_comment=cfg.env.comment,
        slurm_signal_delay_s=cfg.env.signal_delay,
        slurm_array_parallelism=cfg.env.array_parallelism,
        # False: an option that is not wanted
        slurm_additional_parameters={
            key: value for key, value in {"requeue": True, **extra}.items() if value is not False
        },
        slurm_stderr_to_stdout=True,
        slurm_setup=[
            *BATCH.read_text().splitlines(),
            f"begin_job {shlex.quote(str(folder))}",
            # Bash decides what fails, as for `set -e`: conditions stay conditions.
            "trap 'setup_failed $? $LINENO ${#BASH_SOURCE[@]}' ERR",
            *cfg.env.setup,
            "trap - ERR; set +eu",
            f"use_code {shlex.quote(str(code))}",
            *(f"export {name}={shlex.quote(str(value))}" for name, value in cfg.env.nccl.items()),
        ],
        # One lost process ends all, which would otherwise wait for it until the time limit.
        slurm_srun_args=["--kill-on-bad-exit=1", *cfg.env.srun_args],
        slurm_teardown=[f"end_job $? {cfg.env.max_restarts}"],
    )
    executor._executor.parameters["wckey"] = None  # submitit's default, which some clusters refuse
    return executor


def copy_code(folder: Path, keep: bool) -> Path:
    """Later edits in the working tree must not reach a job that is requeued. keep: that of an
    earlier job, which this one waits for."""
    for earlier in [] if keep else folder.glob("code*"):
        shutil.rmtree(earlier, ignore_errors=True)
    code = folder / time.strftime("code-%Y%m%d-%H%M%S")
    code.mkdir(exist_ok=True)
    for pattern in CODE:
        for path in REPOSITORY.glob(pattern):
            copy_code_to(path, code / path.name)
    return code


def copy_code_to(source: Path, target: Path) -> None:
    """Copy a file, or the code in a folder: neither data that lie in it nor what links lead to."""
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    entries = list(source.iterdir())
    files = [path for path in entries if path.suffix in CODE_FILES and path.is_file()]
    if files and source.name != "__pycache__":
        target.mkdir(exist_ok=True)
        folders = [path for path in entries if path.is_dir() and not path.is_symlink()]
        for path in files + folders:
            copy_code_to(path, target / path.name)


def ways_on(job_id: str, log: str) -> str:
    return f"  follow  tail -F {shlex.quote(log)}\n  stop    scancel {job_id}"


def describe(cfg: DictConfig, job_id: str, log: str) -> None:
    jobs = shlex.quote(str(cfg.output_dir))
    print(
        f"{cfg.job_name}: submitted as job {job_id}\n"
        f"{ways_on(job_id, log)}\n"
        f"  resume  the same command with resume=True\n"
        f"  status  python launcher.py --config-name=status output_dir={jobs}",
        flush=True,  # with env.wait=True the log follows
    )


# --- on the node --------------------------------------------------------------------------------


class SlurmTask:
    """What submitit pickles and calls, once per process."""

    def __init__(self, config: dict):
        self.config = config

    def __call__(self) -> None:
        signal.signal(signal.SIGUSR2, ask_for_another_start)
        for number in (signal.SIGTERM, *STOPS):
            signal.signal(number, leave_early)
        for key in ("data_path", "cache_dir", "pretrained_weights"):
            if self.config.get(key) is not None:
                self.config[key] = os.path.expandvars(self.config[key])
        if self.config["env"]["ngpu"] == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from launch.command import leave, run_configured_worker

        try:
            importlib.import_module(self.config["worker"])  # packages that are missing show here
            leave_mark("started")
            exit_code = run_configured_worker(self.config)
        except SystemExit as stopped:
            exit_code = int(stopped.code or 0)
        # Again would be the same. Busy: a second submission; after a restart, the last start's end.
        final = [ConfigError.exit_code, TrainingStopped.exit_code, *(128 + n for n in STOPS)]
        if exit_code in final or (exit_code == JobBusy.exit_code and not is_restart()):
            leave_mark("final")
        if exit_code:
            leave(exit_code)


def leave_mark(name: str) -> None:
    """For the end of the batch script."""
    Path(f"{os.environ['LMIM_MARKS']}.{name}").touch()


def ask_for_another_start(number: int, frame: FrameType | None) -> None:
    """The batch script does it: in a container there is no scontrol."""
    if os.environ["SLURM_PROCID"] == "0":
        leave_mark("again")
        print(f"{signal.Signals(number).name}: this job is to be started again", flush=True)
        sys.exit(NOT_DONE)


def leave_early(number: int, frame: FrameType | None) -> None:
    """Where nothing is trained, or not yet: there is nothing to save."""
    sys.exit(128 + number)


# --- the queue ----------------------------------------------------------------------------------


def job_in_queue(cfg: DictConfig) -> str | None:
    """The last job that was submitted for this folder, if it has not ended. None too if the new one
    is to wait for its end."""
    job_id = noted_job(job_directory(cfg))
    if not job_id or job_state(job_id)["JobState"] in OVER | {"unknown"}:
        return None  # where Slurm does not answer, sbatch says so
    dependency = str(cfg.env.slurm_extra.get("dependency", ""))
    kinds = re.findall(r"after(?:any|ok|notok|corr):([\d:_]+)", dependency)
    awaited = {awaited_id for ids in kinds for awaited_id in ids.split(":")}
    is_awaited = dependency == "singleton" or {job_id, job_id.split("_")[0]} & awaited
    return None if is_awaited else job_id


def follow_all(notes: list[dict[str, str]]) -> int:
    """-> the greatest exit status"""
    try:
        return max(map(follow, notes))
    except KeyboardInterrupt:
        for note in notes:
            print(f"job {note['job_id']} goes on\n{ways_on(**note)}", file=sys.stderr)
        return 130


def follow(note: dict) -> int:
    """Copy the log to this terminal until the job has ended. -> its exit status"""
    job_id, log, position = note["job_id"], Path(note["log"]), 0
    ended = log.with_name(f"{job_id}.ended")  # by the batch script: the answer is near
    text = codecs.getincrementaldecoder("utf-8")("replace")
    record, reason, asked_at = {"JobState": "unknown"}, None, -float(ASK_SECONDS)
    while True:
        # The state is read before the log, so that the log's last lines are not missed.
        if ended.exists() or time.monotonic() - asked_at >= ASK_SECONDS:
            record, asked_at = job_state(job_id), time.monotonic()
        if log.exists():
            with open(log, "rb") as file:
                file.seek(position)
                print(text.decode(file.read()), end="", flush=True)
                position = file.tell()
        state = record["JobState"]
        if state in OVER:
            break
        if (now := why_waiting(record)) and now != reason:
            print(f"job {job_id} does not start: Slurm says {now}", file=sys.stderr, flush=True)
        reason = now
        time.sleep(1)
    if state == "COMPLETED":
        return 0
    print(f"job {job_id} ended as {state}", file=sys.stderr)
    return int(record.get("ExitCode", "1:0").split(":")[0]) or 1
