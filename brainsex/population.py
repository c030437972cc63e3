"""The people of a synthetic cohort: HCP's behavioural and restricted tables, families and twins."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from brainsex import LABELS

ROWS, MEN = 1113, 507  # subjects in HCP's tables, and the men among them
SHARES = {"family": 0.4, "twins": 0.45, "own": 0.15}
"""Variance of anatomy that a family shares, that identical twins share besides, and one's own:
brain volumes of siblings correlate by about 0.4, of identical twins by 0.85 or more."""
FAMILY_SIZES = (0.22, 0.28, 0.32, 0.14, 0.03, 0.01)  # shares of families of 1, 2, … members


@dataclass(frozen=True)
class People:
    """N people, in the order of their IDs."""

    behavioural: pd.DataFrame
    """HCP's table as far as it matters here; ``3T_dMRI_Compl`` says who has a volume."""
    restricted: pd.DataFrame  # Subject, Age_in_Yrs, ZygositySR, Family_ID, Mother_ID, Father_ID
    kin: pd.DataFrame
    """Numbers that the members of a family, and that identical twins, have in common; and one's
    own: family, twins, own."""


def draw(subjects: int, seed: int) -> People:
    """1113 people or more, of whom `subjects` have a volume; both sexes keep HCP's share there.

    Their IDs begin with 0, as none of HCP's does. Half of the families of two or more have twins,
    three in five of them identical; a family has a volume as a whole, as far as that goes.
    """
    rng = np.random.default_rng(seed)
    rows = max(ROWS, subjects)
    numbers = np.sort(rng.choice(np.arange(1000, 100_000), rows, replace=False))
    kin = _kinship(rows, rng)
    men, imaged_men = (round(n * MEN / ROWS) for n in (rows, subjects))
    sex = _whole(kin["twins"], np.zeros(rows, int), [men], rng).astype(int)
    imaged = _whole(kin["family"], sex, [subjects - imaged_men, imaged_men], rng)
    mean_age = 28.9 - 1.4 * pd.Series(sex).groupby(kin["birth"]).transform("mean")
    age = mean_age + 3.5 * rng.standard_normal(rows)[kin["birth"]]
    age = np.clip(age.round(), 22, 37).astype(int)
    bands = np.array(["22-25", "26-30", "31-35", "36+"])[np.digitize(age, (26, 31, 36))]
    names = pd.Series([f"{n:06d}" for n in numbers])
    behavioural = pd.DataFrame(
        {
            "Subject": names,
            "Release": rng.choice(["S500", "S900", "S1200"], rows),
            "Acquisition": [f"Q{n:02d}" for n in rng.integers(1, 14, rows)],
            "Gender": np.array(list(LABELS))[sex],
            "Age": bands,
            "QC_Issue": "",
            "3T_dMRI_Compl": np.where(imaged, "true", "false"),
        }
    )
    mother, father = (10_000 * first + kin["family"] for first in (5, 8))
    restricted = pd.DataFrame({"Subject": names, "Age_in_Yrs": age, "ZygositySR": kin["zygosity"]})
    restricted["Family_ID"] = mother.astype(str) + "_" + father.astype(str)
    restricted = restricted.assign(Mother_ID=mother, Father_ID=father)
    return People(behavioural, restricted, kin[list(SHARES)])


def _kinship(rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """`People.kin`, with birth, a number that twins have in common, and HCP's zygosity."""
    sizes = rng.choice(np.arange(1, len(FAMILY_SIZES) + 1), rows, p=FAMILY_SIZES)
    family = np.repeat(np.arange(rows), sizes)[:rows]
    eldest = np.diff(family, prepend=-1) > 0
    first = np.flatnonzero(eldest & (np.diff(family, append=rows) == 0))
    first = first[rng.random(len(first)) < 0.5]
    identical = first[rng.random(len(first)) < 0.6]
    own, birth, twins = (np.arange(rows) for _ in range(3))
    birth[first + 1], twins[identical + 1] = first, identical
    zygosity = np.full(rows, "NotTwin", dtype=object)
    zygosity[[*first, *(first + 1)]] = "NotMZ"
    zygosity[[*identical, *(identical + 1)]] = "MZ"
    columns = {"family": family, "twins": twins, "own": own, "birth": birth, "zygosity": zygosity}
    return pd.DataFrame(columns).iloc[rng.permutation(rows)].reset_index(drop=True)


def _whole(units: pd.Series, kind: np.ndarray, room: list[int], rng) -> np.ndarray:
    """(N,) bool: as many of each kind as there is room, units whole as far as they fit."""
    chosen, left = np.zeros(len(units), bool), np.array(room)
    for names in (units, np.arange(len(units))):
        members = list(pd.Series(kind).groupby(np.asarray(names)).indices.values())
        for n in rng.permutation(len(members)):
            wanted = np.bincount(kind[members[n]], minlength=len(left))
            if not chosen[members[n]].any() and (wanted <= left).all():
                chosen[members[n]] = True
                left -= wanted
    return chosen


def anatomical_draws(kin: pd.Series, seed: int, count: int) -> np.ndarray:
    """Standard normal numbers (count,) of one row of `People.kin`; those of relatives correlate.

    They depend on seed and row alone, and fewer are the first of more.
    """
    keys = ([seed, n, kin[name]] for n, name in enumerate(SHARES, 1))
    drawn = (np.random.default_rng(key).standard_normal(count) for key in keys)
    return sum(math.sqrt(share) * each for share, each in zip(SHARES.values(), drawn))


def correlated(kin: pd.DataFrame, rng: np.random.Generator, count: int) -> np.ndarray:
    """Standard normal numbers (N, count) of everybody at once; those of relatives correlate."""
    drawn = zip(SHARES.items(), rng.standard_normal((len(SHARES), len(kin), count)))
    return sum(math.sqrt(share) * each[kin[name]] for (name, share), each in drawn)
