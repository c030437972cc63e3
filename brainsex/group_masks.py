"""One mask for a set of subjects: the question is about groups, and single masks average badly.

A subject's own mask keeps, of several regions that say the same, the few that were enough for this
network and this subject: the mean over subjects counts such choices. A group's saliency S answers
once for all. With l_i the log-odds of subject i's target and r_i what takes the evidence's place
(`perturbation`), it minimises the mean of the subjects' losses,

    mean_i relu(l_i(x_i + S (r_i - x_i)) - floor_i) / (l_i(x_i) - floor_i)
    + ramp · (area · mean s + smoothness · mean |∇s|²).

S is the same in all, so the gradient of the mean is the mean of gradients, and a random batch's is
without bias: a step costs what a batch costs, however many subjects there are. No subject's loss is
weighted up until its evidence is gone, as a single mask's is: one that no mask convinces would fill
the mask of all. Men and women belong into one set, each with its own target: what tells the sexes
apart lies at the same places in both.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from brainsex import networks, perturbation
from brainsex.perturbation import SHIFT, matching, tensor

AREA = 30.0
"""Weight of the mask's mean: what differs in groups is more than what one subject needs."""


def group_mask(
    network: networks.MriNet3d,
    volumes: np.ndarray,
    *,
    target: int | np.ndarray | None = None,
    reference: np.ndarray | None = None,
    seed: int = 0,
    iterations: int = 60,
    batch_size: int = 4,
    progress: bool = True,
) -> np.ndarray:
    """Learn the one mask under which a set of subjects loses most of the network's evidence.

    Parameters
    ----------
    volumes : (N, X, Y, Z) finite floats, FA in [0, 1]; may be memory-mapped.
    seed : of the batches and the random shifts.
    batch_size : subjects a step; every one has its turn before any has another.
    network, target, reference, iterations : as in `perturbation.optimise_masks`.

    Returns
    -------
    (X, Y, Z) float32 in [0, 1], the mask's persistence: it ranks voxels better than the mask.

    Raises
    ------
    ValueError
        No volumes, volumes that are not finite or not of the network's shape, or a target or
        reference that does not fit them.
    """
    if len(volumes.shape) != 4 or len(volumes) == 0:
        raise ValueError(f"expected volumes (N, X, Y, Z), found {volumes.shape}.")
    if reference is not None:
        reference = matching(reference, volumes, "a reference")
    device = networks.device()
    for row in range(len(volumes)):
        tensor(volumes, [row], torch.device("cpu"))  # what is not finite is refused at once
    plain = networks.frozen(network, device)
    logits = networks.evaluate(plain, volumes, torch.float32)
    target = perturbation.targets(target, volumes)
    chosen = logits.argmax(1) if target is None else torch.tensor(target, dtype=torch.long)
    lowest, scale = perturbation.goal(perturbation.of_target(logits, chosen))
    fast = plain.to(networks.precision(device))
    rng = np.random.default_rng(seed)
    turns = iterations * batch_size
    order = [rng.permutation(len(volumes)) for _ in range(-(-turns // len(volumes)))]
    batches = np.concatenate(order)[:turns].reshape(iterations, batch_size)

    def evidence(coarse: Tensor, _, rows: np.ndarray) -> Tensor:
        batch = tensor(volumes, rows, device)
        removed = perturbation.replacement(reference, rows, batch) - batch
        moves = rng.integers(-SHIFT, SHIFT + 1, (len(rows), 3)).tolist()
        left = perturbation.seen(fast, batch, coarse, removed, chosen[rows].to(device), moves)
        above = F.relu(left - lowest[rows].to(device)) / scale[rows].to(device)
        return above.mean(0, keepdim=True)

    like = torch.empty((1, 1, *volumes.shape[1:]), device=device)
    bar = tqdm(batches, "group mask", unit="step", disable=not progress)
    _, persistence = perturbation.descend(evidence, like, bar, AREA)
    return persistence[0, 0].cpu().numpy()
