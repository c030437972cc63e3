"""One epoch in a process of its own: ``python -m tests.benchmarks.epoch {ours,published} COHORT``.

Memory and allocator are a process's: so each way has its own, and prints seconds and peak as JSON.
"""

import json
import resource
import sys

import numpy as np
import torch

from brainsex import cohort, networks, training
from tests.benchmarks.measure import seconds
from tests.benchmarks.published import published_epoch

TRAINED, VALIDATED, BATCH = 90, 10, 45


def main(way: str, folder: str) -> None:
    data = cohort.load_cohort(folder)
    volumes, sex = np.array(data.volumes[: TRAINED + VALIDATED]), data.sex
    train = volumes[:TRAINED], sex[:TRAINED]
    validation = volumes[TRAINED:], sex[TRAINED : TRAINED + VALIDATED]
    torch.manual_seed(0)
    network = networks.MriNet3d(32)
    if way == "ours":

        def epoch():
            options = {"epochs": 1, "batch_size": BATCH, "progress": False}
            training.fit(network, *train, validation=validation, **options)
    else:
        optimiser = torch.optim.Adam(network.parameters(), 3e-4)

        def epoch():
            published_epoch(network, optimiser, train, validation, BATCH)

    epoch_seconds = seconds(epoch)  # the shortest of three, of which the first fills memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(json.dumps({"seconds": epoch_seconds / TRAINED, "gb": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
