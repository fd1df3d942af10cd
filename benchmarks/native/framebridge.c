/* framebridge: a kernel guest behind a QEMU-style stream link.
 *
 *   framebridge INTERFACE MTU SOCKET
 *
 * Opens a TAP without virtio-net header in the network namespace it runs in and copies frames to and from a Unix stream
 * socket, each after its length as 4 octets big-endian, as QEMU's `-netdev stream` does. So the kernel segments and fills
 * in checksums, and what is measured behind the socket is a backend without any offload. One thread; several frames per
 * writev, large reads. While the socket is full the TAP is not read: its queue holds or drops, as a network card's ring.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define FRAMES 64
#define FRAME_MAX 65600
#define INBOUND (512 << 10)

static void fail(const char *what)
{
	fprintf(stderr, "framebridge: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int open_tap(const char *name, int mtu)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("/dev/net/tun");
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(fd, TUNSETIFF, &request) < 0)
		fail("TUNSETIFF");
	request.ifr_mtu = mtu;
	if (ioctl(control, SIOCSIFMTU, &request) < 0)
		fail("SIOCSIFMTU");
	request.ifr_flags = IFF_UP;
	if (ioctl(control, SIOCSIFFLAGS, &request) < 0)
		fail("SIOCSIFFLAGS");
	close(control);
	return fd;
}

static int connect_to(const char *path)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof at.sun_path) {
		fprintf(stderr, "framebridge: the path of a socket has at most 107 octets\n");
		exit(2);
	}
	strcpy(at.sun_path, path);
	for (int attempt = 0; attempt < 1000; attempt++) {
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (connect(fd, (struct sockaddr *)&at, sizeof at) == 0) {
			fcntl(fd, F_SETFL, O_NONBLOCK);
			return fd;
		}
		close(fd);
		nanosleep(&(struct timespec){ 0, 10000000 }, NULL);
	}
	fail(path);
	return -1;
}

static uint8_t slots[FRAMES][4 + FRAME_MAX];
static struct iovec vectors[FRAMES];
static int filled, written; /* vectors[written..filled) wait for the socket */

/* 0: everything written, 1: the socket is full. */
static int write_out(int sock)
{
	while (written < filled) {
		ssize_t size = writev(sock, vectors + written, filled - written);
		if (size < 0) {
			if (errno == EAGAIN)
				return 1;
			fail("the stream ended");
		}
		while (written < filled && (size_t)size >= vectors[written].iov_len)
			size -= (ssize_t)vectors[written++].iov_len;
		if (size) {
			vectors[written].iov_base = (uint8_t *)vectors[written].iov_base + size;
			vectors[written].iov_len -= (size_t)size;
		}
	}
	filled = written = 0;
	return 0;
}

static void read_tap(int tap)
{
	size_t octets = 0;
	while (filled < FRAMES && octets < 256 << 10) {
		ssize_t size = read(tap, slots[filled] + 4, FRAME_MAX);
		if (size <= 0)
			break;
		uint32_t length = __builtin_bswap32((uint32_t)size);
		memcpy(slots[filled], &length, 4);
		vectors[filled] = (struct iovec){ slots[filled], 4 + (size_t)size };
		octets += (size_t)size;
		filled++;
	}
}

static uint8_t inbound[INBOUND];
static size_t held;

static void read_stream(int sock, int tap)
{
	ssize_t size = recv(sock, inbound + held, sizeof inbound - held, 0);
	if (size == 0)
		exit(0);
	if (size < 0) {
		if (errno == EAGAIN)
			return;
		fail("recv");
	}
	held += (size_t)size;
	size_t at = 0;
	while (held - at >= 4) {
		uint32_t length;
		memcpy(&length, inbound + at, 4);
		length = __builtin_bswap32(length);
		if (length > 69632) { /* QEMU's limit */
			fprintf(stderr, "framebridge: a length of %u octets\n", length);
			exit(1);
		}
		if (held - at - 4 < length)
			break;
		if (write(tap, inbound + at + 4, length) < 0 && errno != EINVAL && errno != EAGAIN && errno != EIO)
			fail("TAP");
		at += 4 + length;
	}
	held -= at;
	memmove(inbound, inbound + at, held);
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: framebridge INTERFACE MTU SOCKET\n");
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	int sock = connect_to(argv[3]), tap = open_tap(argv[1], atoi(argv[2])), blocked = 0;
	for (;;) {
		struct pollfd ready[2] = { { sock, (short)(POLLIN | (blocked ? POLLOUT : 0)), 0 }, { blocked ? -1 : tap, POLLIN, 0 } };
		if (poll(ready, 2, -1) < 0)
			fail("poll");
		if (ready[0].revents & (POLLIN | POLLHUP | POLLERR))
			read_stream(sock, tap);
		if (blocked && ready[0].revents & POLLOUT)
			blocked = write_out(sock);
		else if (!blocked && ready[1].revents) {
			read_tap(tap);
			blocked = write_out(sock);
		}
	}
}
