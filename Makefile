# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
RESULTS := $(DEMO)/leaderboard
# One default for users with GPUs, one for laptops: a plain "torch" would fetch gigabytes of CUDA libraries.
TORCH ?= torch>=2.10,<2.14

.PHONY: demo demo-run reproduce-small test lint clean

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

SMALL := configs/run/small-write.yaml --method configs/method

reproduce-small: $(VENV)/.installed  ## the comparison of spaces and the sweep over splits, small, on a CPU
	$(BIN)/dihal sweep --config configs/run/small-sweep.yaml
	$(BIN)/dihal train --config $(SMALL)/write-hidden.yaml --method.split 3 --out runs/small/hidden
	$(BIN)/dihal train --config $(SMALL)/write-latent.yaml --method.split 3 --out runs/small/latent
	$(BIN)/dihal train --config $(SMALL)/write-embedding.yaml --out runs/small/embedding
	$(BIN)/dihal train --config $(SMALL)/write-simplex.yaml --out runs/small/simplex
	$(BIN)/dihal frontier --config configs/run/small-frontier.yaml

test: $(VENV)/.installed
	DIHAL_NO_JAXTYPING=1 $(BIN)/python -m pytest tests/compile
	$(BIN)/python -m pytest tests --ignore tests/compile -n auto

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
