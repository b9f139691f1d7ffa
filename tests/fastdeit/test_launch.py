"""Several tasks without torchrun, and cheap mistakes: refused at once, without PyTorch."""

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from fastdeit.launch import check_launch, check_store
from fastdeit.pipelines.errors import UserError
from refusals import refused
from system import run_python


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "4"},
    ],
)
def test_tasks_without_torchrun_are_refused(environ):
    refused(r"without torchrun each would train alone: start one task on each node.*torchrun", check_launch, environ)
    assert check_launch({**environ, "RANK": "0", "WORLD_SIZE": "2"}) is None


def test_a_script_that_joins_the_world_is_refused_too(monkeypatch):
    from fastdeit.distributed import world

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="without torchrun each would train alone"), world("cpu"):
        pass


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
    ],
)
def test_variables_that_torchrun_does_not_set_are_refused(environ):
    refused(r"^RANK=.*start the processes with torchrun, or unset the variable", check_launch, environ)


@pytest.mark.parametrize(
    ("environ", "warned"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1 in a larger job
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, True),  # the batch script itself
        ({"SLURM_NTASKS": "8"}, False),
    ],
)
def test_one_task_may_train(environ, warned):
    assert (check_launch(environ) is not None) == warned


def test_several_machines_that_share_torchruns_store_are_a_warning():
    several = {"GROUP_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "16", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in check_store(several)
    for other in ({"GROUP_WORLD_SIZE": "1"}, {"RANK": "3"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        assert check_store({**several, **other}) is None
    assert check_store({}) is None


# A process starts another in torchrun's place, tells its number, and waits.
PARENT = """
import os, subprocess, sys
environ = {**os.environ, "TORCHELASTIC_RUN_ID": "1", "RANK": "3", "WORLD_SIZE": "4"}
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environ)
print(child.pid, flush=True)
child.wait()
"""
CHILD = """
import os, threading, time
from fastdeit import launch
{patch}
launch.prepare()
launch.prepare()
assert [thread.name for thread in threading.enumerate()].count("fastdeit-parent") == 1
print("ready", flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize("patch", ["", "del os.pidfd_open"])
def test_a_process_ends_with_the_torchrun_that_started_it(patch):
    """At once on Linux; elsewhere within a second."""
    command = [sys.executable, "-c", PARENT, CHILD.format(patch=patch)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "ready\n"
    parent.send_signal(signal.SIGKILL)
    expected = f"error: torchrun (process {parent.pid}), which started rank 3 (process {child.pid}), has ended"
    assert parent.stderr.readline().startswith(expected)
    assert psutil.wait_procs([child], timeout=60)[1] == []
    parent.communicate()


MISTAKES = """
import json, sys, time
from fastdeit.commands.train import train
out = []
for args in json.loads(sys.argv[1]):
    sys.argv[1:] = args
    try:
        train()
    except Exception as error:
        out.append(str(error))
    assert "torch" not in sys.modules, args
print(json.dumps(out))
"""


@pytest.mark.slow
def test_mistakes_are_found_before_pytorch_is_loaded(data, tmp_path):
    train = ["--data.train", str(data / "train.beton")]
    cases = {
        "no data set: give --data.train": ["deit_tiny"],
        "--data.train /nowhere: there is no such file": ["deit_tiny", "--data.train", "/nowhere"],
        "--data.val /nowhere: there is no such file": ["deit_tiny", *train, "--data.val", "/nowhere"],
        "there is no recipe 'deit_huge': choose one of deit_tiny": ["deit_huge"],
        "--model.init /n.pt: there is no such checkpoint file": ["deit_tiny", *train, "--model.init", "/n.pt"],
        "--run.resume /n.pt: there is no such checkpoint file": ["deit_tiny", *train, "--run.resume", "/n.pt"],
        "give --teacher.checkpoint FILE": ["deit_tiny_distilled", *train],
        "--teacher.checkpoint /n.pt: there is no such checkpoint file": [
            "deit_tiny_distilled", *train, "--teacher.checkpoint", "/n.pt",
        ],
        "--teacher.labels /nowhere: there is no such folder": [
            "deit_tiny_distilled", *train, "--teacher.labels", "/nowhere",
        ],
        "there are 160 images to train on, fewer than a global batch of 1024": ["deit_tiny", *train],
        "batch is 100, not a multiple of departures.mix_group": ["deit_tiny", *train, "--run.global_batch", "100"],
        "set --model.num_classes 4": ["deit_tiny", *train, "--model.num_classes", "2"],
        "augment.color_jitter 0.5 has no effect": ["deit_tiny", *train, "--augment.color_jitter", "0.5"],
    }  # fmt: skip
    output = ["--run.output", str(tmp_path / "run")]
    done = run_python("-c", MISTAKES, json.dumps([[*args, *output] for args in cases.values()]), timeout=120, status=0)
    for wanted, found in zip(cases, json.loads(done.stdout), strict=True):
        assert wanted in found
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_slurm_tasks_end_with_the_remedy(data):
    environ = {**os.environ, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    done = run_python(
        "-m", "fastdeit.train", "deit_tiny", "--data.train", data / "train.beton", env=environ, timeout=60
    )
    assert done.returncode == 2
    assert "srun --ntasks-per-node=1 torchrun" in done.stderr


@pytest.mark.slow
def test_a_terminal_sees_a_line_before_pytorch_is_imported(tmp_path):
    """At once where a start takes seconds; nothing of it where the output goes to a file."""
    (tmp_path / "picture.png").write_bytes(b"")
    words = [sys.executable, "-m", "fastdeit", "predict", str(tmp_path / "missing.pt"), str(tmp_path / "picture.png")]
    terminal, other = pty.openpty()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=other) as process:
        os.close(other)
        shown = b""
        with suppress(OSError):  # the end of a terminal whose last process has ended
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    lines = shown.decode().splitlines()
    assert process.returncode == 2
    assert lines[0] == "starting PyTorch ..."
    assert "missing.pt" in lines[-1]
    quiet = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "starting" not in quiet.stderr
