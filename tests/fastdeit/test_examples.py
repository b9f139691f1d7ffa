"""The files in examples/: their syntax, their commands, and what they do on signals; stubs stand in for SLURM."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from fastdeit.cli import parse_recipe
from fastdeit.recipes import RECIPES
from system import run, wait_for

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = ["local.sh", "slurm.sbatch"]
WORDS = ["deit_small", "--data.train", "train.beton", "--run.output", "runs/a b"]


def check_torchrun(words, expected):
    """Assert that torchrun would start `fastdeit.train` with the words `expected`, and return its options."""
    options = get_args_parser().parse_args(words)
    assert (options.module, options.training_script) == (True, "fastdeit.train")
    assert options.training_script_args == expected
    assert parse_recipe(expected).name in RECIPES
    return options


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_bash(name):
    assert run("bash", "-n", EXAMPLES / name).returncode == 0
    if shutil.which("shellcheck") is not None:
        run("shellcheck", EXAMPLES / name, status=0)


@pytest.fixture
def stubs(tmp_path):
    """Function: put a program of this name first in the search path; returns the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    environ = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HERE": str(tmp_path)}

    def put(name, code):
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
        return environ

    return put


RECORD = 'printf "%s\\n" "$@" > "$HERE/{}"'


@pytest.mark.parametrize(("gpus", "processes"), [("exit 127", "1"), ("echo GPU 0; echo GPU 1", "2")])
def test_local_starts_a_process_for_each_gpu(stubs, tmp_path, gpus, processes):
    stubs("nvidia-smi", gpus)
    environ = stubs("torchrun", RECORD.format("torchrun"))
    assert run(EXAMPLES / "local.sh", *WORDS, env=environ).returncode == 0
    options = check_torchrun((tmp_path / "torchrun").read_text().splitlines(), WORDS)
    assert (options.nproc_per_node, options.max_restarts, options.standalone) == (processes, 3, True)


@pytest.mark.slow
def test_local_trains(tiny, tmp_path, events):
    recipe = tiny(run={"epochs": 1, "eval_every": 1})
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_dict()))
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(EXAMPLES.parent),
        "PROCESSES": "2",
    }
    run(EXAMPLES / "local.sh", recipe.name, "--config", file, env=environ, status=0)
    assert len(events(recipe.run.output, "train")) == 5


SRUN = """
trap 'exit "$(cat "$HERE/status")"' TERM
printf "%s\\n" "$@" > "$HERE/srun.new"
echo $$ > "$HERE/pid"
mv "$HERE/srun.new" "$HERE/srun"
while [ ! -e "$HERE/end" ]; do sleep 0.02; done
exit "$(cat "$HERE/end")"
"""
SCONTROL = 'case $1 in show) echo node1; echo node2 ;; *) echo "$@" >> "$HERE/scontrol" ;; esac'
SCANCEL = 'echo "$@" > "$HERE/scancel"; kill -TERM "$(cat "$HERE/pid")"'


def end(folder, status):
    """Let srun end with this status; the file appears with its content."""
    (folder / "end.new").write_text(str(status))
    (folder / "end.new").rename(folder / "end")


@pytest.fixture
def job(stubs, tmp_path):
    """The batch script, which runs, and its srun, which waits."""
    stubs("srun", SRUN)
    stubs("scontrol", SCONTROL)
    environ = stubs("scancel", SCANCEL)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    process = subprocess.Popen(["bash", EXAMPLES / "slurm.sbatch", *WORDS], env={**environ, **slurm})
    wait_for((tmp_path / "srun").exists, process)
    yield process
    end(tmp_path, 0)
    process.kill()
    process.wait()


def test_slurm_starts_one_torchrun_on_each_machine(job, tmp_path):
    words = (tmp_path / "srun").read_text().splitlines()
    options = check_torchrun(words[words.index("torchrun") + 1 :], WORDS)
    assert (options.nnodes, options.nproc_per_node) == ("2", "gpu")
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "node1:22345", "12345")
    assert options.shutdown_timeout < 120  # the seconds of --signal
    end(tmp_path, 0)
    assert job.wait(60) == 0
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("status", [1, 75])
def test_slurm_queues_the_job_again_at_its_time_limit(job, tmp_path, status):
    (tmp_path / "status").write_text(str(status))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == status
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 12345.0\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 12345\n"


@pytest.mark.parametrize(("status", "again"), [(75, True), (1, False), (2, False)])
def test_slurm_queues_a_job_again_that_asks_for_it_but_no_error(job, tmp_path, status, again):
    end(tmp_path, status)
    assert job.wait(60) == status
    assert (tmp_path / "scontrol").exists() == again


def test_slurm_does_not_queue_a_job_again_that_ends_well_after_the_signal(job, tmp_path):
    (tmp_path / "status").write_text("0")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert not (tmp_path / "scontrol").exists()


def test_slurm_asks_for_the_signal_and_for_requeueing():
    options = [
        line.split(maxsplit=1)[1]
        for line in (EXAMPLES / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)


# The fields of PyTorchJob v1 (kubeflow/training-operator, pkg/apis/kubeflow.org/v1), and of a pod those used here.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"runPolicy", "elasticPolicy", "pytorchReplicaSpecs", "nprocPerNode"},
    "spec.runPolicy": {
        "cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy",
        "suspend", "managedBy",
    },
    "spec.elasticPolicy": {
        "minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf", "standalone",
        "nProcPerNode", "maxRestarts", "metrics",
    },
    "spec.pytorchReplicaSpecs": {"Master", "Worker"},
    "spec.pytorchReplicaSpecs.Worker": {"replicas", "template", "restartPolicy"},
    "spec.pytorchReplicaSpecs.Worker.template": {"metadata", "spec"},
    "spec.pytorchReplicaSpecs.Worker.template.spec": {"terminationGracePeriodSeconds", "containers", "volumes"},
}  # fmt: skip


def test_the_kubernetes_job_is_one_that_the_operator_accepts():
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
    for path, names in FIELDS.items():
        held = job
        for name in path.split(".") if path else ():
            held = held[name]
        assert set(held) <= names, path
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker, elastic = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    assert isinstance(spec["nprocPerNode"], str)
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, *words = container["command"]
    assert program == "torchrun"
    options = check_torchrun(words, words[words.index("fastdeit.train") + 1 :])
    assert options.shutdown_timeout < pod["terminationGracePeriodSeconds"]


def instructions(path):
    """Each instruction of a Dockerfile as (name, rest), with continuation lines joined and comments dropped."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line:
            name, rest = line.split(maxsplit=1)
            yield name, rest


DOCKERFILE = list(instructions(EXAMPLES / "Dockerfile"))
RUNS = [rest for name, rest in DOCKERFILE if name == "RUN"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_image_installs_the_system_packages_of_the_makefile():
    (line,) = re.findall(r"^SYSTEM := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (install,) = (code for code in RUNS if "apt-get install" in code)
    _, _, words = install.partition("--no-install-recommends")
    assert set(words.partition("&&")[0].split()) == set(line.split()) - {"python3-venv"}


def test_the_image_gets_what_the_build_needs():
    copied = {word for name, rest in DOCKERFILE if name == "COPY" for word in rest.split()[:-1]}
    assert copied == {
        "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "fastdeit", "kernels", "pipelines",
    }  # fmt: skip
    assert all((ROOT / name).exists() for name in copied)
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(RUNS)):
        assert extra in PROJECT["optional-dependencies"]


def test_the_image_keeps_its_pytorch_which_is_new_enough():
    installs = [code for code in RUNS if "pip install" in code]
    assert len(installs) == 1
    assert installs[0].count("pip install") == installs[0].count("pip install -c constraints.txt")
    (pattern,) = re.findall(r"grep -E '([^']*)'", installs[0])
    for line in ("torch==2.12.0a0+1a2b3c", "torchvision==0.27.0a0", "numpy==2.1.0", "pytorch-triton==3.6"):
        assert re.search(pattern, line)
    assert not re.search(pattern, "torchmetrics==1.0")
    (minimum,) = re.findall(r"^torch>=(.*)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE)
    assert f"fastdeit needs {minimum}." in (EXAMPLES / "Dockerfile").read_text()


def test_the_image_runs_a_command_that_exists_and_not_as_root():
    found = dict(DOCKERFILE)
    (program,) = json.loads(found["ENTRYPOINT"])
    assert program in PROJECT["scripts"]
    assert found["USER"].isdecimal()
    assert f"--uid {found['USER']} " in " ".join(RUNS)


def test_the_commands_in_the_image_are_valid():
    for code in RUNS:
        assert run("bash", "-n", "-c", code).returncode == 0
    if shutil.which("hadolint") is not None:
        run("hadolint", EXAMPLES / "Dockerfile", status=0)


def test_the_images_comments_start_commands_that_exist():
    text = (EXAMPLES / "Dockerfile").read_text()
    comments = "\n".join(line[2:] for line in text.splitlines() if line.startswith("#")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in comments.splitlines() if line.startswith("  docker run")]
    single = next(words for words in commands if "train" in words)
    assert parse_recipe(single[single.index("train") + 1 :]).name == "deit_small"
    several = next(words for words in commands if "torchrun" in words)
    words = several[several.index("fastdeit") + 1 : -1]
    check_torchrun(words, words[words.index("fastdeit.train") + 1 :])
