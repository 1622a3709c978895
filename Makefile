# make demo   the whole loop on this machine, with a table at the end
# make demo-experience   likewise, experience retrieval
# make test   every test but the slow ones (makes the environment if it is not there)
# make test-all   the slow ones too: hundreds of games against TextWorld, kills at random moments
# make setup  .venv with all that tests and benchmarks need
# make java   ScienceWorld's part in Java, after a change to it (needs javac)
# make gpu-compiler   XLA's compiler for NVIDIA GPUs, for experiments.aot (a part of setup)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt

.PHONY: demo demo-experience test test-all setup gpu-compiler java lint clean

demo: $(VENV)/.runtime
	$(BIN)/python -m experiments.hint_distillation --config=configs/hint_distillation.py:model=smollm2_135m --workdir=runs/demo

demo-experience: $(VENV)/.runtime
	$(BIN)/python -m experiments.experience_retrieval --config=configs/experience_retrieval.py:setting=small_demo --workdir=runs/demo-experience

# Each process takes whole files: what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile tests

test: setup
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: setup
	$(PYTEST) $(PYTEST_ARGS)

setup: $(VENV)/.dev gpu-compiler

gpu-compiler: .cache/gpu_compiler/.done

java: setup
	$(BIN)/python -c 'from envs import scienceworld_java; scienceworld_java.build()'

lint: setup
	$(BIN)/ruff check .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"Python 3.11 is needed (scann has wheels for it), not {v[0]}.{v[1]}; set PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv $(VENV)

# One stamp for running, one for developing; a changed requirement installs again.
$(VENV)/.runtime: requirements.txt constraints.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt constraints.txt | $(BIN)/python
	$(PIP) -r requirements-dev.txt
	@touch $@ $(VENV)/.runtime

# In a folder of its own: in the environment JAX would look for a GPU at every start.
.cache/gpu_compiler/.done: requirements-gpu-compiler.txt | $(BIN)/python
	rm -rf $(@D)
	mkdir -p $(@D)
	$(PIP) --no-deps --target $(@D) -r requirements-gpu-compiler.txt
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
