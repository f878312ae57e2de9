"""diffusers' own common tests of schedulers, run on FewstepScheduler, from a checkout of diffusers.

    export FEWSTEP_DIFFUSERS_TESTS=path/to/diffusers/tests
    pytest tests/integrations/test_diffusers_common.py

They are in no package that pip installs. tests/integrations/test_common.py checks the same
behaviour, written anew, and always runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest

from fewstep.integrations.diffusers import FewstepScheduler
from fewstep.solver import get
from tests.support import pipelines

VARIABLE = "FEWSTEP_DIFFUSERS_TESTS"
if not os.environ.get(VARIABLE):
    pytest.skip(f"set {VARIABLE} to the tests folder of diffusers", allow_module_level=True)

INTERVALS = 8
SIGMAS = tuple(14.6 * 0.3**i for i in range(INTERVALS + 1))
CONFIGS: dict[str, dict[str, Any]] = {
    "Default": {},
    "Heun": {"solver": "heun"},
    "UniPC": {"solver": "unipc-2", "prediction_type": "v_prediction"},
    "Stochastic": {"solver": "ddim-eta", "grid": "karras", "final": True},
    "FirstStep": {"solver": "ipndm-2", "afs": "zero"},
    "Plan": {"plan": json.loads(get("dpmpp-2m").plan(SIGMAS).to_json())},
}


def common_test(folder: Path) -> Any:
    """SchedulerCommonTest of a checkout, under a package name that nothing else has."""
    name = "tests_of_diffusers"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or not (folder / "schedulers" / "test_schedulers.py").is_file():
        raise ValueError(f"{VARIABLE}={folder} has no schedulers/test_schedulers.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.schedulers.test_schedulers").SchedulerCommonTest


def case(common: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The body of a test case for one configuration."""

    def get_scheduler_config(self: Any, **config: Any) -> dict[str, Any]:
        return {**pipelines.SD_TABLE, **options, **config}

    body = {
        "scheduler_classes": (FewstepScheduler,),
        "forward_default_kwargs": (("num_inference_steps", INTERVALS),),
        "default_num_inference_steps": INTERVALS,
        "get_scheduler_config": get_scheduler_config,
    }
    if importlib.util.find_spec("torchsde") is None:
        skip = unittest.skip("needs torchsde, as it does with diffusers' own schedulers")
        body["test_compatibles"] = skip(common.test_compatibles)
    return body


def cases() -> dict[str, Any]:
    common = common_test(Path(os.environ[VARIABLE]))
    return {
        f"Test{name}": type(f"Test{name}", (common,), case(common, options))
        for name, options in CONFIGS.items()
    }


globals().update(cases())
