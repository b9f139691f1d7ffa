"""Normalising, erasing, mixing and layouts against torchvision, PyTorch and timm."""

import math

import numpy as np
import pytest
import torch
from timm.layers import PatchEmbed
from torchvision.transforms.v2 import functional as transforms

from fastdeit.kernels import augment_normalize
from fastdeit.kernels.augment_normalize import CUTMIX, MIX, MIXUP, NO_MIX, normalize_erase_mix
from fastdeit.pipelines.plan.philox import philox

pytestmark = pytest.mark.usefixtures("poisoned")

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SEED, EPOCH = 2**63 + 12345, 7


class Inputs:
    """A batch of pairs (0, 1), (2, 3), ..., and its parts on the CPU, for the judges."""

    def __init__(self, size, pairs, seed=0):
        rng = np.random.default_rng(seed)
        count = 2 * pairs
        self.size = size
        self.planes = torch.from_numpy(rng.integers(0, 256, (count, 2, 3, size, size), dtype=np.uint8))
        self.tables = torch.from_numpy(rng.integers(0, 256, (count, 3, 256), dtype=np.uint8))
        self.ending = torch.from_numpy(rng.integers(0, 2, (count, 2), dtype=np.int32))
        self.erase = torch.zeros((count, 4), dtype=torch.int32)
        self.who = torch.from_numpy(np.stack([rng.integers(0, 2**31, count), rng.integers(0, 3, count)], 1))
        self.unit = torch.arange(count, dtype=torch.int32).view(pairs, 2)
        self.mix = torch.zeros((count, MIX), dtype=torch.int32)
        self.share = torch.zeros((count, 2))

    def alone(self):
        """Nothing is paired."""
        count = len(self.planes)
        self.unit = torch.stack([torch.arange(count), torch.full((count,), -1)], 1).int()

    def normalised(self):
        """(B, 3, S, S) float32 by torchvision."""
        images = []
        for planes, table, (side, pending) in zip(self.planes, self.tables, self.ending.tolist(), strict=True):
            image = planes[side].long()
            if pending:
                image = torch.stack([table[c].long()[image[c]] for c in range(3)])
            floats = transforms.to_dtype(image.to(torch.uint8), torch.float32, scale=True)
            images.append(transforms.normalize(floats, MEAN, STD))
        return torch.stack(images)

    def run(self, device, dtype=torch.float32, layout="nchw", patch_size=16):
        count, size = len(self.planes), self.size
        levels = transforms.to_dtype(torch.arange(256, dtype=torch.uint8).expand(3, 1, 256), torch.float32, scale=True)
        levels = transforms.normalize(levels, MEAN, STD)[:, 0].contiguous()
        shape = {
            "nchw": (count, 3, size, size),
            "nhwc": (count, size, size, 3),
            "patches": (count, (size // patch_size) ** 2, 3 * patch_size**2),
        }[layout]
        out = torch.empty(shape, dtype=dtype, device=device)
        key = torch.tensor([SEED - 2**64, EPOCH])
        before = (self.planes, self.ending, self.tables, levels, self.erase, self.who, key)
        inputs = (*before, self.unit, self.mix, self.share)
        normalize_erase_mix(*(t.to(device) for t in inputs), out, layout=layout, patch_size=patch_size)
        return out.cpu()


def noise(who, size):
    """(3, S, S) float64: Box and Muller by the math library, of the words that the plan's generator draws."""
    values = []
    for block in range(-(-3 * size * size // 4)):
        words = philox(SEED, block, int(who[0]), EPOCH, (1 << 28) | int(who[1]))
        a, b, c, d = ((int(word) + 0.5) / 2**32 for word in words)
        for u, v in ((a, b), (c, d)):
            radius = math.sqrt(-2.0 * math.log(u))
            values += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return torch.tensor(values[: 3 * size * size], dtype=torch.float64).view(3, size, size)


@pytest.mark.parametrize("size", [1, 7, 16])
def test_normalises_as_torchvision_does_to_the_bit(device, size):
    batch = Inputs(size, 3)
    assert torch.equal(batch.run(device), batch.normalised())
    batch.alone()
    assert torch.equal(batch.run(device), batch.normalised())


def test_erases_with_the_noise_of_the_plan(device):
    size = 15
    batch = Inputs(size, 3)
    boxes = [(0, 0, 15, 15), (3, 4, 1, 1), (14, 0, 1, 15), (2, 14, 9, 1), (5, 5, 0, 0), (1, 2, 12, 7)]
    batch.erase = torch.tensor(boxes, dtype=torch.int32)
    out, expected = batch.run(device), batch.normalised()
    for sample, (top, left, height, width) in enumerate(boxes):
        box = (sample, slice(None), slice(top, top + height), slice(left, left + width))
        expected[box] = noise(batch.who[sample], size).float()[box[1:]]
        # One unit in the last place: the polynomials are good to 1e-11, the rounding to float32 is not theirs.
        torch.testing.assert_close(out[sample], expected[sample], rtol=1.2e-7, atol=1e-9)


def test_mixes_as_timm_does(device):
    size = 9
    batch = Inputs(size, 4)
    shares = [0.0, 0.3, 0.77, 1.0]
    batch.mix[:, 0] = MIXUP
    batch.share = torch.tensor([[s, 1.0 - s] for s in shares for _ in range(2)])
    images = batch.normalised()
    out = batch.run(device).view(4, 2, 3, size, size)
    for pair, share in enumerate(shares):
        own = images[2 * pair : 2 * pair + 2]
        expected = own * share + own.flip(0) * (1.0 - share)
        torch.testing.assert_close(out[pair], expected, rtol=0, atol=3e-7)


def test_cuts_as_timm_does(device):
    size = 9
    batch = Inputs(size, 4)
    boxes = [(0, 0, 9, 9), (2, 3, 7, 4), (5, 5, 5, 9), (8, 0, 9, 1)]
    batch.mix[:, 0] = CUTMIX
    batch.mix[:, 1:] = torch.tensor(boxes, dtype=torch.int32).repeat_interleave(2, 0)
    batch.erase[3] = torch.tensor([0, 0, 9, 9])  # what is cut out of a sample has been erased
    images = batch.normalised()
    images[3] = noise(batch.who[3], size).float()
    expected = images.clone()
    for pair, (top, left, bottom, right) in enumerate(boxes):
        for own, other in ((2 * pair, 2 * pair + 1), (2 * pair + 1, 2 * pair)):
            expected[own, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    torch.testing.assert_close(batch.run(device), expected, rtol=1.2e-7, atol=1e-9)


def test_a_pair_that_does_not_mix_stays_as_it_is(device):
    batch = Inputs(8, 2)
    batch.mix[:] = torch.tensor([NO_MIX, 1, 1, 7, 7])
    assert torch.equal(batch.run(device), batch.normalised())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_as_pytorch_does(device, on_gpu, dtype):
    batch = Inputs(12, 3)
    batch.mix[:, 0] = MIXUP
    batch.share = torch.tensor([[0.3, 0.7]] * 6)
    full = batch.run(device)
    if dtype is torch.bfloat16 and not on_gpu:  # Triton's interpreter cuts off
        full = (full.view(torch.int32) & -65536).view(torch.float32)
    assert torch.equal(batch.run(device, dtype), full.to(dtype))


@pytest.mark.parametrize(("size", "patch_size"), [(16, 8), (12, 4), (9, 3), (48, 16)])
def test_layouts_hold_the_same_values(device, size, patch_size):
    batch = Inputs(size, 1)
    images = batch.run(device)
    assert torch.equal(batch.run(device, layout="nhwc"), images.permute(0, 2, 3, 1))
    unfolded = torch.nn.functional.unfold(images, patch_size, stride=patch_size).transpose(1, 2)
    assert torch.equal(batch.run(device, layout="patches", patch_size=patch_size), unfolded)


def test_patches_make_timms_patch_embedding_a_matrix_product(device):
    batch = Inputs(16, 2)
    embed = PatchEmbed(16, 4, 3, 24)
    patches = batch.run(device, layout="patches", patch_size=4)
    ours = torch.nn.functional.linear(patches, embed.proj.weight.reshape(24, -1), embed.proj.bias)
    torch.testing.assert_close(ours, embed(batch.normalised()))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [224, 384])
def test_normalises_as_torchvision_does_at_full_size(device, size):
    batch = Inputs(size, 32)
    assert torch.equal(batch.run(device), batch.normalised())


def test_nothing_is_fused_that_the_host_rounds():
    assert not any(variant.fp_fusion for variant in augment_normalize.variants())
