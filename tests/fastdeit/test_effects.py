"""What was given has an effect, or is refused by name; a file names the recipe that it starts from."""

import pytest
import torch

from fastdeit import checkpoint
from fastdeit.cli import parse_recipe
from fastdeit.config import Recipe
from fastdeit.distributed import world as world_of
from fastdeit.effects import EFFECTS, fields, has_effect
from fastdeit.inputs import check_inputs
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes import RECIPES, deit_tiny
from fastdeit.training.trainer import Trainer
from refusals import refused
from runs import changed, newest, parse_file, trained
from steps import build


def test_every_field_is_declared():
    assert set(EFFECTS) == set(fields(Recipe(name="")))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["deit_small", "--teacher.name", "resnet18"], "teacher.name"),
        (["deit_small", "--teacher.checkpoint", "x.pt"], "teacher.checkpoint"),
        (["deit_small", "--teacher.labels", "x"], "teacher.labels"),
        (["deit_small_distilled", "--teacher.labels", "x", "--teacher.name", "resnet18"], "teacher.name"),
        (["deit_small_distilled", "--objective.tau", "2"], "objective.tau"),
        (["deit_small", "--augment.color_jitter", "0.1"], "augment.color_jitter"),
        (["deit_small", "--augment.policy", "plain", "--augment.randaugment", "rand-m5-inc1"], "augment.randaugment"),
        (["deit_small", "--augment.erase_prob", "0", "--augment.erase_area", "0.1", "0.2"], "augment.erase_area"),
        (["deit_small", "--augment.mixup_alpha", "0", "--augment.cutmix_switch_prob", "0.2"], "augment.cutmix_switch"),
        (["deit_small", "--augment.mix_prob", "0", "--augment.cutmix_alpha", "0.2"], "augment.cutmix_alpha"),
        (["deit_small", "--ema.enabled", "False", "--ema.decay", "0.9"], "ema.decay"),
        (["deit_small", "--optim.momentum", "0.8"], "optim.momentum"),
        (["deit_base_transfer", "--model.init", "x.pt", "--optim.eps", "1e-6"], "optim.eps"),
        (["deit_small", "--run.eval_every", "5"], "run.eval_every"),
        (["deit_small", "--data.hw_decoder_load", "0.5"], "data.hw_decoder_load"),
        (["deit_small", "--data.repeats", "1", "--data.cell_groups", "2"], "data.cell_groups"),
        (["deit_base_384", "--model.init", "x.pt", "--model.drop_path", "0.3"], "model.drop_path"),
        (["deit_small", "--departures.finetune_mode", "train"], None),  # what it is anyway
        (["convnet_teacher", "--model.embed_dim", "64"], "model.embed_dim"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(args, named, tmp_path):
    if named is None:
        parse_recipe(args)
        return
    refused(rf"{named}\S* .* has no effect in this run", parse_recipe, args)
    # The same in a file.
    flags = [word for word in args[1:] if word.startswith("--")]
    values: dict = {"name": args[0]}
    for flag in flags:
        section, _, name = flag.removeprefix("--").partition(".")
        at = args.index(flag) + 1
        words = args[at : next((i for i in range(at, len(args)) if args[i].startswith("--")), len(args))]
        values.setdefault(section, {})[name] = words if len(words) > 1 else words[0]
    refused(rf"run\.json.*{named}\S* .* has no effect in this run", parse_file, tmp_path / "run.json", values)


@pytest.mark.slow
def test_the_same_value_with_an_effect_is_taken():
    base = ["deit_small_distilled", "--teacher.checkpoint", "x.pt", "--teacher.name", "resnet18"]
    assert parse_recipe(base).teacher.name == "resnet18"
    parse_recipe([*base, "--teacher.labels", "x"])  # compared with the labels' own teacher
    parse_recipe(["deit_small", "--augment.mix_prob", "0"])  # which turns mixing off
    parse_recipe([*base, "--objective.distillation", "soft", "--objective.tau", "2"])
    parse_recipe(["deit_small", "--augment.policy", "three_augment", "--augment.color_jitter", "0.1"])
    parse_recipe(
        ["deit_base_384", "--model.init", "x.pt", "--departures.finetune_mode", "train", "--model.drop_path", "0"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "deit_base_384", "deit_base_transfer"])
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_a_stored_recipe_starts_the_same_run(name, compat, tmp_path):
    recipe = changed(RECIPES[name](), compat=compat)
    if recipe.model.finetune:
        none = {"distillation": "none"} if compat == "released" else {}
        recipe = changed(recipe, model={"init": tmp_path / "w.pt"}, objective=none)
    recipe = recipe.resolved()
    assert parse_file(tmp_path / "recipe.json", recipe) == recipe
    # As versions stored it in which every run that starts from weights was in eval mode.
    old = changed(recipe, departures={"finetune_mode": "eval"})
    assert parse_file(tmp_path / "recipe.json", old) == old


def test_a_file_names_its_recipe_or_is_refused(tmp_path):
    file = tmp_path / "run.toml"
    text = 'name = "deit_base"\n[optim]\nlr = 1e-3\n'
    assert parse_file(file, text).model.embed_dim == 768
    with pytest.raises(UserError, match=r"the command line names the recipe deit_tiny, .*run.toml names deit_base"):
        parse_file(file, text, "deit_tiny")
    for name in ('"my_deit_base"', '"deit_bse"', "3", "[1]"):
        for first in ([], ["deit_base"]):
            with pytest.raises(
                UserError, match=r"run\.toml: there is no recipe .* set name to one of deit_tiny, .*deit_base"
            ):
                parse_file(file, f"name = {name}\n[optim]\nlr = 1e-3\n", *first)


@pytest.mark.slow
def test_fields_that_are_said_to_have_no_effect_change_no_bit(tiny, tmp_path):
    plain = {
        "augment": {"policy": "plain", "erase_prob": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0},
        "data": {"val": None, "repeats": 1},
        "ema": {"enabled": False},
    }
    idle = {
        "augment": {
            "randaugment": "rand-m3-inc1", "interpolation": "random", "color_jitter": 0.9, "erase_area": (0.3, 0.4),
            "erase_aspect": (0.9, 1.0), "cutmix_switch_prob": 0.1,
        },
        "objective": {"alpha": 0.7, "tau": 7.0},
        "teacher": {"name": "resnet18", "img_size": 64, "mean": (0, 0, 0)},
        "optim": {"momentum": 0.1},
        "ema": {"decay": 0.5},
        "data": {"cell_groups": 1, "hw_decoder_load": 0.1},
        "run": {"eval_every": 7, "eval_batch": 3},
        "model": {"drop_path_mode": "skip"},
        "departures": {
            "cutmix_box": "floor", "soft_reduction": "elements", "late_fusion": "logits", "finetune_mode": "eval",
            "placement": "spread", "single_process_repeats": "dropped", "ema_eval": False,
            "finetune_distillation": "refused",
        },
    }  # fmt: skip
    runs = []
    for name, more in (("plain", {}), ("idle", idle)):
        sections = {s: {**plain.get(s, {}), **more.get(s, {})} for s in {*plain, *more}}
        run = {"epochs": 1, "output": tmp_path / name, **sections.get("run", {})}
        model = {"drop_path": 0.0, "distilled": False, **sections.get("model", {})}
        runs.append(tiny(deit_tiny, **{**sections, "run": run, "model": model}))
    for section, values in idle.items():
        assert not any(has_effect(runs[0], f"{section}.{name}") for name in values)
    plain, idle = (trained(recipe)["model"] for recipe in runs)
    assert all(torch.equal(plain[name], idle[name]) for name in plain)


@pytest.mark.slow
def test_a_checkpoint_that_differs_in_an_idle_field_goes_on(tiny, tmp_path):
    """As of versions in which every run that starts from weights was in eval mode."""
    recipe = tiny(deit_tiny, run={"epochs": 1})
    with world_of("cpu") as joined:
        Trainer(recipe, joined).run()
        path = newest(recipe)
        state = checkpoint.load(path)
        state["recipe"]["departures"]["finetune_mode"] = "eval"
        state["recipe"]["teacher"]["name"] = "resnet18"
        del state["recipe"]["model"]["residual_dtype"]
        torch.save(state, path)
        Trainer(recipe, joined).run()
        fine = tiny(deit_tiny, model={"init": path}, run={"epochs": 1, "output": tmp_path / "fine"})
        Trainer(fine, joined).run()
        path = newest(fine)
        state = checkpoint.load(path)
        state["recipe"]["departures"]["finetune_mode"] = "eval"
        torch.save(state, path)
        trainer = Trainer(fine, joined)
        refused(r"departures\.finetune_mode = eval, this run has train", trainer.run)


def test_no_switch_hides_itself():
    """A value that turns something off has an effect, so no condition looks at the field's own value."""
    recipes = [make().filled() for make in RECIPES.values()]
    for recipe in recipes:
        for name, value in fields(recipe).items():
            section, _, field = name.partition(".")
            if isinstance(value, bool):
                others = [not value]
            elif isinstance(value, int | float):
                others = [type(value)(0), type(value)(1)]
            else:
                continue
            for other in others:
                assert has_effect(changed(recipe, **{section: {field: other}}), name) == has_effect(recipe, name), name


def test_what_turns_mixing_off_is_no_field_without_effect():
    off = "--augment.mix_prob 0 --augment.mixup_alpha 0 --augment.cutmix_alpha 0"
    recipe = parse_recipe(f"deit_small --data.train x {off}".split())
    assert recipe.augment.mixup_alpha == recipe.augment.cutmix_alpha == recipe.augment.mix_prob == 0


def test_the_command_line_overrides_a_stored_recipe(tmp_path):
    words = "deit_small_distilled --data.train x --teacher.checkpoint t.pt --ema.decay 0.9"
    stored = parse_recipe(words.split()).resolved()
    path = tmp_path / "recipe.json"
    assert parse_file(path, stored).resolved() == stored
    assert not parse_file(path, stored, "--ema.enabled", "False").ema.enabled
    assert parse_file(path, stored, "--objective.distillation", "none").teacher == stored.teacher


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"micro_batch": 12}}, "run.micro_batch is 12, not a multiple of a mixing group's 8 samples"),
        ({"run": {"micro_batch": 8}, "departures": {"mix_group": 0}}, "run.micro_batch is 8, .* group's 32 samples"),
        ({"run": {"micro_batch": 24}}, None),
        ({"run": {"micro_batch": 12}, "model": {"drop_path": 0.0}}, None),
    ],
)
def test_micro_batches_that_cut_a_group_of_skipped_samples_are_refused(tiny, sections, message):
    sections = {**sections, "model": {"drop_path_mode": "skip", **sections.get("model", {})}}
    if message is None:
        tiny(**sections)
    else:
        refused(message, tiny, **sections)


@pytest.mark.parametrize(("group", "world", "rate"), [(8, 1, 0.05), (0, 4, 0.05), (8, 2, 0.95)])
def test_a_rate_that_skips_no_sample_or_all_is_refused_before_training(tiny, group, world, rate):
    recipe = tiny(model={"drop_path_mode": "skip", "drop_path": rate}, departures={"mix_group": group})
    refused(f"model.drop_path {rate} drops (none|all) of a group's 8 samples", check_inputs, recipe, world=world)
    if world == 1:
        with world_of("cpu") as joined, pytest.raises(UserError, match="drops none of"):
            build(recipe, joined)
    check_inputs(changed(recipe, model={"drop_path_mode": "mask"}), world=world)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.lr -1", r"optim\.lr is -1\.0: it must be 0 or more"),
        ("--run.checkpoint_patience nan", r"run\.checkpoint_patience is nan: it must be a finite number"),
        ("--run.divergence_band nan", r"run\.divergence_band is nan: it must be a finite number"),
        ("--augment.std 1 inf 1", r"augment\.std is \(1\.0, inf, 1\.0\): it must be a finite number"),
        ("--run.timeout_minutes inf", r"run\.timeout_minutes is inf: it must be a finite number"),
        ("--run.timeout_minutes 1e9", r"run\.timeout_minutes is 1e\+09: it must be more than 0 and at most 527040"),
        ("--optim.betas 0.9 1.5", r"optim\.betas are \(0\.9, 1\.5\)"),
        ("--model.num_heads 0", r"model\.num_heads is 0: it must be at least 1"),
        ("--model.patch_size 0", r"model\.patch_size is 0: it must be at least 1"),
        ("--model.drop_rate 1.5", r"model\.drop_rate is 1\.5: it must be at least 0 and less than 1"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_name(words, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(f"deit_tiny --data.train x {words}".split()).resolved()
