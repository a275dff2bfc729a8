# make demo: the whole method on real digits.  make test: every test but those of a real SLURM (make slurm).
# All build .venv first where it is missing.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: demo test fast slurm lint clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(PY) -m grn.prepare data=digits
	$(PY) -m grn.train +experiment=digits_tokenizer ckpt_path=auto
	$(PY) -m grn.train +experiment=digits_c2i ckpt_path=auto
	$(PY) -m grn.sample ckpt=runs/digits_c2i
	$(PY) -m grn.evaluate ckpt=runs/digits_tokenizer
	$(PY) -m grn.evaluate ckpt=runs/digits_c2i
	@echo "pictures: runs/digits_c2i/samples (samples.png, refinement.gif), runs/digits_c2i/evaluation (nearest.png),"
	@echo "          runs/*/pictures (on the way); numbers: runs/*/evaluation/metrics.json; curves: runs/*/csv, runs/*/wandb"

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slurm" --numprocesses auto --maxprocesses 4 --dist worksteal

fast: $(READY)
	$(PY) -m pytest -m "not slow and not slurm"

slurm: $(READY)
	GRN_SLURM=required $(PY) -m pytest -m slurm

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf runs data build dist .pytest_cache .ruff_cache .hypothesis
