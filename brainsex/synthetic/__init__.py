"""A cohort with planted sex differences, laid out on disk as HCP's would be."""

from brainsex.synthetic.planting import plant
from brainsex.synthetic.template import load_truth
from brainsex.synthetic.writing import head_size_alone, write_cohort

__all__ = ["head_size_alone", "load_truth", "plant", "write_cohort"]
