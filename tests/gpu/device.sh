#!/bin/bash
# Make build/device: what the tests and the benchmark need on a GPU machine that has PyTorch but can
# fetch nothing. For CPython 3.12 on x86-64, at the versions of requirements.lock.
#
# Then copy the sources to that machine, and of what is built:
#   build/device build/bin daemon/agentcgroupd/bpf/objects daemon/agentcgroupd/bpf/lib
#   agent_sdk/agentcgroup/v1
# and run there: bash tests/gpu/on_device.sh

set -euo pipefail
cd "$(dirname "$0")/../.."
PACKAGES='annotated-types grpcio grpcio-health-checking grpcio-reflection hypothesis iniconfig
	nvidia-ml-py packaging pluggy prometheus-client protobuf pydantic pydantic-core pygments
	pytest pytest-timeout sortedcontainers typing-extensions typing-inspection'
SITE=build/device/site

rm -rf build/device
mkdir -p "$SITE"
pinned=$(for name in $PACKAGES; do grep -oE "^$name==[^ ;\\]+" requirements.lock || echo "missing:$name" >&2; done)
# shellcheck disable=SC2086 # one word each
.venv/bin/pip --disable-pip-version-check install --quiet --no-deps --only-binary=:all: --target "$SITE" \
	--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
	--python-version 3.12 --implementation cp $pinned
rm -rf "$SITE"/bin "$SITE"/*/tests "$SITE"/grpc/_cython/_credentials
find "$SITE" -name '__pycache__' -prune -exec rm -rf {} +
# What the sources say of their version is asked of the installed package's metadata.
cp -r .venv/lib/python3.*/site-packages/agentcgroup-*.dist-info "$SITE"
strip --strip-debug "$SITE"/grpc/_cython/*.so 2>/dev/null || true
.venv/bin/python -c 'from tests.standin import build; print(build())' >/dev/null
mkdir -p build/device/standin
cp build/standin/libcuda.so.1 build/device/standin/
du -sh build/device build/bin daemon/agentcgroupd/bpf/objects daemon/agentcgroupd/bpf/lib agent_sdk/agentcgroup/v1
