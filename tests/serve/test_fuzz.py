"""Requests at random from the service's own OpenAPI, right ones and wrong ones: none is a fault.

Twenty seconds; `make fuzz` takes five minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from fewstep.serve.settings import Limits
from tests.support.serving import running

SECONDS = float(os.environ.get("FEWSTEP_FUZZ_SECONDS", "20"))
EXAMPLES = 5 if SECONDS < 60 else 25


@pytest.mark.slow
def test_no_request_is_a_fault_of_the_service():
    schemathesis = pytest.importorskip("schemathesis")
    limits = Limits(most_images=2, most_evaluations=4, upload_bytes=200_000, upload_pixels=10_000)
    answers: Counter[int] = Counter()

    def check(case):
        answer = case.call(timeout=60)
        answers[answer.status_code] += 1
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    with running(limits) as (address, service):
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 9
        end = time.monotonic() + SECONDS
        for turn in itertools.count():
            for operation, mode in itertools.product(operations, schemathesis.GenerationMode):
                if time.monotonic() > end:
                    break
                examine = settings(
                    max_examples=EXAMPLES,
                    phases=[Phase.generate],
                    database=None,
                    deadline=None,
                    derandomize=turn == 0,
                    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
                )
                cases = operation.as_strategy(generation_mode=mode)
                with contextlib.suppress(Unsatisfiable):  # nothing can be wrong without parameters
                    examine(given(case=cases)(check))()
            if time.monotonic() > end:
                break
        assert service.engine.alive
    print(dict(sorted(answers.items())))
    assert sum(answers.values()) > 10
