# `make quickstart` and `make test` do everything, on a fresh Debian 12 machine, too. `make` lists the targets.

MAKEFLAGS += --no-builtin-rules --no-print-directory
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# In the order given: deps come before what needs them, and Go builds in parallel by itself.
.NOTPARALLEL:
.DEFAULT_GOAL := help

PREFIX  ?= /usr/local
DESTDIR ?=
VERSION ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),unknown)
# One package at a time: several boot microVMs, which would slow each other past their limits.
TESTFLAGS ?= -p 1
# How long `make fuzz` spends on each target.
FUZZTIME ?= 10s

# Any Go from 1.21 on will do: it fetches the toolchain that go.mod names. Without one, bin/tools/go is made.
GO := $(or $(shell daemon/setup/go.sh find),$(CURDIR)/bin/tools/go/bin/go)
GO_MADE := $(filter $(CURDIR)/bin/tools/go/bin/go,$(GO))
export PATH := $(CURDIR)/bin/tools:$(dir $(GO)):$(PATH)
export GOTOOLCHAIN ?= auto
# Static programs, and no compiler for C is needed. The race detector needs both: CGO_ENABLED=1.
export CGO_ENABLED ?= 0

GO_BUILD := $(GO) build -trimpath -buildvcs=false
LDFLAGS  := -s -w -X main.version=$(VERSION)

# containerd's version is the module's; this names it in the program, too.
CONTAINERD         := github.com/containerd/containerd
CONTAINERD_VERSION  = $(patsubst v%,%,$(shell sed -n 's,^\t$(CONTAINERD) ,,p' go.mod))
CONTAINERD_FLAGS    = -tags no_cri,no_btrfs,no_devmapper,no_zfs,no_aufs \
	-ldflags '-s -w -X $(CONTAINERD)/version.Version=$(CONTAINERD_VERSION)'

# Tools of the checks, by exact version. They live in bin/tools.
BUF                := github.com/bufbuild/buf/cmd/buf@v1.75.0
PROTOC_GEN_GO      := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
STATICCHECK        := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM          := gotest.tools/gotestsum@v1.13.0

SOURCES  := go.mod go.sum $(shell find api client daemon -type f -not -name '*_test.go' \( -name '*.go' -o -name '*.py' -o -name '*.js' -o -name '*.json' \))
PROGRAMS := bin/msb bin/msbd bin/msb-agent bin/msb-portal bin/containerd bin/containerd-shim-kata-v2
GUEST    := bin/guest/vmlinux bin/guest/initrd.img
IMAGES   := bin/images/python.tar bin/images/node.tar
MKGUEST  := $(wildcard daemon/cmd/msb-mkguest/*.go)
MKIMAGE  := $(wildcard daemon/cmd/msb-mkimage/*.go daemon/internal/image/archive/*.go)

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
test: deps build guest images bin/tools/gotestsum ## Run all tests, real microVMs included
	@gotestsum --format testname --format-hide-empty-pkg -- -count=1 -timeout 30m $(TESTFLAGS) ./...

.PHONY: lint
lint: bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc bin/tools/staticcheck ## Check format, vet, staticcheck, contracts; that generated code is fresh
	@echo "gofmt"; unformatted=$$($(GO)fmt -l api client daemon); test -z "$$unformatted" || { echo "run gofmt -w on:" $$unformatted; exit 1; }
	@echo "go vet"; $(GO) vet ./...
	@echo "staticcheck"; staticcheck ./...
	@echo "buf lint"; buf lint
	@daemon/setup/generated.sh check

.PHONY: generate
generate: bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc ## Write api/ from proto/
	@daemon/setup/generated.sh write

.PHONY: fuzz
fuzz: | $(GO_MADE) ## Run each fuzz target for FUZZTIME (10s)
	@daemon/setup/fuzz.sh $(FUZZTIME)

.PHONY: bench
bench: build guest images bin/ctr ## Measure each figure beside its peer (needs runc and zstd)
	@daemon/setup/host-packages.sh bin/host-packages runc zstd
	@$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m ./daemon/e2e
	@$(GO) test -run '^$$' -bench . -timeout 60m ./daemon/internal/token ./daemon/internal/store ./daemon/internal/gateway ./daemon/cmd/msb-portal

# Each tool's file is made anew when its version changes here.
define tool
bin/tools/$(1): Makefile | $(GO_MADE)
	@echo "Building $$@ ($(lastword $(subst @, ,$(2))))"
	@GOBIN=$(CURDIR)/bin/tools $(GO) install $(2)
	@touch $$@
endef
$(eval $(call tool,buf,$(BUF)))
$(eval $(call tool,protoc-gen-go,$(PROTOC_GEN_GO)))
$(eval $(call tool,protoc-gen-go-grpc,$(PROTOC_GEN_GO_GRPC)))
$(eval $(call tool,staticcheck,$(STATICCHECK)))
$(eval $(call tool,gotestsum,$(GOTESTSUM)))

##@ Install

LIBEXEC := $(DESTDIR)$(PREFIX)/libexec/msb
UNITS   := $(DESTDIR)/etc/systemd/system

.PHONY: install
install: ## Install what was built below PREFIX (/usr/local) and the systemd unit
	@for file in $(PROGRAMS) $(GUEST) $(IMAGES); do test -e $$file || { echo "$$file is missing: make build guest images"; exit 1; }; done
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/msb bin/msbd
	install -D -t $(LIBEXEC) bin/containerd bin/containerd-shim-kata-v2
	install -D -m 0644 -t $(LIBEXEC)/guest $(GUEST)
	install -D -m 0644 -t $(LIBEXEC)/images $(IMAGES)
	install -d $(UNITS)
	sed 's,@PREFIX@,$(PREFIX),' daemon/setup/msbd.service >$(UNITS)/msbd.service

.PHONY: uninstall
uninstall: ## Remove what install put there; state below /var/lib/msb stays
	rm -f $(DESTDIR)$(PREFIX)/bin/msb $(DESTDIR)$(PREFIX)/bin/msbd $(UNITS)/msbd.service
	rm -rf $(LIBEXEC)

.PHONY: clean
clean: ## Remove what was built, but for the record of installed packages
	@if [ -S /run/msb/msbd.sock ]; then echo "A server may be running from bin/: make clean-host first, if it is yours."; fi
	rm -rf $(PROGRAMS) bin/guest bin/images bin/cache bin/tools
