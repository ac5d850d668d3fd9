# `make quickstart` and `make test` do all set-up themselves, also on a fresh Debian 12 machine. `make` lists the targets.

MAKEFLAGS += --no-builtin-rules --no-print-directory
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Targets are made one after the other: deps come before the targets that need them, and Go builds in parallel by
# itself. Only `make test` runs targets in parallel, once everything is built.
ifndef IN_PARALLEL
.NOTPARALLEL:
endif
.DEFAULT_GOAL := help

PREFIX  ?= /usr/local
DESTDIR ?=
# The commit that is built; the number of the version is in api/version.
COMMIT  ?= $(shell git describe --always --dirty --exclude '*' --abbrev=12 2>/dev/null)
# How many packages `make soak` tests at a time.
TESTFLAGS ?= -p 2
# If set, a directory to which each run of gotestsum writes the test events as a JSON file.
TEST_EVENTS ?=
# The number of inputs that `make fuzz` tries with each target.
FUZZTIME ?= 50000x

# Any Go from version 1.21 works, because it fetches the toolchain that go.mod names. Without one, Go is downloaded to
# bin/tools/go.
GO := $(or $(shell daemon/setup/go.sh find),$(CURDIR)/bin/tools/go/bin/go)
GO_MADE := $(filter $(CURDIR)/bin/tools/go/bin/go,$(GO))
export PATH := $(CURDIR)/bin/tools:$(dir $(GO)):$(PATH)
export GOTOOLCHAIN ?= auto
# Programs are static, and building them needs no C compiler. Only the race detector needs CGO_ENABLED=1.
export CGO_ENABLED ?= 0

# All calls of Go use the same flags, so that programs, tests and tools share compiled packages.
export GOFLAGS := $(strip $(filter-out -trimpath -buildvcs=false,$(GOFLAGS)) -trimpath -buildvcs=false)
GO_BUILD := $(GO) build
LDFLAGS  := -s -w -X github.com/msbd/msbd/api/version.commit=$(COMMIT)

# containerd is built from the version that go.mod requires. The linker flag puts this version into the program.
CONTAINERD         := github.com/containerd/containerd
CONTAINERD_VERSION  = $(patsubst v%,%,$(shell sed -n 's,^\t$(CONTAINERD) ,,p' go.mod))
CONTAINERD_FLAGS    = -tags no_cri,no_btrfs,no_devmapper,no_zfs,no_aufs \
	-ldflags '-s -w -X $(CONTAINERD)/version.Version=$(CONTAINERD_VERSION)'

# gVisor, which `make bench` measures too.
GVISOR_VERSION := v0.0.0-20260905035102-160fafc42237

# Tools of the checks, with exact versions. They are installed in bin/tools.
BUF_VERSION        := 1.75.0
BUF_SHA256         := 98b19d4b2b46130e083157490c54dfdcb8ea771e53204d3c6a06a2b12edd0503
PROTOC_GEN_GO      := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
STATICCHECK        := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOTESTSUM          := gotest.tools/gotestsum@v1.13.0
# The ACME server from which tests fetch certificates.
PEBBLE             := github.com/letsencrypt/pebble/v2/cmd/pebble@v2.10.1

SOURCES  := go.mod go.sum $(shell find api client daemon \( -name testdata -o -path client/python -o -path client/typescript \) -prune -o \
	-type f -not -name '*_test.go' \( -name '*.go' -o -name '*.py' -o -name '*.js' -o -name repl.sh -o -name '*.json' -o -path '*/completion/*' \) -print)
PROGRAMS := bin/msb bin/msbd bin/msb-agent bin/msb-portal bin/containerd bin/containerd-shim-kata-v2 bin/msb-virtiofsd
GUEST    := bin/guest/vmlinux bin/guest/initrd.img
# quickstart needs only these images. The third one takes longer to build.
BASE_IMAGES := bin/images/python.tar bin/images/node.tar
IMAGES   := $(BASE_IMAGES) bin/images/code-interpreter.tar
MKGUEST  := $(wildcard daemon/cmd/msb-mkguest/*.go)
MKIMAGE  := $(filter-out %_test.go,$(wildcard daemon/cmd/msb-mkimage/*.go daemon/internal/backend/image/archive/*.go))

##@ Start

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: quickstart
quickstart: ## Set up everything, start the server, run Python in a first sandbox
	@$(MAKE) deps build guest base-images
	@daemon/setup/quickstart.sh

.PHONY: clean-host
clean-host: ## Undo quickstart: remove server, sandboxes and state; with PACKAGES=1 also the packages that deps installed
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
images: $(IMAGES) ## Build the images python, node and code-interpreter into bin/images/
	@:

.PHONY: base-images
base-images: $(BASE_IMAGES) ## Build only the images python and node
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

# Only `make bench` uses ctr and runsc. They do not compile with the newer modules in our go.mod, so each is built with the
# modules that it requires.
# $(call peer,MODULE,VERSION,PACKAGE,FLAGS) builds a program from a module.
define peer
	@module=$$(mktemp -d); trap 'rm -rf "$$module"' EXIT; cd "$$module"; \
	$(GO) mod init peer 2>/dev/null; $(GO) mod edit -require=$(1)@$(2); \
	GOFLAGS='-mod=mod -trimpath' $(GO_BUILD) $(4) -o $(CURDIR)/$@ $(1)/$(3)
endef

bin/ctr: go.mod | $(GO_MADE)
	@echo "Building $@ $(CONTAINERD_VERSION) from its module (about 1 minute)"
	$(call peer,$(CONTAINERD),v$(CONTAINERD_VERSION),cmd/ctr,$(CONTAINERD_FLAGS))

bin/runsc: Makefile | $(GO_MADE)
	@echo "Building $@ from gVisor's module (about 5 minutes)"
	$(call peer,gvisor.dev/gvisor,$(GVISOR_VERSION),runsc,-ldflags '-s -w')
	@touch $@

bin/containerd-shim-kata-v2: $(wildcard daemon/cmd/containerd-shim-kata-v2/*) | $(GO_MADE)
	@echo "Building $@ from Kata's module (about 1 minute)"
	@daemon/cmd/containerd-shim-kata-v2/build.sh $@
	@touch $@

# The metapackage depends on the newest kernel. `make -B bin/cache/kernel.deb` looks for a newer one.
bin/cache/kernel.deb:
	@echo "Downloading the guest's kernel, Debian's cloud kernel"
	@rm -rf $(@D)/deb; mkdir -p $(@D)/deb; apt-get update -qq; \
	package=$$(apt-cache depends linux-image-cloud-$$(dpkg --print-architecture) | sed -n 's/^ *Depends: //p'); \
	cd $(@D)/deb; apt-get download -qq -o APT::Sandbox::User=root "$$package"
	@mv $(@D)/deb/*.deb $@; rmdir $(@D)/deb; touch $@

$(GUEST) &: bin/cache/kernel.deb bin/msb-agent $(MKGUEST)
	@echo "Building bin/guest: kernel and initramfs"
	@$(GO) run ./daemon/cmd/msb-mkguest --kernel-deb bin/cache/kernel.deb --agent bin/msb-agent --out bin/guest
	@touch $(GUEST)

MKIMAGE_RUN = $(GO) run ./daemon/cmd/msb-mkimage --out bin/images --cache bin/cache

$(BASE_IMAGES) &: $(MKIMAGE) | $(GO_MADE)
	@echo "Building the images microsandbox/python and microsandbox/node (about 1 minute)"
	@$(MKIMAGE_RUN) python node

bin/images/code-interpreter.tar: $(MKIMAGE) daemon/cmd/msb-mkimage/wheels.txt | $(GO_MADE)
	@echo "Building the image microsandbox/code-interpreter (about 2 minutes)"
	@$(MKIMAGE_RUN) code-interpreter

$(CURDIR)/bin/tools/go/bin/go:
	@daemon/setup/go.sh fetch $(CURDIR)/bin/tools/go

##@ Check

.PHONY: test
test: deps build guest base-images bin/tools/gotestsum bin/tools/pebble bin/tools/nginx ## Run all tests, real microVMs included
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@$(MAKE) $(LAB)
	@$(MAKE) IN_PARALLEL=1 -j test-e2e test-race test-sdks test-packages test-interpreter

# $(call gotestsum,NAME) runs go test, prints the name of each test as it ends, and writes NAME.json to TEST_EVENTS.
gotestsum = gotestsum --format testname --format-hide-empty-pkg $(if $(TEST_EVENTS),--jsonfile $(TEST_EVENTS)/$(1).json)

# These packages have much concurrent code, so they are tested under the race detector, and not again without it. Only some files
# of tests of the store are for a run without it.
RACE_PACKAGES := ./client $(addprefix ./daemon/internal/,data/... domain/... serve/...)
STORE         := daemon/internal/data/store

.PHONY: test-e2e test-interpreter test-packages test-race test-sdks
# -vet=off, because make lint runs go vet. The time limits are for tests that hang: a slow machine takes six times as long as a
# usual one. -parallel 3, because some tests only wait and use no CPU. TestBenchSmoke runs alone, in make bench-smoke, and
# TestCodeInterpreter after the others, because its image takes minutes to build. The others include TestLeaksFindsEveryTrace,
# whose traces it would report.
test-e2e:
	@$(call gotestsum,e2e) -- -count=1 -vet=off -timeout 60m -parallel 3 -skip '^(TestBenchSmoke|TestCodeInterpreter)$$' ./daemon/e2e

test-interpreter: test-e2e images
	@$(call gotestsum,interpreter) -- -count=1 -vet=off -timeout 60m -run '^TestCodeInterpreter$$' ./daemon/e2e

# All other packages come after the images, one of which TestImages needs. So few run at a time.
test-packages: images
	@failed=0; \
	$(call gotestsum,store) -- -count=1 -vet=off -timeout 60m ./$(STORE) \
		-run "^($$(grep -l '^//go:build !race' $(STORE)/*_test.go | xargs sed -n 's/^func \(Test[A-Za-z]*\)(.*/\1/p' | paste -sd '|'))$$" || failed=1; \
	$(call gotestsum,packages) -- -count=1 -vet=off -timeout 60m -parallel 3 -p 1 \
		$$($(GO) list ./... | grep -vxFf <($(GO) list ./daemon/e2e $(RACE_PACKAGES))) || failed=1; \
	exit $$failed

test-race:
	@CGO_ENABLED=1 $(call gotestsum,race) -- -race -count=1 -vet=off -timeout 40m -p 1 $(RACE_PACKAGES)

test-sdks:
	@echo "Python SDK"; client/python/check.sh unit
	@echo "TypeScript SDK"; client/typescript/check.sh unit

# Packages that only the tests need: gcc and libc6-dev for the race detector, strace to make system calls fail, e2fsprogs
# to create disks for guests, busybox and systemd for the lab, Chromium to load a hostile web page, and python3-venv for
# other projects' clients.
TEST_PACKAGES := gcc libc6-dev:/usr/include/stdio.h strace e2fsprogs:mkfs.ext4 busybox-static:busybox systemd:/lib/systemd/systemd chromium python3-venv:/usr/lib/python3.11/ensurepip

.PHONY: test-kvm
test-kvm: deps build guest base-images bin/tools/gotestsum bin/tools/pebble ## Run the end-to-end tests on KVM with each hypervisor; without KVM, in the lab, an emulated host
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@$(MAKE) $(LAB)
	@$(GO) test -c -o bin/lab/e2e.test ./daemon/e2e
	@$(call gotestsum,kvm) --raw-command -- setpriv --pdeathsig TERM daemon/setup/lab/e2e.sh '$(KVM_TESTS)' $(KVM_HYPERVISORS)

KVM_HYPERVISORS ?= kata builtin
# The tests of sandboxes. In the lab they take an hour, so CI runs a few of them with msbd's own hypervisor service. It also
# runs TestService, in which Kata's driver uses KVM.
KVM_TESTS ?= TestStatusNamesHypervisor|TestHypervisorChange|TestSandboxLifecycle|TestNode|TestTimeouts|TestSandboxConfiguration|TestSandboxesAreIsolated|TestSandboxHas|TestConcurrentSandboxes|TestStopWhile|TestGuestBootFailure|TestDaemonKill|TestProcessDeath|TestContainerdDeath|TestHungGuest|TestHostContainerd|TestShutdownAnswers|TestResourceLimits|TestLeaksFinds|TestKillsUnderSandboxChurn|TestInvalidatedKeysCancelRuns|TestRunOptions|TestEventStream|TestProcesses|TestExecSocket|TestFiles
KVM_TESTS_CI := TestStatusNamesHypervisor|TestSandboxHas|TestDaemonKillKeepsSandboxes|TestTimeouts

.PHONY: test-kvm-ci
test-kvm-ci: ## Run a few of these tests, in minutes
	@$(MAKE) test-kvm KVM_TESTS='$(KVM_TESTS_CI)' KVM_HYPERVISORS=builtin LAB_TIMEOUT=1800

# The lab also needs the guest's kernel.
LAB := bin/lab/initrd.img bin/lab/tsc

bin/lab/initrd.img: bin/cache/kernel.deb $(addprefix daemon/setup/lab/,build.sh init)
	@echo "Building bin/lab: an emulated host with KVM"
	@daemon/setup/lab/build.sh $< $(@D)

bin/lab/tsc: $(wildcard daemon/setup/lab/tsc/* daemon/internal/sys/tsc/*)
	@$(GO) build -o $@ ./daemon/setup/lab/tsc

.PHONY: race
race: deps bin/tools/gotestsum bin/tools/pebble ## Run only the tests that run under the race detector
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@$(MAKE) test-race

.PHONY: soak
soak: deps build guest base-images bin/tools/pebble ## Run the reliability tests with their full counts, which takes hours
	@daemon/setup/host-packages.sh bin/host-packages "for the tests" $(TEST_PACKAGES)
	@MSB_SOAK=1 $(GO) test -count=1 -timeout 24h -v $(TESTFLAGS) $(addprefix ./daemon/internal/,domain/keys data/store serve/http guest/agent guest/portalclient)
	@MSB_SOAK=1 CGO_ENABLED=1 $(GO) test -race -count=1 -timeout 24h -v -run '^TestConcurrentUseAgreesWithAModel$$' ./daemon/internal/domain/keys
	@MSB_SOAK=1 $(GO) test -count=1 -timeout 24h -v -run '^TestKills' ./daemon/e2e
	@MSB_SOAK=1 $(GO) test -count=1 -timeout 24h -v -run '^TestNginx' ./daemon

.PHONY: lint
lint: bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc bin/tools/staticcheck ## Check format, code, types, prose, and that generated code is up to date
	@echo "plain English"; daemon/setup/plain-english.sh
	@echo "gofmt"; unformatted=$$($(GO)fmt -l api client daemon); test -z "$$unformatted" || { echo "run gofmt -w on:" $$unformatted; exit 1; }
	@echo "go vet"; $(GO) vet ./...
	@echo "staticcheck"; staticcheck ./...
	@echo "buf lint"; buf lint
	@echo "Python SDK: ruff, mypy"; client/python/check.sh lint
	@echo "TypeScript SDK: prettier, tsc"; client/typescript/check.sh lint
	@daemon/setup/generated.sh check

.PHONY: generate
generate: bin/tools/buf bin/tools/protoc-gen-go bin/tools/protoc-gen-go-grpc ## Generate api/ from proto/
	@daemon/setup/generated.sh write

.PHONY: fuzz
fuzz: | $(GO_MADE) ## Run each fuzz target with FUZZTIME inputs (default 50000x)
	@daemon/setup/fuzz.sh $(FUZZTIME)

# The benchmarks whose names match the pattern BENCH run, and their results replace the earlier ones.
BENCH ?= .
RESULTS := $(CURDIR)/docs/performance/results

.PHONY: bench
bench: deps build guest base-images bin/ctr bin/runsc ## Measure msbd beside its peers, and write docs/performance.md; BENCH=PATTERN runs only a part
	@daemon/setup/host-packages.sh bin/host-packages "to measure" runc zstd
	@mkdir -p $(RESULTS)
	@MSB_BENCH_RESULTS=$(RESULTS) $(GO) test -run '^$$' -bench '$(BENCH)' -benchtime 1x -timeout 90m ./daemon/e2e
	@MSB_BENCH_RESULTS=$(RESULTS) $(GO) test -run '^$$' -bench '$(BENCH)' -timeout 60m -p 1 ./daemon/internal/domain/keys ./daemon/internal/data/store ./daemon/internal/serve/http ./daemon/internal/serve/mcp ./daemon/cmd/msb-portal
	@$(GO) run ./daemon/cmd/msb-benchreport docs/performance

.PHONY: bench-smoke
bench-smoke: deps build guest base-images bin/tools/gotestsum ## Measure a few times in 3 minutes, and fail if msbd is far slower beside runc than it should be
	@daemon/setup/host-packages.sh bin/host-packages "to measure" runc
	@$(call gotestsum,smoke) -- -count=1 -vet=off -timeout 10m -run '^TestBenchSmoke$$' ./daemon/e2e

# buf is downloaded as a program, because building it takes longer than building all programs of this project.
bin/tools/buf: Makefile
	@echo "Downloading $@ ($(BUF_VERSION)) from npm"
	@mkdir -p $(@D); archive=$$(mktemp); trap 'rm -f "$$archive"' EXIT; \
	curl -sSfL --retry 3 -o "$$archive" https://registry.npmjs.org/@bufbuild/buf-linux-x64/-/buf-linux-x64-$(BUF_VERSION).tgz; \
	echo "$(BUF_SHA256)  $$archive" | sha256sum --check --quiet; \
	tar -xzf "$$archive" -C $(@D) --strip-components 2 --no-same-owner package/bin/buf
	@touch $@

# nginx is extracted from Debian's package. Installing the package would start a web server on this host.
bin/tools/nginx:
	@echo "Downloading $@, Debian's"
	@mkdir -p $(@D); dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; cd "$$dir"; \
	download() { apt-get download -qq -o APT::Sandbox::User=root nginx; }; \
	download 2>/dev/null || { apt-get update -qq; download; }; \
	dpkg-deb --extract nginx_*.deb .; install -T usr/sbin/nginx $(CURDIR)/$@

# A tool is built again when this file changes, since its version may have changed.
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
install: ## Install the programs below PREFIX (/usr/local), the systemd units, the man page and completions
	@for file in $(PROGRAMS) $(GUEST) $(BASE_IMAGES); do test -e $$file || { echo "$$file is missing: run make build guest images"; exit 1; }; done
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/msb bin/msbd
	install -D -t $(LIBEXEC) bin/containerd bin/containerd-shim-kata-v2 bin/msb-portal bin/msb-virtiofsd
	install -D -m 0644 -t $(LIBEXEC)/guest $(GUEST)
	install -D -m 0644 -t $(LIBEXEC)/images $(wildcard $(IMAGES))
	install -d $(UNITS) $(MAN) $(BASH) $(ZSH) $(FISH)
	env -i bin/msb man >$(MAN)/msb.1
	bin/msb completion bash >$(BASH)/msb
	bin/msb completion zsh >$(ZSH)/_msb
	bin/msb completion fish >$(FISH)/msb.fish
	sed 's,@PREFIX@,$(PREFIX),' daemon/setup/msbd.service >$(UNITS)/msbd.service
	install -m 0644 -t $(UNITS) daemon/setup/msbd.socket

.PHONY: uninstall
uninstall: ## Remove the installed files; the state in /var/lib/msb stays
	rm -f $(DESTDIR)$(PREFIX)/bin/msb $(DESTDIR)$(PREFIX)/bin/msbd $(addprefix $(UNITS)/msbd.,service socket)
	rm -f $(MAN)/msb.1 $(BASH)/msb $(ZSH)/_msb $(FISH)/msb.fish
	rm -rf $(LIBEXEC)

.PHONY: clean
clean: ## Remove everything that was built
	@if [ -S /run/msb/msbd.sock ]; then echo "A server may be running from bin/. If it is yours, run make clean-host first."; fi
	rm -rf $(PROGRAMS) bin/ctr bin/runsc bin/guest bin/images bin/lab bin/cache bin/tools
