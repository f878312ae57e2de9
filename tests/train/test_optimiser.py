"""Adam with moments in 8 bits: the library where it is there, and a stand-in for it elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.distillation import distill
from fewstep.extras import MissingExtra
from fewstep.train.optimiser import Adam, Adam8bit
from tests.distillation.test_distill import tiny_model
from tests.support.trainings import pictures

SETTINGS: dict[str, Any] = {
    "pictures": 24, "batch": 8, "points": 5, "dtype": "float32", "lr": 1e-3,
    "validation_seeds": 0, "checkpoint_every": 1, "optimizer": "adamw8bit",
}  # fmt: skip


class StandIn(torch.optim.Optimizer):
    """What fewstep knows of bitsandbytes' AdamW8bit: where its state is, and that it counts."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        assert options == {"betas": (0.9, 0.99), "weight_decay": 0.0}
        super().__init__(params, {"lr": lr})

    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        assert group["params"][pindex] is p
        self.state[p] = {
            "step": 0,
            "state1": torch.zeros_like(p),
            "state2": torch.zeros_like(p, dtype=torch.uint8),
            "qmap1": torch.zeros(256),
            "absmax1": torch.zeros(1),
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] += 1
                state["state1"].lerp_(p.grad, 0.1)
                state["absmax1"].copy_(state["state1"].abs().max())
                p.sub_(group["lr"] / state["step"] * state["state1"].sign())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=StandIn))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)  # type: ignore[arg-type]


def problem(seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shapes = {"large": (64, 128), "small": (8,)}
    drawn = {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}
    return {name: value.requires_grad_() for name, value in drawn.items()}


def descend(adam: Any, steps: int, lr: float = 0.01) -> None:
    """On the sum of squares."""
    for _ in range(steps):
        torch.stack([w.square().sum() for w in adam.weights.values()]).sum().backward()
        adam.clip(1e9)
        adam.step(lr)


def check_resumed() -> Adam8bit:
    whole, broken = Adam8bit(problem()), Adam8bit(problem())
    descend(whole, 6)
    descend(broken, 3)
    again = Adam8bit(problem(1))
    with torch.no_grad():
        for kind in ("weights", "tensors"):
            ours, theirs = (
                one.weights if kind == "weights" else one.tensors() for one in (again, broken)
            )
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                value.copy_(theirs[name])
    descend(again, 3)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name])
    return whole


def test_moments_in_8_bits_follow_those_in_32_and_resume_to_the_bit() -> None:
    pytest.importorskip("bitsandbytes")
    whole, plain = check_resumed(), Adam(problem())
    descend(plain, 6)
    state = whole.tensors()
    assert state["state1.large"].dtype == state["state2.large"].dtype == torch.uint8
    assert state["state1.small"].dtype == torch.float32  # fewer than 4,096 numbers
    for name, weight in plain.weights.items():
        # 8 bits keep a moment to about 1 % of the largest in its block; six steps go 0.06
        torch.testing.assert_close(whole.weights[name], weight, rtol=0, atol=0.01)


def test_the_state_of_the_library_is_taken_up(stand_in: None) -> None:
    whole = check_resumed()
    kinds = {name.partition(".")[0] for name in whole.tensors()}
    assert kinds == {"step", "state1", "state2", "absmax1"}  # its tables of values are constants


def test_a_distillation_keeps_that_state_in_its_checkpoint(stand_in: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    distill(tiny_model(), pictures(0, 8), out=out, **SETTINGS)
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        assert int(file.get_tensor("step")) == 3
        names = list(file.keys())
    assert any(name.startswith("state2.") for name in names)
    assert not any(name.startswith("exp_avg") for name in names)
    with pytest.raises(ValueError, match=r"of a run with optimizer=adamw8bit \(now adam\)"):
        distill(tiny_model(), pictures(0, 8), out=out, **{**SETTINGS, "optimizer": "adam"})


def test_without_the_library_it_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"optimizer adamw8bit needs .*'adamw8bit'") as told:
        distill(tiny_model(), pictures(0, 8), out=tmp_path / "out", **SETTINGS)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="optimizer must be one of adam, adamw8bit, got 'sgd'"):
        distill(tiny_model(), pictures(0, 8), **{**SETTINGS, "optimizer": "sgd"})
