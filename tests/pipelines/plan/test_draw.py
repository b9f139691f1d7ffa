"""The plan's distributions against what timm and torchvision draw, and its keys against change of world."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup, rand_bbox
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, RandomCrop, RandomResizedCrop

from fastdeit.pipelines.plan.draw import PlanDrawer, RandAugment
from fastdeit.pipelines.plan.order import EpochOrder
from fastdeit.pipelines.plan.plan import BICUBIC, BILINEAR, CODE, CUTMIX, MIXUP, OPS
from fastdeit.pipelines.plan.policy import Policy
from refusals import refused

N = 6144
ALPHA = 1e-3


def big_plan(height=375, width=500, seed=11, img_size=224, cutmix_box="full", **policy):
    order = EpochOrder(3 * N, global_batch=N, group_size=64, seed=seed)
    sizes = np.full(3 * N, height, np.int32), np.full(3 * N, width, np.int32)
    drawer = PlanDrawer(Policy(**policy), seed, *sizes, img_size=img_size, cutmix_box=cutmix_box)
    return drawer.draw(order.step(2, 0))


def same(ours, theirs):
    assert stats.ks_2samp(ours, theirs).pvalue > ALPHA


@pytest.fixture(scope="module")
def plan():
    return big_plan()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["timm", "torchvision"])
@pytest.mark.parametrize("size", [(375, 500), (40, 700), (900, 90)])
def test_crop_boxes(source, size):
    height, width = size
    ours = big_plan(height, width).crop
    random.seed(5)
    torch.manual_seed(5)
    image = Image.new("RGB", (width, height))
    if source == "timm":
        get = RandomResizedCropAndInterpolation.get_params
        theirs = [get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    else:
        get = RandomResizedCrop.get_params
        theirs = [get(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = np.array(theirs)
    for column in range(4):
        same(ours[:, column], theirs[:, column])
    same(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])
    assert (ours[:, 0] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "resized"), [(375, 500, (224, 298)), (900, 90, (2240, 224))])
def test_places_of_simple_crops(height, width, resized):
    plan = big_plan(height, width, crop="simple")
    assert {*map(tuple, plan.window[:, :2].tolist())} == {resized}
    assert {*map(tuple, plan.crop.tolist())} == {(0, 0, height, width)}
    torch.manual_seed(5)
    padded = Image.new("RGB", (resized[1] + 8, resized[0] + 8))
    theirs = np.array([RandomCrop.get_params(padded, (224, 224))[:2] for _ in range(3000)]) - 4
    for axis in range(2):
        places = plan.window[:, 2 + axis]
        same(places, theirs[:, axis])
        assert (places.min(), places.max()) == (theirs[:, axis].min(), theirs[:, axis].max()) or resized[axis] > 1000


def test_flip_is_fair(plan):
    assert stats.binomtest(int(plan.flip.sum()), N, 0.5).pvalue > ALPHA


def timm_arguments(monkeypatch, draws, interpolation=(Image.BILINEAR, Image.BICUBIC)):
    """(op name, argument, resample) that timm's transform hands to its own functions."""
    calls = []
    transform = rand_augment_transform(
        "rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104), "interpolation": interpolation}
    )
    for op in transform.ops:

        def record(img, *args, name=op.name, **kwargs):
            calls.append((name, args[0] if args else 0.0, kwargs["resample"]))
            return img

        monkeypatch.setattr(op, "aug_fn", record)
    np.random.seed(1)  # noqa: NPY002 - timm draws from the global generators
    random.seed(1)
    for _ in range(draws):
        transform(None)
    return calls


def test_randaugment_operations_and_arguments(plan, monkeypatch):
    calls = timm_arguments(monkeypatch, 8000)
    short = {"PosterizeIncreasing": "Posterize", "SolarizeIncreasing": "Solarize"}
    names = [short.get(n, n.removesuffix("Increasing")) for n, _, _ in calls]
    assert set(names) == set(OPS) - {"Identity", "GaussianBlur"}

    applied = plan.op[plan.op != 0]
    assert stats.binomtest(len(applied), 2 * N, 0.5).pvalue > ALPHA
    ours = [int((applied == CODE[name]).sum()) for name in OPS[1:16]]
    theirs = [names.count(name) for name in OPS[1:16]]
    assert stats.chi2_contingency([ours, theirs]).pvalue > ALPHA
    assert stats.chisquare(ours).pvalue > ALPHA

    for name in OPS[1:16]:
        mine = plan.arg[plan.op == CODE[name]]
        judge = np.array([a for n, (_, a, _) in zip(names, calls, strict=True) if n == name], dtype=float)
        if name in ("Posterize", "Solarize", "SolarizeAdd"):
            levels = sorted(set(mine) | set(judge))
            # Few, discrete values: the same set wherever either side has a fair share of draws.
            common = [v for v in levels if (mine == v).mean() + (judge == v).mean() > 0.06]
            table = [[(mine == v).sum() for v in common], [(judge == v).sum() for v in common]]
            assert stats.chi2_contingency(table).pvalue > ALPHA, name
        else:
            assert stats.ks_2samp(mine, judge).pvalue > ALPHA, name


def test_layers_are_independent(plan):
    table = np.zeros((16, 16))
    np.add.at(table, (plan.op[:, 0], plan.op[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > ALPHA


def test_interpolation_choice():
    assert set(np.unique(big_plan(interpolation="bicubic").interp)) == {BICUBIC}
    drawn = big_plan(interpolation="random")
    chosen = drawn.interp[drawn.op != 0]
    assert stats.binomtest(int((chosen == BILINEAR).sum()), len(chosen), 0.5).pvalue > ALPHA


@pytest.mark.slow
def test_erased_boxes(plan):
    ours = plan.erase[plan.erase[:, 2] > 0]
    assert stats.binomtest(len(ours), N, 0.25).pvalue > ALPHA
    random.seed(3)
    erasing = RandomErasing(probability=1.0, mode="const", device="cpu")
    theirs = []
    for _ in range(1500):
        mask = erasing(torch.ones(1, 224, 224))[0] == 0
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            theirs.append((rows[0], cols[0], len(rows), len(cols)))
    theirs = np.array(theirs)
    for column in range(4):
        same(ours[:, column], theirs[:, column])


def test_mixing_parameters():
    order = EpochOrder(64 * 400, global_batch=64 * 40, seed=9)
    size = np.full(64 * 400, 300, np.int32)
    drawer = PlanDrawer(Policy(), 9, size, size, img_size=224)
    plans = [drawer.draw(order.step(e, s)) for e in range(5) for s in range(order.steps)]
    mix = np.concatenate([p.mix for p in plans])
    lam = np.concatenate([p.lam for p in plans])
    box = np.concatenate([p.box for p in plans])
    assert len(mix) == 2000
    assert stats.binomtest(int((mix == CUTMIX).sum()), 2000, 0.5).pvalue > ALPHA
    assert ((mix == CUTMIX) | (mix == MIXUP)).all()

    np.random.seed(0)  # noqa: NPY002 - timm draws from the global generator
    mixer = Mixup(0.8, 1.0, switch_prob=0.5)
    drawn = [mixer._params_per_batch() for _ in range(4000)]
    same(lam[mix == MIXUP], [v for v, cut in drawn if not cut])
    theirs = np.array([rand_bbox((3, 224, 224), v) for v, cut in drawn if cut])  # top, bottom, left, right
    ours = box[mix == CUTMIX][:, [0, 2, 1, 3]]
    for column in range(4):
        same(ours[:, column], theirs[:, column])
    area = (ours[:, 1] - ours[:, 0]) * (ours[:, 3] - ours[:, 2])
    np.testing.assert_allclose(lam[mix == CUTMIX], 1 - area / 224**2, rtol=0, atol=1e-12)


def test_mixing_probability_and_single_kinds():
    assert (big_plan(mix_prob=0.0).mix == 0).all()
    assert (big_plan(mixup_alpha=0.0).mix == CUTMIX).all()
    assert (big_plan(cutmix_alpha=0.0).mix == MIXUP).all()
    half = big_plan(mix_prob=0.5).mix
    assert stats.binomtest(int((half != 0).sum()), len(half), 0.5).pvalue > ALPHA
    assert (big_plan(mixup_alpha=0.0, cutmix_alpha=0.0).lam == 1).all()


def test_three_augment():
    drawn = big_plan(policy="three_augment")
    first = drawn.op[:, 0]
    kinds = [int((first == CODE[n]).sum()) for n in ("Color", "Solarize", "GaussianBlur")]
    assert sum(kinds) == N
    assert stats.chisquare(kinds).pvalue > ALPHA
    assert set(drawn.arg[first == CODE["Color"], 0]) == {0.0}
    assert set(drawn.arg[first == CODE["Solarize"], 0]) == {128.0}
    radius = drawn.arg[first == CODE["GaussianBlur"], 0]
    assert stats.kstest(radius, stats.uniform(0.1, 1.9).cdf).pvalue > ALPHA

    torch.manual_seed(0)
    jitter = ColorJitter(0.3, 0.3, 0.3)
    theirs = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(3000)
    ]
    name_of = {CODE["Brightness"]: 0, CODE["Contrast"]: 1, CODE["Color"]: 2}
    for name, column in (("Brightness", 1), ("Contrast", 2), ("Color", 3)):
        mine = drawn.arg[:, 1:][drawn.op[:, 1:] == CODE[name]]
        assert len(mine) == N
        same(mine, [t[column] for t in theirs])
    orders = [tuple(name_of[int(c)] for c in row) for row in drawn.op[:, 1:]]
    judge = [tuple(int(i) for i in t[0] if i != 3) for t in theirs]
    keys = sorted(set(judge))
    table = [[orders.count(k) for k in keys], [judge.count(k) for k in keys]]
    assert len(keys) == 6
    assert stats.chi2_contingency(table).pvalue > ALPHA
    assert big_plan(policy="three_augment", color_jitter=0.0).op.shape[1] == 1


def test_plain_policy_has_no_operations():
    assert big_plan(policy="plain").op.shape == (N, 0)


@pytest.mark.parametrize("world", [2, 16])
def test_world_size_changes_no_number(world):
    """One process at batch 1024 and sixteen at 64 draw the same plan to the bit."""
    rng = np.random.default_rng(0)
    height, width = rng.integers(50, 600, (2, 4000)).astype(np.int32)
    drawer = PlanDrawer(Policy(), 5, height, width, img_size=224)
    one = drawer.draw(EpochOrder(4000, global_batch=1024, seed=5).step(3, 1))
    many = [
        drawer.draw(EpochOrder(4000, global_batch=1024, seed=5, rank=r, world=world).step(3, 1)) for r in range(world)
    ]
    for name in ("index", "repeat", "crop", "flip", "op", "arg", "interp", "erase", "mix", "lam", "box"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in many]), getattr(one, name))


def test_copies_epochs_and_seeds_differ(plan):
    copies = [plan.crop[(plan.repeat == r) & np.isin(plan.index, plan.index[:300])] for r in range(3)]
    assert not np.array_equal(copies[0][:50], copies[1][:50])
    assert not np.array_equal(big_plan(seed=12).crop, plan.crop)


def test_odd_group_is_refused():
    drawer = PlanDrawer(Policy(), 0, np.full(90, 32), np.full(90, 32), img_size=32)
    refused("cannot be paired", drawer.draw, EpochOrder(90, global_batch=15, group_size=5).step(0, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [("m9", "does not start"), ("rand-m9", "inc1"), ("rand-x3-inc1", "section 'x3'"), ("rand-n9-inc1", "n must")],
)
def test_randaugment_notation(text, message):
    refused(message, RandAugment.parse, text)


def test_randaugment_notation_means_what_timm_means():
    parsed = RandAugment.parse("rand-m7-mstd0.25-n3-p0.75-mmax9-inc1")
    assert parsed == RandAugment(7, 0.25, 9, 3, 0.75)
    assert RandAugment.parse("rand-m9-mstd101-inc1").magnitude_std == math.inf
