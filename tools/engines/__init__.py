"""The rollout engines, measured: how a run learns with each, and what one of ours costs beside vLLM alone.

Each script needs an environment with vLLM, as `make test-vllm` makes one, and is run from the checkout's root.
"""
