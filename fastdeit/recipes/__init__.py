"""Named recipes: functions that return a `Recipe`, to be overridden from the command line or a file.

Each docstring gives the command, the hours, and the top-1 accuracy with its source. No recipe has been trained on
ImageNet with this code.
"""

from collections.abc import Callable

from fastdeit.config import Recipe
from fastdeit.pipelines.errors import UserError
from fastdeit.recipes.deit import (
    deit_base,
    deit_base_384,
    deit_base_distilled,
    deit_base_distilled_384,
    deit_small,
    deit_small_384,
    deit_small_distilled,
    deit_small_distilled_384,
    deit_tiny,
    deit_tiny_384,
    deit_tiny_distilled,
    deit_tiny_distilled_384,
)
from fastdeit.recipes.deit3 import (
    deit3_base,
    deit3_base_224,
    deit3_base_384,
    deit3_huge,
    deit3_huge_224,
    deit3_large,
    deit3_large_224,
    deit3_large_384,
    deit3_medium,
    deit3_small,
    deit3_small_384,
)
from fastdeit.recipes.deit3_21k import (
    deit3_base_21k,
    deit3_base_21k_224,
    deit3_huge_21k,
    deit3_huge_21k_224,
    deit3_large_21k,
    deit3_large_21k_224,
    deit3_small_21k,
    deit3_small_21k_224,
)
from fastdeit.recipes.short import (
    deit_base_curriculum,
    deit_base_short_100,
    deit_base_short_200,
    deit_small_curriculum,
    deit_small_short_100,
    deit_small_short_200,
    deit_tiny_curriculum,
    deit_tiny_short_100,
    deit_tiny_short_200,
)
from fastdeit.recipes.small_data import (
    convnet_teacher,
    deit_base_finetune,
    deit_small_finetune,
    deit_tiny_finetune,
    fashion_mnist_distilled,
    fashion_mnist_teacher,
)
from fastdeit.recipes.transfer import (
    deit_base_cars,
    deit_base_cifar10,
    deit_base_cifar100,
    deit_base_flowers102,
    deit_base_inat18,
    deit_base_inat19,
    deit_base_transfer,
)

RECIPES: dict[str, Callable[[], Recipe]] = {
    f.__name__: f
    for f in (
        deit_tiny,
        deit_small,
        deit_base,
        deit_tiny_distilled,
        deit_small_distilled,
        deit_base_distilled,
        deit_tiny_384,
        deit_small_384,
        deit_base_384,
        deit_tiny_distilled_384,
        deit_small_distilled_384,
        deit_base_distilled_384,
        deit_tiny_short_100,
        deit_small_short_100,
        deit_base_short_100,
        deit_tiny_short_200,
        deit_small_short_200,
        deit_base_short_200,
        deit_tiny_curriculum,
        deit_small_curriculum,
        deit_base_curriculum,
        deit3_small,
        deit3_medium,
        deit3_base,
        deit3_large,
        deit3_huge,
        deit3_small_384,
        deit3_base_224,
        deit3_base_384,
        deit3_large_224,
        deit3_large_384,
        deit3_huge_224,
        deit3_small_21k,
        deit3_base_21k,
        deit3_large_21k,
        deit3_huge_21k,
        deit3_small_21k_224,
        deit3_base_21k_224,
        deit3_large_21k_224,
        deit3_huge_21k_224,
        deit_base_transfer,
        deit_base_cifar10,
        deit_base_cifar100,
        deit_base_flowers102,
        deit_base_cars,
        deit_base_inat18,
        deit_base_inat19,
        deit_tiny_finetune,
        deit_small_finetune,
        deit_base_finetune,
        convnet_teacher,
        fashion_mnist_teacher,
        fashion_mnist_distilled,
    )
}


def recipe_of(recipe: str | Recipe) -> Recipe:
    """The recipe itself, or that of the name. Raises UserError as `recipe_named` does."""
    return recipe_named(recipe) if isinstance(recipe, str) else recipe


def recipe_named(name: str) -> Recipe:
    """The recipe of this name. Raises UserError if there is none."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}': choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()
