# Every target makes its own virtual environment where there is none.
#
#   make quickstart       install, then the cold start and GRPO within three minutes on two cores
#   make quickstart-long  the same run with 1,000 updates instead of 120, for at most ten minutes
#   make test             the tests that a change must pass
#   make test-slow        the tests that train for minutes
#   make test-strategies  a few cells of the parity table of the strategies; test-strategies-all runs and writes it whole
#   make test-peers       the objective against TRL's trainer, in an environment of its own
#   make benchmark        whole training steps of this framework and of TRL, in turn; wants a quiet machine
#   make test-vllm        the engines on real vLLM, on the CPU and in an environment of its own (1.5 GB)
#   make check            format, lint, types and `make test`: what to run before a commit

PYTHON ?= python3
CONSTRAINTS := tools/constraints.txt
# Workers of pytest; each computes on one thread, so that two of them fill two cores.
TEST_WORKERS ?= 2

export TOKENIZERS_PARALLELISM := false

RUN := .venv
DEV := .venv-dev
VLLM := .venv-vllm
PEERS := .venv-peers
COLD_START := runs/quickstart/cold_start/policy
BENCHMARK_THREADS ?= 2

.PHONY: quickstart quickstart-long test test-slow test-strategies test-strategies-all test-peers test-vllm benchmark check clean
.DELETE_ON_ERROR:

quickstart: $(RUN)/installed
	$(RUN)/bin/grpo-lightning fit --config configs/quickstart.yaml

quickstart-long: $(RUN)/installed
	$(RUN)/bin/grpo-lightning fit --config configs/quickstart.yaml \
		--trainer.max_steps 1000 --trainer.max_time 00:00:09:00

test: $(DEV)/installed
	OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest -n $(TEST_WORKERS)

test-slow: $(DEV)/installed
	$(DEV)/bin/python -m pytest -m slow

test-strategies: $(DEV)/installed
	$(DEV)/bin/python -m pytest -m strategies tests/strategies

# Then `python -m tools.strategy_table` writes the table of docs/strategies.md.
test-strategies-all: $(DEV)/installed
	$(DEV)/bin/python -m pytest -m strategies_all tests/strategies --strategy-table docs/figures/strategies.json

test-peers: $(PEERS)/installed
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -m peers tests/peers

benchmark: $(DEV)/installed $(PEERS)/installed $(COLD_START)
	$(DEV)/bin/python -m tools.benchmark --trl-python $(PEERS)/bin/python --threads $(BENCHMARK_THREADS)

$(COLD_START): | $(DEV)/installed
	$(DEV)/bin/grpo-lightning fit --config configs/quickstart_cold_start.yaml

# Warnings are vLLM's own. Nothing is compiled: the first run of each shape would take longer than all tests.
test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 TORCH_COMPILE_DISABLE=1 $(VLLM)/bin/python -m pytest -W default -m '' -k VLLM tests/rollout

check: $(DEV)/installed
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(MAKE) test

clean:
	rm -rf $(RUN) $(DEV) $(VLLM) $(PEERS) build dist *.egg-info

$(RUN)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(DEV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(PEERS)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable . trl pytest
	touch $@

$(VLLM)/installed: pyproject.toml tools/constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tools/constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
