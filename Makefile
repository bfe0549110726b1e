# Every target prepares what it needs on a fresh Debian or Ubuntu; all but `lint` need root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Else each of a thousand commands would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench lint

demo: $(READY)
	@$(call need,ip,iproute2)
	@$(BIN)/python -m tests.demo

test: lint
	@$(call need,ip,iproute2)
	@$(call need,nft,nftables)
	@$(call need,iptables-restore,iptables)
	@$(call need,xz,xz-utils)
	@$(call need,redis-server,redis-server)
	@$(call need,nginx,nginx-light)
	@$(call need,nats-server,nats-server)
	@$(call need,gcc,gcc libc6-dev)
	@$(call need,node,nodejs)
	@$(call need,tmux,tmux)
	@$(call need,top,procps)
	@$(call need,vi,vim-tiny)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

bench: $(READY)
	@$(call need,ip,iproute2)
	$(BIN)/python -m tests.benchmarks $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A new pyproject.toml may name new dependencies, so it makes the environment stale. An editable install of the usual
# kind adds an import hook to each start of the interpreter.
$(READY): pyproject.toml
	@$(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' does not work here: installing the package python3-venv with apt-get"; \
		apt-get update -q && apt-get install -y -q python3-venv && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat \
		-e '.[test]'
	@touch $@

# need COMMAND,PACKAGES: the command, or the Debian packages it comes in.
need = command -v $(1) >/dev/null || PATH=$$PATH:/usr/sbin:/sbin command -v $(1) >/dev/null || { \
	echo "the command $(1) is missing: installing $(2) with apt-get"; \
	apt-get update -q && apt-get install -y -q $(2); }
