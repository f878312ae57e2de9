"""How far blur, noise and loss of contrast move pictures in the built-in feature networks.

Frechet distance of 5,000 test pictures of Fashion-MNIST to its training pictures, before and after
each distortion; a network that judges samplers has to rise with every one of them.

    python studies/feature_sensitivity.py --data FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from fewstep.data.idx import load_idx_folder
from fewstep.evaluate.features import resolve_features
from fewstep.evaluate.statistics import Statistics

NETWORKS = ("fashion-a", "fashion-b")
PICTURES, BATCH = 5000, 250
Distortion = Callable[[np.ndarray], np.ndarray]


def blurred(sigma: float) -> Distortion:
    """sigma: in pixels."""
    return lambda x: gaussian_filter(x, (0, sigma, sigma, 0))


def noisy(spread: float) -> Distortion:
    """spread: standard deviation, of a range of 1."""
    return lambda x: x + spread * np.random.default_rng(0).standard_normal(x.shape)


def paler(share: float) -> Distortion:
    return lambda x: (1 - share) * x


DISTORTIONS: dict[str, Distortion] = {
    "none": lambda x: x,
    **{f"blur, {sigma} pixels": blurred(sigma) for sigma in (0.3, 0.5, 0.8, 1.2)},
    **{f"noise, {spread}": noisy(spread) for spread in (0.02, 0.05, 0.1)},
    **{f"contrast, {share:.0%} less": paler(share) for share in (0.1, 0.2, 0.4)},
}


def distance(name: str, images: np.ndarray) -> float:
    """To the training pictures. images: float [n, h, w, 1] in [0, 1], rounded to uint8 here."""
    extractor = resolve_features(name)
    assert extractor.data is not None  # the built-in networks come with it
    pictures = np.round(images.clip(0, 1) * 255).astype(np.uint8)
    stats = None
    for start in range(0, len(pictures), BATCH):
        features = extractor(pictures[start : start + BATCH])
        part = Statistics.of(features, extractor.name)
        stats = part if stats is None else stats.merge(part)
    assert stats is not None
    return stats.frechet(extractor.data)


def main(data: Path, pictures: int = PICTURES) -> None:
    images, _ = load_idx_folder(data, "test")
    x = images[:pictures].permute(0, 2, 3, 1).numpy() / 255
    print(f"| distortion | {' | '.join(f'FD-{name}' for name in NETWORKS)} |")
    print("|---" * (1 + len(NETWORKS)) + "|")
    for name, distort in DISTORTIONS.items():
        cells = (f"{distance(network, distort(x)):.3f}" for network in NETWORKS)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the idx files")
    main(parser.parse_args().data)
