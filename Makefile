# usermilter: what one does with the sources. `make help` lists it.

PREFIX  ?= /usr/local
DESTDIR ?=
# rustup's place, if it is not (yet) on the path: tests/install-dependencies may be about to install it.
CARGO   ?= $(or $(shell command -v cargo),$(HOME)/.cargo/bin/cargo)

BINARY  := $(or $(CARGO_TARGET_DIR),target)/release/usermilter

.PHONY: help build test demo chaos load bench fmt lint install clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build the release binary
	$(CARGO) build --release --locked

test: ## run every test (as root: they start servers and run programs as several users)
	tests/install-dependencies
	$(CARGO) test --locked
	KEEP= $(CARGO) test --locked --test demo

demo: ## show real SMTP dialogues with a private Postfix (as root); KEEP=1 leaves it running
	tests/install-dependencies
	$(CARGO) test --quiet --release --locked --test demo

chaos: ## break everything under load, for a quarter of an hour (as root), and count the mail; ARGS= chooses scenarios
	tests/install-dependencies
	CHAOS=long $(CARGO) test --quiet --release --locked --test chaos -- $(ARGS)

load: ## keep thousands of connections busy for ten minutes (as root), and see what grows
	tests/install-dependencies
	LOAD=long $(CARGO) test --quiet --release --locked --test load -- --nocapture $(ARGS)

bench: ## measure every figure of docs/performance.md (as root); ARGS=--help shows how to choose
	tests/install-dependencies
	$(CARGO) bench --locked --bench figures -- $(ARGS)

fmt: ## format the sources
	$(CARGO) fmt --all

lint: ## check format and lints, as CI does
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --test demo -- -D warnings

install: ## install to $(DESTDIR)$(PREFIX), building first if need be
	@test -x $(BINARY) || $(MAKE) build
	install -D -m 0755 $(BINARY) $(DESTDIR)$(PREFIX)/bin/usermilter
	@for page in docs/man/*.[1-8]; do \
	    test -f "$$page" || continue; \
	    install -v -D -m 0644 "$$page" "$(DESTDIR)$(PREFIX)/share/man/man$${page##*.}/$${page##*/}"; \
	done

clean: ## remove what was built
	$(CARGO) clean
