PYTHON ?= python3
BIN := .venv/bin
.PHONY: install install-dev run test test-full gpu-report lock check lint types

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

install: .venv/installed

install-dev: .venv/installed-dev

run: install  ## run test_input.json: the sample presenter speaks the sample speech
	$(BIN)/python handler.py

test: install-dev
	$(BIN)/python -m pytest

test-full: install-dev  ## published-size networks, fault harness, image build
	$(BIN)/python -m pytest -m "full or not full"

gpu-report: install  ## what this machine's GPU does, PASS or FAIL, and gpu-report.json
	$(BIN)/python -m benchmarks.gpu

lock:  ## requirements.lock: the image's versions with hashes, torch's CUDA libraries included; needs uv
	uv pip compile requirements.txt --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --custom-compile-command "make lock" --quiet --output-file requirements.lock

lint: install-dev
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

check: lint types test
