"""``python -m tests.benchmarks``: every figure beside its baseline's in the same run."""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from brainsex import (
    archives,
    cohort,
    networks,
    participants,
    perturbation,
    speed,
    synthetic,
    training,
    volumes,
)
from tests.benchmarks import epoch
from tests.benchmarks.measure import Table, machine, operations, peaks, seconds
from tests.benchmarks.published import ITERATIONS, deleted, published_mask

BUILD = Path("build")
TRAINED = 160  # subjects of 200; the masks are of the others
SETTINGS = {"epochs": 12, "batch_size": 10, "lr": 2e-3, "milestones": (8,), "progress": False}


def prepare() -> tuple[cohort.Cohort, np.ndarray]:
    """Make a cohort without the confound of head size; return it and its planted regions."""
    folder = BUILD / "benchmark-cohort"
    synthetic.write_cohort(folder, head_size=0)
    with redirect_stdout(sys.stderr):  # the table alone goes to the output
        archives.extract(folder / "archives", folder / "fa")
        volumes.convert(folder / "fa", folder, folder)
    return cohort.load_cohort(folder), synthetic.load_truth(folder)[0] > 0


def quality(table: Table, name: str, ways: list, truth: np.ndarray, brain: np.ndarray) -> None:
    """How well masks delete and localise: of each way (masks, probabilities after), ours first."""

    def precision(masks):
        return statistics.fmean(average_precision_score(truth, m[brain]) for m in masks)

    for what, measure in (
        ("median probability after deletion", lambda _, after: float(np.median(after))),
        ("share of subjects below 0.1", lambda _, after: float(np.mean(np.less(after, 0.1)))),
        ("mean of the mask", lambda masks, _: float(np.mean(masks))),
        ("average precision of single masks", lambda masks, _: precision(masks)),
        ("average precision of the mean mask", lambda masks, _: precision([np.mean(masks, 0)])),
    ):
        table.add("masks", f"{name}: {what}", "", *(measure(*way) for way in ways))


def masks(data, truth, subjects: int, peak, table: Table) -> None:
    """Our masks against the published loop, by one network, on subjects it has not seen."""
    torch.manual_seed(0)
    network = networks.MriNet3d(8)
    training.fit(network, data.volumes[:TRAINED], data.sex[:TRAINED], **SETTINGS)
    held_out, sex = np.array(data.volumes[TRAINED:]), data.sex[TRAINED:]
    correct = (training.predict(network, held_out).argmax(1) == sex).mean()
    brain = np.mean(data.volumes, 0) > volumes.BRAIN_THRESHOLD
    inside = truth[brain]
    table.heading(
        f"Masks: {subjects} held-out subjects, 8 channels, accuracy {correct:.2f} of {len(sex)}; "
        f"base rate {inside.mean():.4f}"
    )
    network.to(networks.device())
    names = data.subjects[TRAINED:]
    perturbation.optimise_masks(network, held_out[:2], subjects=names[:2])  # warm
    start = time.perf_counter()
    ours = perturbation.optimise_masks(network, held_out, subjects=names)
    ours_s = (time.perf_counter() - start) / len(held_out)
    chosen, after = ours.history["target"], ours.history["after"]
    start = time.perf_counter()
    plain = [published_mask(network, held_out[n], chosen[n], seed=n) for n in range(subjects)]
    plain_s = (time.perf_counter() - start) / subjects
    left = [deleted(network, held_out[n], plain[n], chosen[n]) for n in range(subjects)]
    share = _share_of_peak(network, held_out, ours_s, peak)
    table.add("masks", "8 channels: a mask", "s", ours_s, plain_s, share)
    compared = [(ours.masks[:subjects], after[:subjects]), (plain, left)]
    quality(table, f"{subjects} subjects", compared, inside, brain)
    quality(table, f"{len(held_out)} subjects", [(ours.masks, after)], inside, brain)


def masks_at_full_width(held_out: np.ndarray, peak, table: Table) -> float:
    """The time alone, at the study's 32 channels, which an untrained network shows as well."""
    table.heading("Masks, 32 channels: each of the cores at a mask of its own")
    device = networks.device()
    torch.manual_seed(0)
    network = networks.MriNet3d(32).eval().to(device)
    few, part = held_out[: 4 if device.type == "cpu" else None], 10
    # the loop first, as ours changes how this process keeps its memory
    plain = seconds(lambda: published_mask(network, few[0], 1, iterations=part), 2)
    ours = seconds(lambda: perturbation.optimise_masks(network, few), 2) / len(few)
    share = _share_of_peak(network, few, ours, peak)
    what = f"32 channels, untrained: a mask (the loop from {part} of its {ITERATIONS} iterations)"
    table.add("masks", what, "s", ours, plain * ITERATIONS / part, share)
    return ours


def _share_of_peak(network, volumes_, seconds_a_mask: float, peak) -> float:
    """What the convolutions of a mask's iterations need, over what the machine could do."""
    fast = speed.inference_copy(network, networks.device())
    volume = torch.from_numpy(volumes_[:1])[:, None].to(networks.device()).requires_grad_()
    count = operations(lambda: fast(volume).sum().backward())
    iterations = perturbation.optimise_masks.__kwdefaults__["iterations"]
    return count * iterations / seconds_a_mask / peak[networks.fast_precision(networks.device())]


def convert(table: Table) -> None:
    """Conversion of volumes on HCP's own grid, each under eight IDs, against inflating them."""
    folder = BUILD / "benchmark-cohort-1.25mm"
    synthetic.write_cohort(folder, subjects=32, spacing=1.25)
    with redirect_stdout(sys.stderr):
        archives.extract(folder / "archives", folder / "made")
    made = sorted((folder / "made").glob("*.nii.gz"))
    names = participants.read_people(participants.find_people(folder)).index
    shutil.rmtree(folder / "fa", ignore_errors=True)
    (folder / "fa").mkdir()
    paths = [folder / "fa" / f"{name}.nii.gz" for name in names[: 8 * len(made)]]
    for number, path in enumerate(paths):
        os.link(made[number % len(made)], path)

    def converted():
        with redirect_stdout(sys.stderr):
            volumes.convert(folder / "fa", folder, folder / "out", workers=1, overwrite=True)

    def inflated():
        for path in paths:
            gzip.decompress(path.read_bytes())

    table.heading(
        f"Conversion: {len(paths)} volumes of 1.25 mm ({len(made)} different ones), one worker, "
        "against inflating them by Python's gzip"
    )
    both = [seconds(function, 2) / len(paths) for function in (converted, inflated)]
    table.add("convert", "a volume", "s", *both)


def accuracy(data, table: Table) -> None:
    """What speed costs: loss and accuracy of held-out subjects, against plain layers in float32."""
    held_out, sex = np.array(data.volumes[TRAINED:]), data.sex[TRAINED:]
    table.heading(f"Training, 8 channels: {len(sex)} held-out subjects, against plain float32")

    def test(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        network = networks.MriNet3d(8)
        training.fit(network, data.volumes[:TRAINED], data.sex[:TRAINED], seed=seed, **SETTINGS)
        predicted = training.predict(network, held_out)
        loss = -np.log(predicted[np.arange(len(sex)), sex]).mean()
        return float(loss), float((predicted.argmax(1) == sex).mean())

    ours = test(0)
    plain_layers = patch.object(speed, "training_forward", lambda network, batch, _: network(batch))
    with plain_layers, patch.object(networks, "fast_precision", lambda device: torch.float32):
        plain = test(0)
    for what, *pair in zip(("loss (nats)", "accuracy"), ours, plain):
        table.add("train", what, "", *pair)


def train_published(volumes_: np.ndarray, peak, table: Table) -> float:
    """An epoch with its validation at the study's size, against the published loop."""
    table.heading(
        f"Training: an epoch of {epoch.TRAINED} subjects in batches of {epoch.BATCH} with its "
        f"validation on {epoch.VALIDATED}, 32 channels, against the published loop"
    )
    results = []
    for way in ("ours", "published"):
        call = [sys.executable, "-m", "tests.benchmarks.epoch", way, BUILD / "benchmark-cohort"]
        done = subprocess.run(call, check=True, stdout=subprocess.PIPE)
        results.append(json.loads(done.stdout))
    took, plain = (way["seconds"] for way in results)
    network, few = networks.MriNet3d(32), torch.from_numpy(volumes_[:2])[:, None]
    both = operations(lambda: network(few).sum().backward()) / len(few)
    forward = operations(lambda: network(few)) / len(few) * epoch.VALIDATED / epoch.TRAINED
    share = (both + forward) / took / peak[networks.fast_precision(networks.device())]
    table.add("train", "32 channels: a subject", "s", took, plain, share)
    table.add("train", "32 channels: peak memory", "GB", *(way["gb"] for way in results))
    return took


def study(subject_s: float, mask_s: float, table: Table) -> None:
    """What HCP takes here with the study's settings, from the two sections before."""
    subjects, folds, epochs = 1065, 10, 20
    table.heading(f"The study here: {subjects} subjects, extrapolated from the two tables above")
    hours = subject_s * subjects * (folds - 1) * epochs / 3600
    table.add("study", f"{folds} folds of {epochs} epochs, 32 channels", "h", hours)
    table.add("study", f"{subjects} masks", "h", mask_s * subjects / 3600)


def gpu(data, table: Table) -> None:
    """What the study takes on a GPU: its masks and its cross-validation, from a part of each."""
    device = networks.device()
    if device.type != "cuda":
        print("\nNo GPU here: the study's masks and cross-validation on one were not measured.")
        return
    volumes, sex = np.array(data.volumes), data.sex
    torch.manual_seed(0)
    network = networks.MriNet3d(32).eval().to(device)
    count, subjects, folds, epochs = len(volumes), 1113, 10, 20
    table.heading(f"GPU: {subjects} subjects, from {count}")
    took = seconds(lambda: perturbation.optimise_masks(network, volumes), 2)
    table.add("gpu", f"masks of {subjects} subjects", "s", took * subjects / count)
    few = torch.from_numpy(volumes[:45])[:, None].to(device, memory_format=torch.channels_last_3d)
    fast = networks.to_device(networks.MriNet3d(32), device).to(torch.bfloat16)
    layers = [hidden[0] for hidden in (fast.hidden1, fast.hidden2, fast.hidden3)]

    def convolutions():
        features = few.bfloat16()
        for layer in layers:
            features = nn.functional.max_pool3d(layer(features), 2)
        features.sum().backward()

    def one_epoch():
        options = {"epochs": 1, "batch_size": 45, "progress": False}
        training.fit(networks.MriNet3d(32), volumes, sex, **options)

    alone, ours = seconds(convolutions, 5) / len(few), seconds(one_epoch) / count
    table.add("gpu", "training: a subject, against the convolutions alone", "s", ours, alone)
    whole = ours * subjects * (folds - 1) * epochs
    table.add("gpu", f"{folds} folds of {epochs} epochs, {subjects} subjects", "s", whole)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--subjects", type=int, default=1, help="of the published loop")
    arguments = parser.parse_args()
    start, about, table = time.perf_counter(), machine(), Table()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if about["gpu"] == "none":
        print("No GPU here: everything below ran on the CPU.")
    peak = peaks(networks.device(), table)
    data, truth = prepare()
    held_out = np.array(data.volumes[TRAINED:])
    convert(table)
    subject_s = train_published(held_out, peak, table)
    study(subject_s, masks_at_full_width(held_out, peak, table), table)
    accuracy(data, table)
    masks(data, truth, arguments.subjects, peak, table)
    gpu(data, table)
    print(f"\nall of it: {(time.perf_counter() - start) / 60:.0f} minutes")
    report = json.dumps({"machine": about, "rows": table.rows}, indent=1)
    (BUILD / "benchmarks.json").write_text(report + "\n")
    print(f"\n{BUILD / 'benchmarks.json'} holds the same.")


if __name__ == "__main__":
    main()
