# make demo   set up, and run the main job on the bundled teacher
# make test   set up, and run the tests on the newest libraries
# make lint   ruff and mypy
# make docs   set up, and build the site from docs/ into site/
# make gpu    on a machine with a GPU: its tests and benchmarks, with the python3 that is there; no set-up
# make gpu-speed, gpu-more   there as well: the waterfall and a profile; scaling and quality
# make gpu-offline   the CUDA path on a stand-in for CUDA, without a GPU: newest libraries, then oldest
# make test-oldest   the tests on the oldest supported torch, in an environment of its own

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
OUT ?= runs/demo
DEMO_STOPS = --stop 50:0.3 --stop 100:0.3 --stop 200:0.3 --stop 300:0.3

.PHONY: setup demo test lint docs test-oldest gpu-offline gpu gpu-speed gpu-more clean

setup: $(VENV)/.ready
setup-oldest: $(OLDEST)/.ready

$(VENV)/.ready: pyproject.toml constraints/newest.txt
	$(call install,$(VENV),constraints/newest.txt)

$(OLDEST)/.ready: pyproject.toml constraints/oldest.txt
	$(call install,$(OLDEST),constraints/oldest.txt)

define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(1)
	@echo "installing PyTorch and the rest into $(1) (about 5 GB, a few minutes)"
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e ".[test]"
	touch $(1)/.ready
endef

demo: setup
	$(VENV)/bin/smi-fast invert --model demo --labels all --count 5 --iterations 400 $(DEMO_STOPS) \
		--impl eager --seed 0 --out $(OUT) --overwrite

# the kernels' own code runs in a process of its own: Triton reads the variable when a kernel is decorated
test: setup
	$(VENV)/bin/python -m pytest
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m kernel tests/kernels

# what depends on the version of torch, timm or Triton: the model against timm, the engine with its compiler, ops and
# kernels, quantization and training. Command line, benchmarks, docs, data sets and tuning are run on the newest alone.
OLDEST_TESTS = tests/kernels tests/model tests/method tests/engine tests/quantize tests/distill tests/storage tests/images

test-oldest: setup-oldest
	$(OLDEST)/bin/python -m pytest $(OLDEST_TESTS)
	TRITON_INTERPRET=1 $(OLDEST)/bin/python -m pytest -m kernel tests/kernels

# needs gcc, and the CUDA headers that the wheels of torch and Triton bring; says so where they are missing
gpu-offline: setup setup-oldest
	$(VENV)/bin/python -m tests.offline_cuda
	$(OLDEST)/bin/python -m tests.offline_cuda

gpu:
	PYTHON=$(PYTHON) benchmarks/gpu.sh tests

gpu-speed:
	PYTHON=$(PYTHON) benchmarks/gpu.sh speed

gpu-more:
	PYTHON=$(PYTHON) benchmarks/gpu.sh more

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# the sources are read, not imported, and nothing is fetched while the pages are built
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "open site/index.html, or for its search: python3 -m http.server --directory site"

$(VENV)/.docs: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/newest.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info
