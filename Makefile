PYTHON ?= python3
BIN := .venv/bin
# compiled and rewritten tests are kept, whatever the machine says: three workers import all of them
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
WORKERS := -n 3 --dist worksteal
.PHONY: install install-dev run page live test test-long test-full test-certificate bench gpu-report lock check lint types

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

.venv/installed-page: .venv/installed requirements-page.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-page.txt
	touch $@

page: .venv/installed-page  ## a local page to try and tune the worker: http://127.0.0.1:7860
	$(BIN)/python -m pipeline.page

.venv/installed-live: .venv/installed requirements-live.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-live.txt
	touch $@

live: .venv/installed-live  ## speak through a presenter in the browser, live: http://127.0.0.1:7870
	$(BIN)/python -m pipeline.live

test: install-dev
	$(PYTEST) $(WORKERS)

test-long: install-dev  ## published-size networks, fault harness, image build; then what needs the machine to itself
	$(PYTEST) $(WORKERS) -m full -rs
	$(PYTEST) -m alone -rs

test-full: test test-long

test-certificate: install  ## a certificate chain for trying out content credentials, in ./test-certificate
	$(BIN)/python scripts/make_test_certificate.py test-certificate

.venv/installed-bench: .venv/installed requirements-bench.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch $@

bench: .venv/installed-bench  ## the short benchmarks, and one table beside the last release's figures
	$(BIN)/python -m benchmarks

gpu-report: install  ## what this machine's GPU does, PASS or FAIL, and gpu-report.json
	$(BIN)/python -m benchmarks.gpu

lock:  ## requirements.lock: the image's versions with hashes, torch's CUDA libraries included; needs uv
	uv pip compile requirements.txt requirements-queue.txt --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --custom-compile-command "make lock" --quiet --output-file requirements.lock

lint: install-dev
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

check: lint types test
