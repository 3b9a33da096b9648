# make demo    draw scenes, pretrain, export, embed, index, answer questions, write reports (MINUTES=n shortens the training)
# make test    every test           make check   ruff, mypy, imports, spelling         make bench   measurements
# make gpu     checks and measurements that need a GPU, in under 25 minutes
# make fuzz    thousands of damaged shards, images, folders and responses of servers; kills of runs, faults of servers

PYTHON ?= python3
MINUTES ?= 8
BIN := .venv/bin

.PHONY: demo test check ruff mypy imports spelling fuzz bench gpu
.DELETE_ON_ERROR:

# The stamp is written last: an install that was cut off starts again.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clipfuse needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -e '.[all]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on all cores, pip on one; some packages hold files that are no Python
	touch $@

demo: .venv/installed
	$(BIN)/python -m launch.demo --minutes $(MINUTES)

test: .venv/installed
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations 15

check: .venv/installed
	$(MAKE) --jobs 2 --output-sync --no-print-directory mypy ruff imports spelling

mypy: .venv/installed
	$(BIN)/mypy

ruff: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

imports: .venv/installed
	$(BIN)/lint-imports

spelling: .venv/installed
	$(BIN)/codespell

# Thousands of seeded cases of damage; `make test` runs the first few hundred of them. Then two tables of faults.
fuzz: .venv/installed
	FUZZ_FACTOR=20 $(BIN)/python -m pytest -q -n auto --timeout 3600 tests/fuzz
	$(BIN)/python -m tests.faults servers
	$(BIN)/python -m tests.faults kills --kills 20

# Alone on the machine. PEER=PYTHON compares with open_clip, TRAIN= and VAL= name shards of your own.
bench: .venv/installed
	PEER='$(PEER)' TRAIN='$(TRAIN)' VAL='$(VAL)' $(BIN)/python -m tests.bench

# The first hour on a GPU: gradients, losses, samples/s, memory, resuming; into gpu-results/.
gpu: .venv/installed
	$(BIN)/python -m tests.bench.gpu $(if $(PEER),--peer $(PEER))
