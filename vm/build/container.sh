# Functions of the scripts that start containers (/containers/*/*/inside), which run in namespaces of their own.
# `here` is the container's directory, `root` where its root is.

set -e
root=$here/rootfs
# What is mounted below the places that init shares is seen outside; the rest, and so all of $root, is this container's own.
mount --make-private /

fail() {
	echo "vm: ${here##*/}: $*" >&2
	exit 125
}

# The image is in more than one container: what this one writes goes to memory of its own.
overlay() {
	local own=/run/overlay${here#/containers}
	mkdir -p "$own/upper" "$own/work" "$root"
	mount -t overlay -o "lowerdir=$1,upperdir=$own/upper,workdir=$own/work" overlay "$root" || fail "the module overlay is missing"
}

# Names for the applets of an image that has only busybox.
applets() { [ -e "$root/bin/sh" ] || chroot "$root" /bin/busybox --install -s /bin; }

point() { # SOURCE DESTINATION: make what is to be mounted upon
	[ -e "$root$2" ] && return
	if [ -d "$1" ]; then
		mkdir -p "$root$2"
	else
		mkdir -p "$root${2%/*}"
		: >"$root$2"
	fi
}

bind() { # SOURCE DESTINATION FLAGS PROPAGATION
	[ -e "$1" ] || fail "bind: there is no $1"
	point "$1" "$2"
	mount -o rbind "$1" "$root$2"
	mount "--make-$4" "$root$2"
	[ -z "$3" ] || mount -o "remount,bind,$3" none "$root$2"
}

place() { # TYPE SOURCE DESTINATION OPTIONS
	mkdir -p "$root$3"
	mount -t "$1" -o "$4" "$2" "$root$3"
}

dev() {
	place tmpfs dev /dev nosuid,mode=755,size=64m
	cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty "$root/dev/"
	mkdir "$root/dev/pts" "$root/dev/shm" "$root/dev/mqueue"
	ln -s /proc/self/fd "$root/dev/fd"
	ln -s fd/0 "$root/dev/stdin"
	ln -s fd/1 "$root/dev/stdout"
	ln -s fd/2 "$root/dev/stderr"
	ln -s pts/ptmx "$root/dev/ptmx"
}

device() { # PATH TYPE MAJOR MINOR MODE
	mkdir -p "$root${1%/*}"
	rm -f "$root$1"
	mknod -m "$5" "$root$1" "$2" $3 $4
}

masked() {
	[ -e "$root$1" ] || return 0
	if [ -d "$root$1" ]; then mount -t tmpfs -o ro,size=0 masked "$root$1"; else mount -o bind /dev/null "$root$1"; fi
}

unwritable() {
	[ -e "$root$1" ] || return 0
	mount -o rbind "$root$1" "$root$1"
	mount -o remount,bind,ro none "$root$1"
}

namespace() { # KIND PATH: keep one of ours, for others to enter
	mkdir -p "${2%/*}"
	: >"$2"
	mount -o bind "/proc/self/ns/$1" "$2"
}
