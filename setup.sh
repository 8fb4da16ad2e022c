#!/bin/bash
# Make this checkout ready to use: Debian packages that are missing, .venv from requirements.lock,
# libbpf where the system's is too old, the build, and the test kernels where this machine cannot
# run the daemon itself.
# Each step says what it does and is skipped when its result is there: a second run starts at once.
#
# PYTHON  the interpreter for .venv, 3.11 or later (default python3)
# CLANG   the compiler for bpf/, 16 or later (default: found in PATH)

set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
STAMPS=build/stamp

say() { echo "setup: $*"; }
die() {
	echo "setup: $*" >&2
	exit 1
}

# --- Debian packages ---------------------------------------------------------------------------

have() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ]; }

# What is missing is found by what is needed, not by package name: a compiler or a Python that came
# another way is as good.
missing_packages() {
	have git || echo git
	have setpriv || echo util-linux
	have bwrap || echo bubblewrap # tests run agents' sandboxes
	have groff || echo groff-base # checks the manual pages
	have "${CC:-cc}" || echo gcc
	[ -e /usr/include/stdlib.h ] || echo libc6-dev
	# For a fast start of the C programs; elsewhere than on Debian they do without.
	[ -n "${CC:-}" ] || have musl-gcc || ! have apt-get || echo musl-tools
	if ! have "$PYTHON"; then
		echo python3 python3-venv
	elif ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
		echo python3-venv
	fi
	if have "$PYTHON"; then "$PYTHON" -m tools.bpf_toolchain missing; fi
	if [ "$WHERE" != native ]; then missing_guest_packages; fi
}

missing_guest_packages() {
	have qemu-system-x86_64 || echo qemu-system-x86
	# QEMU's own file server until Debian 12, a package of its own since.
	if [ ! -x /usr/lib/qemu/virtiofsd ] && [ ! -x /usr/libexec/virtiofsd ]; then
		if apt-cache show virtiofsd >/dev/null 2>&1; then echo virtiofsd; else echo qemu-system-common; fi
	fi
	[ -x /bin/busybox ] && ! ldd /bin/busybox >/dev/null 2>&1 || echo busybox-static
	have depmod || echo kmod
	have zstd || echo zstd
	[ -x /lib/systemd/systemd ] || echo systemd
}

apt_get() {
	DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

install_packages() {
	local packages=("$@")
	if ! have apt-get; then
		die "not Debian, so please install what these Debian packages hold: ${packages[*]}"
	fi
	if [ "$(id -u)" != 0 ]; then
		die "as root, please run: apt-get install --no-install-recommends ${packages[*]}"
	fi
	say "installing ${packages[*]}"
	# An index from long ago names files that are gone, so a failure is answered with a fresh one.
	apt_get install -y --no-install-recommends "${packages[@]}" >"$STAMPS/apt.log" 2>&1 ||
		{ apt_get update && apt_get install -y --no-install-recommends "${packages[@]}"; } \
			>"$STAMPS/apt.log" 2>&1 || {
		tail -20 "$STAMPS/apt.log" >&2
		die "apt-get failed (all of it: $STAMPS/apt.log)"
	}
}

ensure_packages() {
	local packages
	# Without Python nobody can be asked yet; the list is made again once it is there.
	WHERE=native
	if have "$PYTHON"; then WHERE=$("$PYTHON" -m tests.guest.where 2>"$STAMPS/where") || die "$(<"$STAMPS/where")"; fi
	read -ra packages <<<"$(missing_packages | tr '\n' ' ')"
	if [ ${#packages[@]} = 0 ]; then return; fi
	# Some names depend on the Debian release, and a new machine may have no index to ask.
	if [ "$(id -u)" = 0 ] && have apt-get && ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
		say "reading Debian's package index"
		apt_get update >"$STAMPS/apt.log" 2>&1 || true # the installation says what is wrong
		read -ra packages <<<"$(missing_packages | tr '\n' ' ')"
	fi
	install_packages "${packages[@]}"
	packages=()
	WHERE=$("$PYTHON" -m tests.guest.where 2>"$STAMPS/where") || die "$(<"$STAMPS/where")"
	read -ra packages <<<"$(missing_packages | tr '\n' ' ')"
	if [ ${#packages[@]} != 0 ]; then install_packages "${packages[@]}"; fi
}

# --- steps with stamps -------------------------------------------------------------------------

# once NAME KEY MESSAGE command...: run the command unless it has succeeded with this key before.
once() {
	local stamp=$STAMPS/$1 key=$2
	if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then return; fi
	say "$3"
	rm -f "$stamp"
	"${@:4}"
	echo "$key" >"$stamp"
}

hash_of() { sha256sum -- "$@" | sha256sum | cut -c1-32; }

make_venv() {
	rm -rf .venv
	"$PYTHON" -m venv .venv
}

pip_install() { .venv/bin/pip --disable-pip-version-check install "$@" >"$STAMPS/pip.log" 2>&1; }

pip_failed() {
	tail -20 "$STAMPS/pip.log" >&2
	die "pip failed (all of it: $STAMPS/pip.log)"
}

# A download is tried twice.
install_lock() {
	pip_install --require-hashes -r requirements.lock ||
		pip_install --require-hashes -r requirements.lock || pip_failed
}

# The build tools are in the lock, so nothing is fetched here.
install_project() { pip_install --no-deps --no-build-isolation -e . || pip_failed; }

mkdir -p "$STAMPS"
ensure_packages
version=$("$PYTHON" -c 'import sys; print(sys.version.split()[0], sys.executable)')
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	die "$PYTHON is $version; the daemon needs 3.11 or later (make setup PYTHON=...)"

# A checkout that was moved has scripts that name its old place.
here="$version $PWD"
if [ ! -x .venv/bin/python ]; then rm -f "$STAMPS"/{venv,lock,project}; fi
if [ "$(cat "$STAMPS/venv" 2>/dev/null)" != "$here" ]; then rm -f "$STAMPS"/{lock,project}; fi
once venv "$here" "making .venv with Python ${version% *}" make_venv
once lock "$(hash_of requirements.lock)" "installing requirements.lock" install_lock
"$PYTHON" -m tools.bpf_toolchain libbpf >/dev/null # asks the system and build/libbpf, not a stamp
mapfile -t sources < <(find agent_sdk/exec bpf daemon/load daemon/oci daemon/release proto -type f | LC_ALL=C sort)
once project "$(hash_of pyproject.toml tools/*.py agent_sdk/agentcgroup/cli/*.py "${sources[@]}")" \
	"building gRPC code, C and BPF programs, installing agentcgroup" install_project

if [ "$WHERE" = guest ]; then
	once guest "$(<"$STAMPS/where")" \
		"tests run in user-mode Linux and QEMU, the demo in user-mode Linux ($(<"$STAMPS/where"))" true
	# The cache is shared by all checkouts, so the question is put to it and not to a stamp.
	"$PYTHON" -m tests.guest.kernel "${AGENTCG_KERNEL:-newest}" >/dev/null
	"$PYTHON" -m tests.guest.uml_kernel >/dev/null
fi
