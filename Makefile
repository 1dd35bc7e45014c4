# make demo: the main job on the embedded default.  make test: the tests.  Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
LAUNCH := $(BIN)/accelerate launch --quiet --config_file scripts/accelerate.yaml
# At the demo's sizes a second thread brings nothing: 40.3 ms per step instead of 40.8.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo bundle test newest check format lock audit docs clean

setup: .venv/.installed

# The stamp is rewritten only when what is to be installed changes.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

demo: setup
	$(LAUNCH) scripts/train_bridge.py demo --run $(RUN) --resume
	$(BIN)/sparse-bridges find-channel --run $(RUN)
	$(BIN)/sparse-bridges steer --run $(RUN)
	$(BIN)/sparse-bridges report --run $(RUN)
	@echo "open $(RUN)/report.html"

# The bundle that comes with the package: the demo's dense model, seven times the demo's text for the joint training.
bundle: setup
	$(BIN)/sparse-bridges train-dense demo --run runs/bundle-dense --resume
	$(LAUNCH) scripts/train_bridge.py demo --dense runs/bundle-dense/dense --batch-size 16 --steps 10000 \
		--corpus-tokens 10000000 --run runs/bundle --resume
	for task in single_double_quote while_return_true for_while; do \
		$(BIN)/sparse-bridges find-channel --run runs/bundle --task $$task && \
		$(BIN)/sparse-bridges steer --run runs/bundle --task $$task || exit 1; done
	$(BIN)/sparse-bridges find-circuit --run runs/bundle --controls
	$(BIN)/sparse-bridges package-bundle --run runs/bundle --name demo

# The tests of the CUDA kernels run in Triton's interpreter; a gigabyte that nothing else needs.
.venv/.tests-installed: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,docs,triton]' -c constraints.txt
	touch $@

test: .venv/.tests-installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The newest versions that pyproject.toml admits, without constraints.txt: a plain install runs the README's first block.
newest:
	rm -rf build
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check .
	.venv-newest/bin/python scripts/first_block.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every package that any target installs, pinned in constraints.txt: pins that are there stay, those that are missing are
# resolved. `make lock UPGRADE=1` resolves all anew, torch aside.
lock: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --dry-run --ignore-installed --report .venv/lock.json \
		-e '.[dev,docs,triton]' $(if $(UPGRADE),$(shell grep '^torch==' constraints.txt),-c constraints.txt)
	$(BIN)/python scripts/lock.py .venv/lock.json constraints.txt

# Known advisories on what constraints.txt pins. Needs pip-audit and the network.
audit:
	@$(PYTHON) scripts/audit.py constraints.txt

.venv/.docs-installed: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,docs]' -c constraints.txt
	touch $@

# The notebook is executed on the way. Pages and their search work from disk.
docs: .venv/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf site build .venv .venv-newest .pytest_cache .mypy_cache .ruff_cache *.egg-info
