import os
from collections.abc import Iterator

import pytest

from tests.runs import final_state, succeed_together
from tests.slurm.cluster import (
    ClusterError,
    cancel_all,
    cluster_environment,
    start_cluster,
    stop_cluster,
)
from tests.slurm.jobs import LONG


@pytest.fixture(scope="session")
def undisturbed_pair(tmp_path_factory) -> dict:
    """What LONG ends with on two processes, without Slurm and without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed_together(2, *LONG, f"output_dir={folder}")
    return final_state(folder / "demo")


@pytest.fixture(scope="session")
def require_cluster() -> Iterator[dict[str, str]]:
    """A Slurm cluster that every client finds; one that is up already is used and left up.

    Skips where there can be none; with LMIM_REQUIRE_SLURM=1 that is a failure.
    """
    environment = cluster_environment()
    started = environment is None
    if environment is None:
        give_up = pytest.fail if os.environ.get("LMIM_REQUIRE_SLURM") == "1" else pytest.skip
        reason = ""
        try:
            environment = start_cluster()
        except ClusterError as error:
            reason = str(error)
        if environment is None:  # out of the handler: one message, not a chain of two
            give_up(reason)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
    if started:
        stop_cluster()


@pytest.fixture(autouse=True)
def leave_no_jobs(require_cluster: dict[str, str]) -> Iterator[None]:
    """A test that fails must not leave a job whose name is in the way of the next one."""
    yield
    cancel_all()
