# Entry points. What they do is in setup.sh, tests/run.py and tests/guest/.

PYTHON ?= python3
VENV := .venv/bin
BENCH ?= calls
CMD ?= uname -a
GUEST ?= vm
export PYTHON CMD

.PHONY: help setup lock demo test test-integrations lint bench guest wheel deb image clean

help:
	@echo 'make setup                install what is missing, build, fetch the test kernels where they are needed'
	@echo 'make demo [TRACES=dir]    replay recorded agents with no control, a static split, and the daemon'
	@echo 'make test                 unit tests, and tests on a real kernel (AGENTCG_NO_SKIP=1: no skips)'
	@echo 'make test-integrations    the adapters with the real frameworks (AGENTS=1: and the real agents, from npm)'
	@echo 'make lint                 ruff, import-linter, mypy, clang-format'
	@echo 'make bench BENCH=name     a benchmark; results in build/bench/name.json'
	@echo "make guest CMD='...'      run something on a recent kernel in QEMU (GUEST=uml: in user-mode Linux;"
	@echo '                          GUEST_ARGS: see GUEST_ARGS=--help)'
	@echo 'make wheel                a wheel for any Linux since glibc 2.34, in build/dist'
	@echo 'make deb                  a Debian package in build/deb (DEB_ARGS: see DEB_ARGS=--help)'
	@echo 'make image                a container image in build/image, for docker load'
	@echo 'make lock                 write requirements.lock anew from pyproject.toml'
	@echo 'make clean                remove what was built here (kernels stay in the cache)'
	@echo
	@echo 'AGENTCG_WHERE=native|guest overrides where demo, test and bench run.'

setup:
	@./setup.sh

demo: setup
	@$(VENV)/python -m bench.demo $(DEMO_ARGS)

test: setup
	@$(VENV)/python -m tests.run

# Some 30 s with a warm cache of pip, the first time; nothing of it is in the lock.
test-integrations: setup
	@test -x build/integrations/bin/python || $(PYTHON) -m venv build/integrations
	@build/integrations/bin/pip install --quiet --disable-pip-version-check \
		-r tests/integrations/requirements.txt grpcio protobuf
	@echo $(CURDIR)/agent_sdk > "$$(build/integrations/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/agentcgroup.pth"
	@cp build/bin/agentcg-exec build/integrations/bin/
	$(if $(AGENTS),AGENTCG_AGENTS=1) $(VENV)/pytest tests/integrations $(if $(AGENTS),tests/agents)

lint: setup
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/lint-imports --no-cache
	$(VENV)/mypy
	git ls-files -co --exclude-standard '*.c' '*.h' | xargs -r $(VENV)/clang-format --dry-run -Werror

bench: setup
	@$(VENV)/python -m bench.run $(BENCH) $(BENCH_ARGS)

guest: setup
	@$(VENV)/python -m tests.guest.$(GUEST) $(GUEST_ARGS) -- sh -c "$$CMD"

wheel: setup
	@$(VENV)/python -m tools.manylinux $(WHEEL_ARGS)

deb: setup
	@$(VENV)/python -m tools.build_deb $(DEB_ARGS)

image: setup
	@$(VENV)/python -m tools.build_image $(IMAGE_ARGS)

# Exact versions for every Python and platform at once, each with its hashes.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv
	build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev \
		--generate-hashes --no-emit-index-url --custom-compile-command 'make lock' \
		--upgrade pyproject.toml --output-file requirements.lock

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis agent_sdk/agentcgroup/v1
	rm -rf daemon/agentcgroupd/bpf/lib daemon/agentcgroupd/bpf/objects
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
