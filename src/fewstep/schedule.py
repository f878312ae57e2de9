"""How a model's own time t relates to EDM space.

A diffusion model has x_t = alpha_t x_0 + sigma^vp_t eps. Dividing by alpha_t gives EDM space,

    x = x_t / alpha_t          sigma = sigma^vp_t / alpha_t

and a schedule is the map t <-> sigma together with alpha as a function of sigma:

    VP      abar = cumprod(1 - beta)       sigma = sqrt(1/abar - 1)   alpha = 1/sqrt(1 + sigma^2)
    EDM     x_t = x                        sigma = t                  alpha = 1
    Flow    x_t = (1 - t) x_0 + t eps      sigma = t/(1 - t)          alpha = 1/(1 + sigma)

Sources: Karras et al. 2022 (EDM), arXiv:2206.00364, appendix C; the linear betas of Ho et al. 2020
(DDPM), arXiv:2006.11239; the cosine table of Nichol & Dhariwal 2021, arXiv:2102.09672; flow by
Lipman et al. 2022, arXiv:2210.02747, and Esser et al. 2024 (Stable Diffusion 3), arXiv:2403.03206.

Every map takes a float and returns a float, or takes a tensor and returns a tensor on its device
and in its dtype; both are computed in float64, by one formula, and no map waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["PURE_NOISE", "Schedule", "VP", "EDM", "Flow"]

PURE_NOISE = 1e3  # a start above it stands for infinity (flows, zero terminal SNR)

Value = TypeVar("Value", float, Tensor)


class Schedule(Protocol):
    """The role: t <-> sigma, and alpha. `t` rises with `sigma`.

    sigma_min, sigma_max: the ends of the range on which the network was trained
    t_min, t_max: the same ends in the network's own time
    t_clean: where that time would meet clean data, sigma = 0; at or below `t_min`
    own_time: whether t is more than another name of sigma, so that a grid may be uniform in it
    """

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    @property
    def t_clean(self) -> float: ...
    @property
    def own_time(self) -> bool: ...

    def sigma(self, t: Value) -> Value: ...
    def t(self, sigma: Value) -> Value: ...
    def alpha(self, sigma: Value) -> Value: ...


@dataclass(frozen=True, repr=False)
class VP:
    """Variance-preserving diffusion from a table; t is a float index into it, in [0, T - 1].

    Between entries log sigma is linear in t. Beyond the table both maps stay at its ends:
    `sigma(t)` and `t(sigma)` are an inverse pair inside and constant outside. `alpha` holds for
    every sigma.

    Attributes:
        sigmas: the table in EDM units, strictly rising from t = 0; finite and > 0
    """

    sigmas: tuple[float, ...]
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        init=False, compare=False, default_factory=dict
    )  # one copy of the table per device: a fresh copy at each call would wait for the device

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        if len(self.sigmas) < 2:
            raise ValueError(f"a VP table needs at least 2 entries, got {len(self.sigmas)}")
        if self.sigmas[0] <= 0 or not all(map(math.isfinite, self.sigmas)):
            raise ValueError(
                f"sigmas must be finite and > 0, got {self.sigmas[0]} ... {self.sigmas[-1]}"
            )
        for t, (low, high) in enumerate(pairwise(self.sigmas)):
            if not high > low:
                raise ValueError(f"sigmas must rise with t, got {low}, {high} at t = {t}, {t + 1}")

    def __repr__(self) -> str:
        return f"VP({len(self.sigmas)} entries, sigma {self.sigma_min:.6g} to {self.sigma_max:.6g})"

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor, terminal_sigma: float | None = None) -> VP:
        """The table from its betas, abar = cumprod(1 - beta).

        Args:
            betas: each in (0, 1), the cleanest first
            terminal_sigma: what to put for the last entry where it is infinite. Tables rescaled to
                zero terminal SNR (Lin et al. 2023, arXiv:2305.08891) end at beta = 1, where x_t is
                pure noise and EDM space has no point. They are refused unless this is given; 4096,
                which is abar = 2^-24, is the customary stand-in. The network is then told the last
                t at that sigma.
        """
        table = torch.as_tensor(betas, dtype=torch.float64).cpu()
        # log1p and expm1 keep the small betas of the clean end to full precision
        return cls._from_log_abar(torch.cumsum(torch.log1p(-table), 0), terminal_sigma)

    @classmethod
    def from_abar(cls, abar: Sequence[float] | Tensor, terminal_sigma: float | None = None) -> VP:
        """The table from abar itself.

        Where the betas are known prefer them: a float32 abar near 1 has lost digits of 1 - abar.

        Args:
            abar: strictly falling in (0, 1)
            terminal_sigma: as in `from_betas`
        """
        table = torch.as_tensor(abar, dtype=torch.float64).cpu()
        return cls._from_log_abar(torch.log(table), terminal_sigma)

    @classmethod
    def _from_log_abar(cls, log_abar: Tensor, terminal_sigma: float | None) -> VP:
        sigmas = torch.sqrt(torch.expm1(-log_abar)).tolist()
        if sigmas and math.isinf(sigmas[-1]):
            if terminal_sigma is None:
                raise ValueError(
                    "the last noise level is infinite (a table of zero terminal SNR), which EDM "
                    "space cannot hold: pass terminal_sigma=4096.0, or leave the last entry out"
                )
            sigmas[-1] = terminal_sigma
        return cls(tuple(sigmas))

    @classmethod
    def linear(cls, count: int = 1000, start: float = 1e-4, end: float = 0.02) -> VP:
        """Betas evenly spaced from `start` to `end`; the defaults are DDPM's."""
        return cls.from_betas(torch.linspace(start, end, count, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, count: int = 1000, start: float = 0.00085, end: float = 0.012) -> VP:
        """Square roots of the betas evenly spaced; the defaults are Stable Diffusion's."""
        ends = math.sqrt(start), math.sqrt(end)
        return cls.from_betas(torch.linspace(*ends, count, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, count: int = 1000, s: float = 0.008, clip: float = 0.999) -> VP:
        """abar(u) = cos^2((u + s)/(1 + s) pi/2) at u = t/T, with betas clipped at `clip`."""
        u = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        abar = torch.cos((u + s) / (1 + s) * (math.pi / 2)) ** 2
        return cls.from_betas((1 - abar[1:] / abar[:-1]).clamp(max=clip))

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1]

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self.sigmas) - 1)

    @property
    def t_clean(self) -> float:
        return -1.0  # entry 0 has had one beta's noise, so clean data would be one entry below it

    @property
    def own_time(self) -> bool:
        return True

    def sigma(self, t: Value) -> Value:
        """Noise level at a float index, held inside the table."""
        return _in_double(self._sigma, t)

    def t(self, sigma: Value) -> Value:
        """Float index of a noise level, held inside the table."""
        return _in_double(self._t, sigma)

    def alpha(self, sigma: Value) -> Value:
        """1/sqrt(1 + sigma^2), at any sigma."""
        return _in_double(lambda sigma: torch.rsqrt(1 + sigma**2), sigma)

    def _sigma(self, t: Tensor) -> Tensor:
        table, log_ratio = self._table(t.device)
        t = t.clamp(self.t_min, self.t_max)
        entry = t.detach().long()
        return table[entry] * torch.exp((t - entry) * log_ratio[entry])

    def _t(self, sigma: Tensor) -> Tensor:
        table, log_ratio = self._table(sigma.device)
        sigma = sigma.clamp(self.sigma_min, self.sigma_max)
        entry = torch.searchsorted(table, sigma.detach().contiguous(), right=True) - 1
        return entry + torch.log(sigma / table[entry]) / log_ratio[entry]

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """sigma [T]; log(sigma[t + 1] / sigma[t]) [T], its last entry a divisor of zeros only."""
        if device not in self._tables:
            table = torch.tensor(self.sigmas, dtype=torch.float64, device="cpu")
            log_ratio = torch.cat([table.log().diff(), table.new_ones(1)])
            self._tables[device] = (table.to(device), log_ratio.to(device))
        return self._tables[device]


@dataclass(frozen=True)
class EDM:
    """The identity: t = sigma, alpha = 1. Networks that are told sigma itself.

    The defaults are EDM's range for data of standard deviation 0.5.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def t_clean(self) -> float:
        return 0.0

    @property
    def own_time(self) -> bool:
        return False

    def sigma(self, t: Value) -> Value:
        """t itself."""
        return t

    def t(self, sigma: Value) -> Value:
        """sigma itself."""
        return sigma

    def alpha(self, sigma: Value) -> Value:
        """1."""
        return _in_double(torch.ones_like, sigma)


@dataclass(frozen=True)
class Flow:
    """Rectified flow, x_t = (1 - t) x_0 + t eps: sigma = t/(1 - t).

    A float32 t near 1 holds few digits of 1 - t: keep sigma, and derive t from it. The time shift
    of Stable Diffusion 3, t' = s t/(1 + (s - 1) t), is sigma' = s sigma. It
    belongs to the grid, not to this map.

    Attributes:
        t_max: where sampling starts; t = 1 has sigma infinite, so both maps stay at t_max beyond it
        t_min: the low end of the range; the maps themselves go on down to t = 0 = sigma
    """

    t_max: float = 1 - 1e-5
    t_min: float = 1e-3  # the last time of the 1000 on which such networks are trained

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max < 1:
            raise ValueError(f"need 0 < t_min < t_max < 1, got {self.t_min} and {self.t_max}")

    @property
    def sigma_min(self) -> float:
        return self.t_min / (1 - self.t_min)

    @property
    def sigma_max(self) -> float:
        return self.t_max / (1 - self.t_max)

    @property
    def t_clean(self) -> float:
        return 0.0

    @property
    def own_time(self) -> bool:
        return True

    def sigma(self, t: Value) -> Value:
        """t/(1 - t), with t held in [0, t_max]."""

        def formula(t: Tensor) -> Tensor:
            t = t.clamp(0, self.t_max)
            return t / (1 - t)

        return _in_double(formula, t)

    def t(self, sigma: Value) -> Value:
        """sigma/(1 + sigma), with sigma held in [0, sigma_max]."""

        def formula(sigma: Tensor) -> Tensor:
            sigma = sigma.clamp(0, self.sigma_max)
            return sigma / (1 + sigma)

        return _in_double(formula, sigma)

    def alpha(self, sigma: Value) -> Value:
        """1/(1 + sigma), at any sigma."""
        return _in_double(lambda sigma: 1 / (1 + sigma), sigma)


def _in_double(formula: Callable[[Tensor], Tensor], value: Value) -> Value:
    """A float64 formula of a float, or of a tensor, whose floating dtype the answer then has."""
    if isinstance(value, Tensor):
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        return formula(value.double()).to(dtype)
    return formula(torch.tensor(value, dtype=torch.float64, device="cpu")).item()
