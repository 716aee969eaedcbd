"""Weights in shards on two ranks reach a server exactly, and the run learns what one process learns."""

from functools import partial
from importlib.util import find_spec

import pytest
import replay
import torch
from fake_server import serving

from grpo_lightning.rollout import VLLMServerEngine
from grpo_lightning.rollout.local_servers import LaunchedServers, LocalServers
from grpo_lightning.rollout.server import Server, patiently

pytestmark = pytest.mark.slow

ZERO_3 = {"stage": 3, "zero_settings": {"stage3_param_persistence_threshold": 0}}
SHARDED = [{"strategy": "fsdp2"}, {"zero": ZERO_3}]
POLICY = replay.TinyPolicy(torch.float32, head_dim=32)


@pytest.fixture(params=["fake", *(["VLLM"] if find_spec("vllm") else [])])
def url(request):
    """Of a server: ours, and a real one where there is vLLM."""
    model, tokenizer = POLICY.load_model(seed=0), POLICY.load_tokenizer()
    if request.param == "fake":
        with serving(model, tokenizer) as server:
            yield server.url
        return
    how = LocalServers(kv_cache_gib=0.1, arguments=["--enforce-eager", "--max-num-seqs", "8"])
    launched = LaunchedServers(how, model, tokenizer, torch.float32)
    try:
        yield when_ready(launched)
    finally:
        launched.stop()


def when_ready(launched):
    """The URL of a server that has started; raises what it said where it has not."""
    server = Server(launched.members[0].url)

    def ask():
        launched.keep_running()
        return server.instances(timeout=20)

    patiently(ask, [server], patience=200)
    return server.url


@pytest.mark.parametrize("transfer", ["files", "broadcast"])
def test_ranks_with_shards_draw_from_a_server(url, tmp_path, transfer):
    # Every sync compares each tensor that the server holds with the policy's, bit by bit.
    engine = partial(VLLMServerEngine, [url], transfer=transfer, max_requests=4, patience_seconds=30)
    settings = {"engine": engine, "num_epochs": 2, "head_dim": 32, "lr": 1e-3}
    record, module = replay.run(iterations=5, **settings)
    start = torch.cat([p.detach().flatten() for p in POLICY.load_model(seed=3).parameters()])
    of_runs = replay.in_world(tmp_path, [{**settings, **sharded} for sharded in SHARDED], ranks=2)
    one = dict(by_slot(module.rollout.slots, [completion.token_ids for completion in module.rollout.completions]))
    for ranks in of_runs:
        two = {slot: drawn for rank in ranks for slot, drawn in by_slot(rank["slots"], rank["tokens"])}
        assert two == one
        for rank in ranks:
            # Sums in another order; Adam amplifies them where a gradient is nearly zero.
            difference = (rank["weights"][-1] - record.weights[-1]).norm()
            assert difference < 1e-4 * (record.weights[-1] - start).norm()


def by_slot(slots, tokens):
    size = len(tokens) // len(slots)
    return ((slot, tokens[i * size : (i + 1) * size]) for i, slot in enumerate(slots))
