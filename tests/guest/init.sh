#!/bin/busybox sh
# PID 1 of the test guest (tests/guest/vm.py and uml.py write the files "config" and "command" beside
# a copy).
#
# stage 1: / is the host's root, over virtiofs or hostfs. It becomes the lower layer of an overlay, so that the
#          guest may write anywhere and the host sees none of it, except below the directories that
#          vm.py was asked to share.
# stage 2 ("run" as $1): inside the overlay, runs the command and reports how it ended.
#
# Every fork costs 50 ms under emulation, so shell built-ins are used where there is a choice.
#
# The kernel's console aside, three channels lead to the host: standard output, standard error and
# control. They are virtio ports 1 to 3 in QEMU and serial lines 0 to 2 in user-mode Linux. On the
# last the guest says "up", then "exit <status>"; the host says "forget" when its file server holds
# too many inodes for the guest.

B=/bin/busybox
[ "$1" = run ] && B=/run/guest/busybox # another root file system may have none
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH

# --- stage 2 -----------------------------------------------------------------------------------

run_command() {
	find_channels
	exec 3<>"$control"
	echo up >&3
	while read -r _ <&3; do echo 2 >/proc/sys/vm/drop_caches; done 4>&- 5>&- &
	export HOME=/root USER=root LOGNAME=root SHELL=/bin/sh TERM=dumb
	ulimit -Hn 524288 # as under systemd; the kernel's own default is 4096
	$B setsid /bin/sh /run/guest/command </dev/null >"$out" 2>"$err" 3>&- 4>&- 5>&-
	status=$?
	wait_for_relays
	echo "exit $status" >&3
	exec 3>&-
	$B sync
	$B poweroff -f
}

# Sets out, err and control to files. A command that sees a terminal behaves differently, so pipes
# lie between it and the serial lines.
find_channels() {
	relays=
	for port in /dev/vport*p1; do port=${port%1}; done
	if [ -e "${port}1" ]; then
		out=${port}1 err=${port}2 control=${port}3
		return
	fi
	out=/run/guest/out err=/run/guest/err control=/dev/ttyS2
	$B mkfifo $out $err
	for line in 0 1 2; do $B stty -F /dev/ttyS$line raw -echo; done
	$B cat $out >/dev/ttyS0 3>&- &
	relays=$!
	$B cat $err >/dev/ttyS1 3>&- &
	relays="$relays $!"
	exec 4<>$out 5<>$err # so that they do not end before the command opens them
}

# Processes that the command has left behind may hold the pipes open: what they say later is lost.
wait_for_relays() {
	[ "$relays" ] || return
	exec 4>&- 5>&-
	{ $B sleep 1; kill $relays; } 2>/dev/null &
	wait $relays
}

if [ "$1" = run ]; then
	[ "$2" = systemd ] || { $B umount -l /run/guest/host; $B ip link set lo up; }
	run_command
	exit
fi

# --- stage 1 -----------------------------------------------------------------------------------

here=${0%/*}
work=$here/work # a directory that hides nothing of the host's when something is mounted on it
new=$work/root

fail() { echo "guest: $*"; $B poweroff -f; }

mount_root() {
	$B mount -t tmpfs -o mode=755 work "$work" || fail "no tmpfs"
	$B mkdir "$new"
	$B insmod "$modules/kernel/fs/overlayfs/overlay.ko"
	overlay "$lower" "$new" root
}

# overlay LOWER TARGET NAME: what is written to TARGET stays in memory.
overlay() {
	$B mkdir -p "$work/$3-upper" "$work/$3-work" "$2"
	$B mount -t overlay -o "lowerdir=$1,upperdir=$work/$3-upper,workdir=$work/$3-work" "$3" "$2" ||
		fail "no overlay over $1"
}

mount_system() {
	$B mkdir -p $new/proc $new/sys $new/dev $new/run $new/tmp "$new/lib/modules/$release" ||
		fail "cannot write to the overlay"
	cat_fstab >"$work/fstab"
	$B mount -a -T "$work/fstab"
	$B mkdir -p $new/dev/pts $new/dev/shm $new/run/guest/host
	$B mount -t devpts -o mode=620,ptmxmode=666 devpts $new/dev/pts
	$B mount -t tmpfs shm $new/dev/shm
	$B ln -s /proc/self/fd $new/dev/fd
	$B mount --bind "$modules" "$new/lib/modules/$release"
	# The checkout is there with the host's root, unless something was mounted over it just now.
	case $lower:$checkout in
	/:/tmp/* | /:/run/*) overlay "$checkout" "$new$checkout" checkout ;;
	/:*) ;;
	*) overlay "$checkout" "$new$checkout" checkout ;;
	esac
}

# mount -a does all of these in one process. nsdelegate and memory_recursiveprot are what systemd
# mounts cgroup2 with. io and cpuset and the rest are there too: nothing claims them for cgroup v1.
cat_fstab() {
	echo "proc $new/proc proc defaults 0 0
sys $new/sys sysfs defaults 0 0
dev $new/dev devtmpfs defaults 0 0
cgroup2 $new/sys/fs/cgroup cgroup2 nsdelegate,memory_recursiveprot 0 0
bpf $new/sys/fs/bpf bpf mode=700 0 0
tracefs $new/sys/kernel/tracing tracefs defaults 0 0
debugfs $new/sys/kernel/debug debugfs defaults 0 0
securityfs $new/sys/kernel/security securityfs defaults 0 0
run $new/run tmpfs mode=755 0 0
tmp $new/tmp tmpfs mode=1777 0 0"
}

# Directories shared read-write: the same path inside and outside.
share() {
	for directory; do
		$B mkdir -p "$new$directory"
		$B mount --bind "$directory" "$new$directory" || fail "cannot share $directory"
	done
}

# Boot systemd to a target of our own that wants the command and nothing else. What this host's
# packages want at boot (device managers, timers, network...) is masked, whatever it is called:
# an empty file masks a unit.
prepare_systemd() {
	units=$new/run/systemd/system
	$B mkdir -p $units
	for target in sysinit local-fs sockets timers basic; do
		for path in $new/usr/lib/systemd/system/$target.target.wants/* \
			$new/etc/systemd/system/$target.target.wants/*; do
			case ${path##*/} in
			systemd-journald* | dbus.socket | *.target | *.slice | "*") ;;
			*) : >"$units/${path##*/}" ;;
			esac
		done
	done
	: >$units/systemd-remount-fs.service # wanted by a generator, not by a file
	echo "[Unit]
Description=agentcgroup test guest
Requires=basic.target
Wants=agentcg-guest-command.service
After=basic.target
AllowIsolate=yes" >$units/agentcg-guest.target
	echo "[Unit]
Description=The command that the test guest was started for
DefaultDependencies=no
After=basic.target
[Service]
Type=oneshot
ExecStart=/bin/sh /run/guest/init.sh run systemd
KillMode=process" >$units/agentcg-guest-command.service
	[ -s $new/etc/machine-id ] || echo 0123456789abcdef0123456789abcdef >$new/etc/machine-id
	# Left over from an image build; systemd would believe itself inside a container.
	[ -e $new/.dockerenv ] && $B rm $new/.dockerenv
}

# Sets lower, release, modules, checkout, pid1, hostname, and as positional parameters the shared
# directories.
. "$here/config"
mount_root
mount_system
share "$@"
$B cp $B "$here/init.sh" "$here/command" $new/run/guest/
echo "$hostname" >$new/proc/sys/kernel/hostname
[ "$pid1" = systemd ] && prepare_systemd
cd $new || fail "no new root"
$B pivot_root . run/guest/host || fail "no pivot_root"
B=/run/guest/busybox
exec <dev/console >dev/console 2>&1
if [ "$pid1" = systemd ]; then
	$B umount -l /run/guest/host
	for init in /lib/systemd/systemd /usr/lib/systemd/systemd; do
		[ -x $init ] && exec $B chroot . $init
	done
	fail "systemd is not installed"
fi
exec $B chroot . /bin/sh /run/guest/init.sh run
