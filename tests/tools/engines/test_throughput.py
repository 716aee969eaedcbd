"""The requests that engines are measured on."""

from tools.engines.throughput import POLICY, requests


def test_prompts_share_nothing_and_fit_the_policy():
    wanted = requests(num_prompts=16, group_size=8)
    assert len({request.token_ids[:8] for request in wanted}) == len(wanted) == 16
    assert {request.num_completions for request in wanted} == {8}
    assert all(3 <= token < len(POLICY.characters) + 3 for request in wanted for token in request.token_ids)
