"""What a network sees in men's and women's brains: from FA archives to perturbation masks."""

SHAPE = (58, 70, 58)
"""Voxels of a volume as the networks take it: X, Y, Z in RAS (about 3.1 mm each)."""

LABELS = {"F": 0, "M": 1}
"""Label coding of HCP's Gender column, used everywhere: women 0, men 1."""

from brainsex.cohort import Cohort, load_cohort  # noqa: E402  the modules need the constants
from brainsex.metrics import deletion_insertion  # noqa: E402
from brainsex.networks import MriNet2d, MriNet3d  # noqa: E402
from brainsex.perturbation import optimise_group_mask, optimise_masks  # noqa: E402
from brainsex.saliency import attribute  # noqa: E402
from brainsex.training import cross_validate, fit  # noqa: E402

__all__ = [
    "LABELS",
    "SHAPE",
    "Cohort",
    "MriNet2d",
    "MriNet3d",
    "attribute",
    "cross_validate",
    "deletion_insertion",
    "fit",
    "load_cohort",
    "optimise_group_mask",
    "optimise_masks",
]
