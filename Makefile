# Targets for people. Everything but lint, arm64 and bench-floor needs only Go,
# make and git.
GO      ?= go
BIN     ?= bin
PREFIX  ?= /usr/local
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -ldflags "-X main.version=$(VERSION)"
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: build test demo lint race cover bench bench-floor fuzz arm64 install clean

build:
	CGO_ENABLED=0 $(GO) build $(LDFLAGS) -o $(BIN)/ ./cmd/nvmmirrord

test:
	$(GO) test -timeout 5m ./...

demo: build
	$(BIN)/nvmmirrord demo

lint:
	@test -z "$$(gofmt -l .)" || { echo "gofmt -w these:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	GOARCH=arm64 $(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff

# The race detector wants cgo.
race:
	CGO_ENABLED=1 $(GO) test -race -short -timeout 10m ./...

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
	install -D -m 0644 hack/systemd/nvmmirrord@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/nvmmirrord@.service

clean:
	rm -rf $(BIN) cover.out

# Drops each flush and fence that the code issues, one after the other, and
# wants the crash simulator to notice.
.PHONY: mutants
mutants:
	NVMMIRROR_MUTANTS=1 $(GO) test -run TestMutants -timeout 10m -v .

# What needs network namespaces and TUN devices, at full length: the pair over a
# wire that lies, and chaos with real processes. Skips, and says so, without
# root. NVMMIRROR_CHAOS_SEED repeats choices, NVMMIRROR_CHAOS_TIME=10m goes on.
.PHONY: test-root
test-root:
	NVMMIRROR_TEST_ROOT=1 $(GO) test -count=1 -timeout 15m -v ./internal/chaos

# Real DAX, in emulated machines that are killed under load. Wants Debian, with
# the packages that hack/vm/kernel.sh names, and its kernel in the cache.
.PHONY: test-dax
test-dax:
	hack/vm/kernel.sh
	NVMMIRROR_VM=1 $(GO) test -run TestDAX -count=1 -timeout 15m -v ./hack/vm
