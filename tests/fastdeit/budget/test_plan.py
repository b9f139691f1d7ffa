"""The forecast against measured runs, timm's FLOP counts, and arithmetic on the paper's figures."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.budget.cards import CARDS
from fastdeit.budget.plan import TEACHER_GMAC, Images, Machine, fewest_gpus, plan
from fastdeit.budget.step import memory
from fastdeit.recipes import RECIPES
from refusals import refused
from runs import changed

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "throughput.jsonl"
FORM = "fastdeit compiled + kernels + graph"


def recipe(name="deit_small", **sections):
    return changed(RECIPES[name](), **sections).resolved()


def on(gpus=1, card="H200", **options):
    return Machine(card=CARDS[card], gpus=gpus, **options)


def measured():
    """Records of whole steps on an H200 at the newest commits: model, batch, residual dtype, figures.

    Without those of an older timm, which launches LAMB's update tensor by tensor.
    """
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        old = record["model"].startswith("deit3") and record["environment"]["versions"]["timm"] == "1.0.29"
        if (record["environment"]["gpu"] or {}).get("name") == "NVIDIA H200" and "kernels" in record and not old:
            residual = "bfloat16" if "residual" in record["precision"] else "float32"
            yield record["model"], record["batch"], residual, record["sides"][FORM]


@pytest.mark.parametrize(("model", "batch", "residual", "figures"), [*measured()])
def test_rate_and_memory_are_those_measured(model, batch, residual, figures):
    run = {"global_batch": batch}
    made = recipe(model, run=run, model={"residual_dtype": residual}, ema={"enabled": False})
    found = plan(made, on(), Images())
    assert found.rate == pytest.approx(figures["images_per_second"], rel=0.10)
    assert found.memory == pytest.approx(2**20 * figures["peak_memory_mib"], rel=0.06)
    assert found.fits


def test_apexs_lamb_moves_and_holds_less_than_timms():
    timms, apexs = (
        plan(recipe("deit3_base", optim={"implementation": kind}), on(8), Images()) for kind in ("torch", "apex")
    )
    assert apexs.rate > timms.rate
    assert apexs.memory < timms.memory


def test_measurements_are_there():
    assert len([*measured()]) >= 7


@pytest.mark.parametrize("name", TEACHER_GMAC)
def test_the_teachers_work_is_that_of_timms_network(name):
    arch = "tf_efficientnet_lite0" if name.startswith("efficientnet_lite0") else name
    with torch.device("meta"):
        network = timm.create_model(arch).eval()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        network(images)
    assert 2e9 * TEACHER_GMAC[name] == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_the_hours_are_those_of_the_steps():
    found = plan(recipe(run={"epochs": 30}, data={"val": None}), on(8), Images(val=0))
    assert found.steps == 1_281_167 // 1024
    assert found.evaluation == 0
    assert found.total == pytest.approx(30 * found.steps * sum(found.seconds.values()))
    assert found.cost is None
    priced = plan(recipe(run={"epochs": 30}), on(8, price=2.0), Images(val=0))
    assert priced.cost == pytest.approx(2.0 * 8 * priced.total / 3600)
    assert priced.kilowatt_hours == pytest.approx(0.7 * 8 * priced.total / 3600)


def test_more_gpus_take_less_time_but_not_in_proportion():
    plans = [plan(recipe("deit_base"), on(gpus), Images()) for gpus in (1, 2, 8, 16)]
    times = [found.total for found in plans]
    assert times == sorted(times, reverse=True)
    assert times[0] < 16 * times[-1]
    assert [found.machine.machines for found in plans] == [1, 1, 1, 2]
    assert "gradients" not in plans[0].seconds
    assert plans[2].seconds["gradients"] < plans[3].seconds["gradients"]


def test_few_cores_hold_a_small_network_up():
    free, held = (plan(recipe("deit_tiny"), on(cores=cores), Images()) for cores in (None, 8))
    assert held.speed < 0.5 * free.speed == 0.5 * free.rate
    assert held.bottleneck == "the cores, which decode and prepare images"
    enough = plan(recipe("deit_tiny"), on(cores=round(free.cores) + 1), Images())
    assert enough.speed == free.speed
    once = plan(recipe("deit_tiny", data={"repeats": 1}), on(cores=8), Images())
    assert once.speed < held.speed  # each image is decoded for one sample instead of three


def test_many_processes_without_a_graph_wait_for_the_host():
    assert plan(recipe("deit_tiny"), on(8), Images()).seconds["host"] > 0
    graph = plan(recipe("deit_tiny", run={"cuda_graphs": "on"}), on(8), Images())
    assert "host" not in graph.seconds


def test_a_batch_that_does_not_fit_is_split():
    found = plan(recipe("deit_base", model={"img_size": 384}), on(card="RTX 4090"), Images())
    assert found.fits
    assert found.micro_batch < 1024
    assert found.memory < CARDS["RTX 4090"].memory
    assert f"this is for --run.micro_batch {found.micro_batch}" in " ".join(found.notes)
    fixed = plan(recipe("deit_base", run={"micro_batch": 1024}), on(card="RTX 4090"), Images())
    assert not fixed.fits
    assert memory(recipe("deit_base").model, 64) < memory(recipe("deit_base").model, 128)


def test_a_teacher_in_the_loop_takes_time_and_stored_labels_do_not(tmp_path):
    student = plan(recipe("deit_base_distilled"), on(8), Images())
    assert student.seconds["teacher"] > 0
    labels = plan(recipe("deit_base_distilled", teacher={"labels": tmp_path}), on(8), Images())
    assert "teacher" not in labels.seconds
    assert student.evaluation == pytest.approx(labels.evaluation, rel=0.05)
    split = plan(recipe("deit_base_distilled", run={"micro_batch": 64}), on(), Images())
    assert split.evaluation == pytest.approx(8 * student.evaluation, rel=0.2)
    unknown = plan(recipe("deit_base_distilled", teacher={"name": "resnet50"}), on(8), Images())
    assert "resnet50 is not in these figures" in " ".join(unknown.notes)


def test_the_fewest_gpus_for_a_deadline():
    made = recipe("deit_base")
    gpus = fewest_gpus(made, on(), Images(), 8)
    assert gpus is not None
    assert plan(made, on(gpus), Images()).total <= 8 * 3600 < plan(made, on(gpus // 2), Images()).total
    assert fewest_gpus(made, on(), Images(), 0.01) is None


@pytest.mark.parametrize(
    ("made", "machine", "message"),
    [
        (recipe("convnet_teacher"), on(), "knows the arch 'deit'"),
        (recipe(run={"precision": "fp32"}), on(), "knows bf16, not run.precision 'fp32'"),
        (recipe(), on(7), "not a multiple of the 7 processes"),
        (recipe(), on(0), "--gpus 0"),
    ],
)
def test_what_the_forecast_does_not_know_is_refused(made, machine, message):
    refused(message, plan, made, machine, Images())


def test_a_curriculum_takes_the_time_of_runs_of_its_sizes():
    made = recipe("deit_small_curriculum")
    found = plan(made, on(8, cores=64), Images())
    hours = found.evaluation
    for size, epochs in ((96, 218), (160, 157), (192, 54), (224, 40)):
        shape = {"img_size": size}
        alone = recipe("deit_small_short_100", model=shape, run={"epochs": epochs, "micro_batch": found.micro_batch})
        part = plan(alone, on(8, cores=64), Images())
        hours += part.total - part.evaluation
    assert found.total == pytest.approx(hours, rel=1e-6)
    # Nothing else limits the GPUs: about the time of 200 epochs at full size.
    free, full = plan(made, on(8), Images()), plan(recipe("deit_small_short_200"), on(8), Images())
    assert free.total - free.evaluation == pytest.approx(full.total - full.evaluation, rel=0.15)
    assert free.cores > 3 * full.cores
