# Everything Penstock needs, from a bare Debian 12 machine to a measured dataplane.
# `make help` lists the targets. V=1 shows every command.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
ifndef V
.SILENT:
endif

PYTHON ?= python3
JOBS   ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := build
export PENSTOCK_CACHE_DIR ?= $(CURDIR)/$(BUILD)/cache
export PYTHONPATH := $(CURDIR)

# Debian packages, by what needs them.
PACKAGES_RUN   := clang llvm gcc libc6-dev libbpf-dev libelf-dev zlib1g-dev linux-libc-dev \
                  python3 python3-venv python3-dev iproute2 ethtool iputils-ping curl iperf3 procps ca-certificates libpcap0.8 \
                  bind9-dnsutils dnsperf libevent-2.1-7 libnghttp2-14 libprotobuf-c1 libpython3.11
PACKAGES_TEST  := tshark chromium-headless-shell podman containerd runc containernetworking-plugins busybox-static tcpdump nftables \
                  iputils-arping ndisc6 util-linux git openssl shellcheck dnsmasq-base
PACKAGES_BENCH := dpdk-dev librte-net-af-xdp23 librte-net-af-packet23 nftables dnsperf dnsmasq-base \
                  libunbound8 libxdp1 libcap-ng0 libnuma1 linux-perf
# Chromium is 100 MB to fetch: the only judge of the web page that is not ours.
# The packages of Open vSwitch, Prometheus and unbound would start services and enable them for ever: they are
# unpacked, not installed.
PACKAGES_OVS   := openvswitch-switch openvswitch-common
PACKAGES_PROM  := prometheus
PACKAGES_DNS   := unbound

CLANG      ?= clang
CC         ?= gcc
BPF_CFLAGS := -target bpf -mcpu=v3 -O2 -g -Wall -Werror -Ixdp -I/usr/include/$(shell uname -m)-linux-gnu
BPF_OBJECTS := $(patsubst xdp/bpf/%.bpf.c,$(BUILD)/bpf/%.bpf.o,$(wildcard xdp/bpf/*.bpf.c))
DESCRIPTORS := $(BUILD)/proto/hubble.binpb
PROTOS     := dataplane/observe/api
PROGRAMS   := $(addprefix $(BUILD)/bin/,penstock-cni penstock-rr penstock-frames penstock-replay)

define unpack
	rm -rf $@.part && mkdir -p $@.part
	cd $@.part
	if { apt-get download -q $(1) || { apt-get update -q && apt-get download -q $(1); }; } >>../apt.log 2>&1; then
	  for package in *.deb; do dpkg-deb -x "$$package" . && rm "$$package"; done
	else
	  echo "$(1) cannot be fetched (build/apt.log): what needs it will be skipped"
	fi
	cd - >/dev/null && mv $@.part $@
endef

# apt once per set of packages: the stamp's name carries the set.
stamp = $(BUILD)/.apt-$(shell echo $(1) | md5sum | cut -c1-12)
STAMP_RUN   := $(call stamp,$(PACKAGES_RUN))
STAMP_TEST  := $(call stamp,$(PACKAGES_TEST))
STAMP_BENCH := $(call stamp,$(PACKAGES_BENCH))

.PHONY: help setup build warm run test test-again lint format fuzz bench bench-quick verified engine clean distclean

help: ## List the targets
	awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP_RUN) $(BUILD)/.venv ## Install Debian packages, make the virtual environment

build: setup $(BPF_OBJECTS) $(PROGRAMS) $(DESCRIPTORS) ## Compile BPF programs, small C programs, proto files

warm: build ## Compile the numba kernels into the cache (with progress)
	$(BIN)/python -m dataplane.engine.warm

run: warm $(BUILD)/unbound ## Two nodes, four pods: ping, curl, iperf3, a service, a policy; a live view (ONCE=1 exits)
	$(BIN)/python -m bench.demo $(if $(ONCE),--once)

test: $(STAMP_TEST) $(BUILD)/prometheus $(BUILD)/unbound warm ## The whole suite (root tests run in fresh network namespaces)
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile $(PYTEST)

test-again: $(STAMP_TEST) $(BUILD)/prometheus $(BUILD)/unbound warm ## Only the tests that failed last time
	$(BIN)/python -m pytest tests --last-failed --last-failed-no-failures none $(PYTEST)

lint: build $(STAMP_TEST) ## Formatter, linter, types, import directions, shell
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	shellcheck .ci/run

format: build ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: warm ## Ten million bad frames through all stages, ten million bad DNS messages through the parser
	$(BIN)/python -m tests.fuzz.fuzz_frames --frames 10000000
	$(BIN)/python -m tests.fuzz.fuzz_dns --messages 10000000

bench: warm $(STAMP_BENCH) $(BUILD)/ovs ## Everything beside its peers, interleaved: an hour and a half (RUNS=3)
	$(BIN)/python -m bench --runs $(or $(RUNS),3) $(BENCH)

bench-quick: warm $(STAMP_BENCH) $(BUILD)/ovs ## The quick scenarios: under two minutes
	$(BIN)/python -m bench --quick $(BENCH)

verified: build ## Write down what the verifier walks through for each BPF program
	$(BIN)/python -m xdp.verified

engine: warm ## The engine alone, from memory: ns per packet and stage
	$(BIN)/python -m bench.engine

tables: warm $(STAMP_BENCH) ## Routes, rules, connections beside DPDK's fib, acl and hash programs
	$(BIN)/python -m bench.tables

clean: ## Remove what was built, keep the virtual environment
	rm -rf $(BUILD)/bpf $(BUILD)/bin $(BUILD)/proto $(BUILD)/cache

distclean: ## Remove everything that was built or installed here
	rm -rf $(BUILD) $(VENV)

$(BUILD)/.apt-%:
	mkdir -p $(BUILD)
	case $* in
	  $(patsubst $(BUILD)/.apt-%,%,$(STAMP_RUN)))   set -- $(PACKAGES_RUN) ;;
	  $(patsubst $(BUILD)/.apt-%,%,$(STAMP_TEST)))  set -- $(PACKAGES_TEST) ;;
	  $(patsubst $(BUILD)/.apt-%,%,$(STAMP_BENCH))) set -- $(PACKAGES_BENCH) ;;
	esac
	missing=()
	for package in "$$@"; do
	  dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$$package")
	done
	if [ "$${#missing[@]}" -gt 0 ]; then
	  echo "installing Debian packages: $${missing[*]}"
	  export DEBIAN_FRONTEND=noninteractive
	  apt-get update -q >$(BUILD)/apt.log 2>&1 || { tail -n 20 $(BUILD)/apt.log; exit 1; }
	  apt-get install -q -y --no-install-recommends "$${missing[@]}" >>$(BUILD)/apt.log 2>&1 \
	    || { tail -n 20 $(BUILD)/apt.log; exit 1; }
	fi
	touch $@

$(BUILD)/.venv: pyproject.toml requirements.lock | $(STAMP_RUN)
	echo "making the virtual environment"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.lock
	touch $@

$(BUILD)/bpf/%.bpf.o: xdp/bpf/%.bpf.c xdp/abi.h $(wildcard xdp/bpf/*.h) | $(STAMP_RUN)
	mkdir -p $(@D)
	$(CLANG) $(BPF_CFLAGS) -c $< -o $@

$(BUILD)/bin/penstock-cni: dataplane/cni/shim.c | $(STAMP_RUN)
	mkdir -p $(@D)
	$(CC) -std=gnu11 -O2 -Wall -Wextra -Werror -static -s -o $@ $<

$(BUILD)/bin/penstock-%: bench/%.c | $(STAMP_RUN)
	mkdir -p $(@D)
	$(CC) -std=gnu11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -o $@ $<

$(BUILD)/ovs: | $(STAMP_BENCH)
	$(call unpack,$(PACKAGES_OVS))

$(BUILD)/prometheus: | $(STAMP_TEST)
	$(call unpack,$(PACKAGES_PROM))

$(BUILD)/unbound: | $(STAMP_RUN)
	$(call unpack,$(PACKAGES_DNS))

$(DESCRIPTORS): $(wildcard $(PROTOS)/*/*.proto) | $(BUILD)/.venv
	mkdir -p $(@D)
	$(BIN)/python -m grpc_tools.protoc -I $(PROTOS) --include_imports --descriptor_set_out=$@ $^
