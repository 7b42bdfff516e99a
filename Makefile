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

SMALL := runs/small
SPACES := hidden latent embedding simplex

# A part that is done is not done again, unless its options changed; one that was stopped goes on.
reproduce-small: $(VENV)/.installed $(SMALL)/sweep/.done $(SPACES:%=$(SMALL)/%/.done)  ## the sweep over splits and the comparison of spaces, small, on a CPU
	$(BIN)/dihal frontier --config configs/run/small-frontier.yaml
	@echo "tables: $(SMALL)/sweep/sweep.md, $(SMALL)/frontier/frontier.md"

# Freed memory stays with the process (glibc): fresh pages for every logit tensor cost a third of the time. A thread
# that waits sleeps: spinning, it takes the core from whatever else runs.
reproduce-small: export MALLOC_MMAP_MAX_ = 0
reproduce-small: export MALLOC_TRIM_THRESHOLD_ = 8000000000
reproduce-small: export OMP_WAIT_POLICY = PASSIVE
# All cores are used by each part.
.NOTPARALLEL:

$(SMALL)/sweep/.done: configs/run/small-sweep.yaml configs/budget/small.yaml configs/method/bridge.yaml | $(VENV)/.installed
	$(BIN)/dihal sweep --config $<
	touch $@

$(SMALL)/hidden/.done $(SMALL)/latent/.done: SPLIT := --method.split 3
$(SMALL)/%/.done: configs/run/small-write.yaml configs/method/write-%.yaml configs/budget/small.yaml | $(VENV)/.installed
	$(BIN)/dihal train --config $< --method configs/method/write-$*.yaml $(SPLIT) --out $(@D) $(if $(wildcard $(@D)/checkpoints/step-*),--resume)
	touch $@

test: $(VENV)/.installed
	DIHAL_NO_JAXTYPING=1 $(BIN)/python -m pytest tests/compile
	$(BIN)/python -m pytest tests --ignore tests/compile -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build dist *.egg-info
