"""Every Python example of the documents runs, on small data and a small model."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from runs import newest, train

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = PYTHON.findall((ROOT / "docs" / "python.md").read_text())


@pytest.fixture
def folder(data, images, tmp_path, monkeypatch):
    """A working folder with the files that the examples name."""
    for split in ("train", "val"):
        for file in data.glob(f"{split}.beton*"):
            os.link(file, tmp_path / file.name)
    shutil.copy(images / "val" / "class0" / "000.jpg", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(code, sizes, small):
    """Run an example with other constants in the place of `sizes`, the right sides of its first line."""
    names, given = (re.search(r"^(SIZE, .*) = (.*)$", code, re.MULTILINE)).groups()
    assert given == sizes
    exec(code.replace(f"{names} = {sizes}", f"{names} = {small}"), held := {})
    return held


@pytest.mark.slow
def test_the_training_loop(folder, capsys):
    (loop,) = (code for code in EXAMPLES if "cross_entropy" in code)
    run(loop, "224, 256, 300", "32, 64, 2")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 0", "epoch 1"]
    assert (folder / "last.pt").exists()


@pytest.mark.slow
def test_a_checkpoint_as_a_classifier(folder, tiny, capsys):
    recipe = tiny(run={"epochs": 1})
    train(recipe)
    shutil.copy(newest(recipe), folder / "checkpoint.pt")
    capsys.readouterr()
    (code,) = (code for code in EXAMPLES if "fastdeit.load(" in code)
    exec(code, {})
    assert re.fullmatch(r"class\d \d+%\n", capsys.readouterr().out)


@pytest.mark.slow
def test_distillation_in_a_loop(folder, capsys):
    (code,) = (code for code in EXAMPLES if "fastdeit.objective" in code)
    run(code, '224, 256, "regnety_160"', '32, 64, "resnet10t"')
    assert re.fullmatch(r"the last loss: \d\.\d{3}\n", capsys.readouterr().out)


@pytest.mark.slow
def test_a_whole_run(folder, tiny, capsys):
    (code,) = (code for code in EXAMPLES if "fastdeit.Trainer" in code)
    small = '"epochs": 2, "global_batch": 32, "device": "cpu", '
    shape = 'model={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}, '
    code = code.replace('"epochs": 300, ', small).replace("run={", shape + "run={")
    exec(code.replace("run={", 'departures={"mix_group": 8}, run={'), {})
    assert re.search(r"top-1 \d+\.\d%\n\Z", capsys.readouterr().out)
    assert len([*Path("runs/tiny/checkpoints").glob("checkpoint-*.pt")]) == 2
    exec(code.replace("run={", 'departures={"mix_group": 8}, run={'), {})
    assert "resumed from" in capsys.readouterr().out


def test_no_example_is_left_out():
    assert len(EXAMPLES) == 4


@pytest.mark.slow
def test_the_readmes_example(folder, capsys):
    (code,) = PYTHON.findall((ROOT / "README.md").read_text())
    exec(code.replace("batch_size=256", "batch_size=32").replace(".cuda()", ""), {})
    assert capsys.readouterr().out == "[]\n"


def example(page):
    """The only Python example of a page of docs/."""
    (code,) = PYTHON.findall((ROOT / "docs" / page).read_text())
    return code


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_lightning_example(folder, capsys):
    pytest.importorskip("lightning", reason="pip install lightning")
    run(example("lightning.md"), "224, 256, 300, 1000", "32, 64, 2, 4")
    assert re.search(r"^top-1 \d+\.\d%$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_in_the_middle_of_an_epoch_with_the_same_weights(folder):
    lightning = pytest.importorskip("lightning", reason="pip install lightning")
    code = example("lightning.md").partition("trainer = ")[0]
    code = code.replace("deit_small_patch16_224", "deit_tiny_patch16_224")
    names = run(code, "224, 256, 300, 1000", "32, 32, 2, 4")

    def fit(place, checkpoint=None):
        lightning.seed_everything(0, verbose=False)
        model = names["Classifier"]()
        saver = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=place, every_n_train_steps=3, save_top_k=-1)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False, logger=False,
            callbacks=[saver], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, names["Images"](), ckpt_path=checkpoint)
        return model.state_dict()

    whole = fit(folder / "whole")
    (checkpoint,) = (folder / "whole").glob("*step=3.ckpt")
    resumed = fit(folder / "resumed", checkpoint)
    assert all(value.equal(resumed[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_transformers_example(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # it would take this checkout's folder for a package of its own
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"pip install {package}")
    run(example("huggingface.md"), "224, 256, 300, 1000, 384, 12", "32, 32, 2, 4, 64, 2")
    assert re.search(r"^top-1 \d+\.\d%$", capsys.readouterr().out, re.MULTILINE)
