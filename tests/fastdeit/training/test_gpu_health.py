"""What the log says of GPUs. NVML's constants come from its own package; its answers are made up."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastdeit.distributed import World
from fastdeit.training import gpu_health
from fastdeit.training.gpu_health import Gpu, GpuHealth
from fastdeit.training.reports import report_gpus
from run_logs import run_log

pynvml = pytest.importorskip("pynvml")

CUDA = World(0, 1, 1, torch.device("cuda", 0))
UUID = "12345678-1234-1234-1234-123456789abc"


class FakeNvml:
    """One GPU; `readings` gives temperature, milliwatts and reasons of the next samples."""

    def __init__(self, readings, energies):
        self.readings, self.energies = iter(readings), iter(energies)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == f"GPU-{UUID}".encode()
        return "the GPU"

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert (handle, sensor) == ("the GPU", pynvml.NVML_TEMPERATURE_GPU)
        self.now = next(self.readings)
        return self.now[0]

    def nvmlDeviceGetPowerUsage(self, handle):
        return self.now[1]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.now[2]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return next(self.energies)


@pytest.fixture
def card(monkeypatch):
    """Function: have NVML be this object, and CUDA one GPU with 3 GiB in use."""

    def put(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)

    return put


def test_the_extremes_of_an_epoch_and_the_energy(card):
    heat, brake = pynvml.nvmlClocksEventReasonHwThermalSlowdown, pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown
    cap, idle = pynvml.nvmlClocksEventReasonSwPowerCap, pynvml.nvmlClocksEventReasonGpuIdle
    readings = [(60, 300_000, idle), (88, 690_000, cap | heat), (70, 500_000, 0), (50, 100_000, brake)]
    card(FakeNvml(readings, [1_000_000, 4_500_000, 4_500_000, 4_600_000, 4_600_000]))
    health = GpuHealth(CUDA)
    health.sample()
    health.sample()
    first = health.gathered()
    assert first == [Gpu(3 * 2**30, 88, 690.0, 3500.0, ["heat (hardware)", "power limit"])]
    second = health.gathered()
    assert second == [Gpu(3 * 2**30, 50, 100.0, 100.0, ["power brake"])]
    (sentence,) = health.warnings(first)
    assert "clocks of the GPU of process 0 at 88 degrees: heat (hardware)." in sentence
    assert health.warnings(first) == []  # once
    assert len(health.warnings(second)) == 1


def test_every_reason_is_named_as_nvml_does():
    names = {
        pynvml.nvmlClocksEventReasonSwPowerCap: "power limit",
        pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
        pynvml.nvmlClocksEventReasonSwThermalSlowdown: "heat (software)",
        pynvml.nvmlClocksEventReasonHwThermalSlowdown: "heat (hardware)",
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    }
    assert names == gpu_health._SLOWED


def test_what_nvml_does_not_say_is_none(card):
    """As on a part of a GPU (MIG), which has no sensors."""

    class Silent(FakeNvml):
        def __getattribute__(self, name):
            if name.startswith("nvmlDeviceGet") and not name.endswith("UUID"):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return super().__getattribute__(name)

    card(Silent([], []))
    assert GpuHealth(CUDA).gathered() == [Gpu(3 * 2**30, None, None, None, [])]


def test_a_machine_without_the_library_or_the_package_is_told(card, monkeypatch):
    card(pynvml)  # the package itself, on a machine without a driver
    health = GpuHealth(CUDA)
    if not torch.cuda.is_available():
        assert health.fault is not None
        assert health.fault.startswith(gpu_health.NO_NVML)
    card(None)
    health = GpuHealth(CUDA)
    assert health.fault == f"{gpu_health.NO_NVML}: pip install 'fastdeit[nvml]'"
    assert health.gathered() == [Gpu(3 * 2**30, None, None, None, [])]


def test_without_a_gpu_there_is_nothing_to_say():
    health = GpuHealth(World(0, 1, 1, torch.device("cpu")))
    assert health.fault is None
    health.sample()
    assert health.gathered() == []


def test_the_line_of_the_log(tmp_path, events, capsys):
    gpus = [Gpu(3 * 2**30, 88, 690.4, 3500.2, ["power brake"]), Gpu(2**29, None, None, None, [])]
    with run_log(tmp_path) as log:
        report_gpus(log, 3, gpus, ["x"])
        report_gpus(log, 4, [], [])
    (line,) = events(tmp_path, "gpus")
    assert line["epoch"] == 3
    assert line["processes"] == [
        {"memory_gib": 3.0, "temperature": 88, "watts": 690, "joules": 3500, "slowed": ["power brake"]},
        {"memory_gib": 0.5, "temperature": None, "watts": None, "joules": None, "slowed": []},
    ]
    assert "warning: x" in capsys.readouterr().out


@pytest.mark.gpu
def test_this_gpu():
    health = GpuHealth(CUDA)
    (gpu,) = health.gathered()
    assert gpu.memory >= 0
    if health.fault is None and gpu.temperature is not None:
        assert 5 < gpu.temperature < 120
        assert 0 < gpu.watts < 2000
