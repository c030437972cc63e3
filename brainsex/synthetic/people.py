"""The people of a synthetic cohort: families and twins, and their tables with HCP's columns.

FreeSurfer's measures vary together by head size, kind, structure, side and kinship.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.random import Generator

from brainsex import LABELS

ROWS, MEN = 1113, 507  # subjects in HCP's tables, and the men among them
SHARES = {"family": 0.4, "twins": 0.45, "own": 0.15}
"""Variance of anatomy that a family shares, that identical twins share besides, and one's own."""
HEAD_SIZE = 0.12  # men's mean head volume less women's, over the mean of both, as in life
HEAD_SPREAD = 0.075  # coefficient of variation of head volume within a sex
FAMILY_SIZES = (0.22, 0.28, 0.32, 0.14, 0.03, 0.01)  # shares of families of 1, 2, … members
BEHAVIOURAL = "Subject Release Acquisition Gender Age QC_Issue 3T_dMRI_Compl".split()
RESTRICTED = "Subject Age_in_Yrs ZygositySR Family_ID Mother_ID Father_ID".split()
FACTOR_SHARES = (0.4, 0.36, 0.24)
"""Variance of a factor: its kind of measure's, its structure's besides, and one side's own."""
MEASURES = pd.read_csv(Path(__file__).with_name("measures.csv"), index_col="column")
"""A row per column of the export, in its order: either a sum of the columns that match `parts`, or
median · head^exponent · exp(men_minus_women · (sex − ½) + Σ loading · factor), where a factor is
named by kind, structure and side; rounded to `decimals`. Medians are those of heads like the MNI
template's, from which the volumes are made: 1.3 times an average head."""


def draw_people(subjects: int, seed: int) -> pd.DataFrame:
    """Draw 1113 people or more, of whom `subjects` have a volume, with HCP's share of men.

    Their IDs begin with 0, as none of HCP's does. Half of the families of two or more have twins,
    three in five of them identical; whole families have volumes, as far as the numbers allow.
    Returns a row a person, in the order of IDs: `BEHAVIOURAL`, whose ``3T_dMRI_Compl`` says who
    has a volume, `RESTRICTED`, and family, twins and own, numbers that relatives have in common.
    """
    rng, rows = np.random.default_rng(seed), max(ROWS, subjects)
    numbers = np.sort(rng.choice(np.arange(1000, 100_000), rows, replace=False))
    people = _draw_kinship(rows, rng)
    men, imaged_men = (round(n * MEN / ROWS) for n in (rows, subjects))
    sex = _choose_whole(people["twins"], np.zeros(rows, int), [men], rng).astype(int)
    imaged = _choose_whole(people["family"], sex, [subjects - imaged_men, imaged_men], rng)
    mean_age = 28.9 - 1.4 * pd.Series(sex).groupby(people["birth"]).transform("mean")
    age = mean_age + 3.5 * rng.standard_normal(rows)[people["birth"]]
    age = np.clip(age.round(), 22, 37).astype(int)
    mother, father = 50_000 + people["family"], 80_000 + people["family"]
    columns = {
        "Subject": [f"{n:06d}" for n in numbers],
        "Release": rng.choice(["S500", "S900", "S1200"], rows),
        "Acquisition": [f"Q{n:02d}" for n in rng.integers(1, 14, rows)],
        "Gender": np.array(list(LABELS))[sex],
        "Age": np.array(["22-25", "26-30", "31-35", "36+"])[np.digitize(age, (26, 31, 36))],
        "QC_Issue": "",
        "3T_dMRI_Compl": np.where(imaged, "true", "false"),
        "Age_in_Yrs": age,
        "Family_ID": mother.astype(str) + "_" + father.astype(str),
        "Mother_ID": mother,
        "Father_ID": father,
    }
    return people.assign(**columns)


def _draw_kinship(rows: int, rng: Generator) -> pd.DataFrame:
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


def _choose_whole(units: pd.Series, kind: np.ndarray, room: list, rng: Generator) -> np.ndarray:
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


def _correlated_draws(people: pd.DataFrame, rng: Generator, count: int) -> np.ndarray:
    """Draw standard normal numbers (N, count) of all people; those of relatives correlate."""
    draws = zip(SHARES.items(), rng.standard_normal((len(SHARES), len(people), count)))
    return sum(math.sqrt(share) * values[people[name]] for (name, share), values in draws)


def head_volume(sex: np.ndarray, head_size: float, draw: np.ndarray) -> np.ndarray:
    """Return head volume relative to the template, by sex and the first anatomical draw."""
    return 1 + head_size * (sex - 0.5) + HEAD_SPREAD * np.clip(draw, -2.5, 2.5)


def freesurfer_table(
    people: pd.DataFrame, *, head_size: float = HEAD_SIZE, effect: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Make FreeSurfer's measures of the N people of `draw_people`, with the heads of their volumes.

    `effect` multiplies the differences between the sexes at equal head size. Returns (N, 938):
    Subject, Release, Gender and 935 columns ``FS_…``; volumes in mm³, areas in mm², thickness in
    mm, intensities on FreeSurfer's scale. The export calls the right cerebellar cortex left, so
    that seven names stand twice.
    """
    sex = people["Gender"].map(LABELS).to_numpy()[:, None]
    first_draws = [anatomical_draws(person, seed, 1) for _, person in people.iterrows()]
    head = head_volume(sex, head_size, np.array(first_draws))
    columns = ["median", "head_exponent", "men_minus_women"]
    median, exponent, difference = MEASURES[columns].to_numpy().T
    loadings = MEASURES[["loading_1", "loading_2"]].fillna(0).to_numpy()
    scores = _factor_scores(people, np.random.default_rng([seed, 1]))
    deviation = effect * (sex - 0.5) * difference + (loadings * scores).sum(-1)
    values = median * head**exponent * np.exp(deviation)
    table = pd.DataFrame(values, people.index, MEASURES.index).round(MEASURES["decimals"])
    for column, parts in MEASURES["parts"].dropna().items():
        table[column] = table.filter(regex=parts).sum(axis=1)
    for name in ("BrainSeg", "Mask"):
        table[f"{name}Vol_eTIV_Ratio"] = table[f"{name}_Vol"] / table["InterCranial_Vol"]
    table = table.round(MEASURES["decimals"])
    table.columns = "FS_" + table.columns.str.replace("R_Cerebellum_Cort", "L_Cerebellum_Cort")
    return pd.concat([people[["Subject", "Release", "Gender"]], table], axis=1)


def _factor_scores(people: pd.DataFrame, rng: Generator) -> np.ndarray:
    """Draw the scores (N, 935, 2) of the measures' two factors, of unit variance."""
    sides = MEASURES[["factor_1", "factor_2"]].fillna("")
    structures = sides.replace(" [^ ]+$", "", regex=True)
    kinds = structures.replace(" .+$", "", regex=True)
    names, positions = np.unique([kinds, structures, sides], return_inverse=True)
    draws = _correlated_draws(people, rng, len(names))
    shares = zip(FACTOR_SHARES, positions)
    return sum(math.sqrt(share) * draws[:, position] for share, position in shares)
