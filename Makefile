# Husk: build, try, test, install. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
GUEST_TRIPLE := x86_64-unknown-linux-gnu
DIST := $(CURDIR)/target/dist
# Version of containerd that `make run` and `make test` use in the testbed.
CONTAINERD ?= 1.7

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: deps
deps: ## Install what building and testing need (Debian 12 or 13, root or sudo)
	@tests/testbed/deps

.PHONY: dist
dist: deps host guest kernel ## Build everything that gets installed, into target/dist

.PHONY: host
host:
	@$(CARGO) build --locked --release -p husk-vmm -p husk-cli -p containerd-shim-husk-v2
	@install -D -t $(DIST)/bin $(TARGET)/release/husk $(TARGET)/release/containerd-shim-husk-v2
	@install -D -t $(DIST)/libexec/husk $(TARGET)/release/husk-vmm

.PHONY: guest
guest:
	@RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --profile guest \
		--target $(GUEST_TRIPLE) -p husk-agent -p husk-fscheck
	@mkdir -p $(DIST)/share/husk
	@agent/mkinitrd $(TARGET)/$(GUEST_TRIPLE)/guest/husk-agent $(DIST)/share/husk/initrd.img

.PHONY: kernel
kernel:
	@mkdir -p $(DIST)/share/husk
	@vmlinux=$$(guest-kernel-config/build); \
		cmp -s "$$vmlinux" $(DIST)/share/husk/vmlinux || cp "$$vmlinux" $(DIST)/share/husk/vmlinux

.PHONY: install
install: ## Copy target/dist to DESTDIR/PREFIX (default /usr/local)
	@test -e $(DIST)/share/husk/vmlinux || { echo "install: run 'make dist' first" >&2; exit 1; }
	@install -D -t $(DESTDIR)$(PREFIX)/bin $(DIST)/bin/*
	@install -D -t $(DESTDIR)$(PREFIX)/libexec/husk $(DIST)/libexec/husk/*
	@install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/husk $(DIST)/share/husk/*

.PHONY: run
run: dist ## Run a container in its own virtual machine, through containerd
	@tests/testbed/demo --containerd $(CONTAINERD)

.PHONY: check
check: deps ## Format, lints, docs, unit tests, dependency rules: no KVM needed
	@tests/tools/check

.PHONY: test
test: check dist ## Everything: make check, then guests and containerd in the testbed; FULL=1 for hours of it
	@tests/tools/test

.PHONY: test-pods
test-pods: dist ## The scenarios of pods alone, through CRI, on containerd 1.7 and 2.1
	@VERSIONS="1.7 2.1" OTHERS=whole tests/tools/test --only pods_

.PHONY: scenario-table
scenario-table: ## Put the table of the last make test into the README
	@tests/tools/scenario-table

.PHONY: bench
bench: dist ## Measure Husk beside runc and gVisor, into target/bench; QUICK=1, JSON=1
	@tests/bench/run $(if $(QUICK),--quick) $(if $(JSON),--json)

.PHONY: bench-compare
bench-compare: ## What changed from one report to another: OLD=a.json NEW=b.json
	@test -n "$(OLD)" && test -n "$(NEW)" || { echo "usage: make bench-compare OLD=a.json NEW=b.json" >&2; exit 2; }
	@$(CARGO) run --quiet --locked --release -p husk-bench -- compare "$(OLD)" "$(NEW)"

.PHONY: testbed-shell
testbed-shell: dist ## A root prompt in the testbed, Husk installed
	@tests/testbed/shell --containerd $(CONTAINERD)
