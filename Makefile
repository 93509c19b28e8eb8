# Targets for people. build, demo, test, bench, mutants and soak need only Go,
# make and git; the others say what they want.
GO      ?= go
BIN     ?= bin
PREFIX  ?= /usr/local
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -ldflags "-X main.version=$(VERSION)"
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: build test demo lint race cover bench bench-floor fuzz arm64 install clean

build:
	CGO_ENABLED=0 $(GO) build -buildvcs=false $(LDFLAGS) -o $(BIN)/ ./cmd/nvmmirrord

test:
	$(GO) test -parallel 4 -timeout 20m ./...

demo: build
	$(BIN)/nvmmirrord demo

lint:
	@test -z "$$(gofmt -l .)" || { echo "gofmt -w these:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	GOARCH=arm64 $(GO) vet ./...
	$(GO) -C hack/peers vet ./...
	$(GO) run $(STATICCHECK) ./...
	cd hack/peers && $(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff

# The race detector wants cgo.
race:
	CGO_ENABLED=1 $(GO) test -race -short -parallel 4 -timeout 20m ./...

cover:
	$(GO) test -short -coverprofile=cover.out -coverpkg=./... ./...
	$(GO) tool cover -func=cover.out | tail -1

bench:
	$(GO) test -run '^$$' -bench . -benchmem ./...

# Ratios against libpmem and against a bare socket; wants cc and libpmem-dev.
bench-floor:
	hack/pmembench/run.sh
	hack/floor/run.sh

# A minute on each fuzz target.
fuzz:
	hack/fuzz.sh 1m

# The suites that make sense under qemu-user, which knows no TCP_MD5SIG.
arm64:
	hack/arm64.sh

install: build
	install -D -m 0755 $(BIN)/nvmmirrord $(DESTDIR)$(PREFIX)/bin/nvmmirrord
	sed 's|=/usr/local/bin/|=$(PREFIX)/bin/|' hack/systemd/nvmmirrord@.service >$(BIN)/nvmmirrord@.service
	install -D -m 0644 $(BIN)/nvmmirrord@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/nvmmirrord@.service
	test -d $(DESTDIR)/etc/nvmmirror || install -d -m 0700 $(DESTDIR)/etc/nvmmirror

clean:
	rm -rf $(BIN) cover.out

# Drops each flush and fence that the code issues, one after the other, and
# wants the crash simulator to notice.
.PHONY: mutants
mutants:
	NVMMIRROR_MUTANTS=1 $(GO) test -run TestMutants -timeout 10m -v .

# What needs network namespaces and TUN devices, at full length: the pair over a
# wire that lies, and chaos with real processes. Skips, and says so, without
# root. NVMMIRROR_CHAOS_SEED=N repeats the choices that the run with that seed
# printed; NVMMIRROR_CHAOS_TIME=1h goes on with failovers for so long.
.PHONY: test-root
test-root:
	NVMMIRROR_TEST_ROOT=1 $(GO) test -count=1 -timeout $(if $(NVMMIRROR_CHAOS_TIME),0,20m) -v ./internal/chaos

# Real DAX, in emulated machines that are killed under load. Wants Debian for
# amd64, the packages that hack/vm/kernel.sh names, and its kernel, which that
# script downloads. Where one of them is missing, the test says so and skips.
.PHONY: test-dax
test-dax:
	@hack/vm/kernel.sh || echo "test-dax: no guest can be booted: the reason stands above"
	NVMMIRROR_VM=1 $(GO) test -run TestDAX -count=1 -timeout 25m -v ./hack/vm

# The mirror beside libpmem, Redis, PostgreSQL, etcd and DRBD, in turns, with one
# table of ratios; what is missing is skipped. Wants a quiet machine, root for
# none of it, and Debian's redis-server, postgresql, etcd-server, drbd-utils,
# gcc, libpmem-dev, libpmemlog-dev and what hack/vm/kernel.sh names.
.PHONY: bench-peers
bench-peers:
	$(GO) -C hack/peers run .

# The transports in an emulated machine, whose kernel has AF_ALG sockets: the
# kernel's crypto from userspace beside TCP_MD5SIG. Wants what test-dax wants.
.PHONY: bench-guest
bench-guest:
	@hack/vm/kernel.sh || echo "bench-guest: no guest can be booted: the reason stands above"
	NVMMIRROR_VM=1 $(GO) test -run '^TestBenchWire$$' -count=1 -timeout 25m -v ./hack/vm

# Simulated pairs, schedule after schedule, until DURATION is over. A failure
# prints its seed, and NVMMIRROR_PAIRSIM_SEED=N replays it.
.PHONY: soak
soak: DURATION ?= 10m
soak:
	NVMMIRROR_PAIRSIM_SOAK=$(DURATION) $(GO) test -run '^TestPairSim$$' -count=1 -timeout 0 -v .

# Puts known faults into copies of the tree, one after the other, and wants the
# simulated pair to catch each. Prints the table of docs/TESTING.md.
.PHONY: pairsim-faults
pairsim-faults:
	GO=$(GO) hack/pairsim-faults.sh
