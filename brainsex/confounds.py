"""Head size, age, motion: what differs between men and women beside what is asked about.

`matched` is the control to trust: after it a confound says nothing about sex. `Residuals` keep
every subject, but take out what is linear only, and a classifier that is not linear may read the
rest.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment


def columns(table: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Columns of a table as numbers (N, K), one per column, or per category of a text column.

    Text that is all numbers is numbers. No column may have blanks or be the same for everybody.
    """
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"no column {', '.join(unknown)}: there are {', '.join(table.columns)}.")
    chosen = table[list(names)].replace([np.inf, -np.inf], np.nan)
    for name in chosen:
        values = chosen[name]
        if blank := values.isna().sum():
            raise ValueError(f"confound {name} is blank for {blank} of {len(values)} subjects.")
        if values.nunique() < 2:
            raise ValueError(f"confound {name} is the same for everybody.")
        numbers = pd.to_numeric(values, errors="coerce")
        if numbers.notna().all():
            chosen[name] = numbers
    return pd.get_dummies(chosen, drop_first=True).to_numpy(float)


class Residuals:
    """Values (N, …) less what a linear regression on confounds explains, read when asked for.

    Coefficients come from the training rows alone; the mean over them stays. A volume is read
    once for the fit and once more whenever it is used, so values may be memory-mapped.
    """

    def __init__(self, values: np.ndarray, confounds: np.ndarray, train: np.ndarray):
        self.values, self.shape = values, values.shape
        confounds = np.asarray(confounds, float).reshape(len(values), -1)
        spread = confounds[train].std(0)
        centred = confounds - confounds[train].mean(0)
        varies = spread > 1e-9 * np.abs(confounds[train]).max(0)  # or it is rounding
        self.confounds = np.where(varies, centred / np.where(varies, spread, 1), 0)
        solve = np.linalg.pinv(np.column_stack([np.ones(len(train)), self.confounds[train]]))
        coefficients = 0.0
        for part in np.array_split(np.arange(len(train)), -(-len(train) // 64)):
            read = np.asarray(values[train[part]], float).reshape(len(part), -1)
            coefficients = coefficients + solve[1:, part] @ read
        self.coefficients = coefficients  # (K, values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> np.ndarray:
        read = np.asarray(self.values[rows])
        explained = self.confounds[rows] @ self.coefficients
        return (read - explained.reshape(read.shape)).astype(np.result_type(read, np.float32))


def matched(
    sex: np.ndarray,
    confounds: np.ndarray,
    *,
    caliper: float = 0.1,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of a subsample in which men and women are alike in the confounds.

    As many pairs of a man and a woman as possible who differ by at most `caliper` standard
    deviations in each confound, and among those the closest. Where a confound is measured with
    error, what it misses is left. Takes memory for all pairs.

    `within` are folds (N,): pairs are of one fold, so that every fold is matched. Otherwise a test
    subject's pair, of the other sex and the same size, may be in training, and a confound that says
    nothing any more scores below chance.

    Returns
    -------
    Rows, sorted; half of them men's. No pair that close is a ValueError.
    """
    sex, confounds = np.asarray(sex), np.asarray(confounds, float).reshape(len(sex), -1)
    if not np.isfinite(confounds).all():
        raise ValueError("expected finite confounds, found blanks among them.")
    scaled = confounds / np.where(np.ptp(confounds, 0) > 0, confounds.std(0), 1)
    women, men = np.flatnonzero(sex == 0), np.flatnonzero(sex == 1)
    apart = np.zeros((len(women), len(men)))
    near = np.ones(apart.shape, bool)
    if within is not None:
        near = within[women, None] == within[men]
    for column in scaled.T:
        difference = np.abs(column[women, None] - column[men])
        near &= difference <= caliper
        apart += difference**2
    far = len(sex) * (apart[near].max(initial=0) + 1)  # one pair more is worth any closeness
    pairs = linear_sum_assignment(np.where(near, apart, far))
    close = near[pairs]
    if not close.any():
        raise ValueError(f"no man and woman within {caliper} standard deviations of each other.")
    return np.sort(np.concatenate([women[pairs[0][close]], men[pairs[1][close]]]))
