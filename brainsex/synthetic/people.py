"""The people of a synthetic cohort: families and twins, and their tables with HCP's columns.

FreeSurfer's means and spreads are roughly those of young adults. Kept is what a classifier meets:
sums of parts, measures that follow head size, left and right that agree, structures that vary
together, relatives who resemble each other, and differences between the sexes that are small once
head size is accounted for (Ritchie et al. 2018, Cereb. Cortex 28:2959).
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.random import Generator

from brainsex import LABELS

ROWS, MEN = 1113, 507  # subjects in HCP's tables, and the men among them
SHARES = {"family": 0.4, "twins": 0.45, "own": 0.15}
"""Variance of anatomy that a family shares, that identical twins share besides, and one's own:
brain volumes of siblings correlate by about 0.4, of identical twins by 0.85 or more."""
HEAD_SIZE = 0.12  # men's mean head volume less women's, over the mean of both, as in life
HEAD_SPREAD = 0.075  # coefficient of variation of head volume within a sex
FAMILY_SIZES = (0.22, 0.28, 0.32, 0.14, 0.03, 0.01)  # shares of families of 1, 2, … members
BEHAVIOURAL = "Subject Release Acquisition Gender Age QC_Issue 3T_dMRI_Compl".split()
RESTRICTED = "Subject Age_in_Yrs ZygositySR Family_ID Mother_ID Father_ID".split()
SEX_DIFFERENCE = 0.14  # SD, over structures and measures, of Cohen's d at equal head size
# correlation of two structures of one kind of measure, head size aside
FACTORS = {"volume": 0.35, "intensity": 0.45, "area": 0.4, "thickness": 0.4, "shape": 0.25}
BILATERAL = 0.6  # correlation of left and right in what is a structure's own
SEGMENTS = pd.read_csv(Path(__file__).with_name("segments.csv"), index_col="name")
"""Mean volume in mm³, its coefficient of variation, mean intensity on FreeSurfer's scale."""
CORTEX = pd.read_csv(Path(__file__).with_name("cortex.csv"), index_col="region")
"""Of a region of one hemisphere: surface area in mm² and cortical thickness in mm."""
COLUMNS = pd.read_csv(Path(__file__).with_name("columns.csv"))["column"]
"""The export's order, whose right cerebellar cortex is called left: seven names stand twice."""


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
    mm, intensities on FreeSurfer's scale.
    """
    fixed = np.random.default_rng(0)  # the same differences in every cohort
    draw = partial(_correlated_draws, people, np.random.default_rng([seed, 1]))
    sex = people["Gender"].map(LABELS).to_numpy()
    first_draws = [anatomical_draws(person, seed, 1)[0] for _, person in people.iterrows()]
    head = head_volume(sex, head_size, np.array(first_draws))

    def vary(kind: str, names: list[str]) -> np.ndarray:
        """Draw (N, names), of unit variance within a sex at equal head size."""
        structures, at = np.unique([name.split("_", 1)[-1] for name in names], return_inverse=True)

        def sides(draw: Callable) -> np.ndarray:
            own = math.sqrt(1 - BILATERAL) * draw(len(at))
            return math.sqrt(BILATERAL) * draw(len(structures))[:, at] + own

        common = FACTORS[kind]
        own = math.sqrt(common) * draw(1) + math.sqrt(1 - common) * sides(draw)
        d = SEX_DIFFERENCE * sides(lambda count: fixed.standard_normal((1, count)))
        return own + effect * (sex[:, None] - 0.5) * d

    segments, regions = list(SEGMENTS.index), [f"{s}_{name}" for s in "LR" for name in CORTEX.index]
    z, (size, spread, brightness) = vary("volume", segments), SEGMENTS.to_numpy(float).T
    exponent = np.where(spread > 0.2, 0.5, 0.8)  # what holds fluid follows head size less
    volume = size * head[:, None] ** exponent * np.exp(spread * z - spread**2 / 2)
    volume[:, segments.index("5thVent")] *= z[:, segments.index("5thVent")] > 1  # most have none
    mean = brightness + 2.5 * vary("intensity", segments)
    std = (4 + brightness / 12) * np.exp(0.1 * vary("intensity", segments))
    low = (mean - std * (2.6 + 0.2 * vary("intensity", segments))).clip(0).round()
    high = (mean + std * (2.4 + 0.2 * vary("intensity", segments))).round()
    measures = {"Vol": volume, "Vox": volume.round(), "Mean": mean, "Std": std}
    measures |= {"Range": high - low, "Min": low, "Max": high}

    area, thickness = np.tile(CORTEX.to_numpy().T, 2)
    area = area * head[:, None] ** 0.7 * np.exp(0.08 * vary("area", regions))
    thickness = thickness * np.exp(0.045 * vary("thickness", regions))
    cortex = {
        "MeanCurv": 0.13 * np.exp(0.06 * vary("shape", regions)),
        "GausCurv": 0.025 * np.exp(0.15 * vary("shape", regions)),
        "Thck": thickness,
        "Area": area.round(),
        "NumVert": (1.5 * area * np.exp(0.01 * draw(len(regions)))).round(),
        "GrayVol": (1.06 * area * thickness).round(),
        "ThckStd": 0.22 * thickness * np.exp(0.07 * vary("shape", regions)),
        "FoldInd": (0.013 * area * np.exp(0.2 * vary("shape", regions))).round(),
    }
    cortex["CurvInd"] = 0.06 * area * cortex["GausCurv"]
    columns = _totals(dict(zip(segments, volume.T)), cortex["GrayVol"], head, draw)
    for kind, values in measures.items():
        columns |= {f"{s}_{kind}": v for s, v in zip(segments, (values * (volume > 0)).T)}
    for kind, values in cortex.items():
        columns |= {f"{region}_{kind}": v for region, v in zip(regions, values.T)}
    table = pd.DataFrame(columns, people.index)[COLUMNS].round(4)
    table.columns = "FS_" + COLUMNS.str.replace("R_Cerebellum_Cort", "L_Cerebellum_Cort")
    return pd.concat([people[["Subject", "Release", "Gender"]], table], axis=1)


def _totals(volume: dict, grey: np.ndarray, head: np.ndarray, draw: Callable) -> dict:
    """Return the export's leading columns, sums of parts where FreeSurfer's are."""
    noise = draw(6)
    both = {s[2:]: volume[s] + volume["R" + s[1:]] for s in volume if s.startswith("L_")}
    left, right = grey[:, :34].sum(1), grey[:, 34:].sum(1)
    nuclei = "ThalamusProper Caudate Putamen Pallidum Hippo Amygdala AccumbensArea"
    deep = sum(both[name] for name in nuclei.split())
    white = 225_000 * head[:, None] * np.exp(0.04 * noise[:, :1] + 0.01 * noise[:, 1:3])
    ventricles = both["LatVent"] + both["InfLatVent"] + both["ChoroidPlexus"] + volume["3rdVent"]
    upper = left + right + deep + both["VentDC"] + white.sum(1)
    whole = upper + both["Cerebellum_Cort"] + both["Cerebellum_WM"]
    intracranial = 1_560_000 * head * np.exp(0.012 * noise[:, 3])
    mask = 1_640_000 * head * np.exp(0.012 * noise[:, 4])
    holes = np.exp(2.5 + 0.45 * np.stack([noise[:, 5], draw(1)[:, 0]])).round()
    return {
        "InterCranial_Vol": intracranial,
        "BrainSeg_Vol": whole + ventricles + volume["4thVent"],
        "BrainSeg_Vol_No_Vent": whole,
        "BrainSeg_Vol_No_Vent_Surf": whole - 400,
        "LCort_GM_Vol": left,
        "RCort_GM_Vol": right,
        "TotCort_GM_Vol": left + right,
        "SubCort_GM_Vol": deep,
        "Total_GM_Vol": left + right + deep + both["Cerebellum_Cort"],
        "SupraTentorial_Vol": upper + ventricles,
        "SupraTentorial_Vol_No_Vent": upper,
        "SupraTentorial_No_Vent_Voxel_Count": (0.99 * upper).round(),
        "L_WM_Vol": white[:, 0],
        "R_WM_Vol": white[:, 1],
        "Tot_WM_Vol": white.sum(1),
        "Mask_Vol": mask,
        "BrainSegVol_eTIV_Ratio": (whole + ventricles) / intracranial,
        "MaskVol_eTIV_Ratio": mask / intracranial,
        "LH_Defect_Holes": holes[0],
        "RH_Defect_Holes": holes[1],
        "Total_Defect_Holes": holes.sum(0),
    }
