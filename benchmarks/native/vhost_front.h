/* A vhost-user front-end and the driver of its two split virtqueues, as far as the guests here have it in common
 * (vhost-user protocol, "front-end"; virtio 1.2, 2.7 and 5.1). Included once by a program, which first defines PROGRAM, its
 * name in complaints.
 *
 * The order: `connect_to`, `negotiate`, `make_memory`, the two queues (`rx` is queue 0, `tx` queue 1), `hand_over_memory`,
 * `hand_over` of each, `publish(&rx)`.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define HEADER 12 /* struct virtio_net_hdr_v1 */
#define FRAME_MAX 65550
#define PAGE 4096

static uint64_t features; /* negotiated */

static bool has(int feature)
{
	return features >> feature & 1;
}

__attribute__((noreturn, format(printf, 1, 2))) static void complain(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fprintf(stderr, PROGRAM ": ");
	vfprintf(stderr, format, arguments);
	fprintf(stderr, "\n");
	exit(1);
}

__attribute__((noreturn)) static void fail(const char *what)
{
	complain("%s: %s", what, strerror(errno));
}

/* ---- the guest's memory -------------------------------------------------------------------------------------------- */

#define GUEST_BASE (1ull << 30) /* its physical address: one that is neither an offset nor an address of ours */

static uint8_t *memory;
static size_t memory_size, memory_used;
static int memory_fd;

/* `size` octets that begin a page. */
static void *allot(size_t size)
{
	void *at = memory + memory_used;
	memory_used += (size + PAGE - 1) & ~(size_t)(PAGE - 1);
	if (memory_used > memory_size)
		complain("the guest's memory is too small");
	return at;
}

static uint64_t physical(const void *at)
{
	return GUEST_BASE + (uint64_t)((const uint8_t *)at - memory);
}

/* ---- split virtqueues (virtio 1.2, 2.7) ------------------------------------------------------------------------------ */

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };      /* of a descriptor */
enum { NO_INTERRUPT = 1, NO_NOTIFY = 1 };        /* of the available and the used ring */

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags, next;
};

struct available {
	_Atomic uint16_t flags, index;
	uint16_t ring[]; /* and behind it `used_event` */
};

struct used {
	_Atomic uint16_t flags, index;
	struct {
		uint32_t id, length;
	} ring[]; /* and behind it `avail_event` */
};

struct queue {
	struct descriptor *table;
	struct available *available;
	struct used *used;
	_Atomic uint16_t *used_event, *avail_event;
	unsigned size, mask;
	unsigned chain; /* descriptors of the table that each slot has for itself; slot s has those from s * chain on */
	unsigned slots;
	uint16_t filled, published; /* available index: what is written, and what the back-end sees of it */
	uint16_t seen;		    /* used index */
	bool *offered;		    /* by slot: the back-end has it, or is about to */
	int kick, call;
	uint64_t frames, octets, kicks, calls;
};

static struct queue rx, tx;

static void make_queue(struct queue *queue, unsigned size, unsigned chain)
{
	queue->size = size;
	queue->mask = size - 1;
	queue->chain = chain;
	queue->slots = size / chain;
	queue->offered = calloc(queue->slots + 1, sizeof *queue->offered);
	queue->table = allot(size * sizeof *queue->table);
	queue->available = allot(sizeof *queue->available + size * 2 + 2);
	queue->used = allot(sizeof *queue->used + size * sizeof queue->used->ring[0] + 2);
	queue->used_event = (_Atomic uint16_t *)&queue->available->ring[size];
	queue->avail_event = (_Atomic uint16_t *)&queue->used->ring[size];
	queue->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	queue->call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (queue->kick < 0 || queue->call < 0)
		fail("eventfd");
	if (!has(VIRTIO_RING_F_EVENT_IDX))
		atomic_store_explicit(&queue->available->flags, NO_INTERRUPT, memory_order_relaxed);
}

/* Write `pieces` as the chain of a slot; with more than one and `indirect`, as that table. */
static void describe(struct queue *queue, unsigned slot, struct descriptor *pieces, unsigned count, struct descriptor *indirect)
{
	struct descriptor *table = queue->table, *to = table + slot * queue->chain;
	unsigned first = slot * queue->chain;
	if (indirect && count > 1) {
		*to = (struct descriptor){ physical(indirect), count * sizeof *indirect, INDIRECT, 0 };
		to = indirect;
		first = 0;
	}
	for (unsigned i = 0; i < count; i++) {
		pieces[i].flags |= i + 1 < count ? NEXT : 0;
		pieces[i].next = (uint16_t)(i + 1 < count ? first + i + 1 : 0);
		to[i] = pieces[i];
	}
}

/* The back-end may have the slot's chain, once it is published. */
static void offer(struct queue *queue, unsigned slot)
{
	queue->offered[slot] = true;
	queue->available->ring[queue->filled++ & queue->mask] = (uint16_t)(slot * queue->chain);
}

/* Let the back-end see what was offered, and wake it if it asked for that. */
static void publish(struct queue *queue)
{
	uint16_t now = queue->filled, before = queue->published;
	atomic_store_explicit(&queue->available->index, now, memory_order_release);
	queue->published = now;
	atomic_thread_fence(memory_order_seq_cst); /* the index before the event is read: the back-end does it the other way round */
	bool asked;
	if (has(VIRTIO_RING_F_EVENT_IDX)) {
		uint16_t event = atomic_load_explicit(queue->avail_event, memory_order_relaxed);
		asked = (uint16_t)(now - event - 1) < (uint16_t)(now - before);
	} else {
		asked = !(atomic_load_explicit(&queue->used->flags, memory_order_relaxed) & NO_NOTIFY);
	}
	if (asked) {
		queue->kicks++;
		if (write(queue->kick, &(uint64_t){ 1 }, 8) < 0 && errno != EAGAIN)
			fail("a kick");
	}
}

/* Entries in the used ring that were not looked at. */
static unsigned waiting(const struct queue *queue)
{
	unsigned count = (uint16_t)(atomic_load_explicit(&queue->used->index, memory_order_acquire) - queue->seen);
	if (count > queue->slots)
		complain("the used index ran ahead by %u", count);
	return count;
}

/* The slot of the next used entry. */
static unsigned take(struct queue *queue, uint32_t *length)
{
	unsigned at = queue->seen++ & queue->mask;
	uint32_t id = queue->used->ring[at].id;
	*length = queue->used->ring[at].length;
	unsigned slot = id / queue->chain;
	if (id % queue->chain || slot >= queue->slots || !queue->offered[slot])
		complain("used entry %u names descriptor %u, which begins no chain that was made available", at, id);
	queue->offered[slot] = false;
	return slot;
}

/* Ask to be called when `count` entries will be waiting; false when they are already. */
static bool arm(struct queue *queue, unsigned count)
{
	if (has(VIRTIO_RING_F_EVENT_IDX))
		atomic_store_explicit(queue->used_event, (uint16_t)(queue->seen + count - 1), memory_order_relaxed);
	else
		atomic_store_explicit(&queue->available->flags, 0, memory_order_relaxed);
	atomic_thread_fence(memory_order_seq_cst);
	return waiting(queue) < count;
}

/* No calls for now. With EVENT_IDX there is nothing to do: an event that has passed asks for none. */
static void disarm(struct queue *queue)
{
	if (!has(VIRTIO_RING_F_EVENT_IDX))
		atomic_store_explicit(&queue->available->flags, NO_INTERRUPT, memory_order_relaxed);
}

/* ---- vhost-user ---------------------------------------------------------------------------------------------------- */

enum request {
	GET_FEATURES = 1,
	SET_FEATURES = 2,
	SET_OWNER = 3,
	SET_MEM_TABLE = 5,
	SET_VRING_NUM = 8,
	SET_VRING_ADDR = 9,
	SET_VRING_BASE = 10,
	SET_VRING_KICK = 12,
	SET_VRING_CALL = 13,
	GET_PROTOCOL_FEATURES = 15,
	SET_PROTOCOL_FEATURES = 16,
	GET_QUEUE_NUM = 17,
	SET_VRING_ENABLE = 18,
};

enum { VERSION = 1, REPLY = 4, NEED_REPLY = 8 };
enum { PROTOCOL_MQ = 0, PROTOCOL_REPLY_ACK = 3 };
#define PROTOCOL_FEATURES 30 /* the feature bit that says there are any */

static int control;
static bool acknowledged; /* REPLY_ACK was negotiated */

static void receive(void *into, size_t size)
{
	ssize_t got = recv(control, into, size, MSG_WAITALL);
	if (got < 0)
		fail("no answer from the back-end");
	if ((size_t)got < size)
		complain("the back-end hung up in the middle of the set-up");
}

static uint64_t reply_to(enum request request)
{
	struct {
		uint32_t request, flags, size;
	} head;
	uint64_t value;
	receive(&head, sizeof head);
	if (head.request != (uint32_t)request || (head.flags & 7) != (VERSION | REPLY) || head.size != sizeof value)
		complain("request %d was answered by request %u, flags %#x, %u octets", request, head.request, head.flags, head.size);
	receive(&value, sizeof value);
	return value;
}

static void tell(enum request request, const void *payload, size_t size, int fd)
{
	bool get = request == GET_FEATURES || request == GET_PROTOCOL_FEATURES || request == GET_QUEUE_NUM;
	uint32_t head[3] = { request, VERSION | (acknowledged && !get ? NEED_REPLY : 0), (uint32_t)size };
	struct iovec pieces[2] = { { head, sizeof head }, { (void *)payload, size } };
	union {
		struct cmsghdr align;
		char room[CMSG_SPACE(sizeof(int))];
	} ancillary = { 0 };
	struct msghdr message = { .msg_iov = pieces, .msg_iovlen = 2 };
	if (fd >= 0) {
		message.msg_control = ancillary.room;
		message.msg_controllen = sizeof ancillary.room;
		struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(rights), &fd, sizeof fd);
	}
	if (sendmsg(control, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof head + size))
		fail("the control socket");
	if (acknowledged && !get && reply_to(request) != 0)
		complain("the back-end refused request %d", request);
}

static void tell_u64(enum request request, uint64_t value, int fd)
{
	tell(request, &value, sizeof value, fd);
}

static void tell_state(enum request request, uint32_t index, uint32_t number)
{
	tell(request, (uint32_t[2]){ index, number }, 8, -1);
}

static uint64_t ask(enum request request)
{
	tell(request, NULL, 0, -1);
	return reply_to(request);
}

/* Take what is offered and known here, but for the feature bits `without`. */
static void negotiate(uint64_t without)
{
	uint64_t want = 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_RING_F_INDIRECT_DESC | 1ull << VIRTIO_NET_F_CSUM |
			1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_GUEST_TSO4 | 1ull << VIRTIO_NET_F_GUEST_ECN |
			1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_ECN |
			1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << PROTOCOL_FEATURES;
	features = ask(GET_FEATURES) & want & ~without;
	if (!has(VIRTIO_F_VERSION_1))
		complain("the back-end does not offer VIRTIO_F_VERSION_1");
	if (has(PROTOCOL_FEATURES)) {
		uint64_t protocol = ask(GET_PROTOCOL_FEATURES) & (1ull << PROTOCOL_MQ | 1ull << PROTOCOL_REPLY_ACK);
		tell_u64(SET_PROTOCOL_FEATURES, protocol, -1);
		acknowledged = protocol >> PROTOCOL_REPLY_ACK & 1;
		if (protocol >> PROTOCOL_MQ & 1 && ask(GET_QUEUE_NUM) == 0)
			complain("the back-end has no queues");
	}
	tell(SET_OWNER, NULL, 0, -1);
	tell_u64(SET_FEATURES, features, -1);
}

/* Memory for the guest, zeroed; once, before anything is allotted. */
static void make_memory(size_t size)
{
	memory_size = size;
	memory_fd = memfd_create("guest", MFD_CLOEXEC);
	if (memory_fd < 0 || ftruncate(memory_fd, (off_t)size) < 0)
		fail("memfd");
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
}

static void hand_over_memory(void)
{
	struct {
		uint32_t regions, padding;
		uint64_t physical, size, user, offset;
	} table = { 1, 0, GUEST_BASE, memory_size, (uint64_t)(uintptr_t)memory, 0 };
	tell(SET_MEM_TABLE, &table, sizeof table, memory_fd);
}

static void hand_over(uint32_t index, const struct queue *queue)
{
	struct {
		uint32_t index, flags;
		uint64_t table, used, available, log;
	} address = { index, 0, (uint64_t)(uintptr_t)queue->table, (uint64_t)(uintptr_t)queue->used,
		      (uint64_t)(uintptr_t)queue->available, 0 };
	tell_state(SET_VRING_NUM, index, queue->size);
	tell_state(SET_VRING_BASE, index, 0);
	tell(SET_VRING_ADDR, &address, sizeof address, -1);
	tell_u64(SET_VRING_CALL, index, queue->call);
	tell_u64(SET_VRING_KICK, index, queue->kick);
	if (has(PROTOCOL_FEATURES))
		tell_state(SET_VRING_ENABLE, index, 1);
}

static void connect_to(const char *path)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof at.sun_path) {
		fprintf(stderr, PROGRAM ": the path of a socket has at most 107 octets\n");
		exit(2);
	}
	strcpy(at.sun_path, path);
	for (int attempt = 0; attempt < 5000; attempt++) {
		control = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (connect(control, (struct sockaddr *)&at, sizeof at) == 0) {
			setsockopt(control, SOL_SOCKET, SO_RCVTIMEO, &(struct timeval){ 10, 0 }, sizeof(struct timeval));
			return;
		}
		close(control);
		nanosleep(&(struct timespec){ 0, 2000000 }, NULL);
	}
	fail(path);
}

/* ---- mergeable receive buffers -------------------------------------------------------------------------------------- */

static uint8_t *rx_memory;
static size_t rx_slot;
static unsigned *rx_free, rx_free_count; /* what will be given back, the last first, as Linux does */

/* All of the queue made available in buffers of `size` octets; returns how many the largest frame takes. */
static inline unsigned make_mergeable_rx(unsigned ring, unsigned size)
{
	make_queue(&rx, ring, 1);
	rx_slot = size;
	rx_memory = allot(rx.slots * rx_slot);
	rx_free = malloc(rx.slots * sizeof *rx_free);
	for (unsigned slot = 0; slot < rx.slots; slot++) {
		struct descriptor one = { physical(rx_memory + slot * rx_slot), size, WRITE, 0 };
		describe(&rx, slot, &one, 1, NULL);
		offer(&rx, slot);
	}
	unsigned largest = (unsigned)((HEADER + FRAME_MAX + rx_slot - 1) / rx_slot);
	if (rx.slots < largest)
		complain("%u buffers of %u octets do not hold a frame of 64 KiB", rx.slots, size);
	return largest;
}

static void give_back(void)
{
	while (rx_free_count)
		offer(&rx, rx_free[--rx_free_count]);
	publish(&rx);
}

/* ---- of use to both ------------------------------------------------------------------------------------------------ */

static void tally(struct queue *queue)
{
	uint64_t calls;
	if (read(queue->call, &calls, 8) == 8)
		queue->calls += calls;
}

static void watch(int epoll, int operation, int fd, uint32_t events)
{
	if (epoll_ctl(epoll, operation, fd, &(struct epoll_event){ .events = events, .data.fd = fd }) < 0)
		fail("epoll_ctl");
}

static unsigned number(const char *text, unsigned least, unsigned most, const char *what)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);
	if (*end || end == text || value < least || value > most) {
		fprintf(stderr, PROGRAM ": %s must be a number from %u to %u, not %s\n", what, least, most, text);
		exit(2);
	}
	return (unsigned)value;
}
