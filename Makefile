# `make help` lists the targets. uv keeps the environment in .venv as uv.lock says.
UV := $(or $(shell command -v uv),.tools/bin/uv)
SCRIPTS := $(wildcard benchmarks/*.sh examples/*.sh examples/first_hour/*.sh slurm/*.sh tests/slurm/*.sh) .ci/run
SYNC := $(UV) sync --locked --quiet --inexact --all-extras
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
# Compiled once: without its bytecode PyTorch takes three times as long to import, in every process.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo drill rehearsal test test-slow lint shellcheck golden counts frozen help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/.complete  ## everything that the commands need, in .venv

demo: .venv/.complete  ## the whole curriculum in miniature (DEMO_LENGTH=long for an hour's training)
	@$(RUN) bash examples/demo.sh
	@echo
	@echo 'Next, in this shell: source .venv/bin/activate     (or put `uv run` before each command)'
	@echo 'Then for example:    vdtrain sample demo/runs-$(or $(DEMO_LENGTH),short)/stage3_four_flow "a red circle" resolution=64'
	@echo '                     xdg-open demo/runs-$(or $(DEMO_LENGTH),short)/report.html'

rehearsal: .venv/.complete  ## the whole full-size road on a CPU, in less than an hour (docs/rehearsal.md)
	@$(RUN) python benchmarks/rehearsal.py

drill: .venv/.distributed  ## kills, faults, odd inputs and a long run: hours (docs/reliability.md)
	@$(RUN) python -m tests.drill --record

# Three processes, each of which takes whole modules (tests/order.py): some tests wait more than they compute. JOBS=0
# runs all tests in one.
JOBS := 3
PYTEST = $(RUN) python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

test: .venv/.distributed  ## the tests, but for those at full size: some twelve minutes on two cores (JOBS=N: in N processes)
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

counts: .venv/.complete  ## count the operations and bytes of the stages at full size again (vdtrain/planning/counts.json)
	@$(RUN) python -m tools.counts

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
