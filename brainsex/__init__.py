"""What a network sees in men's and women's brains: from FA archives to perturbation masks."""

from importlib import import_module

SHAPE = (58, 70, 58)
"""Voxels of a volume as the networks take it: X, Y, Z in RAS (about 3.1 mm each)."""

BRAIN_THRESHOLD = 0.02
"""FA, or scaled T1 intensity, above which a voxel counts as brain."""

LABELS = {"F": 0, "M": 1}
"""Label coding of HCP's Gender column, used everywhere: women 0, men 1."""

_PUBLIC = {  # name: its module, imported when the name is first asked for: PyTorch takes seconds
    "Cohort": "cohort",
    "MriNet2d": "networks",
    "MriNet3d": "networks",
    "attribute": "saliency",
    "cross_validate": "training",
    "deletion_insertion": "metrics",
    "fit": "training",
    "load_cohort": "cohort",
    "optimise_masks": "perturbation",
}
__all__ = ["LABELS", "SHAPE", *_PUBLIC]


def __getattr__(name: str) -> object:
    """Return a public name from its module."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
