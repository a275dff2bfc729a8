# make demo: the whole method on real digits.  make test: every property once.  make test-all: all cases of it, too;
# only make slurm starts a real SLURM. All build .venv first where it is missing.
PYTHON ?= python3
ifeq ($(OMP_WAIT_POLICY)$(GOMP_SPINCOUNT)$(KMP_BLOCKTIME),)
# As grn/runtime/openmp.py has it; here, since pytest imports torch first.
export GOMP_SPINCOUNT := 10000
export KMP_BLOCKTIME := 1
endif
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: demo try critters studio test test-full test-all test-kill test-browser test-cuda bench-cuda fast slurm lint docs curves scale clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(PY) -m grn.demo

# Sixteen critters from prompts, by the model in experiments/critters: nothing is trained. Other prompts:
# .venv/bin/python -m grn.sample ckpt=experiments/critters/model 'prompts=["a pink tower critter with a fin"]'
try: $(READY)
	$(PY) -m grn.sample ckpt=experiments/critters/model num=16 columns=8 sampler=linear sampler.schedule.steps=8 out=runs/try

# The same model from nothing: data, tokenizer and refiner, about an hour on two cores; then its scores.
critters: $(READY)
	$(PY) -m grn.prepare data=critters
	$(PY) -m grn.train +experiment=critters_tokenizer
	$(PY) -m grn.encode ckpt=runs/critters_tokenizer data=critters_t2i
	$(PY) -m grn.train +experiment=critters_t2i
	$(PY) -m grn.evaluate ckpt=runs/critters_t2i suite=critters scores=none
	$(PY) -m grn.sample ckpt=runs/critters_t2i num=16

# Watch samples being refined in the browser (docs/studio.md): the refiner under runs/ that was trained last.
studio: $(READY)
	$(PY) -m grn.studio

PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --dist worksteal

test: $(READY)
	$(PYTEST) -m "not full and not slurm and not browser and not cuda"

test-full: $(READY)
	$(PYTEST) -m "full and not slurm and not cuda"

test-all: test test-full

# A part of test-full; GRN_KILLS: rounds of each command, GRN_KILLS_SEED: of the moments.
test-kill: $(READY)
	$(PYTEST) -m kill

# In a headless Chromium (Debian: apt-get install chromium); screenshots are left in build/screenshots.
test-browser: $(READY)
	GRN_BROWSER=required OMP_NUM_THREADS=1 $(PY) -m pytest -m browser

# Every path that only a GPU has, on one; without network and .venv: make test-cuda PY=python READY=
test-cuda: $(READY)
	$(PY) -m pytest -m cuda tests/cuda --durations=10

# What this GPU does, in eight minutes, against goals for an H100; without network and .venv as above.
bench-cuda: $(READY)
	$(PY) -m grn.bench benchmark=gpu out=build/gpu

fast: $(READY)
	$(PY) -m pytest -m "not slow and not slurm and not browser and not cuda"

slurm: $(READY)
	GRN_SLURM=required $(PY) -m pytest -m slurm

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

# The documentation as a site, in build/site; a broken link is an error, and nothing is fetched from elsewhere.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# Loss and step time of digits_c2i on the working tree and on another commit: make curves BASE=main [STEPS=200].
STEPS ?= 200
curves: $(READY)
	$(PY) experiments/curves.py $(BASE) --steps $(STEPS)

# The table of docs/cluster.md: what each of 64 GPUs holds and receives, without any.
scale: $(READY)
	$(PY) experiments/scale/table.py

$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf runs data build dist .pytest_cache .ruff_cache .hypothesis
