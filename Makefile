# Everything runs in one virtual environment that the first target makes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml constraints.txt

.PHONY: demo test sanitize bench cross lint format clean

# Find two tickets on real data, beside a dense-trained and a random-mask control.
# On other data: make demo ARGS="--dataset mnist --data DIR" (or cifar10).
demo: $(VENV)/.installed
	$(BIN)/sparseticket demo --out demo_out $(ARGS)

# The whole suite.
test: $(VENV)/.installed-dev $(VENV)/.triton-3.6
	$(BIN)/python -m pytest

# The C++ core alone under AddressSanitizer and UBSan (part of test, too).
sanitize: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/test_sanitize.py

# Every kernel beside dense torch and others; rows go to bench/results.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m bench.run
	SPARSETICKET_ISA=avx2 $(BIN)/python -m bench.run --barred --threads 1

# Every Triton configuration compiled for every GPU target, with its budgets, by both Tritons; needs
# no GPU.
cross: $(VENV)/.installed-dev $(VENV)/.triton-3.6
	$(BIN)/python -m bench.cross --jobs 2
	PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m bench.cross --jobs 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/native -name '*.cpp' -o -name '*.h')

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/native -name '*.cpp' -o -name '*.h')

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info sparseticket/_C*.so

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	SPARSETICKET_BUILD_JOBS=2 $(BIN)/python -m pip install -c constraints.txt -e '.[demo]'
	touch $@

# More than what demo needs, so that a build for both is one build.
$(VENV)/.installed-dev: $(VENV)/.created $(SOURCES)
	SPARSETICKET_BUILD_JOBS=2 $(BIN)/python -m pip install -c constraints.txt -e '.[demo,dev]'
	touch $(VENV)/.installed $@

# The oldest Triton that the kernels work with, for the child processes of tests: in a folder of its
# own, because an environment has but one.
$(VENV)/.triton-3.6: $(VENV)/.created constraints-triton-3.6.txt
	rm -rf $(VENV)/triton-3.6
	$(BIN)/python -m pip install --no-deps --target $(VENV)/triton-3.6 -r constraints-triton-3.6.txt
	touch $@
