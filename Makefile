# Everything runs in .venv, made on first use. pip takes its index from this machine's own configuration.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
TOOLS := .venv/.tools-installed
MATRIX := build/matrix
# The last version before 5, which cannot live beside it: what else it needs is that of .venv.
OLD := build/transformers-4

.DEFAULT_GOAL := help
.PHONY: help demo test lint matrix bench docs clean

help:
	@echo "make demo    train a small model on this machine's Python source, two processes, about three minutes"
	@echo "make test    lint and the test suite"
	@echo "make lint    ruff and mypy"
	@echo "make matrix  every strategy, layout, mask, head count and world, every mesh; writes the tables into $(MATRIX)"
	@echo "make bench   the benchmarks"
	@echo "make docs    build the documentation into build/site, without network; a broken link fails"
	@echo "make clean   remove build products and the demo's run"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --upgrade setuptools==84.2.1 wheel==0.48.0
	$(BIN)/python -m pip install -qq -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[track]'
	touch $@

# What tests, lint and the documentation need beside that; the demo does without.
$(TOOLS): $(STAMP)
	$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[test,lint,track,docs,hf,formats]'
	touch $@

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/longctx launch --nproc 2 recipe=demo run.dir=runs/demo
	@echo
	@echo "checkpoint: $$(ls -d runs/demo/checkpoints/step-* | sort -V | tail -n 1)"
	@echo "wandb run:  $$(find runs/demo -type d -name 'offline-run-*' | head -n 1)"
	@echo "report:     runs/demo/report.html"

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(OLD)/.installed: $(TOOLS) tests/huggingface/constraints-4.txt
	$(BIN)/python -m venv $(OLD)
	$(OLD)/bin/python -m pip install -qq --no-deps -r tests/huggingface/constraints-4.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(OLD)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth"
	touch $@

matrix: $(TOOLS) $(OLD)/.installed
	$(BIN)/python -m pytest -q -n 2 -m matrix
	mkdir -p $(MATRIX)
	$(BIN)/longctx verify --all --table $(MATRIX)/exactness.md
	$(BIN)/longctx verify --mesh --all --table $(MATRIX)/parity.md
	$(BIN)/python -m benchmarks.tables.volume $(MATRIX)/volume.md
	@echo "whole tables: $(MATRIX)/exactness.md, $(MATRIX)/parity.md, $(MATRIX)/volume.md"

bench: $(TOOLS)
	$(BIN)/python -m benchmarks attention

docs: $(TOOLS)
	$(BIN)/python -m docs.generate.drawings
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: build/site/index.html; for its search serve it: python3 -m http.server --directory build/site"

clean:
	rm -rf build dist runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf *.egg-info
