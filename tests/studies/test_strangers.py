"""The study of learned solvers on other networks runs, and measures what it says."""

from __future__ import annotations

import torch

import fewstep
from studies import strangers


def test_both_columns_are_measured_on_the_same_seeds(capsys) -> None:
    few = ["--budgets", "3", "--trajectories", "16", "--validation", "8", "--test", "8"]
    rows = strangers.main([*few, "--networks", "mixture", "--methods", "tuned"])
    assert f"| {' | '.join(rows[0])} |" in capsys.readouterr().out
    denoiser = strangers.mixture()
    figure, name = rows[0][2].split(" ")
    assert name in fewstep.learned.rivals.RIVALS
    assert float(figure) > 0
    assert float(rows[0][3]) > 0
    exact = strangers.errors(denoiser, (16,), [dict(strangers.FINE)], 8)
    assert exact == [0]


def test_the_network_learns_its_data() -> None:
    data = strangers.pinwheel(1000, torch.Generator().manual_seed(1))
    assert abs(data.std() - 0.5) < 0.1
    x = data + 0.3 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(2))
    sigma = torch.full((1000,), 0.3)
    before, after = (
        (strangers.mlp(updates)(x, sigma) - data).square().mean() for updates in (0, 300)
    )
    assert after < before
