# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
RESULTS := $(DEMO)/leaderboard
# One default for users with GPUs, one for laptops: a plain "torch" would fetch gigabytes of CUDA libraries.
TORCH ?= torch>=2.10,<2.14

.PHONY: demo demo-run test lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed  ## score -> train -> evaluate -> leaderboard on the embedded backbone
	$(MAKE) --no-print-directory demo-run

demo-run:
	$(BIN)/dihal score --config configs/run/demo-score.yaml
	$(BIN)/dihal train --config configs/run/demo.yaml
	$(BIN)/dihal evaluate --config configs/run/demo-evaluate.yaml

test: $(VENV)/.installed
	DIHAL_NO_JAXTYPING=1 $(BIN)/python -m pytest tests/compile
	$(BIN)/python -m pytest tests --ignore tests/compile -n auto

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
