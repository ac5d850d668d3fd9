# `make quickstart` and `make test` do everything, on a fresh Debian 12 machine, too. `make` lists the targets.

MAKEFLAGS += --no-builtin-rules --no-print-directory
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# In the order given: deps come before what needs them, and Go builds in parallel by itself. Only `make test` runs
# targets side by side, when everything is built.
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
.DEFAULT_GOAL := help

PREFIX  ?= /usr/local
DESTDIR ?=
VERSION ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),unknown)
# How many packages `make test` tests at a time, of those that boot microVMs.
TESTFLAGS ?= -p 2
# A directory for the events of the tests as JSON, one file for each run of gotestsum.
TEST_EVENTS ?=
# How many inputs `make fuzz` gives to each target.
FUZZTIME ?= 50000x

# Any Go from 1.21 on will do: it fetches the toolchain that go.mod names. Without one, bin/tools/go is made.
GO := $(or $(shell daemon/setup/go.sh find),$(CURDIR)/bin/tools/go/bin/go)
GO_MADE := $(filter $(CURDIR)/bin/tools/go/bin/go,$(GO))
export PATH := $(CURDIR)/bin/tools:$(dir $(GO)):$(PATH)
export GOTOOLCHAIN ?= auto
# Static programs, and no compiler for C is needed. The race detector needs both: CGO_ENABLED=1.
export CGO_ENABLED ?= 0

# For every call of Go: with the same flags, builds, tests and tools share what is compiled already.
export GOFLAGS := $(strip $(filter-out -trimpath -buildvcs=false,$(GOFLAGS)) -trimpath -buildvcs=false)
GO_BUILD := $(GO) build
LDFLAGS  := -s -w -X main.version=$(VERSION)

# containerd's version is the module's; this names it in the program, too.
CONTAINERD         := github.com/containerd/containerd
CONTAINERD_VERSION  = $(patsubst v%,%,$(shell sed -n 's,^\t$(CONTAINERD) ,,p' go.mod))
CONTAINERD_FLAGS    = -tags no_cri,no_btrfs,no_devmapper,no_zfs,no_aufs \
	-ldflags '-s -w -X $(CONTAINERD)/version.Version=$(CONTAINERD_VERSION)'

# Tools of the checks, by exact version. They live in bin/tools.
BUF_VERSION        := 1.75.0
BUF_SHA256         := 98b19d4b2b46130e083157490c54dfdcb8ea771e53204d3c6a06a2b12edd0503
PROTOC_GEN_GO      := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
STATICCHECK        := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM          := gotest.tools/gotestsum@v1.13.0
# The ACME server that the tests fetch certificates from.
PEBBLE             := github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1

SOURCES  := go.mod go.sum $(shell find api client daemon \( -name testdata -o -path client/python -o -path client/typescript \) -prune -o \
	-type f -not -name '*_test.go' \( -name '*.go' -o -name '*.py' -o -name '*.js' -o -name '*.json' -o -path '*/completion/*' \) -print)
PROGRAMS := bin/msb bin/msbd bin/msb-agent bin/msb-portal bin/containerd bin/containerd-shim-kata-v2 bin/msb-virtiofsd
GUEST    := bin/guest/vmlinux bin/guest/initrd.img
IMAGES   := bin/images/python.tar bin/images/node.tar
MKGUEST  := $(wildcard daemon/cmd/msb-mkguest/*.go)
MKIMAGE  := $(wildcard daemon/cmd/msb-mkimage/*.go daemon/internal/backend/image/archive/*.go)

##@ Start

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: quickstart
quickstart: ## Set up everything, start the server, run Python in a first sandbox; again, it takes seconds
	@$(MAKE) deps build guest images
	@daemon/setup/quickstart.sh

.PHONY: clean-host
clean-host: ## Undo quickstart: server, sandboxes, state; with PACKAGES=1 what deps installed, too
	@daemon/setup/clean-host.sh $(if $(PACKAGES),--packages)

##@ Build

.PHONY: deps
deps: ## Install the Debian packages that are missing
	@daemon/setup/host-packages.sh bin/host-packages

.PHONY: build
build: $(PROGRAMS) ## Build all programs into bin/
	@:

.PHONY: guest
guest: $(GUEST) ## Build the guest's kernel and initramfs into bin/guest/
	@:

.PHONY: images
images: $(IMAGES) ## Build the images microsandbox/python and microsandbox/node into bin/images/
	@:

bin/msb: $(SOURCES) | $(GO_MADE)
	@echo "Building $@"
	@$(GO_BUILD) -ldflags '$(LDFLAGS)' -o $@ ./client/cmd/msb

bin/msbd bin/msb-agent bin/msb-portal: bin/%: $(SOURCES) | $(GO_MADE)
	@echo "Building $@"
	@$(GO_BUILD) -tags grpcnotrace -ldflags '$(LDFLAGS)' -o $@ ./daemon/cmd/$*

bin/msb-virtiofsd: daemon/setup/virtiofsd-c.sh
	@install -D $< $@

bin/containerd: go.mod go.sum | $(GO_MADE)
	@echo "Building $@ $(CONTAINERD_VERSION) from its module (about 1 minute)"
	@$(GO_BUILD) $(CONTAINERD_FLAGS) -o $@ $(CONTAINERD)/cmd/containerd

# Only `make bench` uses it. It does not compile with the newer modules that ours has, so it gets those that
# containerd names.
bin/ctr: go.mod | $(GO_MADE)
	@echo "Building $@ $(CONTAINERD_VERSION) from its module (about 1 minute)"
	@module=$$(mktemp -d); trap 'rm -rf "$$module"' EXIT; cd "$$module"; \
	$(GO) mod init ctr 2>/dev/null; $(GO) mod edit -require=$(CONTAINERD)@v$(CONTAINERD_VERSION); \
	GOFLAGS=-mod=mod $(GO_BUILD) $(CONTAINERD_FLAGS) -o $(CURDIR)/$@ $(CONTAINERD)/cmd/ctr

bin/containerd-shim-kata-v2: $(wildcard daemon/cmd/containerd-shim-kata-v2/*) | $(GO_MADE)
	@echo "Building $@ from Kata's module (about 1 minute)"
	@daemon/cmd/containerd-shim-kata-v2/build.sh $@
	@touch $@

# The metapackage names the newest kernel; `make -B bin/cache/kernel.deb` looks for a newer one.
bin/cache/kernel.deb:
	@echo "Downloading the guest's kernel, Debian's cloud kernel"
	@rm -rf $(@D)/deb; mkdir -p $(@D)/deb; apt-get update -qq; \
	package=$$(apt-cache depends linux-image-cloud-$$(dpkg --print-architecture) | sed -n 's/^ *Depends: //p'); \
	cd $(@D)/deb; apt-get download -qq -o APT::Sandbox::User=root "$$package"
	@mv $(@D)/deb/*.deb $@; rmdir $(@D)/deb; touch $@

$(GUEST) &: bin/cache/kernel.deb bin/msb-agent bin/msb-portal $(MKGUEST)
	@echo "Building bin/guest: kernel and initramfs"
	@$(GO) run ./daemon/cmd/msb-mkguest --kernel-deb bin/cache/kernel.deb --agent bin/msb-agent --portal bin/msb-portal --out bin/guest
	@touch $(GUEST)

$(IMAGES): bin/images/%.tar: $(MKIMAGE) | $(GO_MADE)
	@echo "Building the image microsandbox/$* from Debian packages (about 1 minute)"
	@$(GO) run ./daemon/cmd/msb-mkimage --out $@ $*

$(CURDIR)/bin/tools/go/bin/go:
	@daemon/setup/go.sh fetch $(CURDIR)/bin/tools/go

##@ Check

.PHONY: test
test: deps build guest images bin/tools/gotestsum bin/tools/pebble ## Run all tests, real microVMs included
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@$(MAKE) bin/lab/initrd.img
	@$(MAKE) SIDE_BY_SIDE=1 -j test-microvms test-race test-sdks

# gotestsum NAME RUNS the tests of packages and prints their names as they end.
gotestsum = gotestsum --format testname --format-hide-empty-pkg $(if $(TEST_EVENTS),--jsonfile $(TEST_EVENTS)/$(1).json)

# The packages where much happens at once are tested under the race detector alone, but for the store: where the
# detector would slow its child processes down, it tries a part of the cases (oneOf in its tests), so it is tested twice.
RACE_PACKAGES := ./client $(addprefix ./daemon/internal/,data/... domain/... serve/...)

.PHONY: test-microvms test-race test-sdks
test-microvms:
	@$(call gotestsum,microvms) -- -count=1 -timeout 30m $(TESTFLAGS) ./daemon/internal/data/store \
		$$($(GO) list ./... | grep -vxFf <($(GO) list $(RACE_PACKAGES)))

test-race:
	@CGO_ENABLED=1 $(call gotestsum,race) -- -race -count=1 -timeout 20m $(RACE_PACKAGES)

test-sdks:
	@echo "Python SDK"; client/python/check.sh unit
	@echo "TypeScript SDK"; client/typescript/check.sh unit

# What the tests need beyond the server: strace injects failing writes, e2fsprogs makes disks for guests, busybox and
# systemd are the lab's, Chromium is the hostile page's browser, a venv holds other projects' clients, and the race
# detector needs a C compiler.
TEST_PACKAGES := gcc libc6-dev:/usr/include/stdio.h strace e2fsprogs:mkfs.ext4 busybox-static:busybox systemd:/lib/systemd/systemd chromium python3-venv:/usr/lib/python3.11/ensurepip

.PHONY: test-kvm
test-kvm: deps build guest images bin/tools/gotestsum bin/tools/pebble ## Run the end-to-end tests on KVM, with each hypervisor; where there is no KVM, in an emulated host
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@$(MAKE) bin/lab/initrd.img
	@$(GO) test -c -o bin/lab/e2e.test ./daemon/e2e
	@$(call gotestsum,kvm) --raw-command -- setpriv --pdeathsig TERM daemon/setup/lab/e2e.sh '$(KVM_TESTS)'

# The tests of sandboxes, which take an hour where KVM is emulated, and those of them that CI has the time for.
KVM_TESTS ?= TestStatusNamesHypervisor|TestHypervisorChange|TestSandboxLifecycle|TestNode|TestTimeouts|TestSandboxConfiguration|TestSandboxesAreIsolated|TestSandboxHas|TestConcurrentSandboxes|TestStopWhile|TestGuestBootFailure|TestDaemonKill|TestProcessDeath|TestContainerdDeath|TestHungGuest|TestHostContainerd|TestShutdownAnswers|TestResourceLimits|TestLeaksFinds|TestKillsUnderSandboxChurn|TestInvalidatedKeysCancelRuns
KVM_TESTS_CI := TestStatusNamesHypervisor|TestSandboxLifecycle|TestSandboxHas|TestDaemonKillKeepsSandboxes

.PHONY: test-kvm-ci
test-kvm-ci: ## Run a part of them, in minutes
	@$(MAKE) test-kvm KVM_TESTS='$(KVM_TESTS_CI)' LAB_TIMEOUT=840

# What that host runs, beside the guest's kernel.
bin/lab/initrd.img: bin/cache/kernel.deb $(addprefix daemon/setup/lab/,build.sh init)
	@echo "Building bin/lab: an emulated host with KVM"
	@$(GO) build -o $(@D)/tsc ./daemon/setup/lab/tsc
	@daemon/setup/lab/build.sh $< $(@D)

.PHONY: race
race: deps bin/tools/gotestsum bin/tools/pebble ## Run the part of the tests that runs under the race detector
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@$(MAKE) test-race

.PHONY: soak
soak: deps build guest images bin/tools/pebble ## Run the reliability tests at their full counts: hours
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@MSB_SOAK=1 $(GO) test -count=1 -timeout 24h -v $(TESTFLAGS) $(addprefix ./daemon/internal/,domain/keys data/store serve/http guest/agent)
	@MSB_SOAK=1 CGO_ENABLED=1 $(GO) test -race -count=1 -timeout 24h -v -run '^TestConcurrentUseAgreesWithAModel$$' ./daemon/internal/domain/keys
	@MSB_SOAK=1 $(GO) test -count=1 -timeout 24h -v -run '^TestKills' ./daemon/e2e

.PHONY: lint
lint: bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc bin/tools/staticcheck ## Check format, vet, staticcheck, types, contracts; that generated code is fresh
	@echo "gofmt"; unformatted=$$($(GO)fmt -l api client daemon); test -z "$$unformatted" || { echo "run gofmt -w on:" $$unformatted; exit 1; }
	@echo "go vet"; $(GO) vet ./...
	@echo "staticcheck"; staticcheck ./...
	@echo "buf lint"; buf lint
	@echo "Python SDK: ruff, mypy"; client/python/check.sh lint
	@echo "TypeScript SDK: prettier, tsc"; client/typescript/check.sh lint
	@daemon/setup/generated.sh check

.PHONY: generate
generate: bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc ## Write api/ from proto/
	@daemon/setup/generated.sh write

.PHONY: fuzz
fuzz: | $(GO_MADE) ## Run each fuzz target for FUZZTIME (50000x: that many inputs)
	@daemon/setup/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: build guest images bin/ctr ## Measure each figure beside its peer (needs runc and zstd)
	@daemon/setup/host-packages.sh bin/host-packages "to measure" runc zstd
	@$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./daemon/e2e
	@$(GO) test -run '^$$' -bench . -timeout 60m ./daemon/internal/domain/keys ./daemon/internal/data/store ./daemon/internal/serve/http ./daemon/internal/serve/mcp ./daemon/cmd/msb-portal

# Building buf takes as long as building everything else, so its makers' program for npm is used.
bin/tools/buf: Makefile
	@echo "Downloading $@ ($(BUF_VERSION)) from npm"
	@mkdir -p $(@D); archive=$$(mktemp); trap 'rm -f "$$archive"' EXIT; \
	curl -sSfL --retry 3 -o "$$archive" https://registry.npmjs.org/@bufbuild/buf-linux-x64/-/buf-linux-x64-$(BUF_VERSION).tgz; \
	echo "$(BUF_SHA256)  $$archive" | sha256sum --check --quiet; \
	tar -xzf "$$archive" -C $(@D) --strip-components 2 --no-same-owner package/bin/buf
	@touch $@

# A tool is built again when its version changes here.
define tool
bin/tools/$(1): Makefile | $(GO_MADE)
	@echo "Building $$@ ($(lastword $(subst @, ,$(2))))"
	@GOBIN=$(CURDIR)/bin/tools $(GO) install $(2)
	@touch $$@
endef
$(eval $(call tool,protoc-gen-go,$(PROTOC_GEN_GO)))
$(eval $(call tool,protoc-gen-go-grpc,$(PROTOC_GEN_GO_GRPC)))
$(eval $(call tool,staticcheck,$(STATICCHECK)))
$(eval $(call tool,gotestsum,$(GOTESTSUM)))
$(eval $(call tool,pebble,$(PEBBLE)))

##@ Install

LIBEXEC := $(DESTDIR)$(PREFIX)/libexec/msb
UNITS   := $(DESTDIR)/etc/systemd/system
SHARE   := $(DESTDIR)$(PREFIX)/share
MAN     := $(SHARE)/man/man1
BASH    := $(SHARE)/bash-completion/completions
ZSH     := $(SHARE)/zsh/site-functions
FISH    := $(SHARE)/fish/vendor_completions.d

.PHONY: install
install: ## Install what was built below PREFIX (/usr/local), the systemd unit, man page and completions
	@for file in $(PROGRAMS) $(GUEST) $(IMAGES); do test -e $$file || { echo "$$file is missing: make build guest images"; exit 1; }; done
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/msb bin/msbd
	install -D -t $(LIBEXEC) bin/containerd bin/containerd-shim-kata-v2 bin/msb-portal bin/msb-virtiofsd
	install -D -m 0644 -t $(LIBEXEC)/guest $(GUEST)
	install -D -m 0644 -t $(LIBEXEC)/images $(IMAGES)
	install -d $(UNITS) $(MAN) $(BASH) $(ZSH) $(FISH)
	env -i bin/msb man >$(MAN)/msb.1
	bin/msb completion bash >$(BASH)/msb
	bin/msb completion zsh >$(ZSH)/_msb
	bin/msb completion fish >$(FISH)/msb.fish
	sed 's,@PREFIX@,$(PREFIX),' daemon/setup/msbd.service >$(UNITS)/msbd.service
	install -m 0644 -t $(UNITS) daemon/setup/msbd.socket

.PHONY: uninstall
uninstall: ## Remove what install put there; state below /var/lib/msb stays
	rm -f $(DESTDIR)$(PREFIX)/bin/msb $(DESTDIR)$(PREFIX)/bin/msbd $(addprefix $(UNITS)/msbd.,service socket)
	rm -f $(MAN)/msb.1 $(BASH)/msb $(ZSH)/_msb $(FISH)/msb.fish
	rm -rf $(LIBEXEC)

.PHONY: clean
clean: ## Remove what was built, but for the record of installed packages
	@if [ -S /run/msb/msbd.sock ]; then echo "A server may be running from bin/: make clean-host first, if it is yours."; fi
	rm -rf $(PROGRAMS) bin/guest bin/images bin/lab bin/cache bin/tools
