# What can be done here: `make help`. `make check` before every commit; `make test` is the whole.
#
# `deps`, `test`, `bench` and `quickstart` need root: `sudo make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PREFIX     ?= /usr/local
DESTDIR    ?=
BINDIR     := $(DESTDIR)$(PREFIX)/bin
UNITDIR    := $(DESTDIR)/etc/systemd/system
CONFDIR    := $(DESTDIR)/etc/holdfast

# sudo replaces PATH and HOME; the toolchain is still that of the user who called it.
USER_HOME  := $(shell getent passwd "$${SUDO_USER:-$$(id -un)}" | cut -d: -f6)
ifneq ($(SUDO_USER),)
ifneq ($(wildcard $(USER_HOME)/.cargo/bin/cargo),)
export CARGO_HOME  ?= $(USER_HOME)/.cargo
export RUSTUP_HOME ?= $(USER_HOME)/.rustup
endif
endif
export PATH := $(PATH):$(USER_HOME)/.cargo/bin:/usr/local/cargo/bin
CARGO      ?= cargo

TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
# Static and not relocated: one shim runs for each pod, and relocations are dirty pages.
TRIPLE     := $(shell uname -m)-unknown-linux-gnu
SHIM       := containerd-shim-holdfast-v2
SHIM_FLAGS := -C target-feature=+crt-static -C relocation-model=static
SHIM_BUILD := --target $(TRIPLE) -p holdfast-cmd --no-default-features --features shim --bin $(SHIM)

# Binaries for the integration tests: a debug build, so that a fresh clone is tested soon.
# `make test TEST_PROFILE=release` tests what is shipped.
TEST_PROFILE ?= dev
ifeq ($(TEST_PROFILE),release)
TEST_OUT     := release
SHIM_PROFILE := shim
SHIM_OUT     := shim
TEST_FEATURES :=
else
TEST_OUT     := debug
SHIM_PROFILE := dev
SHIM_OUT     := debug
# Crash points exist in such builds alone.
TEST_FEATURES := --features holdfast-cmd/failpoints
SHIM_TEST_FEATURES := --features holdfast-cmd/failpoints
endif
TEST_BIN   := $(TARGET_DIR)/test-bin
# The release before this one: its sources and its programs. What it is built of besides is ours.
PREVIOUS   := $(TARGET_DIR)/previous

# What Debian has of the things that are run: the OCI runtimes, the CNI plugins and what they call,
# a registry, the content of test images, and other shims and runtimes to test against. No service of
# theirs is started.
PACKAGES   := runc crun containernetworking-plugins iproute2 iptables nftables docker-registry \
              busybox-static e2fsprogs python3 ca-certificates gcc g++ libc6-dev containerd runsc
# What is measured beside, and nothing else needs.
BENCH_PACKAGES := conmon

##@ Building
.PHONY: build
build: ## release binaries: the daemon and the CLI, and the static shim
	$(CARGO) build --locked --release -p holdfast-cmd --bin holdfastd --bin holdfast
	RUSTFLAGS="$(SHIM_FLAGS)" $(CARGO) build --locked --profile shim $(SHIM_BUILD)
	@# Crash points are for the tests alone.
	@for file in release/holdfastd $(TRIPLE)/shim/$(SHIM); do \
	  if grep -q -a -e HOLDFAST_CRASH_DIR -e daemon.pod.intent-recorded -e shim.create.adopted $(TARGET_DIR)/$$file; then \
	    echo "$(TARGET_DIR)/$$file has crash points in it: it was built with the feature failpoints" >&2; exit 1; fi; done
	@ls -l $(TARGET_DIR)/release/holdfastd $(TARGET_DIR)/release/holdfast $(TARGET_DIR)/$(TRIPLE)/shim/$(SHIM)

.PHONY: install
install: ## copies what `make build` made to $(PREFIX), with the unit file and a default configuration
	@for file in release/holdfastd release/holdfast $(TRIPLE)/shim/$(SHIM); do \
	  [ -x $(TARGET_DIR)/$$file ] || { echo "$(TARGET_DIR)/$$file is missing: run 'make build' first" >&2; exit 1; }; \
	done
	install -D -m 0755 -t $(BINDIR) $(TARGET_DIR)/release/holdfastd $(TARGET_DIR)/release/holdfast $(TARGET_DIR)/$(TRIPLE)/shim/$(SHIM)
	@# Each is installed when it is there; a configuration that is there already is the administrator's.
	@if [ -e deploy/holdfast.service ]; then \
	  install -d $(UNITDIR) && sed 's#/usr/local/bin#$(PREFIX)/bin#g' deploy/holdfast.service > $(UNITDIR)/holdfast.service; fi
	@if [ -e deploy/config.toml ] && [ ! -e $(CONFDIR)/config.toml ]; then \
	  install -D -m 0644 deploy/config.toml $(CONFDIR)/config.toml; fi

.PHONY: clean
clean: ## removes what was built
	$(CARGO) clean

##@ Testing
.PHONY: deps
deps: ## installs the Debian packages that building and running need, if any is missing (root)
	@missing=(); for package in $(PACKAGES); do \
	  [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed ] || missing+=($$package); done; \
	if [ $${#missing[@]} -eq 0 ]; then echo "deps: all packages are here"; exit 0; fi; \
	if [ "$$(id -u)" -ne 0 ]; then echo "deps: missing $${missing[*]}: run 'sudo make deps'" >&2; exit 1; fi; \
	echo "deps: installing $${missing[*]}"; \
	export DEBIAN_FRONTEND=noninteractive; \
	if [ ! -e /usr/sbin/policy-rc.d ]; then \
	  trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
	  printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; fi; \
	apt-get update -q && apt-get install -q -y --no-install-recommends "$${missing[@]}"

.PHONY: check
check: lint unit ## formatting, lints, documentation and unit tests; no root

.PHONY: lint
lint:
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

.PHONY: unit
unit:
	$(CARGO) test --locked --workspace --exclude holdfast-integration
	$(CARGO) test --locked -p holdfast-integration --lib

.PHONY: test-bins
test-bins: ## the binaries that the integration tests run, gathered in target/test-bin
	$(CARGO) build --locked $(if $(filter release,$(TEST_PROFILE)),--release) --workspace --bins $(TEST_FEATURES)
	$(CARGO) build --locked $(if $(filter release,$(TEST_PROFILE)),--release) -p holdfast-shim --example orchestrator
	RUSTFLAGS="$(SHIM_FLAGS)" $(CARGO) build --locked --profile $(SHIM_PROFILE) $(SHIM_BUILD) $(SHIM_TEST_FEATURES)
	@mkdir -p $(TEST_BIN)
	@# Links are replaced in one step: tests may be starting from here.
	@for file in $(TEST_OUT)/holdfastd $(TEST_OUT)/holdfast $(TEST_OUT)/holdfast-testimage \
	             $(TEST_OUT)/holdfast-testshim-old $(TEST_OUT)/holdfast-testshim-new \
	             $(TEST_OUT)/examples/orchestrator $(TRIPLE)/$(SHIM_OUT)/$(SHIM); do \
	  ln -sfT $(TARGET_DIR)/$$file $(TEST_BIN)/$$(basename $$file); done

.PHONY: previous
previous: ## the daemon and the shim of integration/previous-release, for the tests of version skew
	@commit=$$(sed -n '/^[^#]/{p;q;}' integration/previous-release); to=$(TEST_BIN)/previous; \
	mkdir -p $$to $(PREVIOUS); \
	if [ "$$(cat $(PREVIOUS)/built 2>/dev/null)" != "$$commit" ]; then \
	  git=(git -c safe.directory='*'); \
	  if ! "$${git[@]}" cat-file -e "$$commit^{commit}" 2>/dev/null; then \
	    rm -f $$to/holdfastd $$to/holdfast $$to/$(SHIM); \
	    echo "this clone does not have commit $$commit, the release before: 'git fetch --unshallow' brings it" > $$to/missing; \
	    exit 0; fi; \
	  rm -rf $(PREVIOUS)/built $(PREVIOUS)/src; mkdir $(PREVIOUS)/src; \
	  : as new files, for cargo goes by their times; \
	  "$${git[@]}" archive "$$commit" | tar -x -m -C $(PREVIOUS)/src; \
	  : what both are made of is built once, what is built at the end lies apart; \
	  export CARGO_BUILD_BUILD_DIR=$(TARGET_DIR) CARGO_TARGET_DIR=$(PREVIOUS)/out; cd $(PREVIOUS)/src; \
	  $(CARGO) build --locked --workspace --bin holdfastd --bin holdfast; \
	  RUSTFLAGS="$(SHIM_FLAGS)" $(CARGO) build --locked $(SHIM_BUILD); \
	  echo $$commit > $(PREVIOUS)/built; fi; \
	for file in debug/holdfastd debug/holdfast $(TRIPLE)/debug/$(SHIM); do \
	  ln -sfT $(PREVIOUS)/out/$$file $$to/$$(basename $$file); done; \
	rm -f $$to/missing

.PHONY: test
test: root deps lint test-bins previous ## everything: lints, unit tests and the tests with real runtimes (root)
	@$(give_back); export HOLDFAST_BIN_DIR=$(TEST_BIN); status=0; \
	rm -f $(addprefix $(TEST_BIN)/,conformance.md gvisor-kvm-missing output); \
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
	  { $(CARGO) test --locked --workspace --doc $(TEST_FEATURES) && \
	    $(CARGO) nextest run --locked --workspace --no-fail-fast $(TEST_FEATURES) $(TESTS) 2>&1 | tee $(TEST_BIN)/output; } || status=$$?; \
	else \
	  $(CARGO) test --locked --workspace --no-fail-fast $(TEST_FEATURES) $(if $(TESTS),-- $(TESTS)) || status=$$?; \
	fi; \
	if [ -e $(TEST_BIN)/conformance.md ]; then echo; cat $(TEST_BIN)/conformance.md; fi; \
	$(say_what_was_not_run); \
	: the end is what the runner sums up; \
	if [ -e $(TEST_BIN)/output ]; then echo; sed -n '/Summary.* \[/,$$p' $(TEST_BIN)/output; fi; exit $$status

# Seconds that a storm lasts; crash points, exits and OOM kills are at full size too.
SOAK  ?= 600
SOAKS ?= binary(crash_points) | binary(exits) | binary(exhaustion) | binary(stuck) | binary(restart) | binary(faults) | binary(shims) | binary(skew)

SOAK_RUN    = HOLDFAST_SOAK=$(SOAK) $(CARGO) nextest run --locked --profile soak --no-fail-fast -p holdfast-integration
# Of what is shipped: storms need no crash points, and a debug build spends most of 300 ms on its start.
SOAK_STORMS = HOLDFAST_BIN_DIR=$(TARGET_DIR)/bench-bin $(SOAK_RUN) -E 'binary(storm)'

.PHONY: soak
soak: root deps test-bins previous release-bins ## the tests of survival at full size, an hour or more (root); docs/reliability.md
	@$(give_back); status=0; HOLDFAST_BIN_DIR=$(TEST_BIN) $(SOAK_RUN) -E '$(SOAKS)' || status=$$?; \
	$(SOAK_STORMS) || status=$$?; \
	$(say_what_was_not_run); exit $$status

.PHONY: soak-storms
soak-storms: root deps release-bins
	@$(give_back); $(SOAK_STORMS)

.PHONY: power-cuts
power-cuts: root deps ## cuts the power 200 times while images are pulled (root); CUTS=n for another number
	@$(give_back); HOLDFAST_POWER_CUTS=$(or $(CUTS),200) $(CARGO) test --locked -p holdfast-integration --test power -- --nocapture

# libFuzzer needs to see which code is run. The compiler that builds everything else can tell it that: no
# cargo-fuzz, and no nightly compiler.
FUZZ_SECONDS ?= 120
FUZZ         ?= layer_tar layer_unpack nri_frames spdy_frames websocket_messages
FUZZ_FLAGS   := --cfg fuzzing -C debug-assertions -C overflow-checks -C codegen-units=1 -C passes=sancov-module \
                $(addprefix -C llvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters pc-table trace-compares)

.PHONY: fuzz
fuzz: root deps ## bytes of strangers, FUZZ_SECONDS=n for each target; FUZZ=name for one (root)
	@cd fuzz; triple=$$(rustc -vV | sed -n 's/^host: //p'); out=$(TARGET_DIR)/fuzz; \
	RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build --locked --release --target $$triple --target-dir $$out; \
	./seeds.sh $$out/seeds; scratch=$$(mktemp -d -p /dev/shm); \
	trap 'rm -rf '$$scratch'; [ -z "$${SUDO_UID:-}" ] || chown -R "$$SUDO_UID:$${SUDO_GID:-$$SUDO_UID}" $(TARGET_DIR)' EXIT; \
	for target in $(FUZZ); do \
	  mkdir -p $$out/corpus/$$target; seeds=; case $$target in layer_*) seeds=$$out/seeds;; esac; \
	  echo "fuzz: $$target, $(FUZZ_SECONDS) s; what it finds goes to $$out/found-*"; \
	  TMPDIR=$$scratch $$out/$$triple/release/$$target -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -timeout=10 \
	    -rss_limit_mb=1024 -print_final_stats=1 -print_funcs=0 -verbosity=0 -artifact_prefix=$$out/found-$$target- $$out/corpus/$$target $$seeds; done

# What is shipped, gathered as the tests' programs are, and what measures it.
.PHONY: release-bins
release-bins: build
	$(CARGO) build --locked --release -p holdfast-integration --bins
	@mkdir -p $(TARGET_DIR)/bench-bin; \
	for file in release/holdfastd release/holdfast $(TRIPLE)/shim/$(SHIM); do \
	  ln -sfT $(TARGET_DIR)/$$file $(TARGET_DIR)/bench-bin/$$(basename $$file); done

.PHONY: bench
bench: PACKAGES += $(BENCH_PACKAGES)
bench: root deps release-bins ## measures against the bare runtimes, and containerd where it is installed (root)
	@$(give_back); HOLDFAST_BIN_DIR=$(TARGET_DIR)/bench-bin $(TARGET_DIR)/release/holdfast-bench --json $(TARGET_DIR)/bench.json $(BENCH)

##@ Trying it
.PHONY: quickstart
quickstart: root deps build ## a daemon, an image, a pod; then the daemon is killed and the pod is not (root)
	@$(give_back); HOLDFAST_BUILD=$(TARGET_DIR) deploy/quickstart.sh

.PHONY: quickstart-clean
quickstart-clean: root ## removes every trace of it (root)
	@HOLDFAST_BUILD=$(TARGET_DIR) deploy/quickstart.sh clean

##@ Other
.PHONY: help
help: ## this text
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } /^[a-z-]+:.*## / { printf "  make %-18s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: root
root:
	@[ "$$(id -u)" -eq 0 ] || { echo "this needs root: run it with sudo" >&2; exit 1; }

say_what_was_not_run = if [ -e $(TEST_BIN)/previous/missing ]; then \
	  printf '\n%s\n' "VERSION SKEW WAS NOT TESTED (integration/tests/skew.rs): $$(cat $(TEST_BIN)/previous/missing)"; fi; \
	if [ -e $(TEST_BIN)/gvisor-kvm-missing ]; then \
	  printf '\n%s\n' "GVISOR ON KVM WAS NOT TESTED (integration/tests/gvisor.rs): $$(cat $(TEST_BIN)/gvisor-kvm-missing)"; fi

# After a build by root on a user's behalf the target folder is the user's again.
give_back = if [ -n "$${SUDO_UID:-}" ]; then trap 'chown -R "$$SUDO_UID:$${SUDO_GID:-$$SUDO_UID}" $(TARGET_DIR)' EXIT; fi
