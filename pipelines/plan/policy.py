"""The distributions of training augmentation."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The distributions that a plan is drawn from (paper, Table 9)."""

    policy: Literal["randaugment", "three_augment", "plain"] = "randaugment"
    randaugment: str = "rand-m9-mstd0.5-inc1"  # timm's notation
    # simple: the short side becomes img_size, then a random square, up to 4 pixels beyond the image (DeiT III's --src)
    crop: Literal["random_resized", "simple"] = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # of the image area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"  # of RandAugment's geometric ops
    color_jitter: float = 0.3  # of three_augment only: as in timm, RandAugment gets none
    erase_prob: float = 0.25
    erase_area: tuple[float, float] = (0.02, 1 / 3)
    erase_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    mixup_alpha: float = 0.8  # 0: no Mixup
    cutmix_alpha: float = 1.0  # 0: no CutMix
    mix_prob: float = 1.0
    cutmix_switch_prob: float = 0.5
