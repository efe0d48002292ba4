# Two commands matter: `make smoke` (the whole job, small, on this machine) and `make test`.
# Both create .venv when it is missing or out of date.
.PHONY: setup setup-container smoke test lint bench-prep bench-packing bench-loader slurm-smoke clean

SHELL := /bin/bash
PYTHON := .venv/bin/python
READY := .venv/.ready
UV_VERSION := 0.13.9
EXTRAS := dev# `make setup EXTRAS=dev,eval` for recipes/evaluate.py, too

setup: $(READY)

# pyenv's shims answer to python3.12 even where they cannot run it, hence the trial.
$(READY): pyproject.toml constraints.txt overrides-cpu.txt
	@set -e; found=; for python in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python3.12; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -x $(PYTHON) ]; then :; \
	elif [ -n "$$found" ]; then $$found -m venv .venv; \
	elif command -v uv >/dev/null; then uv venv -q --seed --python 3.12 .venv; \
	else echo "Python 3.12 is needed: install it (pyenv install 3.12) or install uv, which fetches it" >&2; exit 1; fi; \
	echo "Installing into .venv (2-3 GB, most of it PyTorch)"; \
	$(PYTHON) -m pip install -q --disable-pip-version-check uv==$(UV_VERSION); \
	.venv/bin/uv pip install -q --python $(PYTHON) --compile-bytecode \
	  --constraints constraints.txt --overrides overrides-cpu.txt -e '.[$(EXTRAS)]'; \
	touch $@

# Into a container that holds PyTorch, Transformer Engine and Megatron-Bridge already; none of those is touched.
setup-container:
	python -m pip install --no-deps --constraint constraints.txt -e . \
	  fastokens hydra-submitit-launcher llvmlite numba orjson submitit zstandard

smoke: $(READY)
	$(PYTHON) recipes/prep.py blend=tiny
	$(PYTHON) recipes/train.py data=output/data/tiny

test: $(READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-logo
	.venv/bin/mypy

bench-prep: $(READY)
	$(PYTHON) bench/prep.py

bench-loader: $(READY)
	$(PYTHON) bench/loader.py

slurm-smoke: $(READY)
	$(PYTHON) tests/slurm/smoke.py

bench-packing: $(READY)
	$(PYTHON) bench/packing.py

clean:
	rm -rf .venv output
