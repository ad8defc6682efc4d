# `make help` lists the targets. Each prepares its own environment on first use (.ci/setup), unless
# PYTHON names the Python of an environment that already has the dependencies.
SHELL := /bin/bash
PYTHON ?=
PROCESSES ?= 2
ARGUMENTS ?=

export PYTHONPATH := $(CURDIR):$(CURDIR)/integrations
use_python = python=$(or $(PYTHON),$$(.ci/setup)) &&

.PHONY: help env pretrain test test-full test-gpu test-vllm test-bridge test-titan test-deepspeed test-megatron-lm faults campaign soak sweep lint docs walk wheel bench bench-vllm

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 20

env:  ## what puts the environment's python and `mor` into a shell: eval "$(make -s env)"
	@$(use_python) echo "export PATH='$$(dirname "$$python")':\"\$$PATH\" PYTHONPATH='$(PYTHONPATH)'" && \
	    echo 'mor() { python -m mor_tools.commands "$$@"; }'

pretrain:  ## pretrain a small model on text that ships with Python (ARGUMENTS="key=value ...")
	@$(use_python) OMP_NUM_THREADS=1 $$python -m mor_tools.commands pretrain \
	    --processes $(PROCESSES) --config examples/configs/tiny.yaml $(ARGUMENTS)

test:  ## run the tests (ARGUMENTS="options of pytest")
	@$(use_python) OMP_NUM_THREADS=1 $$python -m tests.side_by_side $(ARGUMENTS)

test-full:  ## run the tests and the exhaustive sweeps
	@$(use_python) OMP_NUM_THREADS=1 $$python -m tests.side_by_side --full $(ARGUMENTS)

campaign:  ## hostile settings, files and requests, and kills (ARGUMENTS="--cases N --seed S")
	@$(use_python) OMP_NUM_THREADS=1 $$python -m tests.campaigns $(ARGUMENTS)

soak:  ## 10,000 calls of all kinds to one small server (ARGUMENTS="--requests N --seed S")
	@$(use_python) OMP_NUM_THREADS=1 $$python -m tests.campaigns.soak $(ARGUMENTS)

sweep:  ## every pair of settings that may meet, in some layout, against one rank (a quarter of an hour)
	@$(use_python) OMP_NUM_THREADS=1 $$python -W ignore -m tests.sweep $(ARGUMENTS)

test-gpu:  ## what needs GPUs, with a verdict (ARGUMENTS="--list", "--rehearse" on CPUs)
	@$(use_python) $$python -m tests.gpu $(ARGUMENTS)

test-vllm:  ## run vLLM itself on our folders, in an environment of its own (.ci/setup-vllm)
	@python=$(or $(PYTHON),$$(.ci/setup-vllm)) && OMP_NUM_THREADS=1 \
	    $$python -m pytest tests/mor_vllm/real $(ARGUMENTS)

test-bridge:  ## run NVIDIA's Megatron-Bridge on our folders, in an environment of its own (.ci/setup-bridge)
	@python=$(or $(PYTHON),$$(.ci/setup-bridge)) && OMP_NUM_THREADS=1 \
	    $$python -m pytest tests/mor_bridge $(ARGUMENTS)

test-titan:  ## run torchtitan's trainer on our models, in an environment of its own (.ci/setup-titan)
	@python=$(or $(PYTHON),$$(.ci/setup-titan)) && OMP_NUM_THREADS=1 \
	    $$python -m pytest tests/mor_titan $(ARGUMENTS)

test-deepspeed:  ## train under DeepSpeed's ZeRO, in an environment of its own (.ci/setup-deepspeed)
	@python=$(or $(PYTHON),$$(.ci/setup-deepspeed)) && OMP_NUM_THREADS=1 \
	    $$python -m pytest tests/mor_huggingface/deepspeed_zero $(ARGUMENTS)

test-megatron-lm:  ## run Megatron-LM's own pretrain_gpt.py with our --spec (.ci/setup-megatron-lm)
	@$(use_python) scripts=$$(.ci/setup-megatron-lm) && MEGATRON_LM_SCRIPTS=$$scripts OMP_NUM_THREADS=1 \
	    $$python -m pytest tests/megatron_lm $(ARGUMENTS)

faults:  ## plant a hundred small faults and see that the tests notice (ten minutes)
	@$(use_python) $$python -m tests.campaigns.planted_faults $(ARGUMENTS)

lint:  ## ruff, pyright and the import contracts
	@$(use_python) $$python -m ruff check . && $$python -m ruff format --check . \
	    && $$python -m pyright --pythonpath "$$(command -v $$python)" \
	    && $$python -c "from importlinter.cli import lint_imports_command as lint; lint()"

docs:  ## build the documentation site
	@$(use_python) $$python -m mkdocs build --quiet --strict --config-file docs/mkdocs.yml

walk:  ## do first tasks by following the pages of the documentation (ARGUMENTS="--list", names)
	@$(use_python) export OMP_NUM_THREADS=1 && $$python -m tests.docs.walk $(ARGUMENTS) && \
		{ [ -n "$(ARGUMENTS)" ] || $$python -m pytest -q -m full --durations=0 tests/docs/test_tutorials.py; }

wheel:  ## build the wheel into dist/, and try it with torch alone and with each extra (minutes)
	@$(use_python) $$python .ci/wheel.py

bench:  ## compare training steps with and without recursion
	@$(use_python) OMP_NUM_THREADS=1 $$python examples/benchmarks/training_step.py $(ARGUMENTS)

bench-vllm:  ## our engine beside stock vLLM on one core (ten minutes; .ci/setup-vllm: 6 GB)
	@$(use_python) vllm=$$(.ci/setup-vllm) && OMP_NUM_THREADS=1 \
	    $$python examples/benchmarks/beside_vllm.py --vllm-python "$$vllm" $(ARGUMENTS)
