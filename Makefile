# Every target makes its own environment (.venv, about 6 GB: PyTorch's CUDA libraries come with it).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := outputs/quickstart
# Without --num_cpu_threads_per_process accelerate gives one core to a process.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)

.PHONY: quickstart test soak mutants test-browser demo docs style quality clean

quickstart: $(VENV)/.installed ## train on digits from random weights and show pictures, minutes on 2 CPU cores
	$(LAUNCH) training/train_erw.py --config training/configs/digits.yaml --output_dir $(QUICKSTART) --overwrite_output_dir
	@echo "Pictures: $(QUICKSTART)/grid.png   Losses: $(QUICKSTART)/loss_curve.png   Pipeline: $(QUICKSTART)/pipeline"

test: $(VENV)/.installed ## all tests, a file at a time on each core
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --durations 15

soak: $(VENV)/.installed ## kill training 30 times and compare with runs that were left alone
	cd tests && HF_HUB_OFFLINE=1 ../$(BIN)/python soak.py --kills 30

mutants: $(VENV)/.installed ## spoil lines of the core, one at a time: do the tests notice?
	$(BIN)/python tests/mutants.py

test-browser: $(VENV)/.installed ## test the demo in headless Chromium (root installs Chromium and Node if missing); SCREENSHOTS=DIR saves screenshots
	{ command -v node && command -v npm; } >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends nodejs npm >/dev/null; }
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; }
	npm install --prefix tests/browser --no-save --no-package-lock --no-audit --no-fund --silent
	node tests/browser/demo.mjs $(BIN)/python $(SCREENSHOTS)

demo: $(VENV)/.installed ## the Gradio demo: the shipped emoji and digits, and to compare with them what was trained in outputs/
	ERW_MODELS=$$(ls -d outputs/*/pipeline 2>/dev/null | paste -sd,) $(BIN)/python spaces/erw/app.py

# Not --quiet, which hides warnings from --strict too.
docs: $(VENV)/.installed ## the site, in build/site; a broken link, anchor or inclusion fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

style: $(VENV)/.installed ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.installed ## check without writing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture
	$(BIN)/codespell

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "erw-hf needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist
