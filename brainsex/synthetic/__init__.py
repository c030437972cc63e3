"""A cohort with planted sex differences, laid out on disk as HCP's would be."""

from brainsex.synthetic.template import load_truth
from brainsex.synthetic.writing import HEAD_SIZE, freesurfer_table, head_size_alone, write_cohort

__all__ = ["HEAD_SIZE", "freesurfer_table", "head_size_alone", "load_truth", "write_cohort"]
