# The index of what a person does here; the logic is in the scripts.
# KVM host: this machine, or an emulated one where /dev/kvm cannot run our guest (tests/host).
# make turns every failure into exit code 2; tests/host/run.sh CMD passes the code on as it is.

.DEFAULT_GOAL := help
.PHONY: help demo test test-package simulate mutants critest node-conformance delegate software bench hostile faults soak check fuzz host shell host-stop image build sbom deb tarball installer clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo; echo 'Cache (guest kernels, KVM hosts, images): $${HULL_CACHE:-~/.cache/hull}'

demo: build ## a real image from a real registry as a container in a microVM, step by step
	@tests/demo.sh

test: ## all checks and tests; TESTS=WORD: only the integration tests of that name
	@tests/run-all.sh

test-package: sbom ## [PART="deb tarball node"]: the packages on a fresh Debian under systemd: install, use, upgrade under a pod, remove; node: a Kubernetes node, with your KUBELET=/path/to/kubelet
	@tests/package.sh

simulate: ## SEEDS=10000 [FIRST=1]: runs of a node under a seed, killed and broken anywhere; SEED=N: one, with all that happens
	@cargo run --quiet --locked --profile simulate -p hull-pod --example simulate -- $(or $(SEED),$(or $(FIRST),1) $(or $(SEEDS),10000))

mutants: ## [SEEDS=10000]: bugs put into the daemon, and the seed by which the simulation finds each
	@tests/mutants/run $(SEEDS)

critest: build ## CRITEST=/path/to/critest [FOCUS=REGEX]: that critest against hull serve in the KVM host
	@tests/critest.sh

node-conformance: build ## E2E=DIR [FOCUS=REGEX] [SKIP=REGEX] [PROCS=3] [MINUTES=N] [REST=1] [DELEGATE=1]: the Kubernetes node suite in DIR against hull serve in the KVM host; runs add up
	@tests/node-conformance.sh

delegate: build ## pods of Debian's containerd and runc beside pods in VMs, by one socket, each daemon killed, in the KVM host
	@tests/delegate.sh

software: build ## [NAME="redis java"]: databases, servers, languages as their users run them, in the KVM host
	@tests/software.sh $(NAME)

bench: build ## BENCH=network, storage, files, pmem, pods, boot, exec, memory, parallel, checkpoint, burst or neighbours: measures Hull and its peers in the KVM host; node, logs, pull: the daemon with many pods, with much output, pulls, here
	@tests/bench/$(or $(BENCH),network).sh

hostile: ## [SECONDS=N] [SEED=N]: the hostile guest's attacks at random on the VMM's devices, one seed after another, here
	@HULL_HOSTILE_SECONDS=$(or $(SECONDS),60) HULL_HOSTILE_SEED=$(SEED) \
		cargo test --locked -p hull-vmm --test hostile seeds_without_end -- --ignored --nocapture

faults: ## a daemon that is killed, stopped and refused writes at each of its points, in real VMs, or VMS=fake; FOCUS=WORDS: some of them
	@tests/faults.sh faults

soak: ## pods and restarts by the thousand, fake and real, leave nothing; MINUTES=N: at least so long
	@tests/faults.sh soak

check: ## format, lints, dependencies (licences, versions, advisories), layering, circles, points of faults, bugs for the simulation
	@tests/checks/run.sh

fuzz: ## [SECONDS=60] [TARGET=NAME]: runs the fuzz targets, each so long; needs a nightly compiler
	@FUZZ_TARGET=$(TARGET) tests/fuzz/run.sh $(SECONDS)

host: ## CMD="…" as root in the KVM host, built binaries in PATH; SHARE=dir is visible there too
	@tests/host/run.sh $(if $(value CMD),'$(subst ','\'',$(value CMD))')

shell: ## a prompt in the KVM host
	@tests/host/run.sh

host-stop: ## stop the emulated KVM host
	@tests/host/kvm-host.sh stop

image: ## guest kernel and root
	@tests/host/assets.sh image

build: ## everything into target/hull; PROFILE=dev: quicker to build
	@tests/host/assets.sh

sbom: build ## what all of target/hull is made of: target/hull/sbom.cdx.json (CycloneDX)
	@tests/host/sbom target/hull/sbom.cdx.json

deb: sbom ## the Debian package: target/package/hull_VERSION_amd64.deb
	@packaging/build-deb

tarball: sbom ## the same for other distributions, with install.sh: target/package/hull-VERSION-x86_64.tar.xz
	@packaging/build-tarball

installer: sbom ## the image and DaemonSet that put Hull on nodes of Kubernetes: target/package/hull-installer-VERSION.tar, hull.yaml; IMAGE=its name in your registry
	@packaging/build-image

clean: host-stop ## remove target/ and stop the emulated KVM host; the cache stays
	cargo clean

export PART SHARE TESTS PROFILE BENCH CRITEST E2E PROCS REST DELEGATE FOCUS SKIP FLAGS MINUTES VMS INPUT KEEP
