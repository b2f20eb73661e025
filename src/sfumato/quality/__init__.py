"""How good generated images are, from the features and classes of a classifier that was trained on real ones."""

from sfumato.quality.measures import (
    Features,
    Interval,
    accuracy,
    f1_of_two,
    frechet,
    frechet_difference,
    precision_recall,
    psnr,
)

__all__ = [
    "Features",
    "Interval",
    "accuracy",
    "f1_of_two",
    "frechet",
    "frechet_difference",
    "precision_recall",
    "psnr",
]
