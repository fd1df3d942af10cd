/* ringbridge: a kernel guest behind a vhost-user back-end, at the speed of the kernel.
 *
 *   ringbridge [OPTIONS] INTERFACE MTU SOCKET
 *
 *   --ring N           descriptors of each virtqueue, a power of two [256]
 *   --rx-size N        octets of a receive buffer [4096]; several make up a frame (VIRTIO_NET_F_MRG_RXBUF)
 *   --no-mrg           instead, receive buffers are chains of 18 descriptors for 64 KiB, as Linux has them without MRG_RXBUF
 *   --no-event-idx     no VIRTIO_F_EVENT_IDX: notifications are only switched on and off
 *   --split-tx[=N]     frames of more than N octets [256] go out as Linux sends them: headers, then fragments [the default]
 *   --flat-tx          every frame in one descriptor
 *   --stats FILE       write the statistics there, by rename, not to standard error
 *
 * Plays QEMU and the guest's driver at once (vhost-user protocol, "front-end"; virtio 1.2, 2.7 and 5.1): opens a TAP with
 * virtio-net header in the network namespace it runs in, makes a memfd the guest's memory, hands it and two split virtqueues
 * to the back-end that listens on SOCKET, and is the driver of these from then on. What is read from the TAP goes to the
 * back-end through queue 1 ("tx" below), what the back-end put into queue 0 ("rx") to the TAP. A frame is read straight into
 * ring memory and written straight from it. Of the offloads it takes what is offered.
 *
 * One thread. It sleeps only when nothing is in the TAP and nothing in the rings; the descriptors are watched edge-triggered,
 * so a call from the back-end costs no read: its eventfd only counts, until someone asks for the statistics.
 * SIGUSR1 writes the statistics, one line of JSON; so does the end, which comes by SIGTERM, SIGINT, or the back-end's.
 */
#define PROGRAM "ringbridge"
#include "vhost_front.h"

#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>

#define BATCH 32 /* frames from the TAP before the back-end is told of them */
#define RX_BATCH 16 /* frames to the TAP before what the guest answered is looked at */

static struct {
	unsigned ring, rx_size, split_above;
	bool mergeable, event_idx, split;
	const char *stats;
} wanted = { .ring = 256, .rx_size = 4096, .split_above = 256, .mergeable = true, .event_idx = true, .split = true };

/* ---- TAP ----------------------------------------------------------------------------------------------------------- */

static int open_tap(const char *name, int mtu)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int header = HEADER;
	unsigned offloads = 0; /* what the kernel may leave to the back-end */
	if (has(VIRTIO_NET_F_CSUM)) {
		offloads |= TUN_F_CSUM;
		if (has(VIRTIO_NET_F_HOST_TSO4))
			offloads |= TUN_F_TSO4 | (has(VIRTIO_NET_F_HOST_ECN) ? TUN_F_TSO_ECN : 0);
	}
	if (fd < 0)
		fail("/dev/net/tun");
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(fd, TUNSETIFF, &request) < 0)
		fail("TUNSETIFF");
	if (ioctl(fd, TUNSETVNETHDRSZ, &header) < 0)
		fail("TUNSETVNETHDRSZ");
	if (ioctl(fd, TUNSETOFFLOAD, offloads) < 0)
		fail("TUNSETOFFLOAD");
	request.ifr_mtu = mtu;
	if (ioctl(any, SIOCSIFMTU, &request) < 0)
		fail("SIOCSIFMTU");
	request.ifr_flags = IFF_UP;
	if (ioctl(any, SIOCSIFFLAGS, &request) < 0)
		fail("SIOCSIFFLAGS");
	close(any);
	return fd;
}

/* ---- guest to back-end --------------------------------------------------------------------------------------------- */

/* A slot: header and packet headers in its first page, where a small frame fits whole, and the indirect table; then two
 * fragments as Linux's sockets have them, apart from each other. A frame is read with a guess of how long its headers are,
 * that of the frame before. Where it was wrong some octets are moved, for which there is room on both sides. */
#define HEAD_ROOM 1024
#define HEADERS_MIN 54
#define HEADERS_MAX 116
#define FRAGMENT 32768
#define FRAGMENT_1 PAGE
#define FRAGMENT_2 (FRAGMENT_1 + FRAGMENT + PAGE)
#define TX_SLOT (FRAGMENT_2 + FRAGMENT)
#define SPLIT_MAX (HEAD_ROOM - HEADER)

static uint8_t *tx_memory;
static unsigned *tx_free, tx_free_count; /* last in, first out: its memory is still in the cache */
static unsigned headers = HEADERS_MIN;   /* the guess */

static void make_tx(void)
{
	bool chains = wanted.split && !has(VIRTIO_RING_F_INDIRECT_DESC);
	make_queue(&tx, wanted.ring, chains ? 4 : 1);
	tx_memory = allot((size_t)tx.slots * TX_SLOT);
	tx_free = malloc(tx.slots * sizeof *tx_free);
	for (unsigned slot = 0; slot < tx.slots; slot++)
		tx_free[tx_free_count++] = tx.slots - 1 - slot;
}

/* Length of the headers up to the payload of a frame of which HEADERS_MIN octets lie at `frame`. */
static unsigned headers_of(const uint8_t *frame)
{
	if (frame[12] != 8 || frame[13] != 0)
		return HEADERS_MIN;
	unsigned ip = 14 + (frame[14] & 15) * 4u;
	if (frame[23] == 6)
		ip += ip + 13 <= HEADERS_MIN ? (frame[ip + 12] >> 4) * 4u : 20;
	else if (frame[23] == 17)
		ip += 8;
	return ip > HEADERS_MAX ? HEADERS_MAX : ip;
}

static void describe_tx(unsigned slot, size_t size)
{
	uint8_t *at = tx_memory + (size_t)slot * TX_SLOT, *first = at + FRAGMENT_1, *end = first + FRAGMENT;
	size_t guess = HEADER + headers;
	if (!wanted.split) {
		describe(&tx, slot, &(struct descriptor){ .address = physical(first), .length = (uint32_t)size }, 1, NULL);
		return;
	}
	if (size <= HEADER + wanted.split_above || size <= HEADER + HEADERS_MIN) {
		if (size > guess)
			memcpy(at + guess, first, size - guess);
		describe(&tx, slot, &(struct descriptor){ .address = physical(at), .length = (uint32_t)size }, 1, NULL);
		return;
	}
	unsigned found = headers_of(at + HEADER);
	size_t head = HEADER + found;
	if (head > size)
		head = size;
	if (head > guess) {
		memcpy(at + guess, first, head - guess);
		first += head - guess;
	} else if (head < guess) {
		first -= guess - head;
		memcpy(first, at + head, guess - head);
	}
	headers = found > HEADERS_MIN ? found : HEADERS_MIN;
	struct descriptor pieces[3] = { { .address = physical(at), .length = (uint32_t)head } };
	unsigned count = 1;
	if (size > head) {
		size_t length = size - head < (size_t)(end - first) ? size - head : (size_t)(end - first);
		pieces[count++] = (struct descriptor){ .address = physical(first), .length = (uint32_t)length };
		if (size > head + length)
			pieces[count++] = (struct descriptor){ .address = physical(at + FRAGMENT_2),
							       .length = (uint32_t)(size - head - length) };
	}
	describe(&tx, slot, pieces, count, has(VIRTIO_RING_F_INDIRECT_DESC) ? (struct descriptor *)(at + HEAD_ROOM) : NULL);
}

static void reap(void)
{
	uint32_t length;
	for (unsigned count = waiting(&tx); count; count--)
		tx_free[tx_free_count++] = take(&tx, &length);
}

enum collected { DRAINED, MORE, FULL };

/* Frames of the TAP into the tx ring, at most a batch. */
static enum collected collect(int tap)
{
	unsigned count = 0;
	enum collected state = MORE;
	reap();
	for (; count < BATCH; count++) {
		if (!tx_free_count) {
			state = FULL;
			break;
		}
		unsigned slot = tx_free[tx_free_count - 1];
		uint8_t *at = tx_memory + (size_t)slot * TX_SLOT;
		struct iovec split[3] = { { at, HEADER + headers }, { at + FRAGMENT_1, FRAGMENT }, { at + FRAGMENT_2, FRAGMENT } };
		ssize_t size = wanted.split ? readv(tap, split, 3) : read(tap, at + FRAGMENT_1, HEADER + FRAME_MAX);
		if (size <= HEADER) {
			if (size < 0 && errno == EINTR)
				continue;
			state = DRAINED;
			break;
		}
		tx_free_count--;
		describe_tx(slot, (size_t)size);
		offer(&tx, slot);
		tx.frames++;
		tx.octets += (uint64_t)size - HEADER;
	}
	if (tx.filled != tx.published)
		publish(&tx);
	return state;
}

/* ---- back-end to guest --------------------------------------------------------------------------------------------- */

#define BIG_PAGES 17
#define BIG_SLOT (BIG_PAGES * PAGE)
#define BIG_PAD 16 /* Linux pads the header to this, and the frame begins behind it in the same page */

static unsigned refill; /* given back when there are so many */
static uint64_t refused; /* frames the TAP did not take */

static void make_rx(void)
{
	if (has(VIRTIO_NET_F_MRG_RXBUF)) {
		unsigned largest = make_mergeable_rx(wanted.ring, wanted.rx_size);
		/* What is held back here must not keep a frame of the largest size waiting. */
		refill = rx.slots - largest < rx.slots / 4 ? rx.slots - largest : rx.slots / 4;
	} else {
		bool indirect = has(VIRTIO_RING_F_INDIRECT_DESC);
		make_queue(&rx, wanted.ring, indirect ? 1 : 1 + BIG_PAGES);
		rx_slot = BIG_SLOT;
		rx_memory = allot(rx.slots * rx_slot);
		struct descriptor *tables = allot(rx.slots * (1 + BIG_PAGES) * sizeof *tables);
		for (unsigned slot = 0; slot < rx.slots; slot++) {
			uint8_t *at = rx_memory + slot * rx_slot;
			struct descriptor pieces[1 + BIG_PAGES] = { { physical(at), HEADER, WRITE, 0 },
								    { physical(at + BIG_PAD), PAGE - BIG_PAD, WRITE, 0 } };
			for (unsigned page = 1; page < BIG_PAGES; page++)
				pieces[1 + page] = (struct descriptor){ physical(at + page * PAGE), PAGE, WRITE, 0 };
			describe(&rx, slot, pieces, 1 + BIG_PAGES, indirect ? tables + slot * (1 + BIG_PAGES) : NULL);
			offer(&rx, slot);
		}
		refill = rx.slots / 4;
		rx_free = malloc(rx.slots * sizeof *rx_free);
	}
	if (refill < 1)
		refill = 1;
}

/* A driver believes VIRTIO_NET_HDR_F_DATA_VALID; a TAP would verify the checksum, which the back-end may have left out
 * relying on that. "Not yet computed" it believes, and nothing here computes it. */
static void believe(struct virtio_net_hdr_v1 *header, const uint8_t *frame)
{
	if ((header->flags & (VIRTIO_NET_HDR_F_DATA_VALID | VIRTIO_NET_HDR_F_NEEDS_CSUM)) != VIRTIO_NET_HDR_F_DATA_VALID)
		return;
	if (frame[12] != 8 || frame[13] != 0 || (frame[23] != 6 && frame[23] != 17))
		return;
	header->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
	header->csum_start = (uint16_t)(14 + (frame[14] & 15) * 4);
	header->csum_offset = frame[23] == 6 ? 16 : 6;
}

/* Frames of the rx ring to the TAP, at most a batch; true when there may be more. */
static bool deliver(int tap)
{
	unsigned there = waiting(&rx), count = 0;
	for (; there && count < RX_BATCH; count++) {
		struct iovec pieces[IOV_MAX];
		unsigned vectors = 0, buffers = 1;
		uint32_t length;
		unsigned slot = take(&rx, &length);
		uint8_t *at = rx_memory + slot * rx_slot;
		struct virtio_net_hdr_v1 *header = (struct virtio_net_hdr_v1 *)at;
		size_t octets = length;
		if (length <= HEADER || length > (has(VIRTIO_NET_F_MRG_RXBUF) ? rx_slot : BIG_SLOT - BIG_PAD + HEADER))
			complain("a used rx buffer of %u octets", length);
		rx_free[rx_free_count++] = slot;
		if (has(VIRTIO_NET_F_MRG_RXBUF)) {
			buffers = header->num_buffers;
			if (!buffers || buffers > there || buffers > IOV_MAX)
				complain("a frame of %u buffers where %u are used", buffers, there);
			believe(header, at + HEADER);
			pieces[vectors++] = (struct iovec){ at, length };
			for (unsigned more = buffers - 1; more; more--) {
				slot = take(&rx, &length);
				if (length > rx_slot)
					complain("a used rx buffer of %u octets", length);
				rx_free[rx_free_count++] = slot;
				pieces[vectors++] = (struct iovec){ rx_memory + slot * rx_slot, length };
				octets += length;
			}
		} else {
			believe(header, at + BIG_PAD);
			pieces[vectors++] = (struct iovec){ at, HEADER };
			pieces[vectors++] = (struct iovec){ at + BIG_PAD, length - HEADER }; /* its pages adjoin */
		}
		there -= buffers;
		if (writev(tap, pieces, (int)vectors) < 0) {
			if (errno != EINVAL && errno != EAGAIN && errno != EIO)
				fail("TAP");
			refused++;
		}
		rx.frames++;
		rx.octets += octets - HEADER;
		if (rx_free_count >= refill)
			give_back();
	}
	return count == RX_BATCH;
}

/* ---- all together -------------------------------------------------------------------------------------------------- */

static uint64_t sleeps;

static void write_statistics(void)
{
	char line[512], fresh[4096];
	tally(&rx);
	tally(&tx);
	int length = snprintf(
		line, sizeof line,
		"{\"frames_out\": %" PRIu64 ", \"octets_out\": %" PRIu64 ", \"kicks_out\": %" PRIu64 ", \"calls_out\": %" PRIu64
		", \"frames_in\": %" PRIu64 ", \"octets_in\": %" PRIu64 ", \"kicks_in\": %" PRIu64 ", \"calls_in\": %" PRIu64
		", \"refused_in\": %" PRIu64 ", \"sleeps\": %" PRIu64 ", \"features\": %" PRIu64 "}\n",
		tx.frames, tx.octets, tx.kicks, tx.calls, rx.frames, rx.octets, rx.kicks, rx.calls, refused, sleeps, features);
	if (!wanted.stats) {
		fputs(line, stderr);
		return;
	}
	snprintf(fresh, sizeof fresh, "%s.new", wanted.stats);
	int fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, line, (size_t)length) != length || close(fd) < 0 || rename(fresh, wanted.stats) < 0)
		fail(wanted.stats);
}

/* Until the end. */
static void carry(int tap, int signals)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	bool watched = true;
	watch(epoll, EPOLL_CTL_ADD, tap, EPOLLIN | EPOLLET);
	watch(epoll, EPOLL_CTL_ADD, rx.call, EPOLLIN | EPOLLET);
	watch(epoll, EPOLL_CTL_ADD, tx.call, EPOLLIN | EPOLLET);
	watch(epoll, EPOLL_CTL_ADD, control, EPOLLIN | EPOLLRDHUP);
	watch(epoll, EPOLL_CTL_ADD, signals, EPOLLIN);
	for (;;) {
		bool more = deliver(tap);
		enum collected state = collect(tap);
		if ((state != FULL) != watched) { /* a full ring is not woken for each frame that the TAP queues */
			watched = state != FULL;
			watch(epoll, EPOLL_CTL_MOD, tap, (watched ? EPOLLIN : 0) | EPOLLET);
		}
		more = more || state == MORE;
		if (!more && !arm(&rx, 1))
			more = true;
		if (!more && state == FULL && !arm(&tx, (tx.slots + 1) / 2))
			more = true;
		struct epoll_event ready[8];
		int count = epoll_wait(epoll, ready, 8, more ? 0 : -1);
		sleeps += !more;
		disarm(&rx);
		disarm(&tx);
		if (count < 0 && errno != EINTR)
			fail("epoll_wait");
		for (int i = 0; i < count; i++) {
			if (ready[i].data.fd == control) {
				char ignored[256]; /* the back-end has nothing to say of itself */
				ssize_t size = recv(control, ignored, sizeof ignored, MSG_DONTWAIT);
				if (size == 0 || (size < 0 && errno != EAGAIN))
					return;
			} else if (ready[i].data.fd == signals) {
				struct signalfd_siginfo signal;
				if (read(signals, &signal, sizeof signal) != sizeof signal)
					continue;
				if (signal.ssi_signo != SIGUSR1)
					return;
				write_statistics();
			}
		}
	}
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "ring", required_argument, NULL, 'r' },	  { "rx-size", required_argument, NULL, 'b' },
		{ "no-mrg", no_argument, NULL, 'm' },		  { "no-event-idx", no_argument, NULL, 'e' },
		{ "split-tx", optional_argument, NULL, 's' },	  { "flat-tx", no_argument, NULL, 'f' },
		{ "stats", required_argument, NULL, 'o' },	  { 0 },
	};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		switch (option) {
		case 'r':
			wanted.ring = number(optarg, 2, 32768, "--ring");
			break;
		case 'b':
			wanted.rx_size = number(optarg, 128, 131072, "--rx-size");
			break;
		case 'm':
			wanted.mergeable = false;
			break;
		case 'e':
			wanted.event_idx = false;
			break;
		case 's':
			wanted.split = true;
			if (optarg)
				wanted.split_above = number(optarg, 0, SPLIT_MAX, "--split-tx");
			break;
		case 'f':
			wanted.split = false;
			break;
		case 'o':
			wanted.stats = optarg;
			break;
		default:
			exit(2);
		}
	}
	if (argc - optind != 3) {
		fprintf(stderr, "usage: ringbridge [OPTIONS] INTERFACE MTU SOCKET; the source says which options\n");
		exit(2);
	}
	if (wanted.ring & (wanted.ring - 1)) {
		fprintf(stderr, "ringbridge: --ring must be a power of two\n");
		exit(2);
	}
}

int main(int argc, char **argv)
{
	sigset_t handled;
	parse(argc, argv);
	sigemptyset(&handled);
	sigaddset(&handled, SIGTERM);
	sigaddset(&handled, SIGINT);
	sigaddset(&handled, SIGUSR1);

	connect_to(argv[optind + 2]);
	negotiate((wanted.mergeable ? 0 : 1ull << VIRTIO_NET_F_MRG_RXBUF) |
		  (wanted.event_idx ? 0 : 1ull << VIRTIO_RING_F_EVENT_IDX));
	int tap = open_tap(argv[optind], atoi(argv[optind + 1]));

	size_t of_rx = has(VIRTIO_NET_F_MRG_RXBUF) ? wanted.rx_size : BIG_SLOT + (1 + BIG_PAGES) * sizeof(struct descriptor);
	make_memory((1u << 20) + wanted.ring * (TX_SLOT + of_rx + 64));
	make_rx();
	make_tx();
	if (!rx.slots || !tx.slots)
		complain("a ring of %u has no room for one frame", wanted.ring);

	hand_over_memory();
	hand_over(0, &rx);
	hand_over(1, &tx);
	publish(&rx);
	sigprocmask(SIG_BLOCK, &handled, NULL); /* until here they simply end it */
	int signals = signalfd(-1, &handled, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0)
		fail("signalfd");
	carry(tap, signals);
	write_statistics();
	return 0;
}
