# make demo: see it learn. make test: the tests. Both make .venv first if it is missing.
PYTHON ?= python3
SEED ?= 0
PAGE ?= gpu-results.md
BIN = .venv/bin
# One at a time, in a second process that can crash.
ALONE = --numprocesses=1 --timeout-method=thread
TOGETHER = --numprocesses=auto --dist=loadfile --no-loadscope-reorder

.PHONY: help demo pictures challenges laboratory test test-fast test-slurm test-gpu lint types clean

help:
	@echo "make demo       see it learn: digits on a CPU, one to two minutes (SEED=1: another seed)"
	@echo "make pictures   what patches of photographs become: 20 minutes on a CPU, into figs/"
	@echo "make challenges the paper's argument in numbers: an hour on two cores, into docs/challenges.md"
	@echo "make laboratory published choices of the target, compared: into docs/laboratory.md"
	@echo "make test       all tests but those of Slurm and GPUs"
	@echo "make test-fast  without the slow ones"
	@echo "make test-slurm on a cluster that they start on this machine; needs root and apt"
	@echo "make test-gpu   what needs a GPU, in at most 15 minutes on one; PAGE=gpu-results.md is written"
	@echo "make lint       ruff"
	@echo "make types      mypy"
	@echo "make clean      remove .venv"

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@echo "installing 6 GB into .venv; while pip unpacks it is silent, for a minute or more"
	$(BIN)/pip install --requirement requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python launcher.py --config-name=demo seed=$(SEED) overwrite=True
	mkdir -p results && cp checkpoints/demo/results/demo.json results/demo.json

pictures: .venv/installed
	$(BIN)/python launcher.py --config-name=photographs seed=$(SEED) overwrite=True
	$(BIN)/python launcher.py --config-name=visualize pretrained=checkpoints/photographs stride=16 "controls=[random,pixels]" "point=[0.35,0.5]" max_iter=500 job_name=pictures
	for name in china flower; do cp checkpoints/pictures/results/pictures/*-$$name.png figs/$$name.png; done

challenges laboratory: .venv/installed
	$(BIN)/python launcher.py --config-name=$@ env.parallel=2

test: .venv/installed
	$(BIN)/python -m pytest $(TOGETHER) --ignore=tests/slurm

test-fast: .venv/installed
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow" --ignore=tests/slurm

test-slurm: .venv/installed
	$(BIN)/python -m pytest tests/slurm

test-gpu: .venv/installed
	timeout --signal=INT --kill-after=20 870 $(BIN)/python -m pytest tests/gpu -m gpu $(ALONE) --page=$(PAGE)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

clean:
	rm -rf .venv
