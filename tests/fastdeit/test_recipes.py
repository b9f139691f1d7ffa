"""Named recipes against the paper's figures; the compat switch; refusal of what cannot be."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.cli import parse_recipe, recipe_from_dict
from fastdeit.config import Recipe
from fastdeit.effects import fields
from fastdeit.model.deit import build_model
from fastdeit.model.fused import fuse
from fastdeit.option_names import TIMM
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES
from fastdeit.sections import COMPAT, COMPAT_RUN, Departures, RunConfig
from fastdeit.training.optim import peak_lr
from refusals import refused
from runs import changed, parse_file


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("deit_")])
def test_shapes_are_those_of_timm(name):
    cfg = RECIPES[name]().model
    size, distilled = name.split("_")[1], "_distilled" in name
    res = 384 if name.endswith("_384") else 224
    with torch.device("meta"):  # shapes alone
        model = timm.create_model(f"deit_{size}{'_distilled' if distilled else ''}_patch16_224", img_size=res)
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads) == (
        model.embed_dim,
        len(model.blocks),
        model.blocks[0].attn.num_heads,
    )
    assert cfg.distilled == hasattr(model, "dist_token")
    assert cfg.img_size == model.patch_embed.img_size[0]
    assert cfg.patch_size == model.patch_embed.patch_size[0]


@pytest.mark.slow
def test_the_table_of_deit_3s_networks_is_true():
    """FLOPs as PyTorch counts them."""
    table = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| (deit3_\w+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", table, re.MULTILINE)
    assert len(rows) == 5
    for name, millions, gigas, modules in rows:
        cfg = dataclasses.replace(RECIPES[name]().model, grad_checkpointing=False)
        with torch.device("meta"):
            model, image = build_model(cfg, 1000).eval(), torch.empty(1, 3, cfg.img_size, cfg.img_size)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(image)
        swap = fuse(model)
        found = sum(p.numel() for p in model.parameters()) / 1e6, flops.get_total_flops() / 1e9, len(swap.replaced)
        assert (f"{found[0]:.1f}", f"{found[1]:.1f}", str(found[2])) == (millions, gigas, modules)
        assert swap.left == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_states_command_hours_and_accuracy(name):
    lines = [line.strip() for line in (RECIPES[name].__doc__ or "").splitlines()]
    command = shlex.split(next(line for line in lines if line.startswith("fastdeit-train")))
    assert command[1] == name
    parse_recipe(command[1:]).resolved()
    assert any(line.startswith("Hours") for line in lines)
    assert any("op-1" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # deit issue 45
        ("cifar10 cifar100 flowers102 cars", ("sgd", 0.01, 1e-4, 1000, 0.0, 0.0)),
        # deit issue 105
        ("inat18 inat19", ("adamw", 7.5e-5, 0.05, 360, 0.1, 0.1)),
    ],
)
def test_transfer_is_as_the_authors_wrote(names, expected):
    for name in names.split():
        recipe = RECIPES[f"deit_base_{name}"]()
        optim, run = recipe.optim, recipe.run
        assert peak_lr(optim, run.global_batch) == optim.lr
        noise = recipe.model.drop_path, recipe.augment.erase_prob
        assert (optim.name, optim.lr, optim.weight_decay, run.epochs, *noise) == expected
        assert (run.global_batch, recipe.data.repeats, optim.warmup_epochs) == (768, 3, 5)
        augment = recipe.augment
        assert (augment.mixup_alpha, augment.cutmix_alpha, augment.label_smoothing) == (0.8, 1.0, 0.1)


def test_every_departure_is_decided_in_both_columns():
    for column in COMPAT.values():
        assert all(getattr(column, f.name) is not None for f in dataclasses.fields(Departures))


def test_resolving_keeps_what_was_chosen():
    fused = Departures(late_fusion="probabilities")
    recipe = changed(RECIPES["deit_tiny"](), compat="released", departures=fused).resolved()
    assert recipe.departures.late_fusion == "probabilities"
    assert recipe.departures.schedule_unit == "epoch"
    assert (recipe.objective.alpha, recipe.objective.tau) == (0.5, 1.0)
    paper = RECIPES["deit_tiny"]().resolved()
    assert (paper.objective.alpha, paper.objective.tau) == (0.1, 3.0)
    assert paper.resolved() == paper


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.patch_size", "15"], "not a multiple of model.patch_size"),
        (["--model.num_heads", "5"], "not a multiple of model.num_heads"),
        (["--run.epochs", "0"], "run.epochs is 0"),
        (["--data.repeats", "0"], "data.repeats is 0"),
        (["--run.eval_every", "0"], "run.eval_every is 0"),
        (["--run.micro_batch", "-1"], "run.micro_batch is -1"),
        (["--model.finetune", "True"], "starts from trained weights"),
        (["--model.arch", "resnet18"], "needs model.arch 'deit'"),
        (["--optim.layer_decay", "0.7", "--optim.implementation", "apex"], "set --optim.layer_decay 1"),
        (["--compat", "released", "--model.init", "x.pt"], "refuses distillation while fine-tuning"),
    ],
)
def test_impossible_recipes_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(["deit_tiny_distilled", *args]).resolved()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_stored_recipe_reads_back_equal(name, tmp_path):
    args = [name, "--data.train", "a b.beton", "--optim.clip_grad", "1.5", "--model.init", "weights.pt"]
    recipe = parse_recipe(args).resolved()
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert parse_file(tmp_path / "recipe.json", recipe) == recipe


def test_command_line_wins_over_file_and_file_over_recipe(tmp_path):
    text = "[optim]\nlr = 0.5\nmin_lr = 0.25\nbetas = [0.8, 0.9]\n[ema]\nenabled = false\n"
    recipe = parse_file(tmp_path / "run.toml", text, "deit_tiny", "--optim.lr", "0.125")
    assert (recipe.optim.lr, recipe.optim.min_lr, recipe.optim.betas) == (0.125, 0.25, (0.8, 0.9))
    assert recipe.ema.enabled is False
    assert recipe.optim.weight_decay == 0.05


def test_a_stored_run_of_another_name_starts_again(tmp_path):
    recipe = changed(RECIPES["deit_tiny"](), name="mine").resolved()
    file = tmp_path / "recipe.json"
    assert parse_file(file, recipe) == recipe
    assert parse_file(file, recipe, "--optim.lr", "0.25").optim.lr == 0.25


def test_the_compat_switch_wins_over_what_a_file_had_decided(tmp_path):
    stored = RECIPES["deit_tiny"]().resolved()
    recipe = parse_file(tmp_path / "recipe.json", stored, "--compat", "released").resolved()
    assert recipe.departures == COMPAT["released"]
    assert (recipe.objective.alpha, recipe.objective.tau) == (0.5, 1.0)
    assert {name: getattr(recipe.run, name) for name in COMPAT_RUN["released"]} == COMPAT_RUN["released"]


OLD = Path(__file__).parent / "old_recipe.json"  # as an older version stored it


def test_compat_decides_the_engineering_fields_of_run():
    for compat, values in COMPAT_RUN.items():
        run = changed(RECIPES["deit_tiny"](), compat=compat).resolved().run
        assert {name: getattr(run, name) for name in values} == values
    recipe = parse_recipe(["deit_tiny", "--compat", "released", "--run.amp_dtype", "bf16"]).resolved()
    assert (recipe.run.amp_dtype, recipe.run.loss_sync) == ("bf16", "every_step")


@pytest.mark.slow
def test_a_recipe_that_an_older_version_stored_is_read(tmp_path):
    stored = json.loads(OLD.read_text())
    moved = {"eval_sharding": "replicate", "loss_sync": "every_step", "amp_dtype": "fp16"}
    stored["departures"] |= moved  # not the defaults
    for recipe in (recipe_from_dict(stored), recipe_from_dict(stored).resolved()):
        assert {name: getattr(recipe.run, name) for name in moved} == moved
        assert recipe.to_dict()["departures"] == {k: v for k, v in stored["departures"].items() if k not in moved}
        run = {k: v for k, v in recipe.to_dict()["run"].items() if k not in moved}
        newer = dataclasses.asdict(RunConfig())
        assert run == {**{name: newer[name] for name in run}, **stored["run"]}
    stored["name"] = "mine"
    file = tmp_path / "recipe.json"
    assert parse_file(file, stored) == changed(recipe, name="mine")
    # What a compat had decided follows another compat, as in a recipe of this version.
    stored["departures"] |= COMPAT_RUN["paper"]
    released = parse_file(file, stored, "--compat", "released").resolved()
    assert {name: getattr(released.run, name) for name in moved} == COMPAT_RUN["released"]


@pytest.mark.slow
def test_the_old_names_are_read_from_files_alone(tmp_path):
    refused(r"did you mean --run\.loss_sync\?", parse_recipe, ["deit_tiny", "--departures.loss_sync", "deferred"])
    # A file may still hold them: with others, alone, and beside a section of runs, whose own value wins.
    file = tmp_path / "run.toml"
    for text in ("", "mix_group = 32\n", "[run]\nepochs = 3\n", '[run]\nloss_sync = "every_step"\n'):
        recipe = parse_file(file, f'[departures]\nloss_sync = "deferred"\n{text}', "deit_tiny")
        assert recipe.run.loss_sync == ("every_step" if "every_step" in text else "deferred")
        assert recipe.departures.mix_group == (32 if "mix_group" in text else None)


def test_a_file_without_a_recipe_is_named(tmp_path):
    file = tmp_path / "run.json"
    refused(r"run\.json holds a list", parse_file, file, "[1, 2]", "deit_tiny")
    refused(r"run\.json holds no settings", parse_file, file, "{}", "deit_tiny")
    refused(r"run\.json does not name its recipe", parse_file, file, '{"run": {"epochs": 3}}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1", "'optim.lrr' is not a field"),
        ("[optimizer]\nlr = 1", "'optimizer' is not a section"),
        ("optim = 3", "must be a section"),
        ("[optim\n", "not valid TOML"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    file = tmp_path / "run.toml"
    with pytest.raises(UserError, match=message) as caught:
        parse_file(file, text, "deit_tiny")
    assert str(file) in str(caught.value)


def test_unknown_recipe_and_missing_file():
    refused(r"no recipe 'deit_huge'.*deit_base", parse_recipe, ["deit_huge"])
    refused("No such file", parse_recipe, ["deit_tiny", "--config", "/nonexistent.toml"])


def test_a_stored_recipe_of_wrong_types_is_refused():
    values = Recipe(name="x").to_dict()
    values["optim"]["lr"] = "much"
    refused("does not fit", recipe_from_dict, values)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", r"did you mean --optim\.lr\? \(for a batch of optim\.lr_batch"),
        ("--batch-size", r"did you mean --run\.global_batch\? \(images a step on all GPUs together"),
        ("--data.batch_size", r"did you mean --run\.global_batch\? \(images a step on all GPUs together"),
        ("--train.epochs", r"did you mean --run\.epochs\?"),
        ("--mixup", r"did you mean --augment\.mixup_alpha\?"),
        ("--distilled", r"did you mean --model\.distilled\?"),
        ("--run.epoch", r"did you mean --run\.epochs\?"),
        ("--optim.lrr", r"did you mean --optim\.lr\?"),
        ("--ema-rate", "--help-all lists them all"),
        ("--data.trian=x", r"there is no option --data\.trian: did you mean --data\.train"),
        ("--crop-pct", r"did you mean --augment\.eval_crop\?"),
        ("--print-confg", r"did you mean --print-config\?"),
        ("--xyz", "--help-all lists them all"),
        ("--eval", "--help-all lists them all"),
    ],
)
def test_an_unknown_option_names_the_nearest(typed, meant):
    refused(meant, parse_recipe, ["deit_tiny", typed, "3"])


def test_every_option_of_timm_leads_to_one_of_ours():
    known = {name: str(value) for name, value in fields(RECIPES["deit_tiny"]()).items()}
    for typed, name in TIMM.items():
        assert name in known, typed
        refused(rf"did you mean --{re.escape(name)}\?", parse_recipe, ["deit_tiny", typed, known[name]])


def test_a_word_that_belongs_to_no_option():
    with pytest.raises(UserError, match=r"'photos' belongs to no option: .* --data\.train photos"):
        parse_recipe(["deit_tiny", "photos", "--run.epochs", "3"])


def test_switches_that_compat_decides_need_no_value_either():
    assert parse_recipe(["deit_tiny", "--departures.decay_dist_token", "--model.distilled"]).departures.decay_dist_token


@pytest.mark.parametrize("words", [["--model.distilled"], ["--model.distilled", "--optim.lr", "1"]])
def test_a_switch_needs_no_value(words):
    assert parse_recipe(["deit_tiny", *words]).model.distilled
    assert not parse_recipe(
        ["deit_tiny_distilled", "--objective.distillation", "none", "--model.distilled", "False"]
    ).model.distilled
