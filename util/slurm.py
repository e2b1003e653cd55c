"""Slurm: submit a job, run it there, and look at the queue.

Imports no torch on the submitting side. submitit writes the batch script and the pickle; what the
pickle holds is the resolved config and nothing else.
"""

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import submitit
from omegaconf import DictConfig, OmegaConf
from submitit.core.utils import FailedJobError

from util.config import ConfigError, TrainingStopped, job_directory, processes_per_node
from util.job import is_finished, is_restart, refuse_to_start_over
from util.lock import JobBusy
from util.slurm_queue import OVER, job_state, read_queue

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = ("*.py", "Makefile", "requirements.txt", "configs", "data", "eval", "models", "util")


# --- submission ---------------------------------------------------------------------------------


def submit(configs: list[DictConfig]) -> int:
    """One job, or an array of jobs (a sweep). -> exit code"""
    if shutil.which("sbatch") is None:
        raise ConfigError("env.slurm=True: there is no sbatch on this machine; expected False")
    queue = read_queue()
    waiting = [cfg for cfg in configs if needs_to_run(cfg, queue, single=len(configs) == 1)]
    if not waiting:
        return 0
    for cfg in waiting:
        make_paths_absolute(cfg)
        (job_directory(cfg) / "logs").mkdir(parents=True, exist_ok=True)
    folder = submission_folder(waiting)
    tasks = [SlurmTask(OmegaConf.to_container(cfg)) for cfg in waiting]
    jobs = submit_tasks(build_executor(waiting[0], folder), tasks)
    notes = []
    for cfg, job in zip(waiting, jobs, strict=True):
        log = folder / f"{job.job_id}_0_log.out"  # of the first process
        notes.append({"job_id": job.job_id, "log": str(log)})
        note_file(cfg).write_text(json.dumps(notes[-1]) + "\n")
        describe(cfg, job.job_id, log)
    cfg = waiting[0]
    return max(map(follow, notes)) if cfg.env.wait else 0


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


def needs_to_run(cfg: DictConfig, queue: dict[str, str], single: bool) -> bool:
    """False, after saying why, for a job that is finished or (in a sweep) queued. A single job that
    is queued is an error."""
    if is_finished(cfg):
        return False
    if job_id := job_in_queue(cfg, queue):
        text = f"job_name={cfg.job_name}: job {job_id} of this name is queued or running"
        if single:
            raise ConfigError(f"{text}: choose another job_name, or scancel {job_id} first")
        print(f"{text}; nothing submitted")
        return False
    if "resume" in cfg:  # an evaluation that trains nothing may always run again
        refuse_to_start_over(cfg)
    return True


def make_paths_absolute(cfg: DictConfig) -> None:
    """The job runs in another folder."""
    for key in ("output_dir", "data_path", "pretrained_weights", "cache_dir"):
        if cfg.get(key) is not None:
            cfg[key] = str(Path(cfg[key]).absolute())
    if cfg.get("pretrained") is not None:
        family, colon, file = cfg.pretrained.rpartition(":")
        if family != "timm":
            cfg.pretrained = f"{family}{colon}{Path(file).absolute()}"


def submission_folder(configs: list[DictConfig]) -> Path:
    """Where submitit's files, Slurm's logs and the copy of the code go."""
    if len(configs) == 1:
        return job_directory(configs[0]) / "logs"
    return Path(configs[0].output_dir) / "sweeps" / time.strftime("%Y%m%d-%H%M%S")


def build_executor(cfg: DictConfig, folder: Path) -> submitit.AutoExecutor:
    folder.mkdir(parents=True, exist_ok=True)
    code = copy_code(folder) if cfg.env.snapshot else REPOSITORY
    # A long training runs into its time limit any number of times.
    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=1_000_000)
    executor.update_parameters(  # None: not set
        name=cfg.job_name,
        nodes=cfg.env.world_size,
        tasks_per_node=processes_per_node(cfg),
        cpus_per_task=cfg.env.workers,
        gpus_per_node=cfg.env.ngpu or None,
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
        slurm_additional_parameters={"requeue": True, **cfg.env.slurm_extra},
        slurm_setup=[
            f"cd {shlex.quote(str(code))}",
            f"export PYTHONPATH={shlex.quote(str(code))}",
            *(f"export {name}={shlex.quote(str(value))}" for name, value in cfg.env.nccl.items()),
        ],
        # One lost process ends all, which would otherwise wait for it until the time limit.
        slurm_srun_args=["--kill-on-bad-exit=1"],
        slurm_teardown=requeue_after_a_crash(folder, cfg.env.max_restarts),
    )
    return executor


def copy_code(folder: Path) -> Path:
    """Later edits in the working tree must not reach a job that is requeued."""
    code = folder / "code"
    shutil.rmtree(code, ignore_errors=True)
    code.mkdir()
    for pattern in CODE:
        for path in REPOSITORY.glob(pattern):
            if path.is_dir():
                shutil.copytree(
                    path, code / path.name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(path, code / path.name)
    return code


def requeue_after_a_crash(folder: Path, max_restarts: int) -> list[str]:
    """Shell lines after srun. Slurm's own restart count has preemptions in it, so crashes are
    counted in a file. A process that fails for good (bad config, missing data) leaves a file that
    says so. After a requeue by signal these lines do not run: Slurm ends the batch script."""
    return [
        "rc=$?",
        f"marks={shlex.quote(str(folder))}/$SLURM_JOB_ID",
        'crashes=$(cat "$marks.crashes" 2>/dev/null || echo 0)',
        f'if [ $rc -ne 0 ] && [ ! -e "$marks.final" ] && [ "$crashes" -lt {max_restarts} ]; then',
        '  echo $((crashes + 1)) > "$marks.crashes"',
        f'  echo "exit status $rc: restart $((crashes + 1)) of {max_restarts}"',
        "  scontrol requeue $SLURM_JOB_ID",
        "fi",
        "exit $rc",
    ]


def describe(cfg: DictConfig, job_id: str, log: Path) -> None:
    jobs = shlex.quote(str(cfg.output_dir))
    print(
        f"{cfg.job_name}: submitted as job {job_id}\n"
        f"  follow  tail -F {shlex.quote(str(log))}\n"
        f"  stop    scancel {job_id}\n"
        f"  resume  the same command with resume=True\n"
        f"  status  python launcher.py --config-name=status output_dir={jobs}"
    )


# --- on the node --------------------------------------------------------------------------------


class SlurmTask:
    """What submitit pickles and calls, once per process."""

    def __init__(self, config: dict):
        self.config = config

    def __call__(self) -> None:
        # GPUs are chosen by local rank among those that Slurm has given (util/distributed.py);
        # submitit's own choice would ignore what was given.
        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        # After a requeue Slurm starts the pickle of the submission again.
        if is_restart() and "resume" in self.config:
            self.config["resume"] = True
        if self.config["env"]["ngpu"] == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from util.command import leave, run_configured_worker

        exit_code = run_configured_worker(self.config)
        # Again would be the same. Busy: a second submission; after a restart, the last start's end.
        final = [ConfigError.exit_code, TrainingStopped.exit_code]
        if exit_code in final or (exit_code == JobBusy.exit_code and not is_restart()):
            mark = Path(os.environ["SUBMITIT_FOLDER"]) / f"{os.environ['SLURM_JOB_ID']}.final"
            mark.touch()
        if exit_code:
            leave(exit_code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called when a signal requeues the job, after the training has saved."""
        return submitit.helpers.DelayedSubmission(SlurmTask(self.config))


# --- the queue ----------------------------------------------------------------------------------


def note_file(cfg: DictConfig) -> Path:
    return job_directory(cfg) / "logs" / "slurm.json"


def job_in_queue(cfg: DictConfig, queue: dict[str, str]) -> str | None:
    """By name, or (elements of an array share a name) by the id noted at submission."""
    for job_id, name in queue.items():
        if name == cfg.job_name:
            return job_id
    with contextlib.suppress(FileNotFoundError):
        noted = json.loads(note_file(cfg).read_text())["job_id"]
        return noted if noted in queue else None
    return None


def follow(note: dict) -> int:
    """Copy the log to this terminal until the job has ended. -> its exit status"""
    path, position = Path(note["log"]), 0
    while True:
        # The state is read before the log, so that the log's last lines are not missed.
        state = job_state(note["job_id"]).get("JobState", "UNKNOWN")
        if path.exists():
            with open(path) as log:
                log.seek(position)
                print(log.read(), end="", flush=True)
                position = log.tell()
        if state in {*OVER, "UNKNOWN"}:
            break
        time.sleep(1)
    if state == "COMPLETED":
        return 0
    status, _ = job_state(note["job_id"]).get("ExitCode", "1:0").split(":")
    print(f"job {note['job_id']} ended as {state}", file=sys.stderr)
    return int(status) or 1
