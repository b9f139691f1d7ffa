"""timm's own network and transform, which judge what a distilled checkpoint says of images."""

import timm
import torch
from timm.data import create_transform


def timms_transform(recipe):
    """timm's evaluation transform for the recipe's resolution and crop."""
    return create_transform(
        recipe.model.img_size, is_training=False, interpolation="bicubic", crop_pct=recipe.augment.eval_crop
    )


def timms_network(recipe, weights):
    """timm's distilled network with these weights (four classes)."""
    m = recipe.model
    shape = {name: getattr(m, name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    network = timm.create_model("deit_tiny_distilled_patch16_224", **shape, num_classes=4).eval()
    network.load_state_dict(weights, strict=True)
    return network


def timms_outputs(recipe, weights, images):
    """The outputs of `timms_network` for `images`, by head."""
    network = timms_network(recipe, weights)
    with torch.no_grad():
        tokens = network.forward_features(images)
        heads = network.head(tokens[:, 0]), network.head_dist(tokens[:, 1])
        return {
            "class": heads[0],
            "distillation": heads[1],
            "fused_logits": network(images),
            "fused_probabilities": heads[0].softmax(-1) + heads[1].softmax(-1),
        }
