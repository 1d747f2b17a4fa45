# usermilter: what one does with the sources. `make help` lists it.

PREFIX  ?= /usr/local
DESTDIR ?=
# rustup's place, if it is not (yet) on the path: tests/install-dependencies may be about to install it.
CARGO   ?= $(or $(shell command -v cargo),$(HOME)/.cargo/bin/cargo)

# What rustc builds for, which a sanitizer has to be told.
HOST     = $(shell rustc -vV | sed -n 's/^host: //p')
SECONDS ?= 30

BUILT   := $(or $(CARGO_TARGET_DIR),target)/release
BINARY  := $(BUILT)/usermilter
COMPLETIONS := $(BUILT)/completions
TO      := $(DESTDIR)$(PREFIX)

.PHONY: help build test demo chaos load bench fuzz sanitize fmt lint audit completions install uninstall deb clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build the release binary
	$(CARGO) build --release --locked

test: ## run every test (as root: they start servers and run programs as several users)
	tests/install-dependencies packaging
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

audit: ## check licences, sources, duplicates and, online, known holes of the dependencies (deny.toml)
	tests/install-dependencies audit
	$(CARGO) deny --locked check licenses bans sources
	@if timeout 30 git ls-remote --quiet https://github.com/RustSec/advisory-db HEAD >/dev/null 2>&1; then \
	    $(CARGO) deny --locked check advisories && \
	    { $(CARGO) audit --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-audit; } && $(CARGO) audit; \
	else \
	    echo "NOT CHECKED: known holes, since the advisory database cannot be reached" >&2; \
	fi

completions: $(BINARY) # into the build directory, for `install` and `deb`
	@mkdir -p $(COMPLETIONS)
	$(BINARY) completions bash > $(COMPLETIONS)/usermilter
	$(BINARY) completions zsh > $(COMPLETIONS)/_usermilter
	$(BINARY) completions fish > $(COMPLETIONS)/usermilter.fish

$(BINARY):
	$(MAKE) build

install: completions ## install to $(DESTDIR)$(PREFIX), building first if need be
	install -D -m 0755 $(BINARY) $(TO)/bin/usermilter
	@for page in docs/man/*.[1-8]; do \
	    install -v -D -m 0644 "$$page" "$(TO)/share/man/man$${page##*.}/$${page##*/}" || exit 1; \
	done
	install -D -m 0644 $(COMPLETIONS)/usermilter $(TO)/share/bash-completion/completions/usermilter
	install -D -m 0644 $(COMPLETIONS)/_usermilter $(TO)/share/zsh/site-functions/_usermilter
	install -D -m 0644 $(COMPLETIONS)/usermilter.fish $(TO)/share/fish/vendor_completions.d/usermilter.fish
	install -D -m 0644 packaging/usermilter.toml $(TO)/share/doc/usermilter/examples/usermilter.toml
	@for file in postfix/* sendmail/* ldap/*; do \
	    install -v -D -m 0644 "$$file" "$(TO)/share/doc/usermilter/examples/$$file" || exit 1; \
	done
	@for unit in packaging/systemd/*; do \
	    install -d $(TO)/lib/systemd/system && \
	    sed 's|/usr/bin/usermilter|$(PREFIX)/bin/usermilter|' "$$unit" > "$(TO)/lib/systemd/system/$${unit##*/}" || exit 1; \
	done
	install -D -m 0644 packaging/sysusers.d/usermilter.conf $(TO)/lib/sysusers.d/usermilter.conf
	install -D -m 0644 packaging/tmpfiles.d/usermilter.conf $(TO)/lib/tmpfiles.d/usermilter.conf

uninstall: ## remove from $(DESTDIR)$(PREFIX) what `install` has put there
	rm -f $(TO)/bin/usermilter $(foreach page,$(wildcard docs/man/*.[1-8]),$(TO)/share/man/man$(subst .,,$(suffix $(page)))/$(notdir $(page)))
	rm -f $(TO)/share/bash-completion/completions/usermilter $(TO)/share/zsh/site-functions/_usermilter
	rm -f $(TO)/share/fish/vendor_completions.d/usermilter.fish
	rm -f $(addprefix $(TO)/lib/systemd/system/,$(notdir $(wildcard packaging/systemd/*)))
	rm -f $(TO)/lib/sysusers.d/usermilter.conf $(TO)/lib/tmpfiles.d/usermilter.conf
	rm -rf $(TO)/share/doc/usermilter

deb: build completions ## build a Debian package, target/debian/usermilter_*.deb (needs cargo-deb)
	$(CARGO) deb --no-build --locked $(if $(DEBEMAIL),--maintainer "$(DEBFULLNAME) <$(DEBEMAIL)>")

clean: ## remove what was built
	$(CARGO) clean
