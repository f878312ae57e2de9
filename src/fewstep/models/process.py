"""The diffusion process behind a scheduler's configuration: schedule, prediction, clipping, shift.

A diffusers scheduler is a solver and a process in one. Only the process is read here: the table of
betas or the flow, what the network predicts, whether D is clipped. Its grid and its solver are
not; those are ours.

    prediction_type     here       schedule
    epsilon             eps        VP
    v_prediction        v          VP
    sample              x0         VP
    flow_prediction     flow       Flow, shifted

A flow's shift (Esser et al. 2024, arXiv:2403.03206, section 5.3.2) moves the times of a grid,
t = s u / (1 + (s - 1) u), and leaves the network's own time as it is. In EDM units it is
sigma = s u / (1 - u): the grids that are uniform in time are uniform in u. Where the shift depends
on the size of the picture ("dynamic"), s = exp(mu) or mu, mu linear in the number of tokens.

Zero terminal SNR (Lin et al. 2023, arXiv:2305.08891): the last level of the table is infinite, and
sigma = 4096 stands for it, as in diffusers. A network that predicts eps says nothing there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Wrapper
from fewstep.schedule import VP, Flow, Schedule, Value

__all__ = ["Process", "Scheduled", "Shifted", "betas_of", "read_process", "said_of_process"]

PREDICTION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# the fields of a scheduler's configuration that say anything of the process
READ = (
    "prediction_type",
    "timestep_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "sample_max_value",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "rescale_betas_zero_snr",
    "num_train_timesteps",
    "use_flow_sigmas",
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_image_seq_len",
    "max_image_seq_len",
    "base_shift",
    "max_shift",
    "time_shift_type",
)
ZERO_SNR_SIGMA = 4096.0  # abar = 2^-24, the stand-in of diffusers' own schedulers


@dataclass(frozen=True)
class Shifted:
    """The schedule by whose time u the grids of a shifted flow are uniform: sigma = s u / (1 - u).

    flow: the network's own schedule
    shift: s > 0; 1 is the flow itself

    The range is that of the flow's times u in [t_min, t_max], but never noisier than the flow's.
    """

    flow: Flow
    shift: float

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive and finite, got {self.shift}")

    @property
    def sigma_min(self) -> float:
        return self.shift * self.flow.sigma_min

    @property
    def sigma_max(self) -> float:
        return min(self.shift, 1.0) * self.flow.sigma_max

    @property
    def t_min(self) -> float:
        return self.flow.t_min

    @property
    def t_max(self) -> float:
        return self.t(self.sigma_max)

    @property
    def t_clean(self) -> float:
        return 0.0

    @property
    def own_time(self) -> bool:
        return True

    def sigma(self, t: Value) -> Value:
        """s u / (1 - u)."""
        return self.shift * self.flow.sigma(t)

    def t(self, sigma: Value) -> Value:
        """sigma / (sigma + s)."""
        return self.flow.t(sigma / self.shift)

    def alpha(self, sigma: Value) -> Value:
        """1/(1 + sigma), that of the flow."""
        return self.flow.alpha(sigma)


@dataclass(frozen=True, eq=False)
class Scheduled(Wrapper):
    """The same denoiser, with the schedule that its grids should go by."""

    denoiser: Any
    schedule: Schedule

    @property
    def sigma_min(self) -> float:
        return self.schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.schedule.sigma_max


@dataclass(frozen=True)
class Process:
    """What a network was trained on, as far as sampling needs to know.

    schedule: the network's own: t <-> sigma and alpha
    grid_schedule: the one by whose time grids are uniform; the same but for a shifted flow
    prediction: a key of `fewstep.denoiser.PREDICTIONS`
    time_scale: the network is told time_scale * t
    clip: D is held in [-clip, clip]; None where it is free
    """

    schedule: Schedule
    grid_schedule: Schedule
    prediction: str
    time_scale: float = 1.0
    clip: float | None = None

    @property
    def sigma_min(self) -> float:
        return self.grid_schedule.sigma_min

    @property
    def sigma_max(self) -> float:
        return self.grid_schedule.sigma_max


def read_process(
    name: str, config: Mapping[str, Any], betas: Tensor | None, tokens: int = 0
) -> Process:
    """The process of a scheduler.

    Args:
        name: its class
        config: its configuration
        betas: its table, where it has one
        tokens: how many tokens one sample has, for a dynamic shift

    Raises:
        ValueError: for a process that is neither VP nor a flow, or that cannot be sampled.
    """
    kind = str(config.get("prediction_type", "epsilon"))
    if name in FLOWS or config.get("use_flow_sigmas") or kind == "flow_prediction":
        return _flow(config, tokens)
    if betas is None or kind not in PREDICTION or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} with prediction_type {kind!r} is a process that fewstep does not run; it runs "
            f"those with a table of betas and {', '.join(PREDICTION)}, and flow matching"
        )
    ends_in_noise = float(betas[-1]) >= 1
    if ends_in_noise and kind == "epsilon":
        raise ValueError(
            "the scheduler has zero terminal SNR (rescale_betas_zero_snr) and prediction_type "
            "epsilon: at pure noise eps says nothing of the picture. Set prediction_type to what "
            "the network predicts (v_prediction?), or rescale_betas_zero_snr to false"
        )
    schedule = VP.from_betas(betas.double(), ZERO_SNR_SIGMA if ends_in_noise else None)
    return Process(schedule, schedule, PREDICTION[kind], clip=_clip(config))


def said_of_process(scheduler: Any) -> dict[str, Any]:
    """What a scheduler says of its process, JSON-ready; its table as a hash."""
    found = {name: scheduler.config[name] for name in READ if name in scheduler.config}
    betas = betas_of(scheduler)
    if betas is not None:
        digest = hashlib.sha256(betas.double().numpy().tobytes()).hexdigest()
        found["table of betas"] = digest[:16]
    return found


def _flow(config: Mapping[str, Any], tokens: int) -> Process:
    flow = Flow()
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    if config.get("use_dynamic_shifting"):
        shift = _dynamic_shift(config, tokens)
    if config.get("invert_sigmas") or config.get("shift_terminal"):
        raise ValueError(
            "the scheduler's invert_sigmas and shift_terminal belong to video models that fewstep "
            "does not run; unset them"
        )
    total = float(config.get("num_train_timesteps", 1000))
    return Process(flow, Shifted(flow, shift), "flow", time_scale=total)


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu is linear in the number of tokens, from base_shift to max_shift."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.16)
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _clip(config: Mapping[str, Any]) -> float | None:
    if config.get("thresholding"):
        if config.get("sample_max_value", 1.0) > 1:
            raise ValueError(
                "the scheduler thresholds D dynamically up to sample_max_value = "
                f"{config['sample_max_value']}, which no pipeline that fewstep runs was trained "
                "for; set thresholding to false"
            )
        return 1.0  # the threshold is held in [1, sample_max_value]
    return float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None


def betas_of(scheduler: Any) -> Tensor | None:
    """The table of a diffusers scheduler; None where it has none."""
    betas = getattr(scheduler, "betas", None)
    return betas.detach().cpu() if isinstance(betas, torch.Tensor) else None
