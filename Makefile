# usermilter: what one does with the sources. `make help` lists it.

PREFIX  ?= /usr/local
DESTDIR ?=
# rustup's place, if it is not (yet) on the path: tests/install-dependencies may be about to install it.
CARGO   ?= $(or $(shell command -v cargo),$(HOME)/.cargo/bin/cargo)

# What rustc builds for, which a sanitizer has to be told.
HOST     = $(shell rustc -vV | sed -n 's/^host: //p')
SECONDS ?= 30

BINARY  := $(or $(CARGO_TARGET_DIR),target)/release/usermilter

.PHONY: help build test demo bench fuzz sanitize fmt lint install clean

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

bench: ## measure every figure of docs/performance.md (as root); ARGS=--help shows how to choose
	tests/install-dependencies
	$(CARGO) bench --locked --bench figures -- $(ARGS)

fuzz: ## run every fuzz target for SECONDS=30 (needs a nightly toolchain)
	SECONDS_EACH=$(SECONDS) tests/fuzz/run

sanitize: ## run the tests of the only unsafe code with AddressSanitizer (needs a nightly toolchain)
	RUSTFLAGS=-Zsanitizer=address $(CARGO) +nightly test --locked --lib --target $(HOST) sys::

fmt: ## format the sources
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path tests/fuzz/Cargo.toml

lint: ## check format and lints, as CI does
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path tests/fuzz/Cargo.toml --check
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
