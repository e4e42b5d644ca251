# Two commands for a newcomer; each sets up what it needs in .venv.
#   make demo   makes a first clip in out/
#   make test   runs the whole test suite

PYTHON ?= python3
PIP = .venv/bin/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test

demo: .venv/demo.stamp
	.venv/bin/dynamictrl demo --out out/demo.mp4

test: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy -p dynamictrl_edge
	.venv/bin/python -m pytest -n auto --dist worksteal -q

.venv/bin/python:
	$(PYTHON) -m venv .venv

SOURCES = pyproject.toml constraints.txt $(shell find bundle calibration cli engines export package pocket runtime -name '*.py' -o -name '*.safetensors')

.venv/demo.stamp: .venv/bin/python $(SOURCES)
	$(PIP) ".[export]"
	touch $@

.venv/test.stamp: .venv/bin/python $(SOURCES)
	$(PIP) ".[export,calibrate,build,rtx,dev]"
	touch $@
