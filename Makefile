# Everything that a newcomer types. `make demo` does the main job, `make test` runs the tests.
#
#   PYTHON  the interpreter that makes the environment (3.10 … 3.13)
#   JOBS    test processes, one thread of PyTorch each
#   TORCH   the PyTorch requirement; name a CUDA build here on a GPU machine

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BUDGET ?= 15
JOBS ?= 2

bin := $(VENV)/bin
out := out

.PHONY: demo test benchmark fuzz load long lock lint types peers pythons clean

demo: $(VENV)/.installed
	$(bin)/lemica-trt build --model cogvideox-tiny --budget $(BUDGET) --output $(out)/cogvideox-tiny
	$(bin)/lemica-trt run $(out)/cogvideox-tiny "a big red circle moves left" --seed 7 --output $(out)/clip.mp4

test: $(VENV)/.installed lint types pythons
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# Tests with a limit in seconds: on a machine that does nothing else.
benchmark: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -m benchmark

# A hundred thousand mutations of files and requests; a quarter of an hour of one core.
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -m fuzz

# Whole builds, the commands of README.md, the newest Python: an hour of one core.
long: $(VENV)/.installed
	PYTHONS=3.13 tools/test_pythons.sh
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -m long

# A real tritonserver under load: 32 clients; killed processes, then killed servers, LOAD_SECONDS=300 each; and more.
load: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -m load -s tests/tritonserver/test_server_load.py

# Versions and hashes of what runs in a server; asks the package index for the newest.
lock:
	tools/lock_server.sh

lint: $(VENV)/.installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(VENV)/.installed
	$(bin)/mypy

# An environment with the libraries that benchmarks/peers compares with, which the project itself does not need.
peers: .venv-peers/.installed

# The packages that run in production need no PyTorch and run on every Python that Triton's containers have.
pythons: $(VENV)/.installed
	tools/test_pythons.sh

# PyTorch first and by itself: which build it is depends on the machine, the rest does not.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(bin)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[build,hub,serve,test]'
	touch $@

.venv-peers/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[build,flip]' cache-dit==1.5.3
	touch $@

clean:
	rm -rf $(VENV) .venv-peers $(out)
