"""The Slurm template: its commands are ours; warned of its time limit, it queues itself again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import heartbeat_training
from heartbeat_training import cli

TEMPLATE = Path(heartbeat_training.__file__).parent / "heartbeat.sbatch"
# Stand-ins: srun drops its options, torchrun notes its arguments and ends when asked to.
SRUN = 'while [ "$1" != torchrun ]; do shift; done; exec "$@"'
TORCHRUN = """printf '%s\\n' "$@" > arguments; echo "$OMP_NUM_THREADS" > threads
for i in $(seq 600); do
    [ -e "$HEARTBEAT_STOP" ] && exit 1
    [ -e finish ] && exit 0
    sleep 0.05
done
exit 3"""
SCONTROL = 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" > requeued; fi'
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
}


def examples() -> list[list[str]]:
    """Arguments of the commands that the template's head names."""
    lines = re.findall(r"^#   sbatch .*heartbeat\.sbatch (.+)$", TEMPLATE.read_text(), re.MULTILINE)
    return [line.split() for line in lines]


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A folder to run in, with stand-ins for Slurm and torchrun first on the path."""
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", SRUN), ("torchrun", TORCHRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, **SLURM, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def start(folder: Path, cluster: dict[str, str]) -> subprocess.Popen[bytes]:
    job = subprocess.Popen(["bash", str(TEMPLATE), *examples()[0]], cwd=folder, env=cluster)
    deadline = time.monotonic() + 30
    while not (folder / "threads").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return job


def test_the_template_is_bash() -> None:
    subprocess.run(["bash", "-n", str(TEMPLATE)], check=True)


def test_a_warning_asks_the_processes_to_stop_and_queues_again(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    job = start(tmp_path, cluster)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 1
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert not list(tmp_path.glob(".heartbeat-stop-*"))


def test_a_finished_job_is_not_queued_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    job = start(tmp_path, cluster)
    (tmp_path / "finish").touch()
    assert job.wait(timeout=30) == 0
    assert not (tmp_path / "requeued").exists()
    assert (tmp_path / "threads").read_text() == "8\n"
    launched = get_args_parser().parse_args((tmp_path / "arguments").read_text().splitlines())
    assert (launched.nnodes, launched.nproc_per_node) == ("2", "8")
    assert launched.rdzv_endpoint == "node1:24711"
    assert launched.module
    assert launched.training_script == "heartbeat_training.cli"
    assert launched.training_script_args == examples()[0]


def test_its_examples_are_commands_of_ours() -> None:
    assert len(examples()) == 2
    for example in examples():
        arguments = cli._parser().parse_args(example)
        assert arguments.command == example[0]
