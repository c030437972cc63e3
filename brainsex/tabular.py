"""Classifiers on flat features; so far the study's SVM on voxels."""

import numpy as np
import pandas as pd
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from tqdm.auto import tqdm

from brainsex.cohort import Cohort
from brainsex.nifti import BRAIN_FA


def voxel_svm(cohort: Cohort, assignment: np.ndarray) -> pd.DataFrame:
    """The study's support vector machine (RBF) on standardised voxels, over given folds.

    Brain mask (mean FA above 0.02) and scaling come from the training folds alone.

    Parameters
    ----------
    cohort : its voxels within the brain must fit into memory (1113 subjects: 0.3 GB).
    assignment : (N,) fold in which each subject is tested, of `evaluation.folds`.

    Returns
    -------
    One row a subject, in the cohort's order: Subject, fold, sex, decision (positive for man).
    """
    decision = np.empty(len(cohort))
    for fold in tqdm(np.unique(assignment), desc="voxel SVM", unit="fold"):
        train, test = (np.flatnonzero(rows) for rows in (assignment != fold, assignment == fold))
        brain = sum(cohort.volumes[row] / len(train) for row in train) > BRAIN_FA
        voxels = [np.stack([cohort.volumes[row][brain] for row in rows]) for rows in (train, test)]
        classifier = make_pipeline(StandardScaler(copy=False), SVC())
        decision[test] = classifier.fit(voxels[0], cohort.sex[train]).decision_function(voxels[1])
    columns = {"Subject": cohort.subjects, "fold": assignment, "sex": cohort.sex}
    return pd.DataFrame({**columns, "decision": decision})
