"""A solver's training on a loaded model: its conditions, its first step, its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.cache import cache_folder
from fewstep.learned.prompts import prompted
from fewstep.learned.solver import LearnedSolver
from fewstep.learned.training import known_of, train
from fewstep.loop import starts_at
from fewstep.models import Model
from fewstep.models.labels import by_seed

__all__ = ["train_on_model"]


def train_on_model(
    model: Model,
    *,
    label: str | None = None,
    texts: Sequence[str] = (),
    digest: str = "",
    negative: str | None = None,
    guidance: float | None = None,
    loss: str = "pixels",
    **given: Any,
) -> LearnedSolver:
    """Train a solver for one model and one budget, see `fewstep.learned.train`.

    Args:
        model: what is sampled
        label: class name or index; several, with commas, take turns among the seeds; all: draw one
        texts: each picture draws one; every tenth is for validation alone
        digest: of the file that the texts are from, for the record
        negative, guidance: as in `model.denoiser`
        loss: where ends are compared: pixels, or the name of a feature network
        given: the other arguments of `train`

    Raises:
        ValueError: for what cannot be trained, before any work.
    """
    place = model.prior([0]).device
    network = None
    if loss != "pixels":
        from fewstep.networks.features import Clamped, load_feature_network

        network = Clamped(load_feature_network(loss, str(place)))
    about = {
        "name": model.card.name,
        "weights": model.card.weights_sha256,
        "dtype": str(model.dtype).removeprefix("torch."),
        "label": label,
        "prompt": texts[0] if texts and not digest else None,
        "guidance": guidance,
        **({"prompts": digest} if digest else {}),
        **({} if negative is None else {"negative": negative}),
        **known_of(model),
    }
    if texts:
        conditions = prompted(model, texts, negative=negative, guidance=guidance)
    else:
        conditions = by_seed(model, label, None, guidance)
    bound = conditions([0])
    afs, grid = given.pop("afs", None), given.get("grid")
    if afs is None and given.get("method", "tuned") in ("tuned", "grid"):
        # the mean, where it is known and holds
        top = grid is None or isinstance(grid, str) or starts_at(grid[0], model.card.sigma_max)
        afs = "mean" if top and getattr(bound, "far_mean", None) is not None else "none"
    return train(
        bound,
        model.shape,
        conditions=conditions,
        prior=model.prior,
        device=place,
        model=about,
        loss_features=network,
        cache=cache_folder() if about["weights"] else None,
        afs=afs,
        **given,
    )
