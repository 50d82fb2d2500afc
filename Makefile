# make demo    draw pictures, train, evaluate, one table and one picture a method (a few minutes on a CPU)
# make test    the tests
# make lint    ruff
# make real    the table on real photos: make real DATA=data/real WORDS=path/to/words
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint real clean

demo: $(VENV)/base
	$(RUN) -m benchmarks.demo

test: $(VENV)/dev
	$(RUN) -m pytest

lint: $(VENV)/dev
	$(RUN) -m ruff check .

real: $(VENV)/extra
	$(RUN) -m benchmarks.real --data-path $(DATA) --embedding-path $(WORDS)

$(VENV)/base: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV): once, some minutes"
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/extra: requirements-extra.txt $(VENV)/base
	$(PIP) -r requirements.txt -r requirements-extra.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/extra
	$(PIP) -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs/demo data/synthetic
