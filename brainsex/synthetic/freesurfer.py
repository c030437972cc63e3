"""The FreeSurfer table of a synthetic cohort, with the columns of HCP's unrestricted export.

Means and spreads are roughly those of young adults. Kept is what a classifier meets: sums of parts,
measures that follow head size, left and right that agree, structures that vary together, relatives
who resemble each other, and differences between the sexes that are small once head size is
accounted for (Ritchie et al. 2018, Cereb. Cortex 28:2959).
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

SEX_DIFFERENCE = 0.14  # SD, over structures and measures, of Cohen's d at equal head size
FACTORS = {"volume": 0.35, "intensity": 0.45, "area": 0.4, "thickness": 0.4, "shape": 0.25}
"""Correlation of two structures of one kind of measure, head size aside."""
BILATERAL = 0.6  # correlation of left and right in what is a structure's own
SEGMENTS = pd.read_csv(Path(__file__).with_name("segments.csv"), index_col="name")
"""Mean volume in mm³, its coefficient of variation, mean intensity on FreeSurfer's scale."""
CORTEX = pd.read_csv(Path(__file__).with_name("cortex.csv"), index_col="region")
"""Of a region of one hemisphere: surface area in mm² and cortical thickness in mm."""
COLUMNS = pd.read_csv(Path(__file__).with_name("columns.csv"))["column"]
"""The export's order, whose right cerebellar cortex is called left: seven names stand twice."""


def freesurfer_measures(
    subjects: pd.DataFrame, head: np.ndarray, draw: Callable[[int], np.ndarray], *, effect: float
) -> pd.DataFrame:
    """Make FreeSurfer's measures of N subjects.

    Parameters
    ----------
    head : (N,) head volume relative to the template's.
    draw : of a count makes (N, count) standard normal numbers, in which relatives are alike.
    effect : multiplies the differences between the sexes at equal head size.

    Returns
    -------
    (N, 938): Subject, Release, Gender and 935 columns ``FS_…``; volumes in mm³, areas in mm²,
    thickness in mm, intensities on FreeSurfer's scale.
    """
    fixed = np.random.default_rng(0)  # the same differences in every cohort
    men = (subjects["Gender"] == "M").to_numpy()[:, None] - 0.5

    def vary(kind: str, names: list[str]) -> np.ndarray:
        """Draw (N, names), of unit variance within a sex at equal head size."""
        structures, at = np.unique([name.split("_", 1)[-1] for name in names], return_inverse=True)

        def sides(draw: Callable) -> np.ndarray:
            own = math.sqrt(1 - BILATERAL) * draw(len(at))
            return math.sqrt(BILATERAL) * draw(len(structures))[:, at] + own

        common = FACTORS[kind]
        own = math.sqrt(common) * draw(1) + math.sqrt(1 - common) * sides(draw)
        d = SEX_DIFFERENCE * sides(lambda count: fixed.standard_normal((1, count)))
        return own + effect * men * d

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
    curvature = 0.13 * np.exp(0.06 * vary("shape", regions))
    gaussian = 0.025 * np.exp(0.15 * vary("shape", regions))
    cortex = {
        "Thck": thickness,
        "Area": area.round(),
        "NumVert": (1.5 * area * np.exp(0.01 * draw(len(regions)))).round(),
        "GrayVol": (1.06 * area * thickness).round(),
        "ThckStd": 0.22 * thickness * np.exp(0.07 * vary("shape", regions)),
        "MeanCurv": curvature,
        "GausCurv": gaussian,
        "FoldInd": (0.013 * area * np.exp(0.2 * vary("shape", regions))).round(),
        "CurvInd": 0.06 * area * gaussian,
    }
    columns = _totals(dict(zip(segments, volume.T)), cortex["GrayVol"], head, draw)
    for kind, values in measures.items():
        columns |= {f"{s}_{kind}": v for s, v in zip(segments, (values * (volume > 0)).T)}
    for kind, values in cortex.items():
        columns |= {f"{region}_{kind}": v for region, v in zip(regions, values.T)}
    table = pd.DataFrame(columns, subjects.index)[COLUMNS].round(4)
    table.columns = "FS_" + COLUMNS.str.replace("R_Cerebellum_Cort", "L_Cerebellum_Cort")
    return pd.concat([subjects[["Subject", "Release", "Gender"]], table], axis=1)


def _totals(
    volume: dict, grey: np.ndarray, head: np.ndarray, draw: Callable
) -> dict[str, np.ndarray]:
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
