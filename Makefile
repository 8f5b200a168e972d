# `make help` lists the targets. uv keeps the environment in .venv as uv.lock says.
UV := $(or $(shell command -v uv),.tools/bin/uv)
SCRIPTS := $(wildcard benchmarks/*.sh examples/*.sh slurm/*.sh tests/slurm/*.sh) .ci/run
SYNC := $(UV) sync --locked --quiet --inexact --all-extras
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: demo rehearsal test test-slow lint shellcheck golden frozen help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: .venv/.complete  ## the whole curriculum in miniature (DEMO_LENGTH=long for an hour's training)
	@$(RUN) bash examples/demo.sh

rehearsal: .venv/.complete  ## the whole full-size road on a CPU, in less than an hour (docs/rehearsal.md)
	@$(RUN) python benchmarks/rehearsal.py

# Two processes, each of which takes whole modules (tests/order.py); JOBS=0 runs all tests in one.
JOBS := 2
PYTEST = $(RUN) python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

test: .venv/.distributed  ## the tests, but for those at full size: about ten minutes on two cores (JOBS=N: on N)
	@$(PYTEST) -m "not slow"

test-slow: .venv/.distributed  ## the others: full size, Spark and Ray, long drills, real starts of every program
	@$(PYTEST) -m slow

lint: .venv/.complete  ## style, types, shell scripts, length of the pages' sentences
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(MAKE) --no-print-directory shellcheck
	@$(RUN) python -m tools.prose

shellcheck: .venv/.complete  ## shell scripts alone
	@bash -n $(SCRIPTS)
	@$(RUN) shellcheck --external-sources $(filter-out examples/%,$(SCRIPTS))
	@$(RUN) shellcheck --exclude=SC2086 $(filter examples/%,$(SCRIPTS))  # settings that are several words

golden: .venv/.complete  ## record the golden losses again (tests/golden_losses/README.md)
	@$(RUN) python -m tests.golden_losses.record

frozen: .venv/.complete  ## train the tiny preset's frozen parts again (vdtrain/assets/tiny)
	@$(RUN) python -m miniature.frozen

.venv/.complete: pyproject.toml uv.lock | $(UV)
	@$(SYNC) --no-extra distributed
	@touch $@

# The tests also run the engines that a download can be spread with; a demo does without their half gigabyte.
.venv/.distributed: .venv/.complete
	@$(SYNC)
	@touch $@

.tools/bin/uv:
	@python3 -m pip --version >/dev/null 2>&1 && pip="python3 -m pip" \
		|| { python3 -m venv .tools/venv && pip=.tools/venv/bin/pip; } \
		|| { echo "error: python3 has neither pip nor venv; install python3-pip, or uv" >&2; exit 1; }; \
	$$pip install --quiet --disable-pip-version-check --root-user-action=ignore --target .tools uv
