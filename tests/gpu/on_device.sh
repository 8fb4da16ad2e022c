#!/bin/bash
# Run all that needs a real GPU, as root on a machine that has build/device (device.sh makes it):
# facts, benchmark, tests. The parts do not depend on each other. All output goes to $OUT, its end to
# stdout. By default only what the targets need, in less than four minutes; all of it is
# PARTS="facts standin bench gpu" BUDGET_S=580 BENCH_ARGS=--seconds=6

set -u
cd "$(dirname "$0")/../.."
ROOT=$PWD
OUT=${OUT:-$ROOT/build/gpu-out}
PYTHON=${AGENTCG_TORCH_PYTHON:-/opt/torch/.venv/bin/python3}
PARTS=${PARTS:-standin bench gpu}
BUDGET_S=${BUDGET_S:-225} # of all parts together
BENCH_ARGS=${BENCH_ARGS:---seconds 6 --bursts-s 35 --mps-sets 1 --parts sliced,turns,mps,ours}
mkdir -p "$OUT" build/standin
cp -n build/device/standin/libcuda.so.1 build/standin/ 2>/dev/null
touch build/standin/libcuda.so.1
export AGENTCG_TORCH_PYTHON=$PYTHON AGENTCG_WHERE=native
export AGENTCG_EXEC=$ROOT/build/bin/agentcg-exec
export PYTHONPATH=$ROOT/build/device/site:$ROOT/agent_sdk:$ROOT/daemon:$ROOT/lab:$ROOT
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The machine's own plugins are for another pytest.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export PATH=$PATH:/usr/local/cuda/bin
chmod +x build/bin/* 2>/dev/null

# part NAME SECONDS CHARACTERS COMMAND...: run COMMAND for at most SECONDS, or for what is left of the
# budget if that is less, and show the last CHARACTERS of its output.
part() {
	local name=$1 limit=$2 shown=$3 began=$SECONDS status left
	shift 3
	case " $PARTS " in *" $name "*) ;; *) return ;; esac
	left=$((BUDGET_S - SECONDS))
	if [ "$left" -lt "$limit" ]; then limit=$left; fi
	if [ "$limit" -lt 5 ]; then
		echo "=== $name: no time left"
		return
	fi
	timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
	status=$?
	echo "=== $name: status $status after $((SECONDS - began)) s"
	tail -c "$shown" "$OUT/$name.log"
}

part facts 60 3000 "$PYTHON" -m tests.gpu.facts
part standin 60 1200 "$PYTHON" -m pytest -q -p pytest_timeout -p no:cacheprovider --tb=line \
	tests/kernel/test_vram.py tests/kernel/test_gpu_gate.py tests/kernel/test_gpu_calls.py
# shellcheck disable=SC2086 # words
part bench 400 4500 "$PYTHON" -m bench.gpu.benchmark $BENCH_ARGS
part gpu 200 2500 "$PYTHON" -m pytest -v -p pytest_timeout -p no:cacheprovider --tb=short --durations=0 tests/gpu
cp -r build/bench/gpu.json "$OUT/" 2>/dev/null
for directory in /sys/fs/cgroup/agentcg-test-*; do
	if [ -d "$directory" ]; then echo "left behind: $directory"; fi
done
