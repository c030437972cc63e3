"""Write what the tour needs, four people and a network, into notebooks/tour: `make notebooks`.

Two women and two men of the synthetic cohort, held out when the network of fold 0 was trained.
"""

import shutil
from pathlib import Path

import numpy as np
from run import HERE, ROOT, execute, tidy

from brainsex import cohort, explain, storage

COHORT, NETWORKS, TOUR = ROOT / "data" / "synthetic", ROOT / "build" / "cnn3d", HERE / "tour"


def write_tour(cohort_folder: Path, networks: Path, folder: Path, people: int = 2) -> None:
    """Write the first so many held-out women and men, as a cohort, and their network."""
    data = cohort.load(cohort_folder)
    held_out = explain.held_out_folds(networks, data.subjects) == 0
    rows = [np.flatnonzero(held_out & (data.sex == sex))[:people] for sex in (0, 1)]
    rows = np.sort(np.concatenate(rows))
    volumes = (volume.astype(np.float16) for volume in data.volumes[rows])  # half the room
    shape = len(rows), *data.volumes.shape[1:]
    storage.write_array(folder / "tensors.npy", shape, np.float16, volumes)
    storage.write_array(folder / "labels.npy", (len(rows),), np.int64, [data.sex[rows]])
    table = data.table.iloc[rows][["Subject", "Gender", "label"]]
    storage.write_text(folder / "subjects.csv", table.to_csv(index=False))
    for name in ("grid.json", "SYNTHETIC", "truth/regions.csv", "truth/regions.nii.gz"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(cohort_folder / name, folder / name)
    shutil.copy(networks / "fold-0.pt", folder)


if __name__ == "__main__":
    write_tour(COHORT, NETWORKS, TOUR)
    notebook = HERE / "00_tour.ipynb"
    with storage.atomic_path(notebook) as partial:
        execute(notebook, partial, {})
        tidy(partial)
