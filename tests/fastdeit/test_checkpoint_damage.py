"""Damaged, edited and hostile checkpoints: found before anything uses them. Judges: torch.load, the OS's accounts."""

import collections
import contextlib
import errno
import io
import itertools
import json
import os
import pickle
import random
import struct
import threading
import zipfile

import pytest
import torch

from fastdeit import checkpoint
from fastdeit.checkpoint_file import DamagedError, ForeignError
from fastdeit.distributed import world
from fastdeit.model.networks import build_network
from fastdeit.model.weights import load_weights
from fastdeit.pipelines.errors import UserError
from fastdeit.pipelines.machine import MachineError
from fastdeit.sections import TeacherConfig
from fastdeit.teacher.teacher import Teacher
from fastdeit.training.resume import restore, set_damaged_aside
from fastdeit.training.resume_checks import check_position
from fastdeit.training.trainer import Trainer
from refusals import refused
from runs import assert_same_state, changed, evaluated, newest, same_values, train
from system import refusing, run_python


def weights():
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}": torch.randn(40, 5 + i, generator=generator) for i in range(6)}


@pytest.mark.slow
def test_no_flipped_bit_reaches_the_weights(tmp_path):
    path, plain = tmp_path / "x.pt", tmp_path / "plain.pt"
    torch.save({"model": weights(), "epoch": 7}, path)
    good, rng, silent, found = path.read_bytes(), random.Random(0), 0, 0
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        plain.write_bytes(data)
        with contextlib.suppress(Exception):  # PyTorch found that one
            silent += not same_values(torch.load(plain, weights_only=True)["model"], weights())
        stored = None
        with contextlib.suppress(UserError):
            stored = checkpoint.read_checkpoint(path)
        if stored is None:
            found += 1
        else:  # where nothing is stored
            assert stored["epoch"] == 7
            assert same_values(stored["model"], weights())
    assert silent > 100
    assert found > 200


@pytest.mark.parametrize("old", [True, False])
def test_files_without_checksums_are_announced(tmp_path, old):
    path = tmp_path / "x.pt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": weights()}, path, _use_new_zipfile_serialization=not old)
    finally:
        torch.serialization.set_crc32_options(before)
    with pytest.warns(UserWarning, match=r"x\.pt (is in PyTorch's format from before 1\.6|was saved without)"):
        assert same_values(checkpoint.read_checkpoint(path)["model"], weights())
    assert not checkpoint.is_whole(path)


def zipped(path, pickled, records=(), compression=zipfile.ZIP_STORED):
    """A file as torch.save lays it out, with any pickle and any records."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
        for name, data in records:
            archive.writestr(name, data)


def pickled(value):
    file = io.BytesIO()
    pickle.Pickler(file, 2).dump(value)
    return file.getvalue()


def nested(value, depth, times=1):
    """Lists in lists. Of ten times the same list each, a kilobyte prints as a gigabyte."""
    for _ in range(depth):
        value = [value] * times
    return value


def itself():
    value = []
    value.append(value)
    return value


def make_hostile(folder):
    """Files that are small on the disk and large in memory, by name, with what the error says of them."""
    said = {}

    def add(name, reason):
        said[name] = reason
        return folder / f"{name}.pt"

    zipped(add("deflated", "compressed record"), pickled({}), [("x/data/0", bytes(1 << 28))], zipfile.ZIP_DEFLATED)
    with open(add("holes", "GiB of memory|damaged"), "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(48_000_000_000)
    path = add("directory", "damaged")
    zipped(path, pickled({}))
    end = bytearray(path.read_bytes()[-22:])
    end[12:16], end[16:20] = (900_000_000).to_bytes(4, "little"), bytes(4)
    with open(path, "r+b") as file:
        file.truncate(900_000_000)
        file.seek(0, 2)
        file.write(end)
    # PyTorch admits bytearray, and a number of bytes as its argument.
    zipped(
        add("bytearray", "holds an object"),
        b"\x80\x02}X\x01\x00\x00\x00wc__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs.",
    )
    zipped(add("lists", "data.pkl"), b"\x80\x02(" + b"]" * (17 << 20) + b"l.")
    zipped(add("laughs", "counting repeats"), pickled({"model": nested("ha", 10, times=10)}))
    zipped(add("deep", "nested more than"), pickled({"model": nested([], 400)}))
    zipped(add("itself", "contains itself"), pickled({"model": itself()}))
    zipped(add("number", "64 bits|was not loaded"), pickled({"epoch": 10**30_000}))
    zipped(add("twice", "twice|damaged"), pickled({}), [("x/version", "3")])
    torch.save({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, add("repeats", "does not store its own values"))
    torch.save({"model": {"w": torch.zeros(10**9, 4, device="meta")}}, add("nowhere", "holds an object|numbers of its"))
    folder.joinpath("pointer.pt").write_bytes(b"not a checkpoint at all")
    said["pointer"] = "damaged or not a checkpoint"
    os.mkfifo(add("pipe", "Is a fifo"))
    add("device", "Is a device").symlink_to("/dev/zero")
    return said


HOSTILE = """
import json, resource, sys
from fastdeit import checkpoint
checkpoint.read_checkpoint(sys.argv[1])  # PyTorch takes memory with the first
said, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    try:
        checkpoint.read_checkpoint(name)
        said[name] = "loaded"
    except checkpoint.UserError as error:
        said[name] = str(error)
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


@pytest.mark.slow
def test_hostile_files_are_refused_without_memory_or_time(tmp_path):
    said = make_hostile(tmp_path)
    torch.save({"model": weights()}, tmp_path / "good.pt")
    names = [str(tmp_path / f"{name}.pt") for name in ("good", *said)]
    done = run_python("-c", HOSTILE, *names, timeout=120, status=0)
    found, grown = json.loads(done.stdout)
    for name, reason in said.items():
        text = found[str(tmp_path / f"{name}.pt")]
        assert str(tmp_path / f"{name}.pt") in text
        assert any(part in text for part in reason.split("|")), (name, text)
        assert len(text) < 700
    assert grown < 150  # MiB


def test_the_usual_contents_still_load(tmp_path):
    stored = {
        "model": collections.OrderedDict(weights()),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "size": torch.Size([1, 2]),
        "options": {"lr": 1e-3, "names": ["a", "b"], "flags": (True, None), "kinds": {1, 2}},
        "milestones": collections.Counter([30, 60]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    torch.save(stored, tmp_path / "x.pt")
    loaded = checkpoint.read_checkpoint(tmp_path / "x.pt")
    assert loaded.keys() == stored.keys()
    assert same_values(loaded["model"], weights())
    assert loaded["options"] == stored["options"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES])
def test_a_machine_that_cannot_read_calls_no_file_damaged(tmp_path, monkeypatch, number):
    checkpoint.save(tmp_path / "x.pt", {"model": weights()})
    monkeypatch.setattr("fastdeit.checkpoint.open_regular", refusing(number))
    message = refused(r"x\.pt: cannot be read: ", checkpoint.read_checkpoint, tmp_path / "x.pt", error=MachineError)
    assert os.strerror(number) in message


def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"model": weights()})
    monkeypatch.setattr("os.fsync", refusing(errno.ENOSPC))
    with pytest.raises(MachineError, match=r"x\.pt: cannot be written: No space left on device: free space"):
        checkpoint.save(path, {"model": {}})
    assert same_values(checkpoint.read_checkpoint(path)["model"], weights())
    assert list(tmp_path.iterdir()) == [path]


def put(state, where, value):
    """`state` with `value` at `where`, a path of keys; the last one is taken away where it is None."""
    *path, last = where
    inner = state
    for key in path:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value


EDITS = [
    (("epoch",), -1, "'epoch' is -1"),
    (("step",), 10**6, "its next step is 1000000"),
    (("global_step",), lambda n: n + 1, "'global_step' is 6, but epoch 1, step 0 are 5 steps"),
    (("global_step",), True, "'global_step' is a bool"),
    (("global_step",), None, "'global_step' is missing"),
    (("counted_from",), [0, 0], "'counted_from' is not an epoch"),
    (("effective", "steps per epoch"), 4, "steps per epoch"),
    (("effective", "steps per epoch"), "5", "steps per epoch"),
    (("model", "cls_token"), None, "'model' lacks 'cls_token'"),
    (("model", "extra"), lambda _: torch.zeros(1), "'model' has an unknown 'extra'"),
    (("model", "norm.weight"), lambda w: w.half(), r"'model\.norm\.weight' is \(48,\) float16, but this run has"),
    (("model", "head.bias"), lambda w: w[:1], r"'model\.head\.bias' is \(1,\) float32, but this run has \(4,\)"),
    (("model", "head.bias"), [0.0] * 4, r"'model\.head\.bias' is a list, not a tensor"),
    (("ema",), None, "'ema' is missing"),
    (("ema", "norm.weight"), lambda w: w[:1], r"'ema\.norm\.weight' is \(1,\) float32"),
    (("ema", "norm.weight"), None, r"'ema' lacks 'norm\.weight'"),
    (("optimizer", "state"), {}, r"'optimizer\.state\[0\] \(.*\)' is missing"),
    (("optimizer", "state", 3), None, r"'optimizer\.state\[3\] \(.*\)' is missing"),
    (("optimizer", "state", 3, "exp_avg"), lambda w: w.double(), r"exp_avg' is .* float64, but this run has"),
    (("optimizer", "state", 3, "exp_avg_sq"), None, "holds step, exp_avg, but this run's optimizer has"),
    (("optimizer", "state", 3, "step"), lambda _: torch.tensor(1e6), r"step' is 1000000\.0 after 5 steps"),
    (("optimizer", "state", 3, "step"), lambda _: torch.tensor(float("nan")), "step' is nan after 5 steps"),
    (("optimizer", "param_groups"), lambda groups: groups[:1], "param_groups' lists other parameters"),
    (("optimizer", "param_groups"), None, "'optimizer' is not the state of an optimizer"),
    (("scaler",), None, "'scaler' is missing"),
    (("kernels", "ops"), ["a"], "'kernels' is not a choice that this version knows"),
    (("kernels", "attention"), "quick", "'kernels' is not a choice that this version knows"),
    (("kernels",), [], "'kernels' is not a choice that this version knows"),
    (("rounding",), ["torch"], "'rounding' does not hold names and numbers"),
    (("rounding", "torch"), [], "'rounding' does not hold names and numbers"),
    (("rounding", "device"), "x" * 201, "'rounding' does not hold names and numbers"),
    (("scaler",), {"scale": -1.0}, "'scaler' is not the state of a loss scale"),
]


@pytest.mark.slow
def test_edited_training_checkpoints_are_refused_by_field(tiny):
    recipe = tiny(run={"epochs": 1})
    train(recipe)
    path = newest(recipe)
    good = path.read_bytes()
    with world("cpu") as joined:
        trainer = Trainer(recipe, joined)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        for where, value, message in EDITS:
            path.write_bytes(good)
            state = checkpoint.load(path)
            if where[-1] == "extra":
                state["model"]["extra"] = None
            put(state, where, value)
            checkpoint.save(path, state)
            with pytest.raises(UserError, match=message) as caught:
                restore(trainer.state, trainer.train_step, trainer.effective)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
            assert same_values(before, trainer.model.state_dict())
            assert trainer.state.position() == {"epoch": 0, "step": 0, "global_step": 0}
            assert not trainer.train_step.optimizer.state
        path.write_bytes(good)
        restore(trainer.state, trainer.train_step, trainer.effective)
        assert trainer.state.position() == {"epoch": 1, "step": 0, "global_step": 5}
        trainer.close()


def test_a_run_whose_epochs_changed_their_length_goes_on(tmp_path):
    state = {"epoch": 3, "step": 1, "global_step": 100 + 2 * 50 + 1 - 0, "effective": {"steps per epoch": 50}}
    counted = {**state, "counted_from": [1, 0, 100]}
    check_position(counted, tmp_path, epochs=9, steps_per_epoch=50)
    with pytest.raises(UserError, match="'global_step' is 202"):
        check_position({**counted, "global_step": 202}, tmp_path, epochs=9, steps_per_epoch=50)
    check_position(state, tmp_path, epochs=9, steps_per_epoch=50, changed=True)  # from before this was kept
    refused("'global_step' is 201", check_position, state, tmp_path, epochs=9, steps_per_epoch=50)
    refused("its next step is in epoch 3", check_position, counted, tmp_path, epochs=3, steps_per_epoch=50)


def _middle_of_the_largest_part(path):
    """The middle of the file may be padding between two tensors, where a flipped bit does no harm."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    names = struct.unpack("<HH", path.read_bytes()[part.header_offset + 26 : part.header_offset + 30])
    return part.header_offset + 30 + sum(names) + part.file_size // 2


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[_middle_of_the_largest_part(path)] ^= 1
    path.write_bytes(data)


@pytest.fixture
def finished(tiny):
    """A run with many checkpoints, and their paths."""
    recipe = tiny(run={"epochs": 1, "checkpoint_every": 2, "keep_checkpoints": 9})
    train(recipe)
    return recipe, checkpoint.found(recipe.run.output / "checkpoints")


@pytest.mark.slow
def test_damaged_checkpoints_are_set_aside_and_the_run_ends_with_the_same_bits(finished, events):
    recipe, found = finished
    expected, bytes_before = checkpoint.load(found[0]), []
    for path in found[:2]:
        flip_a_bit(path)
        bytes_before.append(path.read_bytes())
    found[0].with_name(f"{found[0].name}.damaged").write_text("an earlier one")
    train(recipe)
    assert_same_state(expected, checkpoint.load(found[0]))
    warned = [event["text"] for event in events(recipe.run.output, "warning")]
    lost = [checkpoint.steps_of(path) - checkpoint.steps_of(found[2]) for path in found[:2]]
    for path, steps in zip(found[:2], lost, strict=True):
        (text,) = [text for text in warned if text.startswith(f"{path} is damaged (Bad CRC-32 for file")]
        assert text.endswith(f".damaged, and the run goes on from {found[2].name}, {steps} steps earlier")
    names = [f"{found[0].name}.damaged.damaged", f"{found[1].name}.damaged"]
    assert [found[0].with_name(name).read_bytes() for name in names] == bytes_before
    assert found[0].with_name(f"{found[0].name}.damaged").read_text() == "an earlier one"


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_is_renamed(finished):
    recipe, found = finished
    for path in found:
        flip_a_bit(path)
    refused(f"None of the {len(found) - 1} older checkpoints is whole either", train, recipe)
    for path in found[1:]:
        path.unlink()
    refused("There is no older checkpoint: start afresh", train, recipe)
    assert checkpoint.found(found[0].parent) == found[:1]


@pytest.mark.slow
def test_only_damaged_files_are_renamed(finished, monkeypatch):
    """Neither one that holds what this version does not know, nor one beside an older one that cannot be read."""
    recipe, found = finished
    state = torch.load(found[0], weights_only=True)
    torch.save({**state, "more": torch.zeros(2, dtype=torch.uint16)}, found[0])
    assert set_damaged_aside(recipe, recipe.run.output) == []
    flip_a_bit(found[0])
    damage = checkpoint.damage

    def unreadable(path):
        if path == found[1]:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return damage(path)

    monkeypatch.setattr(checkpoint, "damage", unreadable)
    assert set_damaged_aside(recipe, recipe.run.output) == []
    assert checkpoint.found(found[0].parent) == found


@pytest.mark.slow
def test_a_damaged_checkpoint_that_was_asked_for_is_named_with_a_whole_one(finished):
    recipe, found = finished
    flip_a_bit(found[0])
    with pytest.raises(UserError) as caught:
        train(changed(recipe, run={"resume": str(found[0])}))
    assert str(caught.value).startswith(f"{found[0]} is damaged (Bad CRC-32 for file")
    assert f"{found[1]} is whole: move {found[0].name} to another folder" in str(caught.value)


def _bit(data, rng):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _block(data, rng):
    """A sector that the disk gives back as zeros or noise."""
    start = rng.randrange(len(data)) // 512 * 512
    block = bytes(512) if rng.random() < 0.5 else rng.randbytes(512)
    data[start : start + 512] = block[: len(data) - start]


def _cut(data, rng):
    del data[rng.randrange(len(data)) :]


def _swapped_blocks(data, rng):
    size = rng.choice((64, 512, 4096))
    one, other = (rng.randrange(len(data) // size) * size for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]


def _edited_pickle(data, rng):
    """Bytes of the archive's pickle, its checksum made to fit."""
    edited = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(edited, "w", zipfile.ZIP_STORED) as new:
        for part in old.infolist():
            content = bytearray(old.read(part))
            if part.filename.endswith("data.pkl"):
                for _ in range(rng.randint(1, 4)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
            new.writestr(part.filename, bytes(content))
    data[:] = edited.getvalue()


def _same_training(one, other):
    fields = ("model", "ema", "epoch", "step", "global_step")
    held = [[state["optimizer"]["state"], *(state[name] for name in fields)] for state in (one, other)]
    return same_values(*held)


@pytest.mark.slow
def test_damage_of_any_kind_is_named_or_the_checkpoint_before_is_taken(finished, tmp_path, pytestconfig):
    """`--damages 500` is the long campaign. Edits that keep every checksum may change only values nobody can check."""
    recipe, (newest_path, older_path, *rest) = finished
    for path in rest:
        path.unlink()
    newest_state, older_state = checkpoint.load(newest_path), checkpoint.load(older_path)
    whole, rng, counts = newest_path.read_bytes(), random.Random(7), collections.Counter()
    kinds = (_bit, _block, _cut, _swapped_blocks, _edited_pickle)
    for _, kind in zip(range(pytestconfig.getoption("damages")), itertools.cycle(kinds), strict=False):
        data = bytearray(whole)
        kind(data, rng)
        newest_path.write_bytes(data)
        aside = newest_path.with_name(f"{newest_path.name}.damaged")
        resumed, refused = None, ""
        with world("cpu") as joined, contextlib.ExitStack() as stack:
            try:
                trainer = Trainer(recipe, joined)
                stack.callback(trainer.close)
                resumed = restore(trainer.state, trainer.train_step, trainer.effective)
                loaded = {**trainer.train_step.state(), **trainer.state.position()}
            except UserError as error:
                refused = str(error)
        if resumed is None:
            assert newest_path.name in refused, kind.__name__
            what = "refused by name"
        elif resumed.path == older_path:
            assert aside.read_bytes() == data
            assert any(newest_path.name in warning for warning in trainer.warnings)
            assert _same_training(loaded, older_state)
            what = "the one before"
        else:
            what = "no harm" if _same_training(loaded, newest_state) else "other values"
            assert kind is _edited_pickle or what == "no harm", kind.__name__
        counts[kind.__name__, what] += 1
        aside.unlink(missing_ok=True)
    print(dict(counts))
    assert sum(count for (kind, what), count in counts.items() if what == "no harm") < sum(counts.values()) / 2


@pytest.fixture
def own(tiny, tmp_path):
    """A checkpoint of fastdeit's, with its recipe."""
    recipe = tiny(data={"train": tmp_path / "t", "val": tmp_path / "v"})
    model = build_network(recipe.model, 4)
    state = {"format": 1, "model": model.state_dict(), "ema": None, "recipe": recipe.to_dict(), "num_classes": 4}
    return tmp_path / "own.pt", state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", 30_000, "does not fit this network"),
        ("embed_dim", 10**17, "does not describe a network"),
        ("depth", 10**9, "says model.depth 1000000000, but its weights have 2 blocks"),
        ("img_size", 10**6, "does not fit this network"),
        ("img_size", 8 * 10**9, "does not describe a network"),
        ("patch_size", 0, "says model.patch_size 0"),
        ("mlp_ratio", 1e300, "does not describe a network"),
        ("mlp_ratio", 1e5, "does not fit this network"),
        ("arch", "vit_giant_patch14_224", "does not fit this network"),
        ("arch", "--help", "does not fit this version"),
        ("num_heads", "many", "does not fit this version"),
    ],
)
def test_an_edited_recipe_is_compared_before_it_is_built(own, data, field, value, message):
    path, state = own
    state["recipe"]["model"] |= {field: value} | ({"distilled": False} if field == "arch" else {})
    torch.save(state, path)
    with pytest.raises(UserError, match=message) as caught:
        evaluated(checkpoint=path, val=data / "val.beton")
    assert str(path) in str(caught.value)


def test_a_teacher_of_any_resolution_is_compared_before_it_is_built(own, tmp_path):
    path, state = own
    model = {k: v for k, v in state["model"].items() if "dist" not in k}
    torch.save({"model": model, "arch": "deit", "img_size": 96_000, "num_classes": 4}, path)
    cfg = TeacherConfig(name="deit_tiny_patch16_224", checkpoint=path)
    refused(r"own\.pt does not fit this network", Teacher, cfg, (0.5,) * 3, (0.2,) * 3, 32, 4)


def test_narrow_weights_are_announced_and_whole_numbers_refused(own, tiny):
    path, state = own
    recipe = tiny()
    half = {name: value.half() for name, value in state["model"].items()}
    messages = load_weights(build_network(recipe.model, 4), {"model": half})
    assert messages == ["weights stored as float16 are converted to the network's own format"]
    half["norm.bias"] = half["norm.bias"].long()
    with pytest.raises(UserError, match=r"norm\.bias is torch\.int64, but this network has torch\.float32 there"):
        load_weights(build_network(recipe.model, 4), {"model": half})
    assert path.name == "own.pt"


def test_what_is_no_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    errors = []

    def read():
        with pytest.raises(UserError, match="Is a fifo, not a file") as caught:
            checkpoint.read_checkpoint(tmp_path / "pipe.safetensors")
        errors.append(caught.value)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert errors


def test_kinds_of_refusal(tmp_path):
    assert issubclass(DamagedError, UserError)
    torch.save({"model": {"w": torch.nn.Linear(1, 1)}}, tmp_path / "x.pt")
    with pytest.raises(ForeignError, match=r"holds an object of .* only tensors and plain containers"):
        checkpoint.read_checkpoint(tmp_path / "x.pt")
