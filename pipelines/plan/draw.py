"""Draws plans: every random number of the recipe, from Philox (see `philox.py` for the counters).

RandomResizedCrop, RandomCrop, RandAugment with the "increasing" set, random erasing, and Mixup and CutMix in batch mode
have the distributions of timm and torchvision. 3-Augment follows Touvron et al., "DeiT III", section 3.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.jit import compiled, inlined
from fastdeit.pipelines.plan.curriculum import Curriculum
from fastdeit.pipelines.plan.order import StepSamples
from fastdeit.pipelines.plan.philox import MIX, SAMPLE, Word, check_seed, normal_pair, philox, unit
from fastdeit.pipelines.plan.plan import (
    BICUBIC,
    BILINEAR,
    CODE,
    CUTMIX,
    INCREASING,
    MIXUP,
    NO_MIX,
    OVERHANG,
    Plan,
    resized_sides,
    whole_windows,
)
from fastdeit.pipelines.plan.policy import Policy

# Blocks of a sample's stream. A loop of ten attempts uses one block per attempt.
_CROP, _FLIP, _LAYER, _THREE, _ERASE = 0, 16, 32, 48, 64
_ATTEMPTS = 10
# Blocks of a mixing group's stream; the beta draw rejects, so it comes last.
_SWITCH, _BOX, _BETA = 0, 1, 2

_INCREASING = np.array([CODE[name] for name in INCREASING], dtype=np.int8)
_ROTATE, _POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = (CODE[n] for n in ("Rotate", "Posterize", "Solarize", "SolarizeAdd"))
_COLOR, _CONTRAST, _BRIGHTNESS, _SHARPNESS, _BLUR = (
    CODE[n] for n in ("Color", "Contrast", "Brightness", "Sharpness", "GaussianBlur")
)
_SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y = (
    CODE[n] for n in ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
)
_JITTER = np.array([_BRIGHTNESS, _CONTRAST, _COLOR], dtype=np.int8)


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment settings: `layers` operations, each applied with probability `prob`."""

    magnitude: float
    magnitude_std: float  # infinity: uniform between 0 and `magnitude`
    magnitude_max: float
    layers: int
    prob: float

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """From timm's notation, e.g. `rand-m9-mstd0.5-inc1`. Only the increasing set is supported.

        Raises UserError naming the section that it does not understand.
        """
        head, *sections = text.split("-")
        if head != "rand":
            raise UserError(f"augment.randaugment '{text}' does not start with 'rand'")
        values = {"m": 10.0, "mstd": 0.0, "mmax": 10.0, "n": 2.0, "p": 0.5, "inc": 0.0}
        for section in sections:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", section)
            if match is None or match[1] not in values:
                raise UserError(
                    f"augment.randaugment '{text}': section '{section}' is not one of "
                    f"{', '.join(values)} followed by a number"
                )
            values[match[1]] = float(match[2])
        if not values["inc"]:
            raise UserError(f"augment.randaugment '{text}': only the increasing set is supported, add 'inc1'")
        if not 1 <= values["n"] <= 8:
            raise UserError(f"augment.randaugment '{text}': n must be from 1 to 8")
        std = math.inf if values["mstd"] > 100 else values["mstd"]
        return cls(values["m"], std, values["mmax"], int(values["n"]), values["p"])


class PlanDrawer:
    """Draws the plan of any step of a run.

    policy         the distributions
    seed           the run's seed, unsigned 64 bit
    height, width  (N,) sizes of the data set's images; a crop depends on them
    img_size       side of the output, pixels
    curriculum     makes the output smaller and RandAugment weaker in earlier epochs; None: all epochs are alike
    cutmix_box     "floor": a CutMix box of odd side loses a row and a column, as in timm before 1.0.29
    """

    def __init__(
        self,
        policy: Policy,
        seed: int,
        height: np.ndarray,
        width: np.ndarray,
        *,
        img_size: int,
        curriculum: Curriculum | None = None,
        cutmix_box: Literal["full", "floor"] = "full",
    ) -> None:
        self.policy, self.seed, self.cutmix_box = policy, check_seed(seed), cutmix_box
        self.curriculum = curriculum or Curriculum(1, img_size)
        for name, alpha in (("mixup_alpha", policy.mixup_alpha), ("cutmix_alpha", policy.cutmix_alpha)):
            if not 0 <= alpha <= 3:
                raise UserError(f"augment.{name} is {alpha}: it must be from 0 (none) to 3")
        self._height, self._width = height, width
        self._rand = RandAugment.parse(policy.randaugment) if policy.policy == "randaugment" else None
        jitter = 3 if policy.color_jitter > 0 else 0
        self._layers = {
            "randaugment": self._rand.layers if self._rand else 0,
            "three_augment": 1 + jitter,
            "plain": 0,
        }[policy.policy]

    @property
    def mixes(self) -> bool:
        p = self.policy
        return p.mix_prob > 0 and (p.mixup_alpha > 0 or p.cutmix_alpha > 0)

    def draw(self, samples: StepSamples) -> Plan:
        """The plan of these samples; see `Plan`. Raises UserError if a mixing group cannot be paired."""
        p, count, epoch = self.policy, len(samples.index), samples.epoch
        size = self.curriculum.size(epoch)
        groups = int(samples.group[-1]) + 1 if count else 0
        if self.mixes and count and (count // groups) % 2:
            raise UserError(
                f"a mixing group of {count // groups} samples cannot be paired: use an even departures.mix_group"
            )
        plan = Plan(
            index=samples.index,
            repeat=samples.repeat,
            crop=np.empty((count, 4), np.int32),
            window=whole_windows(count, size),
            flip=np.empty(count, np.bool_),
            op=np.zeros((count, self._layers), np.int8),
            arg=np.zeros((count, self._layers), np.float64),
            interp=np.full((count, self._layers), BICUBIC, np.int8),
            erase=np.zeros((count, 4), np.int32),
            group=samples.group,
            mix=np.full(groups, NO_MIX, np.int8),
            lam=np.ones(groups, np.float64),
            box=np.zeros((groups, 4), np.int32),
            img_size=size,
            seed=self.seed,
            epoch=epoch,
        )
        seed = np.uint64(self.seed)
        height, width = self._height[samples.index], self._width[samples.index]
        sample = seed, epoch, plan.index, plan.repeat
        if p.crop == "simple":
            plan.crop[:] = np.stack([np.zeros_like(height), np.zeros_like(height), height, width], axis=1)
            plan.window[:, :2] = resized_sides(height, width, size)
            _draw_places(*sample, size, OVERHANG, plan.window)
        else:
            _draw_crops(*sample, height, width, p.crop_scale, p.crop_ratio, plan.crop)
        _draw_flips(*sample, p.hflip, plan.flip)
        interp = {"bilinear": BILINEAR, "bicubic": BICUBIC, "random": 0}[p.interpolation]
        if self._rand is not None:
            r, weaker = self._rand, self.curriculum.magnitude(epoch)
            magnitude = r.magnitude if weaker is None else weaker
            _draw_randaugment(
                seed, epoch, plan.index, plan.repeat,
                magnitude, r.magnitude_std, r.magnitude_max, r.prob, interp, plan.op, plan.arg, plan.interp,
            )  # fmt: skip
        elif p.policy == "three_augment":
            _draw_three(seed, epoch, plan.index, plan.repeat, p.color_jitter, plan.op, plan.arg)
        if p.erase_prob > 0:
            _draw_erase(
                seed,
                epoch,
                plan.index,
                plan.repeat,
                size,
                p.erase_prob,
                p.erase_area,
                p.erase_aspect,
                plan.erase,
            )
        if self.mixes:
            _draw_mix(
                seed, epoch, samples.step, samples.first_group, size, p.mix_prob, p.cutmix_switch_prob,
                p.mixup_alpha, p.cutmix_alpha, int(self.cutmix_box == "full"), plan.mix, plan.lam, plan.box,
            )  # fmt: skip
        return plan


@inlined
def _uniform(word: Word, low: float, high: float) -> float:
    return low + (high - low) * unit(word)


@inlined
def _below(word: Word, count: int) -> int:
    """Uniform integer in [0, count)."""
    return int(unit(word) * count)


@compiled
def _draw_crops(seed, epoch, index, repeat, height, width, scale, ratio, crop):
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for s in range(len(index)):
        rows, cols = int(height[s]), int(width[s])
        stream = SAMPLE | np.uint32(repeat[s])
        found = False
        for attempt in range(_ATTEMPTS):
            a, b, c, d = philox(seed, _CROP + attempt, index[s], epoch, stream)
            area = _uniform(a, scale[0], scale[1]) * rows * cols
            aspect = math.exp(_uniform(b, low, high))
            w, h = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
            if 0 < w <= cols and 0 < h <= rows:
                crop[s, 0], crop[s, 1] = _below(c, rows - h + 1), _below(d, cols - w + 1)
                crop[s, 2], crop[s, 3] = h, w
                found = True
                break
        if not found:
            w, h = cols, rows
            if cols / rows < ratio[0]:
                h = int(np.rint(w / ratio[0]))
            elif cols / rows > ratio[1]:
                w = int(np.rint(h * ratio[1]))
            crop[s, 0], crop[s, 1], crop[s, 2], crop[s, 3] = (rows - h) // 2, (cols - w) // 2, h, w


@compiled
def _draw_places(seed, epoch, index, repeat, size, overhang, window):
    """torchvision's RandomCrop(size, padding=overhang) of resized images: top and left."""
    for s in range(len(index)):
        a, b, _, _ = philox(seed, _CROP, index[s], epoch, SAMPLE | np.uint32(repeat[s]))
        window[s, 2] = _below(a, window[s, 0] + 2 * overhang - size + 1) - overhang
        window[s, 3] = _below(b, window[s, 1] + 2 * overhang - size + 1) - overhang


@compiled
def _draw_flips(seed, epoch, index, repeat, hflip, flip):
    for s in range(len(index)):
        a, _, _, _ = philox(seed, _FLIP, index[s], epoch, SAMPLE | np.uint32(repeat[s]))
        flip[s] = unit(a) < hflip


@compiled
def _increasing_arg(op: int, level: float, negate: bool) -> float:
    """timm's argument of an operation of the increasing set at `level` (0 to 10)."""
    part = level / 10.0
    sign = -1.0 if negate else 1.0
    if op == _ROTATE:
        return sign * part * 30.0
    if op == _POSTERIZE:
        return 4.0 - int(part * 4)
    if op == _SOLARIZE:
        return 256.0 - min(256, int(part * 256))
    if op == _SOLARIZE_ADD:
        return float(min(128, int(part * 110)))
    if op in (_COLOR, _CONTRAST, _BRIGHTNESS, _SHARPNESS):
        return max(0.1, 1.0 + sign * part * 0.9)
    if op in (_SHEAR_X, _SHEAR_Y):
        return sign * part * 0.3
    if op in (_TRANSLATE_X, _TRANSLATE_Y):
        return sign * part * 0.45
    return 0.0


@compiled
def _draw_randaugment(seed, epoch, index, repeat, mean, std, top, prob, interp_choice, op, arg, interp):
    for s in range(len(index)):
        stream = SAMPLE | np.uint32(repeat[s])
        for layer in range(op.shape[1]):
            a, b, c, d = philox(seed, _LAYER + 2 * layer, index[s], epoch, stream)
            if unit(b) >= prob:
                continue
            e, f, _, _ = philox(seed, _LAYER + 2 * layer + 1, index[s], epoch, stream)
            level = mean
            if math.isinf(std):
                level = unit(c) * mean
            elif std > 0:
                level = mean + std * normal_pair(c, d)[0]
            level = max(0.0, min(level, top))
            code = _INCREASING[_below(a, len(_INCREASING))]
            op[s, layer] = code
            arg[s, layer] = _increasing_arg(code, level, unit(e) < 0.5)
            if interp_choice:
                interp[s, layer] = interp_choice
            else:
                interp[s, layer] = BILINEAR if unit(f) < 0.5 else BICUBIC


@compiled
def _draw_three(seed, epoch, index, repeat, jitter, op, arg):
    for s in range(len(index)):
        stream = SAMPLE | np.uint32(repeat[s])
        a, b, _, _ = philox(seed, _THREE, index[s], epoch, stream)
        choice = _below(a, 3)
        if choice == 0:  # grayscale is a color factor of 0
            op[s, 0], arg[s, 0] = _COLOR, 0.0
        elif choice == 1:
            op[s, 0], arg[s, 0] = _SOLARIZE, 128.0
        else:
            op[s, 0], arg[s, 0] = _BLUR, _uniform(b, 0.1, 2.0)
        if op.shape[1] == 1:
            continue
        c, d, e, f = philox(seed, _THREE + 1, index[s], epoch, stream)
        low, high = max(0.0, 1.0 - jitter), 1.0 + jitter
        factors = (_uniform(d, low, high), _uniform(e, low, high), _uniform(f, low, high))
        # One of the six orders of brightness, contrast and colour.
        order = _below(c, 6)
        first = order // 2
        second = (first + 1 + order % 2) % 3
        third = 3 - first - second
        op[s, 1], arg[s, 1] = _JITTER[first], factors[first]
        op[s, 2], arg[s, 2] = _JITTER[second], factors[second]
        op[s, 3], arg[s, 3] = _JITTER[third], factors[third]


@compiled
def _draw_erase(seed, epoch, index, repeat, size, prob, area_range, aspect_range, erase):
    low, high = math.log(aspect_range[0]), math.log(aspect_range[1])
    for s in range(len(index)):
        stream = SAMPLE | np.uint32(repeat[s])
        a, _, _, _ = philox(seed, _ERASE, index[s], epoch, stream)
        if unit(a) >= prob:
            continue
        for attempt in range(_ATTEMPTS):
            a, b, c, d = philox(seed, _ERASE + 1 + attempt, index[s], epoch, stream)
            area = _uniform(a, area_range[0], area_range[1]) * size * size
            aspect = math.exp(_uniform(b, low, high))
            h, w = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
            if 0 < w < size and 0 < h < size:
                erase[s, 0], erase[s, 1] = _below(c, size - h + 1), _below(d, size - w + 1)
                erase[s, 2], erase[s, 3] = h, w
                break


@compiled
def _symmetric_beta(seed, epoch, step, group, alpha):
    """Beta(alpha, alpha) by Johnk's rejection (Devroye 1986, section IX.3.5).

    An attempt succeeds with probability 0.05 at alpha 3, so all 508 fail once in 10^11 draws.
    """
    block = _BETA
    while True:
        a, b, c, d = philox(seed, block | (group << 8), step, epoch, MIX)
        for u, v in ((unit(a), unit(b)), (unit(c), unit(d))):
            x, y = u ** (1.0 / alpha), v ** (1.0 / alpha)
            if 0.0 < x + y <= 1.0:
                return x / (x + y)
        block += 1
        if block > 255:
            return 0.5


@compiled
def _draw_mix(seed, epoch, step, first, size, prob, switch, mixup, cutmix, odd, mix, lam, box):
    for g in range(len(mix)):
        group = first + g
        a, b, _, _ = philox(seed, _SWITCH | (group << 8), step, epoch, MIX)
        if unit(a) >= prob:
            continue
        cut = cutmix > 0 and (mixup <= 0 or unit(b) < switch)
        share = _symmetric_beta(seed, epoch, step, group, cutmix if cut else mixup)
        if not cut:
            mix[g], lam[g] = MIXUP, share
            continue
        side = int(size * math.sqrt(1.0 - share))
        c, d, _, _ = philox(seed, _BOX | (group << 8), step, epoch, MIX)
        y, x = _below(c, size), _below(d, size)
        top, left = max(0, y - side // 2), max(0, x - side // 2)
        # With `odd` 1, a box of odd side keeps its last row and column, as in timm from 1.0.29 on.
        bottom, right = min(size, y + (side + odd) // 2), min(size, x + (side + odd) // 2)
        mix[g], lam[g] = CUTMIX, 1.0 - (bottom - top) * (right - left) / (size * size)
        box[g, 0], box[g, 1], box[g, 2], box[g, 3] = top, left, bottom, right
