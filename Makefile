# `make demo`: from nothing to a Figure of Merit with pictures.   `make test`: ruff, mypy, pytest.
# `make exact`, `make leakage`: the evidence in docs/, again.   `make bench`: how fast it is.   `make gpu`: a GPU, checked.
PYTHON ?= python3
BIN := .venv/bin
DEMO := --results-dir results/demo

.PHONY: demo test slow exact leakage bench bench-full gpu lint clean

demo: .venv/installed
	$(BIN)/python run_mock.py $(DEMO) --lmax 200 --noise-level des_y3 --n-sims 300
	$(BIN)/python run_compressor.py $(DEMO) --lmax 200 --noise-level des_y3 --recipe laptop --tag demo --restart
	$(BIN)/python run_npe.py --ckpt results/demo/field_compressor_runs/demo/best.ckpt --restart

test: .venv/installed-dev lint
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile

slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

exact: .venv/installed
	$(BIN)/python benchmarks/exact_posterior.py
	$(BIN)/python benchmarks/exact_posterior.py --recipe best

leakage: .venv/installed
	$(BIN)/python benchmarks/leakage.py

bench: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py

bench-full: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py --full

gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt requirements-tensorboard.txt .venv/installed
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
