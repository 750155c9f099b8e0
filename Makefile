# SPDX-License-Identifier: Apache-2.0
# `make help` lists what there is.  Nothing here calls sudo: run as root what needs root.

PREFIX  ?= /usr/local
DESTDIR ?=
KERNEL  ?= build
PYTHON  ?= /usr/bin/python3
TESTS   ?=
BENCH   ?=
SOAK    ?=

BUILD   := $(CURDIR)/build
GUEST   := $(BUILD)/guest
STAGE   := $(BUILD)/prefix
VENV    := .venv
CACHE   := $(or $(PYKATA_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pykata)
BIN     := $(VENV)/bin
ROOMS   := ttrpc vmm agent shimv2
# The slowest first, as they run two at a time.
TESTED  := rootfs-builder vmm $(filter-out vmm,$(ROOMS)) tools

# Where tools/go.sh puts a newer Go, if this host needs one.
export PATH := $(CACHE)/go/toolchain/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help deps virtiofsd guest install uninstall stage run shell venv lint fmt typecheck imports deps-test \
        unit integration test go critest bench soak proto docs clean kvmlab kvmlab-smoke kvmlab-shell
.DELETE_ON_ERROR:

help: ## this list
	@echo "make TARGET [PREFIX=$(PREFIX)] [DESTDIR=] [KERNEL=build|debian]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) \
	    | while IFS="$$(printf '\t')" read -r name text; do printf '  %-13s %s\n' "$$name" "$$text"; done

run: deps guest stage ## busybox in a VM, by a containerd of our own (installs what is missing)
	@$(PYTHON) -I tools/run.py --prefix $(STAGE) run

shell: deps guest stage ## the same, with a shell in the container
	@$(PYTHON) -I tools/run.py --prefix $(STAGE) shell

deps: ## install the Debian packages that are missing
	@PYTHON=$(PYTHON) tools/deps.sh $(KERNEL)

guest: ## build guest kernel and image into build/guest (KERNEL=debian: without a kernel build)
	@$(PYTHON) rootfs-builder/build.py --kernel $(KERNEL) --output $(GUEST)

$(GUEST)/kata-containers.json:
	@$(MAKE) --no-print-directory guest

install: | $(GUEST)/kata-containers.json ## install for the system's containerd under PREFIX
	@$(PYTHON) -I tools/install.py install --python $(PYTHON) \
	    --prefix "$(PREFIX)" --destdir "$(DESTDIR)"

uninstall: ## remove what `make install` put there
	@$(PYTHON) -I tools/install.py uninstall --prefix "$(PREFIX)" --destdir "$(DESTDIR)"

stage: | $(GUEST)/kata-containers.json
	@$(PYTHON) -I tools/install.py install --python $(PYTHON) --prefix $(STAGE)

venv: $(VENV)/.made ## the environment that tests and checks run in

$(VENV)/.made: pyproject.toml
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

go:
	@tools/go.sh "$(CACHE)"

deps-test:
	@PYTHON=$(PYTHON) tools/deps.sh $(KERNEL) test

virtiofsd: ## the virtiofsd in Rust, for the tests, into the cache
	@$(PYTHON) tools/rust_virtiofsd.py "$(CACHE)"

test: deps-test go virtiofsd venv guest ## all checks and all tests, those with VMs and containerd included
	@$(MAKE) --no-print-directory lint typecheck imports unit
	@$(MAKE) --no-print-directory integration kvmlab-smoke

unit: venv ## tests that lie beside the code
	$(BIN)/python -m pytest --numprocesses auto $(or $(TESTS),$(TESTED))

integration: go venv stage ## tests with real containerd, VMs and peers
	$(BIN)/python -m pytest integration $(TESTS)

kvmlab: go venv guest ## tests with KVM and vhost-vsock, in an emulated machine that has both
	$(BIN)/python -m integration.kvmlab run $(TESTS)

kvmlab-smoke: venv guest ## the short part of it
	$(BIN)/python -m integration.kvmlab smoke

kvmlab-shell: venv guest ## a shell in that machine
	$(BIN)/python -m integration.kvmlab shell

lint: venv ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: venv ## let ruff format and mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: venv ## mypy, strict
	$(BIN)/mypy $(ROOMS) integration/lib integration/bench integration/critest integration/soak.py tools/install.py tools/run.py
	MYPYPATH=rootfs-builder $(BIN)/mypy integration/kvmlab tools/rust_virtiofsd.py
	cd rootfs-builder && $(CURDIR)/$(BIN)/mypy --config-file ../pyproject.toml guestbuild

imports: venv ## which package may know which
	$(BIN)/lint-imports

critest: go venv guest stage ## cri-tools' critest, with both sandboxers of containerd 2
	$(BIN)/python -m integration.critest --sandboxer podsandbox
	$(BIN)/python -m integration.critest --sandboxer shim

soak: go venv guest stage ## many pods, thousands of execs, and what is left of them (half an hour)
	$(BIN)/python -m integration.soak $(SOAK)

bench: go virtiofsd venv guest stage ## the tables of figures, beside runc's (long; wants a quiet host)
	$(BIN)/python -m integration.bench $(BENCH)
	for kind in cold template "template --ready-shims" cache; do \
	    $(BIN)/python -m integration.bench.density --kind $$kind || exit 1; done
	$(BIN)/python -m integration.bench.loss
	$(BIN)/python -m integration.bench.guests

proto: ## Python from the .proto files
	protoc -I. --python_out=. --pyi_out=. agent/api/*.proto shimv2/api/*.proto

docs: venv ## the generated parts of docs/
	$(BIN)/python -m shimv2.config.document markdown docs/configuration.md

clean: ## remove all that was built in the tree (not the cache outside of it)
	rm -rf build $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
