# make demo    the tour: installs into .venv, needs no root and no VM
# make demo-vm the tour with a virtual machine: installs QEMU where it may, boots a kernel of Debian (on x86-64)
# make demo-vpn a VPN of the host comes and goes under a working guest; needs no root and no VM either
# make test    everything: installs what the tests use (Debian, Ubuntu), runs them, PROCESSES files at a time; what fails so,
#              on a machine that is busy with another test, has to pass alone
# make lint    ruff and mypy
# make bench   the benchmarks; takes minutes, wants root and an idle machine
# make fuzz    the fuzz targets, FUZZ_SECONDS each
# make manual  docs/manual.md from the definitions
# make clean   everything that was made here

SHELL := /bin/bash
.DELETE_ON_ERROR:

# A distribution's own python (built with PGO) is half as fast again as most others: it comes first, if it is new enough.
PYTHON ?= $(shell for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
FUZZ_SECONDS ?= 60
PYTEST_ARGS ?=
PROCESSES ?= 2

.PHONY: demo demo-vm demo-vpn test lint bench fuzz manual clean packages dev

demo: $(VENV)/.installed
	$(BIN)/pyvpnkit demo

demo-vm: $(VENV)/.installed
	@command -v qemu-system-x86_64 >/dev/null || .ci/packages <(echo qemu-system-x86)
	$(BIN)/pyvpnkit demo --vm

demo-vpn: $(VENV)/.installed
	$(BIN)/pyvpnkit demo --vpn

test: packages dev
	$(BIN)/python -m pytest -n $(PROCESSES) $(PYTEST_ARGS) || { \
	  echo "once more, alone:"; $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(PYTEST_ARGS); }

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: dev
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

fuzz: dev
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

manual: $(VENV)/.installed
	$(BIN)/python -m pyvpnkit.manual docs/manual.md

packages:
	@.ci/packages packages.txt

dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { \
	  echo "No Python 3.11 or newer with venv was found. On Debian or Ubuntu: apt-get install python3-venv;" >&2; \
	  echo "or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
