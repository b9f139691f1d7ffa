"""Time each pass of the device augmentation, compared with the bytes that it must move and with its peers.

The batch is that of the recipe: photos of 500 x 375 pixels, each decoded once for its three repeats, with plans drawn
as in a run. Peers do the same kind of work on the same images with their own random draws. torchvision's RandAugment
draws once per batch; a second figure has one draw per image, as the recipe requires.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.record import first_line
from fastdeit.pipelines.batch import DecodedBatch
from fastdeit.pipelines.device.stage import DeviceStage
from fastdeit.pipelines.host.stage import HostStage
from fastdeit.pipelines.plan.draw import PlanDrawer
from fastdeit.pipelines.plan.order import EpochOrder
from fastdeit.pipelines.plan.plan import CODE, Plan
from fastdeit.pipelines.plan.policy import Policy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEIGHT, WIDTH = 375, 500
SIZE = 224
_READ_ONLY = ("AutoContrast", "Equalize", "Contrast")  # read the pixels for a histogram or a mean
_REWRITTEN = ("Color", "Sharpness", "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A batch to augment."""

    decoded: DecodedBatch
    plan: Plan
    size: int
    dtype: torch.dtype

    @classmethod
    def draw(cls, batch: int, size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Job:
        """A step of the recipe, with smoothed noise as photos."""
        order = EpochOrder(max(batch, 64), global_batch=batch, seed=seed)
        samples = order.step(0, 0)
        images, source = np.unique(samples.index, return_inverse=True)
        rng = np.random.default_rng(seed)
        noise = rng.integers(0, 256, (len(images), HEIGHT + 4, WIDTH + 4, 3), dtype=np.uint8)
        pixels = np.stack([image[:-4, :-4] // 2 + image[4:, 4:] // 2 for image in noise])
        decoded = DecodedBatch(
            epoch=0,
            step=0,
            pixels=pixels.reshape(-1),
            offset=np.arange(len(images)) * HEIGHT * WIDTH * 3,
            height=np.full(len(images), HEIGHT, np.int32),
            width=np.full(len(images), WIDTH, np.int32),
            source=source.astype(np.int32),
            index=samples.index,
            label=samples.index % 1000,
        )
        sizes = (np.full(order.length, side, np.int32) for side in (HEIGHT, WIDTH))
        plan = PlanDrawer(Policy(), seed, *sizes, img_size=size).draw(samples)
        return cls(decoded=decoded, plan=plan, size=size, dtype=dtype)

    def bytes(self) -> dict[str, int]:
        """The least that each pass of `passes` must read and write."""
        image = 3 * self.size**2
        op, source = self.plan.op, self.decoded.source
        crops = np.zeros(len(self.decoded.offset))
        np.add.at(crops, source, 3.0 * self.plan.crop[:, 2] * self.plan.crop[:, 3])
        taken = int(np.minimum(crops, 3 * HEIGHT * WIDTH).sum())
        read = np.isin(op, [CODE[name] for name in _READ_ONLY]).sum()
        rewritten = np.isin(op, [CODE[name] for name in _REWRITTEN]).sum()
        everything = len(self.plan) * image
        out = everything * self.dtype.itemsize
        return {
            "resize": taken + everything,
            "operations": int(read + 2 * rewritten) * image,
            "normalize_erase_mix": everything + out,
            # One perfect kernel for the last two passes would move this.
            "augment": everything + out,
            "stage": taken + out,
        }


@dataclass(frozen=True)
class Passes:
    """Calls that each rerun one pass, on data that is already on the device."""

    calls: dict[str, Callable[[], object]]
    batch: Callable[[], Tensor]


def passes(job: Job, device: torch.device, layout: Literal["nchw", "patches"] = "patches") -> Passes:
    """The launches of `DeviceStage` one pass at a time, and the whole stage from the host's plan on."""

    def stage() -> DeviceStage:
        return DeviceStage(job.size, MEAN, STD, device=device, dtype=job.dtype, layout=layout)

    launches, images = stage().passes(job.decoded, job.plan)

    def run_augment() -> None:
        launches["operations"]()
        launches["normalize_erase_mix"]()

    def run_stage() -> None:
        launches["resize"]()
        run_augment()

    def batch() -> Tensor:
        run_stage()
        return images

    source = torch.from_numpy(job.decoded.pixels)
    pinned = source.pin_memory().numpy() if device.type == "cuda" else job.decoded.pixels
    decoded = DecodedBatch(**{**vars(job.decoded), "pixels": pinned})
    from_host = stage()
    return Passes(
        calls={
            **launches,
            "augment": run_augment,
            "stage": run_stage,
            "stage from the host": lambda: from_host(decoded, job.plan),
        },
        batch=batch,
    )


def disagreement(job: Job, device: torch.device) -> str | None:
    """Why the device's batch is wrong; None if it is bit-identical to the host stage's."""
    float32 = dataclasses.replace(job, dtype=torch.float32)
    with ThreadPoolExecutor(4) as pool:
        host = HostStage(job.size, MEAN, STD, pool=pool, threads=4)(job.decoded, job.plan).images
    ours = passes(float32, device, "nchw").batch().cpu()
    wrong = (ours != host).flatten(1).any(1).nonzero().flatten().tolist()
    return f"{len(wrong)} of {len(host)} samples differ from the host's, the first is {wrong[0]}" if wrong else None


@dataclass
class Peers:
    """Calls by pass and name; why others are absent, or failed to set up."""

    calls: dict[str, dict[str, Callable[[], object]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def available_peers(job: Job, device: torch.device) -> Peers:
    """Resizing and augmenting with torchvision, kornia and DALI, if they are installed."""
    peers = Peers({"resize": {}, "augment": {}})
    pixels = torch.from_numpy(job.decoded.pixels).view(-1, HEIGHT, WIDTH, 3).permute(0, 3, 1, 2).contiguous().to(device)
    images = torch.randint(0, 256, (len(job.plan), 3, job.size, job.size), dtype=torch.uint8, device=device)
    setups: dict[str, Callable[[], None]] = {
        "torchvision": lambda: _add_torchvision(peers, job, pixels, images),
        "kornia": lambda: _add_kornia(peers, job, images),
        "DALI": lambda: _add_dali(peers, job, images),
    }
    for name, setup in setups.items():
        try:
            setup()
        except Exception as error:  # an incompatible version must not cost our own figures
            peers.failed[name] = first_line(error)
    return peers


def _add_torchvision(peers: Peers, job: Job, pixels: Tensor, images: Tensor) -> None:
    crops, source = job.plan.crop.tolist(), job.decoded.source.tolist()
    policy = v2.RandAugment(num_ops=2, magnitude=9)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))])
    erase = v2.RandomErasing(p=0.25)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=1000), v2.CutMix(alpha=1.0, num_classes=1000)])
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def resize() -> Tensor:
        side = [job.size, job.size]
        bicubic = v2.InterpolationMode.BICUBIC
        return torch.stack(
            [
                v2.functional.resized_crop(
                    pixels[slot], top, left, height, width, side, interpolation=bicubic, antialias=True
                )
                for slot, (top, left, height, width) in zip(source, crops, strict=True)
            ]
        )

    def one_draw() -> Tensor:
        return mix(erase(normalise(policy(images))), labels)[0].to(job.dtype)

    def a_draw_each() -> Tensor:
        augmented = torch.stack([erase(normalise(policy(image))) for image in images])
        return mix(augmented, labels)[0].to(job.dtype)

    peers.calls["resize"]["torchvision"] = resize
    peers.calls["augment"]["torchvision, one draw a batch"] = one_draw
    peers.calls["augment"]["torchvision, a draw an image"] = a_draw_each


def _add_kornia(peers: Peers, job: Job, images: Tensor) -> None:
    try:
        import kornia.augmentation as kornia
    except ImportError:
        peers.absent["kornia"] = "pip install kornia"
        return
    sequence = kornia.AugmentationSequential(
        kornia.auto.RandAugment(n=2, m=9),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        kornia.RandomErasing(p=0.25),
    )
    peers.calls["augment"]["kornia"] = lambda: sequence(images.float() / 255).to(job.dtype)


def _add_dali(peers: Peers, job: Job, images: Tensor) -> None:
    try:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.auto_aug import rand_augment
    except ImportError:
        peers.absent["DALI"] = "pip install nvidia-dali-cuda120"
        return
    if images.device.type != "cuda":
        peers.absent["DALI"] = "its RandAugment runs only on GPUs here"
        return
    interleaved = images.permute(0, 2, 3, 1).contiguous()

    @pipeline_def(enable_conditionals=True, batch_size=len(images), num_threads=4, device_id=0)
    def pipeline() -> Any:
        batch = fn.external_source(source=lambda: interleaved, device="gpu", layout="HWC", no_copy=True)
        augmented = rand_augment.rand_augment(batch, n=2, m=9)
        return fn.crop_mirror_normalize(
            augmented,
            dtype=types.FLOAT16,  # pyright: ignore[reportAttributeAccessIssue]
            mean=[255 * x for x in MEAN],
            std=[255 * x for x in STD],
        )

    pipe = pipeline()
    pipe.build()

    def run() -> None:
        pipe.run()
        # DALI works on its own streams; an event on PyTorch's stream does not wait for them.
        torch.cuda.synchronize()

    peers.calls["augment"]["DALI, without erasing and mixing"] = run


def measure(
    job: Job,
    device: torch.device,
    launched: Callable[[Callable[[], object]], list[float]],
    graphed: Callable[[Callable[[], object]], list[float] | None],
    bytes_per_second: float,
) -> Iterator[dict[str, Any]]:
    """Yield a record for every pass: floor, time, times the floor, images per second, and the same for its peers.

    launched  times a call: milliseconds in each window
    graphed   the same in a CUDA graph of the call, without the launches; None if it cannot be captured. Not used for
              peers, which draw on the host

    If the results differ from the host stage nothing is timed: one record says so in `refused`.
    """
    common = {"op": "augment", "size": job.size, "refused": {}, "failed": {}, "absent": {}, "sides": {}}
    reason = disagreement(job, device)
    if reason is not None:
        yield {**common, "refused": {"fastdeit": reason}}
        return
    peers, floors = available_peers(job, device), job.bytes()
    for name, call in passes(job, device).calls.items():
        record: dict[str, Any] = {**common, "pass": name, "sides": {}, "failed": {}}
        if name == "augment":  # the pass that absent and failed peers would do
            record |= {"absent": peers.absent, "failed": dict(peers.failed)}
        if name in floors:
            record["floor_ms"] = 1e3 * floors[name] / bytes_per_second
        for contender, run in {"fastdeit": call, **peers.calls.get(name, {})}.items():
            try:
                windows = launched(run)
                in_graph = graphed(run) if run is call and name in floors else None
            except Exception as error:  # peers may raise anything
                record["failed"][contender] = first_line(error)
                continue
            median = statistics.median(windows)
            figures = {"ms": median, "windows": windows, "images_per_second": 1e3 * len(job.plan) / median}
            if in_graph is not None:
                figures |= {"graph_ms": statistics.median(in_graph), "graph_windows": in_graph}
            if "floor_ms" in record:
                figures["times_floor"] = figures.get("graph_ms", median) / record["floor_ms"]
            record["sides"][contender] = figures
        yield record
