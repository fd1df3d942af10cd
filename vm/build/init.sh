#!/bin/busybox sh
# The first process of a machine that `vm build` made. It makes the places that programs expect, loads modules, runs what is in
# /containers/onboot one after another, keeps what is in /containers/services running, and ends with the machine.
#
# Signals, as busybox sends them: USR2 powers off, TERM and INT start again, USR1 halts.

# Ours come first for us, whatever else an image brings, and are there for others where nothing else is.
/bin/busybox mkdir -p /usr/lib/vm/bin
/bin/busybox --install -s /usr/lib/vm/bin
/bin/busybox --install -s /bin 2>/dev/null
export PATH=/usr/lib/vm/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
umask 022

say() { echo "vm: $*" >/dev/console; }
uptime_s() { cut -d . -f 1 /proc/uptime; }

places() {
	mount -t proc -o nosuid,nodev,noexec proc /proc
	mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
	mount -t devtmpfs -o nosuid devtmpfs /dev 2>/dev/null
	mkdir -p /dev/pts /dev/shm
	mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
	mount -t tmpfs -o nosuid,nodev,mode=1777 shm /dev/shm
	mount -t tmpfs -o nosuid,nodev,mode=755 run /run
	mount -t tmpfs -o nosuid,nodev,mode=1777 tmp /tmp
	mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
	# What a container mounts below these, with its bind marked shared, is seen by all.
	mount -o bind /var /var
	for place in /dev /run /sys /tmp /var; do mount --make-rshared $place; done
	[ -e /var/run ] || ln -s /run /var/run
	mkdir -p /var/log /run/services
	for link in fd:/proc/self/fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
		[ -e /dev/${link%%:*} ] || ln -s "${link#*:}" /dev/${link%%:*}
	done
}

modules() {
	local at=/lib/modules/$(uname -r) module
	[ -e $at/load ] || return
	while read -r module; do insmod "$at/$module" || say "module $module: not loaded"; done <$at/load 2>/dev/null
}

groups() {
	mkdir -p /sys/fs/cgroup/onboot /sys/fs/cgroup/onshutdown /sys/fs/cgroup/services
	for group in /sys/fs/cgroup /sys/fs/cgroup/onboot /sys/fs/cgroup/onshutdown /sys/fs/cgroup/services; do
		for controller in cpu memory pids cpuset; do
			echo "+$controller" >$group/cgroup.subtree_control 2>/dev/null
		done
	done
}

# Run the container in directory $1 to its end, or for $2 seconds. Nothing of it is left running: its status.
container() {
	local group=/sys/fs/cgroup${1#/containers} status process
	mkdir -p "$group"
	setsid /bin/busybox sh "$1/run" </dev/null >>"/var/log/${1##*/}.log" 2>&1 &
	process=$!
	echo $process >"/run/services/${1##*/}.pid"
	[ -z "$2" ] || (sleep "$2"; echo 1 >"$group/cgroup.kill") &
	wait $process
	status=$?
	echo 1 >"$group/cgroup.kill" 2>/dev/null
	return $status
}

# All of /containers/$1, each after the one before it has ended, or $2 seconds. One that fails is named, and the next one runs.
in_order() {
	local directory
	for directory in /containers/$1/*; do
		[ -e "$directory/run" ] || continue
		[ -z "$down" ] || [ $1 = onshutdown ] || return
		container "$directory" "$2" || {
			say "$1 ${directory##*/} failed with status $?:"
			tail -n 5 "/var/log/${directory##*/}.log" >/dev/console
			continue
		}
		say "$1 ${directory##*/} done"
	done
}

# Keep the service in directory $1 running. Each failure within 10 s doubles the pause, from 1 s to 30.
supervise() {
	local pause=1 began status
	trap - USR1 USR2 TERM INT
	while :; do
		began=$(uptime_s)
		container "$1"
		status=$?
		[ $(($(uptime_s) - began)) -lt 10 ] || pause=1
		say "service ${1##*/} ended with status $status; it starts again in $pause s"
		sleep $pause
		pause=$((pause * 2 > 30 ? 30 : pause * 2))
	done
}

# Logs are in memory: what is larger than 1 MiB loses all but its end.
crop_logs() {
	local log
	while sleep 60; do
		for log in /var/log/*.log; do
			[ "$(stat -c %s "$log" 2>/dev/null || echo 0)" -gt 1048576 ] || continue
			tail -c 262144 "$log" >/run/cropped && cat /run/cropped >"$log"
			rm -f /run/cropped
		done
	done
}

end() {
	trap : USR1 USR2 TERM INT
	say "$down"
	in_order onshutdown 10
	kill -TERM -1
	# A shell at a console ends by this. Who does not catch TERM as the first process of a namespace is not ended by it at all.
	kill -HUP -1
	for process in $(cat /sys/fs/cgroup/services/*/cgroup.procs); do
		grep -q '^SigCgt:.*[4567cdef]...$' /proc/$process/status || kill -KILL $process
	done 2>/dev/null
	tries=0
	while grep -q "populated 1" /sys/fs/cgroup/services/cgroup.events 2>/dev/null && [ $tries -lt 20 ]; do
		usleep 100000
		tries=$((tries + 1))
	done
	kill -KILL -1
	# A share whose server is gone would hold this up for ever.
	{ sync; umount -a -r; } 2>/dev/null &
	tries=0
	while kill -0 $! 2>/dev/null && [ $tries -lt 30 ]; do
		usleep 100000
		tries=$((tries + 1))
	done
	$down -f
}

down=
trap 'down=poweroff' USR2
trap 'down=reboot' TERM INT
trap 'down=halt' USR1
places
dmesg -n 1
echo 0 >/proc/sys/kernel/ctrl-alt-del # which sends INT: the way out of a machine without ACPI
modules
groups
hostname -F /etc/hostname
ip link set lo up
[ -e /containers/services/acpid ] || acpid -f -l /dev/null &
crop_logs &
in_order onboot
if [ -z "$down" ]; then
	for directory in /containers/services/*; do
		[ -e "$directory/run" ] && supervise "$directory" &
	done
	say "up after $(cut -d ' ' -f 1 /proc/uptime) s"
fi
# A signal just before `wait` is seen when the next sleep ends; meanwhile orphans are buried.
while [ -z "$down" ]; do
	sleep 5 &
	wait $!
done
end
