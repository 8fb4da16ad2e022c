#!/bin/bash
# Everything that needs a real GPU, on a machine that was brought build/device (see device.sh): facts,
# tests, benchmark. As root; some eight minutes. A part that fails leaves the others. All output is
# in $OUT, its essence on stdout.

set -u
cd "$(dirname "$0")/../.."
ROOT=$PWD
OUT=${OUT:-$ROOT/build/gpu-out}
PYTHON=${AGENTCG_TORCH_PYTHON:-/opt/torch/.venv/bin/python3}
PARTS=${PARTS:-facts standin gpu bench}
BENCH_ARGS=${BENCH_ARGS:---seconds 4 --bursts-s 14}
mkdir -p "$OUT" build/standin
cp -n build/device/standin/libcuda.so.1 build/standin/ 2>/dev/null
touch build/standin/libcuda.so.1
export AGENTCG_TORCH_PYTHON=$PYTHON AGENTCG_WHERE=native
export AGENTCG_EXEC=$ROOT/build/bin/agentcg-exec
export PYTHONPATH=$ROOT/build/device/site:$ROOT/agent_sdk:$ROOT/daemon:$ROOT
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The machine's own plugins are for another pytest.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export PATH=$PATH:/usr/local/cuda/bin
chmod +x build/bin/* 2>/dev/null

# part NAME SECONDS CHARACTERS command...: run it with a limit, show the end of what it says.
part() {
	local name=$1 limit=$2 shown=$3 began=$SECONDS status
	shift 3
	case " $PARTS " in *" $name "*) ;; *) return ;; esac
	timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
	status=$?
	echo "=== $name: status $status after $((SECONDS - began)) s"
	tail -c "$shown" "$OUT/$name.log"
}

part facts 60 3000 "$PYTHON" -m tests.gpu.facts
part standin 100 1200 "$PYTHON" -m pytest -q -p pytest_timeout -p no:cacheprovider --tb=line \
	tests/kernel/test_vram.py tests/kernel/test_gpu_gate.py tests/kernel/test_gpu_calls.py
part gpu 200 3000 "$PYTHON" -m pytest -v -p pytest_timeout -p no:cacheprovider --tb=short --durations=0 tests/gpu
# shellcheck disable=SC2086 # words
part bench 360 4500 "$PYTHON" -m bench.gpu $BENCH_ARGS
cp -r build/bench/gpu.json "$OUT/" 2>/dev/null
for directory in /sys/fs/cgroup/agentcg-test-*; do
	if [ -d "$directory" ]; then echo "left behind: $directory"; fi
done
