# make demo    draw images, train four networks, one table and one sheet of predictions (two minutes on two cores)
# make test    the tests
# make photos  the pictures at the top of the README: docs/photos with the shipped checkpoint
# make lint    ruff
# make oldest  the tests with the oldest torch that is promised, in a .venv of its own
# another Python, each with a .venv of its own: make PYTHON=python3.12 VENV=.venv312 test
# make ablation  the tables on real photos: make ablation DATA=data/real WORDS=path/to/words
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: demo photos test lint oldest ablation clean

demo: $(VENV)/extra
	$(RUN) -m benchmarks.demo

photos: $(VENV)/extra
	$(RUN) predict.py --images docs/photos/astronaut.jpg docs/photos/chelsea.jpg --output-dir runs/photos
	$(RUN) predict.py --images docs/photos/coffee.jpg --classes "cup, spoon, table" --output-dir runs/photos
	mkdir -p docs/photos/predictions
	cp runs/photos/overlays/*.png docs/photos/predictions/

test: $(VENV)/dev
	$(RUN) -m pytest

lint: $(VENV)/dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

oldest: OLDEST := $(VENV)-oldest
oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-oldest.txt -r requirements-dev.txt
	$(OLDEST)/bin/python -m pytest

ablation: $(VENV)/extra
	$(RUN) -m benchmarks.ablation --data-path $(DATA) --embedding-path $(WORDS)

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
	rm -rf $(VENV) $(VENV)-oldest runs/demo data/drawn
