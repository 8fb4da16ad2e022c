#!/bin/bash
# Record the agents of bench/agents, all at the same time, into bench/recordings (or a directory
# given as the first argument). Needs root, cgroup v2 with the memory controller, git and g++; no
# network. Takes about three minutes on a machine with 8 cores or more.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=$(realpath -m "${1:-bench/recordings}")
PYTHON=${PYTHON:-.venv/bin/python}
# Which agents, and the part of the inputs that each needs.
declare -A NEEDS=([build_cpp]=cpp [fix_tests]=suite [history]=repo [analyse]=data [packages]=wheels)
read -ra AGENTS <<<"${AGENTS:-build_cpp fix_tests history analyse packages}"
BIN=build/bin
[ -x "$BIN/agentcg" ] || { echo "record_all: run 'make setup' first" >&2; exit 1; }
for tool in git g++; do
	command -v "$tool" >/dev/null || { echo "record_all: $tool is needed" >&2; exit 1; }
done
PYTHON=$(realpath -s "$PYTHON")
BIN=$(realpath "$BIN")

WORK=$(mktemp -d "${TMPDIR:-/var/tmp}/agentcg-record-XXXXXX")
POOL=agentcg-record-$$
export AGENTCG_RUN_DIR=$WORK/run AGENTCG_EXEC=$BIN/agentcg-exec
DAEMON=
finish() {
	local status=$?
	[ -z "$DAEMON" ] || { kill "$DAEMON" 2>/dev/null && wait "$DAEMON" 2>/dev/null; } || true
	rm -rf "$WORK"
	exit $status
}
trap finish EXIT

cat >"$WORK/agentcgroupd.toml" <<END
[pool]
cgroup = "/$POOL"
[server]
run_dir = "$AGENTCG_RUN_DIR"
metrics_address = ""
[audit]
path = "$WORK/audit.jsonl"
[history]
path = ""
END
"$PYTHON" -m agentcgroupd --config "$WORK/agentcgroupd.toml" 2>"$WORK/daemon.log" &
DAEMON=$!
for _ in $(seq 600); do
	[ -S "$AGENTCG_RUN_DIR/admin/attach.sock" ] && break
	kill -0 $DAEMON 2>/dev/null || { cat "$WORK/daemon.log" >&2; exit 1; }
	sleep 0.1
done

# One agent: its inputs, a session, the recorder, the run, the end. The recorder stops by itself
# when its session closes.
record_one() {
	local name=$1 work=$WORK/$1 recorder
	"$BIN/agentcg" session open "$name" >/dev/null
	"$BIN/agentcg" record "$name" -o "$OUT/$name.jsonl.gz" 2>"$WORK/$name.record" &
	recorder=$!
	until grep -q '^recording' "$WORK/$name.record" 2>/dev/null; do
		kill -0 $recorder 2>/dev/null || { cat "$WORK/$name.record" >&2; return 1; }
		sleep 0.05
	done
	local status=0
	"$BIN/agentcg-exec" --session "$name" -- "$PYTHON" -m "bench.agents.$name" "$work" \
		2>"$WORK/$name.log" || status=$?
	"$BIN/agentcg" session close "$name" >/dev/null
	wait $recorder || status=$?
	[ $status = 0 ] || { echo "record_all: $name failed:" >&2; cat "$WORK/$name.log" >&2; }
	return $status
}

echo "record_all: making the inputs"
for name in "${AGENTS[@]}"; do
	"$PYTHON" -m bench.agents.prepare "$WORK/$name" "${NEEDS[$name]}" &
	pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done

echo "record_all: ${#AGENTS[@]} agents at work"
mkdir -p "$OUT"
pids=()
for name in "${AGENTS[@]}"; do
	record_one "$name" &
	pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
