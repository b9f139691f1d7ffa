"""The state of a run's GPUs: memory, temperature, power, energy, and clocks that the driver has lowered.

All but the memory come from NVIDIA's management library (NVML), through the package nvidia-ml-py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastdeit.distributed import World

# The bits of NVML's clock event reasons: nvml.h, section "nvmlClocksEventReasons".
POWER_LIMIT = "power limit"
_SLOWED = {
    0x04: POWER_LIMIT,
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
NO_NVML = "temperature, power and lowered clocks of the GPUs are not logged"


class Gpu(NamedTuple):
    """Readings of one process's GPU over a part of a run; None for values that NVML does not report.

    memory       bytes: the most that PyTorch had allocated since the run started
    temperature  degrees Celsius, the highest reading
    watts        the highest reading
    joules       used in this part
    slowed       why the driver lowered the clocks at any reading
    """

    memory: int
    temperature: int | None
    watts: float | None
    joules: float | None
    slowed: list[str]


class GpuHealth:
    """Reads the GPU of this process; does nothing without one.

    fault  a sentence if NVML cannot be read, else None
    """

    def __init__(self, world: World) -> None:
        self._world, self._nvml, self._handle, self.fault = world, None, None, None
        self._warned = set[tuple[int, str]]()
        if world.device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # By UUID: NVML numbers all GPUs of the machine, including those that CUDA_VISIBLE_DEVICES hides.
            uuid = f"GPU-{torch.cuda.get_device_properties(world.device).uuid}"
            self._handle, self._nvml = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()), pynvml
        except ImportError:
            self.fault = f"{NO_NVML}: pip install 'fastdeit[nvml]'"
        except Exception as error:  # NVML has its own errors, and none of them may end a run
            self.fault = f"{NO_NVML}: {error}"
        self._begin()

    def _begin(self) -> None:
        self._temperature: int | None = None
        self._watts: float | None = None
        self._slowed = set[str]()
        self._energy = self._read("nvmlDeviceGetTotalEnergyConsumption")

    def sample(self) -> None:
        """Read the sensors; a few milliseconds at most."""
        if self._nvml is None:
            return
        temperature = self._read("nvmlDeviceGetTemperature", 0)  # NVML_TEMPERATURE_GPU
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        if temperature is not None:
            self._temperature = max(temperature, self._temperature or temperature)
        if milliwatts is not None:
            self._watts = max(milliwatts / 1000, self._watts or 0.0)
        self._slowed.update(name for bit, name in _SLOWED.items() if reasons & bit)

    def gathered(self) -> list[Gpu]:
        """Readings of each process's GPU since the last call, by rank; empty without GPUs. Call it on all processes."""
        if self._world.device.type != "cuda":
            return []
        self.sample()
        before, now = self._energy, self._read("nvmlDeviceGetTotalEnergyConsumption")
        joules = None if before is None or now is None else (now - before) / 1000
        memory = torch.cuda.max_memory_allocated(self._world.device)
        gpu = Gpu(memory, self._temperature, self._watts, joules, sorted(self._slowed))
        self._begin()
        return self._world.gathered(gpu)

    def warnings(self, gpus: Sequence[Gpu]) -> list[str]:
        """A sentence for each GPU that is slowed by heat or too little power, once for each reason."""
        out = []
        for rank, gpu in enumerate(gpus):
            new = [why for why in gpu.slowed if why != POWER_LIMIT and (rank, why) not in self._warned]
            self._warned.update((rank, why) for why in new)
            if new:
                at = "" if gpu.temperature is None else f" at {gpu.temperature} degrees"
                out.append(
                    f"the driver has lowered the clocks of the GPU of process {rank}{at}: {', '.join(new)}. All "
                    f"processes wait for the slowest GPU: check the cooling and power supply of this one"
                )
        return out

    def _read(self, function: str, *arguments: Any) -> int | None:
        """What an NVML function reports for this GPU; None if it fails, as on a part of a GPU (MIG)."""
        if self._nvml is None:
            return None
        with contextlib.suppress(Exception):
            return getattr(self._nvml, function)(self._handle, *arguments)
        return None
