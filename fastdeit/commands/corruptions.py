"""Mean corruption error on ImageNet-C, for `fastdeit eval --corruptions` (Hendrycks and Dietterich, arXiv 1903.12261).

The corruption error of a corruption is a network's top-1 error over its five severities, divided by AlexNet's; mCE is
the mean over 15 corruptions.
"""

from pathlib import Path
from typing import Any

from fastdeit.pipelines.errors import UserError

# AlexNet's top-1 error by corruption, the mean of five severities, from the authors' code.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
_SEVERITIES = range(1, 6)

Sets = dict[str, list[Path]]  # of each corruption, by severity


def corrupted_sets(folder: Path) -> Sets:
    """The data sets folder/CORRUPTION/SEVERITY, each a folder of images, or with the suffix .beton.

    Raises UserError naming the first that is missing: the mean needs them all.
    """
    sets: Sets = {}
    for name in ALEXNET:
        paths = [folder / name / str(severity) for severity in _SEVERITIES]
        sets[name] = [beton if (beton := path.with_suffix(".beton")).exists() else path for path in paths]
    missing = [path for paths in sets.values() for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"--corruptions {folder}: there is no {missing[0]} ({len(missing)} of {5 * len(ALEXNET)} are missing): "
            f"give the folder with ImageNet-C's CORRUPTION/SEVERITY folders, or data sets CORRUPTION/SEVERITY.beton"
        )
    return sets


def corruption_errors(results: dict[str, dict[str, Any]], sets: Sets) -> dict[str, dict[str, Any]]:
    """By kind of weights and head, in percent: "mce", "error", and each corruption's "errors" by severity and "ce".

    results  scores by data set, which must hold all of `sets`, and by kind of weights
    """
    from fastdeit.kernels.reference import HEADS  # here, since it needs PyTorch

    kinds = results[str(next(iter(sets.values()))[0])]
    return {
        kind: {head: _of_head(results, sets, kind, head) for head in HEADS if head in scores}
        for kind, scores in kinds.items()
    }


def _of_head(results: dict[str, dict[str, Any]], sets: Sets, kind: str, head: str) -> dict[str, Any]:
    by_name = {}
    for name, paths in sets.items():
        errors = [100 - results[str(path)][kind][head]["top1"] for path in paths]
        by_name[name] = {"errors": errors, "ce": sum(errors) / len(errors) / ALEXNET[name]}
    errors = [error for each in by_name.values() for error in each["errors"]]
    return {
        "mce": sum(each["ce"] for each in by_name.values()) / len(by_name),
        "error": sum(errors) / len(errors),
        "corruptions": by_name,
    }


def corruption_table(found: dict[str, dict[str, Any]]) -> str:
    """The mean errors of every head, then each corruption's of the head that stands for the network, as text."""
    from fastdeit.training.evaluation import headline_head  # here, since it needs PyTorch

    lines = [f"{'weights':8} {'head':20} {'error %':>8} {'mCE %':>8}"]
    for kind, heads in found.items():
        lines += [f"{kind:8} {head:20} {each['error']:8.2f} {each['mce']:8.2f}" for head, each in heads.items()]
    for kind, heads in found.items():
        head = headline_head(heads, None)
        lines += ["", f"{kind}, {head}: top-1 error % by severity, and CE %"]
        for name, values in heads[head]["corruptions"].items():
            errors = "".join(f" {error:6.1f}" for error in values["errors"])
            lines.append(f"{name:18}{errors} {values['ce']:8.1f}")
    return "\n".join(lines)
