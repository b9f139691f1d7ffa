"""Writes a loaded checkpoint in the layouts of other programs. Every layout is checked against the model.

Each is a folder of its own, which holds the weights, the preprocessing and the class names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastdeit.checkpoint import save_safetensors
from fastdeit.loading import Loaded, log_probabilities
from fastdeit.pipelines.errors import UserError
from fastdeit.version import __version__

_SHAPE = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
TOLERANCE = 1e-4  # of log-probabilities in float32, between two programs that compute the same


class Classifier(nn.Module):
    """Images (B, 3, S, S) to log-probabilities (B, K) of the head that decides; their softmax is the probabilities."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.model, self._head = loaded.model, loaded.head

    def forward(self, images: Tensor) -> Tensor:
        return log_probabilities(self.model(images), self._head)


def export_timm(loaded: Loaded, folder: Path) -> None:
    """`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it. timm averages the logits of two heads."""
    from timm.models import save_for_hf

    network = _timm_model(loaded)
    save_for_hf(
        network,
        str(folder),
        model_config={"label_names": loaded.class_names} if loaded.class_names else None,
        model_args=_timm_arguments(loaded),
        safe_serialization=True,
    )
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _check(loaded, folder, lambda images: _log_softmax(again(images)), head="fused_logits")


def _timm_arguments(loaded: Loaded) -> dict[str, Any]:
    cfg = loaded.recipe.model
    if cfg.arch != "deit":
        return {}
    arguments = {name: getattr(cfg, name) for name in _SHAPE}
    if cfg.layer_scale:
        arguments["init_values"] = cfg.layer_scale
    return arguments | ({"no_embed_class": True} if cfg.no_embed_class else {})


def _timm_model(loaded: Loaded) -> nn.Module:
    """timm's own network with these weights, and with this preprocessing in its configuration."""
    cfg, augment = loaded.recipe.model, loaded.recipe.augment
    if cfg.distilled and cfg.no_embed_class:
        raise UserError("timm has no model with a distillation token without a position: export it as onnx or torch")
    arch = "deit_tiny_distilled_patch16_224" if cfg.distilled else "deit_tiny_patch16_224"
    overlay = {
        "input_size": (3, cfg.img_size, cfg.img_size),
        "crop_pct": augment.eval_crop,
        "interpolation": "bicubic",
        "mean": augment.mean,
        "std": augment.std,
    }
    network = timm.create_model(
        arch if cfg.arch == "deit" else cfg.arch,
        num_classes=cfg.num_classes,
        pretrained_cfg_overlay=overlay,
        **_timm_arguments(loaded),
    )
    network.load_state_dict(loaded.model.state_dict(), strict=True)
    return network.eval()


def export_transformers(loaded: Loaded, folder: Path) -> None:
    """Loads in `transformers`: DeiTForImageClassificationWithTeacher with a distillation token, else ViT.

    transformers averages the logits of two heads. The names of the weights are those of the Hub's DeiT checkpoints,
    which every version reads.
    """
    cfg, augment = loaded.recipe.model, loaded.recipe.augment
    if cfg.arch != "deit":
        raise UserError(f"{cfg.arch} has no layout in transformers here: export it as timm, onnx or torch")
    if cfg.layer_scale or cfg.no_embed_class:
        raise UserError(
            "transformers has no DeiT with LayerScale or without positions for tokens: export it as timm, onnx or torch"
        )
    kind = "deit" if cfg.distilled else "vit"
    names = loaded.class_names or [f"LABEL_{i}" for i in range(cfg.num_classes or 0)]
    config = {
        "model_type": kind,
        "architectures": ["DeiTForImageClassificationWithTeacher" if cfg.distilled else "ViTForImageClassification"],
        "image_size": cfg.img_size,
        "patch_size": cfg.patch_size,
        "num_channels": 3,
        "hidden_size": cfg.embed_dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": int(cfg.embed_dim * cfg.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "torch_dtype": "float32",
    }
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": _short_side(loaded)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": cfg.img_size, "width": cfg.img_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(augment.mean),
        "image_std": list(augment.std),
    }
    save_safetensors(folder / "model.safetensors", transformers_state(loaded.model.state_dict(), kind))
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessing)


def transformers_state(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A DeiT's state dict under the names of the Hub's checkpoints; `kind` is "deit" or "vit"."""
    heads = {"head": "cls_classifier" if kind == "deit" else "classifier", "head_dist": "distillation_classifier"}
    outer = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    inner = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        module, dot, last = name.rpartition(".")
        if module in heads:
            out[f"{heads[module]}.{last}"] = value
        elif not name.startswith("blocks."):
            out[f"{kind}.{outer[module or name]}{dot and dot + last if module else ''}"] = value
        else:
            _, number, part = module.split(".", 2)
            block = f"{kind}.encoder.layer.{number}"
            if part == "attn.qkv":
                for which, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[f"{block}.attention.attention.{which}.{last}"] = piece
            else:
                out[f"{block}.{inner[part]}.{last}"] = value
    return {name: value.contiguous().clone() for name, value in out.items()}


def export_onnx(loaded: Loaded, folder: Path) -> None:
    """`model.onnx`: `images` (batch, 3, S, S) to `log_probabilities` (batch, K), for any batch."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'fastdeit[onnx]'") from error
    path = folder / "model.onnx"
    torch.onnx.export(
        Classifier(loaded).eval(),
        (_example(loaded),),
        str(path),
        input_names=["images"],
        output_names=["log_probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    _describe(loaded, folder)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _check(loaded, path, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))


def export_torch(loaded: Loaded, folder: Path) -> None:
    """`model.pt2`: a program of `torch.export`, with the same input and output as `export_onnx`."""
    path = folder / "model.pt2"
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Classifier(loaded).eval(), (_example(loaded),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    _describe(loaded, folder)
    again = torch.export.load(path).module()
    _check(loaded, path, again)


FORMATS: dict[str, Callable[[Loaded, Path], None]] = {
    "timm": export_timm,
    "transformers": export_transformers,
    "onnx": export_onnx,
    "torch": export_torch,
}


def card(loaded: Loaded, source: str, scores: dict[str, dict[str, float]] | None) -> str:
    """A model card in Markdown; `scores` are top-1 and top-5 by head, measured on the run's own validation set."""
    cfg, recipe = loaded.recipe.model, loaded.recipe
    parameters = sum(each.numel() for each in loaded.model.parameters())
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-classification, deit]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        f"{parameters / 1e6:.1f} M parameters, {cfg.num_classes} classes, {cfg.img_size} pixels. Trained with "
        f"fastdeit; exported by version {__version__} from `{source}`, weights `{loaded.weights}`.",
        "",
        f"Preprocessing: bicubic resize of the short side to {_short_side(loaded)}, center "
        f"crop of {cfg.img_size}, mean {list(recipe.augment.mean)}, deviation {list(recipe.augment.std)}.",
        "",
    ]
    if loaded.head != "class":
        lines += [
            f"Two heads. fastdeit decides by `{loaded.head}`; ONNX and torch.export files give its log-probabilities. "
            f"timm and transformers average the two heads' logits.",
            "",
        ]
    if scores is None:
        return "\n".join([*lines, "Its accuracy has not been measured."]) + "\n"
    rows = [f"| {head} | {each['top1']:.2f} | {each['top5']:.2f} |" for head, each in scores.items()]
    return "\n".join([*lines, "| head | top-1 % | top-5 % |", "|---|---:|---:|", *rows]) + "\n"


def _describe(loaded: Loaded, folder: Path) -> None:
    """`preprocessing.json`, for layouts that have no file of their own for it."""
    cfg, augment = loaded.recipe.model, loaded.recipe.augment
    preprocessing = {
        "resize_short_side": _short_side(loaded),
        "interpolation": "bicubic",
        "center_crop": cfg.img_size,
        "mean": list(augment.mean),
        "std": list(augment.std),
        "class_names": loaded.class_names,
    }
    _write_json(folder / "preprocessing.json", preprocessing)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _short_side(loaded: Loaded) -> int:
    """Pixels to which the evaluation resizes the short side of an image."""
    return int(loaded.recipe.model.img_size / loaded.recipe.augment.eval_crop)


def _example(loaded: Loaded) -> Tensor:
    size = loaded.recipe.model.img_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


@torch.inference_mode()
def _check(loaded: Loaded, path: Path, run: Callable[[Tensor], Tensor], head: str | None = None) -> None:
    """Raise UserError unless `run` gives the log-probabilities of the model, for a batch of another size as well.

    head  the head that `run` computes, if there are two; None: the one that decides
    """
    images = torch.cat([_example(loaded), _example(loaded).flip(0) / 2])[:3]
    output = loaded.model(images)
    head = loaded.head if head is None or output.dist is None else head
    worst = float((run(images) - log_probabilities(output, head)).abs().max())
    if not worst <= TOLERANCE:
        raise UserError(f"{path}: its results differ by {worst:.2g} from the model's, more than {TOLERANCE:g}")
