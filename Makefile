# Every target first installs what it needs into .venv, once.
#   make train ARGS="--data DIR"    PYTHON=python3.12 make test    PIP_EXTRA_INDEX_URL=... make test
PYTHON ?= python3
ARGS ?=
OUT ?= benchmarks/results/gpu_check.json
FUZZ_SECONDS ?= 60
# Threads that spin long at barriers slow down other programs on the same cores.
export GOMP_SPINCOUNT ?= 10000

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
NATIVE := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: help train test lint fuzz abuse bench results accuracy tables gpu-check clean
.DELETE_ON_ERROR:

help:
	@echo 'make train      train Semi-MoE; ARGS="--help" lists the options, without ARGS it trains on synthetic glands'
	@echo 'make test       run the tests; ARGS goes to pytest'
	@echo 'make lint       check the style of the Python and the C++ code'
	@echo 'make fuzz       compare the C++ code with its definition on random cases, under sanitizers, for $$(FUZZ_SECONDS) s each'
	@echo 'make abuse      try hostile cases and count them in benchmarks/results/abuse.md, in 20 minutes; ARGS="--all" tries all'
	@echo 'make bench      benchmark the operations and the training step against other libraries; ARGS goes to pytest'
	@echo 'make results    measure the speeds in the pages again, in half an hour; ARGS names some of benchmarks/measure.py'
	@echo 'make accuracy   train other methods beside Semi-MoE and score them (docs/accuracy.md); ARGS="--help" lists the options'
	@echo 'make tables     write the tables of the Markdown pages from benchmarks/results/*.json'
	@echo 'make gpu-check  run tests and benchmarks on this machine'"'"'s GPU with the PyTorch of $$(PYTHON); results go to $$(OUT);'
	@echo '                ARGS: stages (build tests sanitize ops step train) and --minutes N, the time limit of each'
	@echo 'make clean      remove .venv and everything built'

train: $(VENV)/train.done
	$(RUN) -m semimoe_fast.train $(ARGS)

# One process a core; tests/conftest.py limits each process to one thread. The slow tests: make test ARGS="-m slow"
test: $(VENV)/test.done
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow" $(ARGS)

lint: $(VENV)/lint.done
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/* $(wildcard tests/cuda_on_cpu/* tests/fuzz/*)

# Every call draws new random cases. A failure prints its seed; `build/fuzz/fuzz_... 0 SEED` repeats it.
fuzz: $(VENV)/fuzz.done
	$(VENV)/bin/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM='$(CURDIR)/$(VENV)/bin/ninja' -DSEMIMOE_FUZZ=ON
	$(VENV)/bin/cmake --build build/fuzz
	build/fuzz/fuzz_distance $(FUZZ_SECONDS) $$(date +%s%N)
	build/fuzz/fuzz_objective $(FUZZ_SECONDS) $$(date +%s%N)
	build/fuzz/fuzz_batch_norm $(FUZZ_SECONDS) $$(date +%s%N)
	build/fuzz/fuzz_blur $(FUZZ_SECONDS) $$(date +%s%N)
	build/fuzz/fuzz_pooling $(FUZZ_SECONDS) $$(date +%s%N)

# Kills, power cuts, full disks, damaged images, fuzzing: in two processes, or with ARGS="-n 0" in one. A failure prints the command that repeats it.
abuse: $(VENV)/abuse.done
	$(RUN) -m pytest tests/abuse --quiet -n 2 --dist worksteal $(ARGS); status=$$?; $(RUN) benchmarks/tables.py; exit $$status

bench: $(VENV)/bench.done
	$(RUN) -m pytest benchmarks --benchmark-only --benchmark-sort=name --benchmark-columns=min,median,iqr,rounds $(ARGS)

results: $(VENV)/bench.done
	$(RUN) -m benchmarks.measure $(ARGS)
	$(RUN) benchmarks/tables.py

accuracy: $(VENV)/train.done
	$(RUN) -m benchmarks.peers $(ARGS)

tables:
	$(PYTHON) benchmarks/tables.py

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out '$(OUT)' $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info _semimoe_fast*.so

# The install is editable: Python changes take effect at once, changes of the native sources start a build.
$(VENV)/train.done: $(NATIVE) | $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/test.done: $(NATIVE) | $(VENV)
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/train.done

$(VENV)/abuse.done: $(NATIVE) | $(VENV)
	$(INSTALL) --editable '.[test,abuse]'
	@touch $@ $(VENV)/test.done $(VENV)/train.done

$(VENV)/bench.done: $(NATIVE) | $(VENV)
	$(INSTALL) --editable '.[test,bench]'
	@touch $@ $(VENV)/test.done $(VENV)/train.done

$(VENV)/lint.done: constraints.txt | $(VENV)
	$(INSTALL) ruff clang-format
	@touch $@

$(VENV)/fuzz.done: constraints.txt | $(VENV)
	$(INSTALL) cmake ninja
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 15) else \
	  "error: Python %d.%d is not supported: set PYTHON to Python 3.11 to 3.14, as in make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $@ || { rm -rf $@; exit 1; }
