"""The people of a synthetic cohort: HCP's behavioural and restricted tables, families and twins."""

import math

import numpy as np
import pandas as pd

from brainsex import LABELS

ROWS, MEN = 1113, 507  # subjects in HCP's tables, and the men among them
SHARES = {"family": 0.4, "twins": 0.45, "own": 0.15}
"""Variance of anatomy that a family shares, that identical twins share besides, and one's own:
brain volumes of siblings correlate by about 0.4, of identical twins by 0.85 or more."""
FAMILY_SIZES = (0.22, 0.28, 0.32, 0.14, 0.03, 0.01)  # shares of families of 1, 2, … members
BEHAVIOURAL = "Subject Release Acquisition Gender Age QC_Issue 3T_dMRI_Compl".split()
RESTRICTED = "Subject Age_in_Yrs ZygositySR Family_ID Mother_ID Father_ID".split()


def draw_people(subjects: int, seed: int) -> pd.DataFrame:
    """Draw 1113 people or more, of whom `subjects` have a volume, with HCP's share of men.

    Their IDs begin with 0, as none of HCP's does. Half of the families of two or more have twins,
    three in five of them identical; whole families have volumes, as far as the numbers allow.

    Returns
    -------
    A row a person, in the order of IDs: `BEHAVIOURAL`, whose ``3T_dMRI_Compl`` says who has a
    volume, `RESTRICTED`, and family, twins and own, numbers that relatives have in common.
    """
    rng = np.random.default_rng(seed)
    rows = max(ROWS, subjects)
    numbers = np.sort(rng.choice(np.arange(1000, 100_000), rows, replace=False))
    people = _draw_kinship(rows, rng)
    men, imaged_men = (round(n * MEN / ROWS) for n in (rows, subjects))
    sex = _choose_whole(people["twins"], np.zeros(rows, int), [men], rng).astype(int)
    imaged = _choose_whole(people["family"], sex, [subjects - imaged_men, imaged_men], rng)
    mean_age = 28.9 - 1.4 * pd.Series(sex).groupby(people["birth"]).transform("mean")
    age = mean_age + 3.5 * rng.standard_normal(rows)[people["birth"]]
    age = np.clip(age.round(), 22, 37).astype(int)
    bands = np.array(["22-25", "26-30", "31-35", "36+"])
    mother, father = 50_000 + people["family"], 80_000 + people["family"]
    columns = {
        "Subject": [f"{n:06d}" for n in numbers],
        "Release": rng.choice(["S500", "S900", "S1200"], rows),
        "Acquisition": [f"Q{n:02d}" for n in rng.integers(1, 14, rows)],
        "Gender": np.array(list(LABELS))[sex],
        "Age": bands[np.digitize(age, (26, 31, 36))],
        "QC_Issue": "",
        "3T_dMRI_Compl": np.where(imaged, "true", "false"),
        "Age_in_Yrs": age,
        "Family_ID": mother.astype(str) + "_" + father.astype(str),
        "Mother_ID": mother,
        "Father_ID": father,
    }
    return people.assign(**columns)


def _draw_kinship(rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw family, twins, own, birth (a number that twins have in common) and HCP's zygosity."""
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
    kin = {"family": family, "twins": twins, "own": own, "birth": birth, "ZygositySR": zygosity}
    return pd.DataFrame(kin).iloc[rng.permutation(rows)].reset_index(drop=True)


def _choose_whole(
    units: pd.Series, kind: np.ndarray, room: list[int], rng: np.random.Generator
) -> np.ndarray:
    """Choose (N,) bool as many of each kind as there is room, units whole as far as they fit."""
    chosen, left = np.zeros(len(units), bool), np.array(room)
    for names in (units, np.arange(len(units))):
        members = list(pd.Series(kind).groupby(np.asarray(names)).indices.values())
        for n in rng.permutation(len(members)):
            wanted = np.bincount(kind[members[n]], minlength=len(left))
            if not chosen[members[n]].any() and (wanted <= left).all():
                chosen[members[n]] = True
                left -= wanted
    return chosen


def anatomical_draws(person: pd.Series, seed: int, count: int) -> np.ndarray:
    """Draw standard normal numbers (count,) of a person; those of relatives correlate by `SHARES`.

    They depend on seed and person alone, and fewer are the first of more.
    """
    keys = ([seed, n, person[name]] for n, name in enumerate(SHARES, 1))
    draws = (np.random.default_rng(key).standard_normal(count) for key in keys)
    return sum(math.sqrt(share) * values for share, values in zip(SHARES.values(), draws))


def correlated_draws(people: pd.DataFrame, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw standard normal numbers (N, count) of all people; those of relatives correlate."""
    draws = zip(SHARES.items(), rng.standard_normal((len(SHARES), len(people), count)))
    return sum(math.sqrt(share) * values[people[name]] for (name, share), values in draws)
