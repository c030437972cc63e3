"""Head size, age, motion: what differs between men and women beside what is asked about.

`matched_rows` is the control to trust: after it a confound says nothing about sex. Regression keeps
every subject but takes out only what is linear; a classifier that is not linear may read the rest.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from sklearn.base import BaseEstimator, TransformerMixin

CHUNK = 64  # volumes read at a time to fit a regression


def confound_matrix(table: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return columns of a table as numbers (N, K), a text column as one per category but one.

    Text that is all numbers counts as numbers. Raises ValueError for a column that is missing, has
    blanks, or is the same for everybody.
    """
    columns = table.reindex(columns=names).replace([np.inf, -np.inf], np.nan)
    for name in columns:
        if columns[name].isna().any() or columns[name].nunique() < 2:
            counts = f"{columns[name].isna().sum()} blanks and {columns[name].nunique()} values"
            raise ValueError(f"expected confound {name} complete and varied, found {counts}")
        numbers = pd.to_numeric(columns[name], errors="coerce")
        if numbers.notna().all():
            columns[name] = numbers
    return pd.get_dummies(columns, drop_first=True).to_numpy(float)


class ConfoundRegressor(TransformerMixin, BaseEstimator):
    """Take out of features what a linear regression on the first `count` columns explains.

    A transformer for scikit-learn: X (N, count + P) holds confounds, then features, none blank;
    P columns are returned. Coefficients come from the rows of `fit`. A feature of which nothing but
    rounding is left, such as a confound itself, becomes 0: a tree could read the rounding.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def fit(self, X: np.ndarray, y: np.ndarray | None = None) -> "ConfoundRegressor":
        """Learn coefficients from confounds and features (N, count + P)."""
        features = X[:, self.count :]
        self.regression_ = RegressedVolumes(features, X[:, : self.count], np.arange(len(X)))
        self.rounding_ = self.regression_[:].std(0) < 1e-6 * features.std(0)
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Return the features (N, P) less what their confounds explain."""
        residuals = self.regression_.residuals(X[:, self.count :], X[:, : self.count])
        residuals[:, self.rounding_] = 0
        return residuals


class RegressedVolumes:
    """Values (N, …) less what a linear regression on confounds (N, K) explains, read when indexed.

    Coefficients come from the training rows (indices) alone. Values may be memory-mapped: a volume
    is read once for the fit and once whenever it is used.
    """

    def __init__(self, values: np.ndarray, confounds: np.ndarray, train: np.ndarray) -> None:
        self.values, self.shape = values, values.shape
        self.confounds = np.asarray(confounds, float).reshape(len(values), -1)
        training = self.confounds[train]
        varies = training.std(0) > 1e-9 * np.abs(training).max(0)  # or its spread is rounding
        self.mean, self.scale = training.mean(0), np.where(varies, training.std(0), np.inf)
        design = np.column_stack([np.ones(len(train)), (training - self.mean) / self.scale])
        solve, self.coefficients = np.linalg.pinv(design)[1:], 0.0  # (K, N), (K, P)
        for part in np.array_split(np.arange(len(train)), -(-len(train) // CHUNK)):
            chunk = np.asarray(values[train[part]], float).reshape(len(part), -1)
            self.coefficients = self.coefficients + solve[:, part] @ chunk

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        values = np.asarray(self.values[rows])
        dtype = np.result_type(values, np.float32)
        return self.residuals(values, self.confounds[rows]).astype(dtype)

    def residuals(self, values: np.ndarray, confounds: np.ndarray) -> np.ndarray:
        """Return any values less what their confounds explain; the training rows' mean stays."""
        explained = (confounds - self.mean) / self.scale @ self.coefficients
        return values - explained.reshape(values.shape)


def matched_rows(
    sex: np.ndarray,
    confounds: np.ndarray,
    *,
    caliper: float = 0.1,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Return the rows, sorted, of as many pairs of a man and a woman as differ little in confounds.

    Within a pair each confound (N,) or (N, K) differs by at most `caliper` standard deviations;
    among the largest sets of pairs the closest is taken. What a confound measured with error misses
    is left. Memory is taken for all pairs. Raises ValueError if no pair is that close.

    `within` are folds (N,) that no pair may span. Otherwise a test subject's pair, of the other sex
    and the same size, may be in training, and an uninformative confound scores below chance.
    """
    sex, confounds = np.asarray(sex), np.asarray(confounds, float).reshape(len(sex), -1)
    scaled = confounds / np.where(np.ptp(confounds, 0) > 0, confounds.std(0), 1)
    women, men = np.flatnonzero(sex == 0), np.flatnonzero(sex == 1)
    difference = np.abs(scaled[women, None] - scaled[men])  # (women, men, K)
    distance, near = (difference**2).sum(-1), (difference <= caliper).all(-1)
    if within is not None:
        near &= within[women, None] == within[men]
    far = len(sex) * (distance[near].max(initial=0) + 1)  # one pair more is worth any closeness
    pairs = linear_sum_assignment(np.where(near, distance, far))
    close = near[pairs]
    if not close.any():
        raise ValueError(f"no man and woman within {caliper} standard deviations of each other.")
    return np.sort(np.concatenate([women[pairs[0][close]], men[pairs[1][close]]]))
