"""Streams, batches and searches on a real model that faults strike: a short piece of the soak."""

from __future__ import annotations

import pytest

from tests.support.llm_traffic import LLMRates, LLMTraffic

BUSY = LLMRates(line_fault=0.03, second_fault=0.2, runner_fault=0.01, spoilt=0.01)


@pytest.mark.parametrize("has_thread", [False, True])
def test_callers_get_the_tokens_of_an_undisturbed_llm_whatever_strikes(has_thread):
    traffic = LLMTraffic(1, rates=BUSY)
    traffic.serve(40, has_thread=has_thread)
    traffic.close()
    assert traffic.tally.faults.total() == traffic.tally.num_recovered > 5
