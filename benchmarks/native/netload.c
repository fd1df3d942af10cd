/* netload: servers, clients and probes for the benchmarks. One epoll thread, one JSON line on standard output.
 *
 *   netload serve ADDRESS PORT                       TCP and UDP peer; prints the port it listens on, runs until ended
 *   netload dns-serve ADDRESS PORT                   answers every A question with 192.0.2.80
 *   netload probe ADDRESS PORT SECONDS               waits until one octet comes back over TCP
 *   netload rr ADDRESS PORT CONNECTIONS SECONDS      one-octet ping-pong on every connection
 *   netload crr ADDRESS PORT LOOPS SECONDS           connect, one octet, its reply, the server closes first
 *   netload short ADDRESS PORT LOOPS COUNT           COUNT connections as those of crr, and how each of them ended
 *   netload idle ADDRESS PORT CONNECTIONS SECONDS    opens, at most so long, and holds; standard input closed = ask
 *                                                    each again and end
 *   netload udp-up ADDRESS PORT SIZE RATE SECONDS    datagrams to the peer; RATE 0 is as fast as they go
 *   netload udp-down ADDRESS PORT SIZE RATE SECONDS  datagrams from the peer
 *   netload dns ADDRESS PORT ZONE WINDOW SECONDS NAMES  queries for so many names with WINDOW outstanding, each answer checked
 *   netload dhcp-tap INTERFACE SECONDS               waits for the interface, then DISCOVER until an OFFER comes
 *   netload dhcp-qemu PATH SECONDS                   the same over a stream with 4-octet big-endian lengths
 *
 * What a TCP connection is for is told by its first octet: 'r' is echoed, 'c' is echoed and the connection closed. Behind
 * 'u' everything is thrown away until the client has no more; after 'd' octets come until then. Both end with how many it
 * were, without that first one, as 8 octets in network byte order. These have a thread each and move 128 KiB per call.
 *
 * For clients that only speak HTTP, as busybox's: `GET /N` brings N octets of text, `POST` is answered with how many
 * octets its body had, in decimal. One request per connection, a thread each, calls as large as above.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "latency.h"

#define NANO 1000000000ull
#define BATCH 64
#define DATAGRAM_MAX 65536

static void fail(const char *what)
{
	fprintf(stderr, "netload: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t clock_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NANO + now.tv_nsec;
}

static void pause_ns(uint64_t ns)
{
	struct timespec span = { ns / NANO, ns % NANO };
	nanosleep(&span, NULL);
}

static uint64_t in_seconds(const char *text)
{
	return (uint64_t)(atof(text) * 1e9);
}

static struct sockaddr_in address_of(const char *address, const char *port)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
	if (inet_pton(AF_INET, address, &sin.sin_addr) != 1) {
		fprintf(stderr, "netload: %s is not an IPv4 address\n", address);
		exit(2);
	}
	return sin;
}

static void set_int(int fd, int level, int name, int value)
{
	setsockopt(fd, level, name, &value, sizeof value);
}

/* The machine's default may be bbr, which paces and hides what is measured. */
static void tune_tcp(int fd)
{
	setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
	set_int(fd, IPPROTO_TCP, TCP_NODELAY, 1);
}

static void tune_udp(int fd)
{
	set_int(fd, SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20);
	set_int(fd, SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20);
}

/* ---- UDP: what crosses ---------------------------------------------------------------------------------------- */

enum { DATA = 'D', QUERY = 'Q', ANSWER = 'A', GO = 'G' };

struct head { /* first 16 octets of every datagram; the rest not in DATA */
	uint32_t magic;
	uint32_t kind;
	uint32_t run;
	uint32_t seq;
	uint64_t first;
	uint64_t second;
};
#define MAGIC 0x6c6f6164u
#define DATA_HEAD 16

static int is_ours(const struct head *head, ssize_t size)
{
	return size >= DATA_HEAD && head->magic == MAGIC && (head->kind == DATA || size >= (ssize_t)sizeof *head);
}

/* Send datagrams of `size` octets for `span` ns, `rate` per second or without pause; returns how many the kernel took. */
static uint64_t blast(int fd, const struct sockaddr_in *to, uint32_t run, int size, int rate, uint64_t span)
{
	static char payload[BATCH][DATAGRAM_MAX];
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];
	memset(messages, 0, sizeof messages);
	for (int i = 0; i < BATCH; i++) {
		struct head head = { .magic = MAGIC, .kind = DATA, .run = run };
		memcpy(payload[i], &head, DATA_HEAD);
		vectors[i] = (struct iovec){ payload[i], size };
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
		if (to) {
			messages[i].msg_hdr.msg_name = (void *)to;
			messages[i].msg_hdr.msg_namelen = sizeof *to;
		}
	}
	prctl(PR_SET_TIMERSLACK, 1);
	uint64_t sent = 0, start = clock_ns(), now = start;
	while (now - start < span) {
		int due = BATCH;
		if (rate) {
			uint64_t wanted = (uint64_t)((double)(now - start) * rate / 1e9) + 1;
			due = wanted - sent < BATCH ? (int)(wanted - sent) : BATCH;
		}
		if (due > 0) {
			for (int i = 0; i < due; i++)
				((struct head *)payload[i])->seq = (uint32_t)(sent + i);
			int taken = sendmmsg(fd, messages, due, 0);
			if (taken > 0)
				sent += taken;
			else if (errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED && errno != EINTR)
				fail("sendmmsg");
		} else {
			pause_ns(100000);
		}
		now = clock_ns();
	}
	return sent;
}

/* ---- the peer -------------------------------------------------------------------------------------------------- */

static struct {
	uint32_t run;
	uint64_t count, first, last;
} sink;
static struct {
	uint32_t run; /* of the last GO: the client repeats it until data arrives */
	uint64_t sent;
	int ended;
} *source; /* shared with the child that sends */

static void serve_go(int fd, const struct head *head, const struct sockaddr_in *from)
{
	if (head->run == source->run)
		return;
	source->run = head->run;
	source->ended = 0;
	if (fork() != 0)
		return;
	source->sent = blast(fd, from, head->run, (int)head->seq, (int)head->first, head->second);
	source->ended = 1;
	_exit(0);
}

static void serve_datagrams(int fd)
{
	static char payload[BATCH][2048]; /* longer ones are cut: only the head matters */
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];
	struct sockaddr_in from[BATCH];
	memset(messages, 0, sizeof messages);
	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){ payload[i], sizeof payload[i] };
		messages[i].msg_hdr = (struct msghdr){ &from[i], sizeof from[i], &vectors[i], 1, NULL, 0, 0 };
	}
	int count = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
	uint64_t now = clock_ns();
	for (int i = 0; i < count; i++) {
		struct head *head = (struct head *)payload[i];
		if (!is_ours(head, messages[i].msg_len))
			continue;
		if (head->kind == DATA) {
			if (sink.run != head->run) {
				memset(&sink, 0, sizeof sink);
				sink.run = head->run;
				sink.first = now;
			}
			sink.count++;
			sink.last = now;
		} else if (head->kind == QUERY) {
			struct head answer = { .magic = MAGIC, .kind = ANSWER, .run = head->run };
			if (sink.run == head->run) {
				answer.first = sink.count;
				answer.second = sink.last - sink.first;
			} else if (source->run == head->run) {
				if (!source->ended)
					continue;
				answer.first = source->sent;
			}
			sendto(fd, &answer, sizeof answer, 0, (struct sockaddr *)&from[i], sizeof from[i]);
		} else if (head->kind == GO) {
			serve_go(fd, head, &from[i]);
		}
	}
}

static int bound(int kind, struct sockaddr_in *at)
{
	int fd = socket(AF_INET, kind | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("socket");
	if (kind == SOCK_STREAM) {
		set_int(fd, SOL_SOCKET, SO_REUSEADDR, 1);
		tune_tcp(fd);
	} else {
		tune_udp(fd);
	}
	if (bind(fd, (struct sockaddr *)at, sizeof *at) < 0)
		fail("bind");
	socklen_t length = sizeof *at;
	getsockname(fd, (struct sockaddr *)at, &length);
	return fd;
}

static void watch(int poller, int op, int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };
	if (epoll_ctl(poller, op, fd, &event) < 0)
		fail("epoll_ctl");
}

#define BULK 131072
#define FIRST 65536 /* what is read to see what a connection is for */

struct bulk {
	int fd;
	char what;
	uint64_t count;
};

static void *serve_bulk(void *argument)
{
	struct bulk bulk = *(struct bulk *)argument;
	char *octets = calloc(1, BULK);
	ssize_t size = -1;
	free(argument);
	fcntl(bulk.fd, F_SETFL, 0);
	if (bulk.what == 'u') {
		while ((size = recv(bulk.fd, octets, BULK, 0)) > 0)
			bulk.count += (uint64_t)size;
	} else {
		char ignored;
		while ((size = recv(bulk.fd, &ignored, 1, MSG_DONTWAIT)) != 0) {
			if (size < 0 && errno != EAGAIN)
				break;
			size = send(bulk.fd, octets, BULK, MSG_NOSIGNAL);
			if (size < 0)
				break;
			bulk.count += (uint64_t)size;
		}
	}
	if (size == 0) { /* the client is still there */
		for (int i = 7; i >= 0; i--, bulk.count >>= 8)
			octets[i] = (char)bulk.count;
		send(bulk.fd, octets, 8, MSG_NOSIGNAL);
	}
	close(bulk.fd);
	free(octets);
	return NULL;
}

struct web {
	int fd;
	size_t size;
	char head[FIRST + 1]; /* and what of the body came with it */
};

static void *serve_web(void *argument)
{
	struct web *web = argument;
	char *octets = malloc(BULK), *end, *told;
	size_t room = sizeof web->head - 1;
	ssize_t some = 1;
	fcntl(web->fd, F_SETFL, 0);
	while (!(end = strstr(web->head, "\r\n\r\n")) && web->size < room && some > 0) {
		some = recv(web->fd, web->head + web->size, room - web->size, 0);
		web->size += some > 0 ? (size_t)some : 0;
	}
	if (end && web->head[0] == 'G') {
		uint64_t left = strncmp(web->head, "GET /", 5) ? 0 : strtoull(web->head + 5, NULL, 10);
		dprintf(web->fd, "HTTP/1.1 200 OK\r\nContent-Length: %llu\r\nConnection: close\r\n\r\n", (unsigned long long)left);
		memset(octets, 'x', BULK);
		while (left && (some = send(web->fd, octets, left < BULK ? left : BULK, MSG_NOSIGNAL)) > 0)
			left -= (uint64_t)some;
	} else if (end) {
		told = strcasestr(web->head, "\r\nContent-Length:");
		uint64_t length = told && told < end ? strtoull(told + 17, NULL, 10) : 0;
		uint64_t count = web->size - (size_t)(end + 4 - web->head);
		while (count < length && (some = recv(web->fd, octets, BULK, 0)) > 0)
			count += (uint64_t)some;
		int digits = snprintf(octets, BULK, "%llu", (unsigned long long)count);
		dprintf(web->fd, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", digits, octets);
	}
	close(web->fd);
	free(octets);
	free(web);
	return NULL;
}

static void start_thread(void *(*run)(void *), void *argument)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, run, argument) != 0)
		fail("pthread_create");
	pthread_detach(thread);
}

/* `size` octets of it were read; they begin with what it is for. */
static void start(int fd, const char *octets, size_t size)
{
	if (octets[0] == 'u' || octets[0] == 'd') {
		struct bulk *bulk = malloc(sizeof *bulk);
		*bulk = (struct bulk){ fd, octets[0], octets[0] == 'u' ? size - 1 : 0 };
		start_thread(serve_bulk, bulk);
	} else {
		struct web *web = calloc(1, sizeof *web);
		web->fd = fd;
		web->size = size;
		memcpy(web->head, octets, size);
		start_thread(serve_web, web);
	}
}

static int serve(char **args)
{
	struct sockaddr_in at = address_of(args[0], args[1]);
	int listener = bound(SOCK_STREAM, &at), datagrams = bound(SOCK_DGRAM, &at), poller = epoll_create1(0);
	if (listen(listener, 4096) < 0)
		fail("listen");
	signal(SIGCHLD, SIG_IGN);
	source = mmap(NULL, sizeof *source, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (source == MAP_FAILED)
		fail("mmap");
	watch(poller, EPOLL_CTL_ADD, listener, EPOLLIN);
	watch(poller, EPOLL_CTL_ADD, datagrams, EPOLLIN);
	printf("{\"port\": %d}\n", ntohs(at.sin_port));
	fflush(stdout);
	struct epoll_event events[256];
	char octets[FIRST];
	for (;;) {
		int ready = epoll_wait(poller, events, 256, -1);
		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.fd;
			if (fd == datagrams) {
				serve_datagrams(fd);
			} else if (fd == listener) {
				int accepted;
				while ((accepted = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
					set_int(accepted, IPPROTO_TCP, TCP_NODELAY, 1);
					watch(poller, EPOLL_CTL_ADD, accepted, EPOLLIN);
				}
			} else {
				ssize_t size = recv(fd, octets, sizeof octets, 0);
				if (size > 0 && memchr("udGP", octets[0], 4)) {
					watch(poller, EPOLL_CTL_DEL, fd, 0);
					start(fd, octets, (size_t)size);
					continue;
				}
				if (size > 0)
					size = send(fd, octets, size, MSG_NOSIGNAL);
				if (size <= 0 ? size == 0 || errno != EAGAIN : octets[0] == 'c')
					close(fd);
			}
		}
	}
	return 0;
}

static int dns_serve(char **args)
{
	struct sockaddr_in at = address_of(args[0], args[1]), from;
	int fd = bound(SOCK_DGRAM, &at);
	fcntl(fd, F_SETFL, 0);
	printf("{\"port\": %d}\n", ntohs(at.sin_port));
	fflush(stdout);
	static const uint8_t answer[] = { 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 80 };
	for (;;) {
		uint8_t message[2048];
		socklen_t length = sizeof from;
		ssize_t size = recvfrom(fd, message, 1024, 0, (struct sockaddr *)&from, &length);
		ssize_t end = 12;
		while (end < size && message[end])
			end += message[end] + 1;
		end += 5; /* the root label, type and class */
		if (size < 17 || end > size)
			continue;
		memcpy(message + 2, "\x81\x80\0\1\0\1\0\0\0\0", 10);
		memcpy(message + end, answer, sizeof answer);
		sendto(fd, message, end + sizeof answer, 0, (struct sockaddr *)&from, length);
	}
	return 0;
}

/* ---- TCP clients ------------------------------------------------------------------------------------------------ */

static int stream_socket(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("socket");
	tune_tcp(fd);
	return fd;
}

static int connected(const struct sockaddr_in *to)
{
	int fd = stream_socket();
	struct timeval limit = { 5, 0 };
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	if (connect(fd, (const struct sockaddr *)to, sizeof *to) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

static int echoes(int fd)
{
	char octet = 'r';
	return send(fd, &octet, 1, MSG_NOSIGNAL) == 1 && recv(fd, &octet, 1, 0) == 1;
}

static int probe(char **args)
{
	struct sockaddr_in to = address_of(args[0], args[1]);
	uint64_t start = clock_ns(), end = start + in_seconds(args[2]);
	while (clock_ns() < end) {
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		struct pollfd ready = { fd, POLLOUT, 0 };
		connect(fd, (struct sockaddr *)&to, sizeof to);
		if (poll(&ready, 1, 200) == 1 && send(fd, "r", 1, MSG_NOSIGNAL) == 1) {
			char octet;
			ready.events = POLLIN;
			if (poll(&ready, 1, 500) == 1 && recv(fd, &octet, 1, 0) == 1) {
				printf("{\"seconds\": %.6f}\n", (clock_ns() - start) / 1e9);
				return 0;
			}
		}
		close(fd);
		pause_ns(5000000);
	}
	fprintf(stderr, "netload: no answer from %s:%s\n", args[0], args[1]);
	return 1;
}

static int rr(char **args)
{
	struct sockaddr_in to = address_of(args[0], args[1]);
	int count = atoi(args[2]), poller = epoll_create1(0), errors = 0;
	int *fds = calloc(count, sizeof *fds);
	static uint64_t asked[65536];
	for (int i = 0; i < count; i++) {
		fds[i] = connected(&to);
		if (fds[i] < 0 || !echoes(fds[i]))
			fail("connect");
		fcntl(fds[i], F_SETFL, O_NONBLOCK);
		watch(poller, EPOLL_CTL_ADD, fds[i], EPOLLIN);
	}
	uint64_t start = clock_ns(), now = start, end = start + in_seconds(args[3]), done = 0;
	for (int i = 0; i < count; i++) {
		asked[fds[i]] = start;
		if (send(fds[i], "r", 1, MSG_NOSIGNAL) != 1)
			fail("send");
	}
	struct epoll_event events[256];
	char octet;
	while (now < end) {
		int ready = epoll_wait(poller, events, 256, 100);
		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.fd;
			if (recv(fd, &octet, 1, 0) == 1 && (now = clock_ns(), send(fd, "r", 1, MSG_NOSIGNAL) == 1)) {
				done++;
				sample(now - asked[fd]);
				asked[fd] = now;
			} else {
				errors++;
				epoll_ctl(poller, EPOLL_CTL_DEL, fd, NULL);
			}
		}
		now = clock_ns();
	}
	double seconds = (now - start) / 1e9;
	printf("{\"operations\": %llu, \"seconds\": %.6f, \"rate\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"errors\": %d}\n",
	       (unsigned long long)done, seconds, done / seconds, percentile_us(.5), percentile_us(.99), errors);
	return 0;
}

static void crr_open(int poller, const struct sockaddr_in *to, uint64_t *asked, int *errors)
{
	int fd = stream_socket();
	fcntl(fd, F_SETFL, O_NONBLOCK);
	if (connect(fd, (const struct sockaddr *)to, sizeof *to) < 0 && errno != EINPROGRESS) {
		if (++*errors > 1000)
			fail("connect");
		close(fd);
		pause_ns(1000000);
		crr_open(poller, to, asked, errors);
		return;
	}
	asked[fd] = clock_ns();
	watch(poller, EPOLL_CTL_ADD, fd, EPOLLOUT);
}

static int crr(char **args)
{
	struct sockaddr_in to = address_of(args[0], args[1]);
	int loops = atoi(args[2]), poller = epoll_create1(0), errors = 0;
	static uint64_t asked[65536];
	uint64_t start = clock_ns(), now = start, end = start + in_seconds(args[3]), done = 0;
	for (int i = 0; i < loops; i++)
		crr_open(poller, &to, asked, &errors);
	struct epoll_event events[256];
	char octets[16];
	while (now < end) {
		int ready = epoll_wait(poller, events, 256, 100);
		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.fd;
			if (events[i].events & EPOLLOUT && !(events[i].events & (EPOLLERR | EPOLLHUP))) {
				if (send(fd, "c", 1, MSG_NOSIGNAL) == 1) {
					watch(poller, EPOLL_CTL_MOD, fd, EPOLLIN);
					continue;
				}
			} else {
				ssize_t size = recv(fd, octets, sizeof octets, 0);
				if (size > 0) { /* the reply; its FIN is most often already here */
					size = recv(fd, octets, sizeof octets, 0);
					if (size < 0 && errno == EAGAIN)
						continue;
				}
				if (size == 0) {
					done++;
					sample(clock_ns() - asked[fd]);
				} else if (++errors > 10000) {
					fail("connection");
				}
			}
			close(fd);
			crr_open(poller, &to, asked, &errors);
		}
		now = clock_ns();
	}
	double seconds = (now - start) / 1e9;
	printf("{\"operations\": %llu, \"seconds\": %.6f, \"rate\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"errors\": %d}\n",
	       (unsigned long long)done, seconds, done / seconds, percentile_us(.5), percentile_us(.99), errors);
	return 0;
}

#define SILENCE_MS 20000 /* when nothing happens for so long, what is open hangs */

/* How each connection ended: `served` with its octet and the end; `refused`, reset before an octet came; `empty`, ended
 * without one, which a client takes for an answer; `cut`, reset after it; `hung`, not at all. */
static int short_connections(char **args)
{
	struct sockaddr_in to = address_of(args[0], args[1]);
	int loops = atoi(args[2]), total = atoi(args[3]), poller = epoll_create1(0), begun = 0, open = 0, refused = 0;
	int served = 0, empty = 0, cut = 0, failed = 0;
	static uint8_t answered[65536];
	static uint64_t asked[65536];
	uint64_t start = clock_ns();
	struct epoll_event events[256];
	char octets[16];
	for (;;) {
		for (; begun < total && open < loops; begun++, open++)
			crr_open(poller, &to, asked, &failed);
		int ready = open ? epoll_wait(poller, events, 256, SILENCE_MS) : 0;
		if (!ready)
			break;
		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.fd;
			if (events[i].events & EPOLLOUT && !(events[i].events & (EPOLLERR | EPOLLHUP))) {
				answered[fd] = 0;
				if (send(fd, "c", 1, MSG_NOSIGNAL) == 1) {
					watch(poller, EPOLL_CTL_MOD, fd, EPOLLIN);
					continue;
				}
				refused++;
			} else {
				ssize_t size = recv(fd, octets, sizeof octets, 0);
				if (events[i].events & EPOLLOUT)
					answered[fd] = 0; /* it never got as far */
				if (size > 0) {
					answered[fd] = 1;
					size = recv(fd, octets, sizeof octets, 0);
				}
				if (size < 0 && errno == EAGAIN)
					continue;
				if (size == 0)
					answered[fd] ? served++ : empty++;
				else
					answered[fd] ? cut++ : refused++;
			}
			close(fd);
			open--;
		}
	}
	printf("{\"served\": %d, \"refused\": %d, \"empty\": %d, \"cut\": %d, \"hung\": %d, \"seconds\": %.3f}\n", served, refused,
	       empty, cut, open, (clock_ns() - start) / 1e9);
	return 0;
}

static int idle(char **args)
{
	struct sockaddr_in to = address_of(args[0], args[1]);
	int count = atoi(args[2]), open = 0, alive = 0;
	int *fds = calloc(count, sizeof *fds);
	uint64_t start = clock_ns(), end = start + in_seconds(args[3]);
	while (open < count && clock_ns() < end && (fds[open] = connected(&to)) >= 0 && echoes(fds[open]))
		open++;
	printf("{\"open\": %d, \"seconds\": %.3f}\n", open, (clock_ns() - start) / 1e9);
	fflush(stdout);
	char octet;
	while (read(0, &octet, 1) > 0)
		;
	for (int i = 0; i < open; i++)
		alive += echoes(fds[i]);
	printf("{\"alive\": %d}\n", alive);
	return open == count && alive == count ? 0 : 1;
}

/* ---- UDP clients ------------------------------------------------------------------------------------------------ */

static int datagram_socket(char **args)
{
	struct sockaddr_in to = address_of(args[0], args[1]);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	tune_udp(fd);
	if (connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
		fail("connect");
	return fd;
}

static uint32_t run_id(void)
{
	return (uint32_t)(clock_ns() >> 10) ^ ((uint32_t)getpid() << 16);
}

static int udp_size(const char *text)
{
	int size = atoi(text);
	if (size < DATA_HEAD || size > 65507) {
		fprintf(stderr, "netload: datagrams are %d to 65507 octets\n", DATA_HEAD);
		exit(2);
	}
	return size;
}

static void udp_result(uint64_t sent, uint64_t received, uint64_t span)
{
	double rate = span ? received / (span / 1e9) : 0;
	printf("{\"sent\": %llu, \"received\": %llu, \"rate\": %.1f, \"loss\": %.6f}\n", (unsigned long long)sent,
	       (unsigned long long)received, rate, sent ? 1.0 - (double)received / sent : 0.0);
}

static int udp_up(char **args)
{
	int fd = datagram_socket(args);
	uint32_t run = run_id();
	uint64_t sent = blast(fd, NULL, run, udp_size(args[2]), atoi(args[3]), in_seconds(args[4]));
	struct head query = { .magic = MAGIC, .kind = QUERY, .run = run }, answer;
	for (int i = 0; i < 40; i++) {
		pause_ns(50000000); /* what is queued on the way comes first */
		send(fd, &query, sizeof query, 0);
		struct pollfd ready = { fd, POLLIN, 0 };
		while (poll(&ready, 1, 200) == 1) {
			ssize_t size = recv(fd, &answer, sizeof answer, MSG_DONTWAIT);
			if (size == sizeof answer && is_ours(&answer, size) && answer.kind == ANSWER && answer.run == run) {
				udp_result(sent, answer.first, answer.second);
				return 0;
			}
			if (size < 0 && errno != EAGAIN && errno != ECONNREFUSED)
				fail("recv");
		}
	}
	fprintf(stderr, "netload: the peer does not report\n");
	return 1;
}

static int udp_down(char **args)
{
	int fd = datagram_socket(args);
	uint32_t run = run_id();
	uint64_t span = in_seconds(args[4]), start = clock_ns(), asked = 0, first = 0, last = 0, received = 0;
	struct head go = { .magic = MAGIC, .kind = GO, .run = run, .seq = (uint32_t)udp_size(args[2]),
			   .first = (uint64_t)atoi(args[3]), .second = span };
	struct head query = { .magic = MAGIC, .kind = QUERY, .run = run };
	static char payload[BATCH][2048];
	struct mmsghdr messages[BATCH];
	struct iovec vectors[BATCH];
	memset(messages, 0, sizeof messages);
	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){ payload[i], sizeof payload[i] };
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	for (uint64_t now = start; now < start + span + 4 * NANO; now = clock_ns()) {
		int over = received && now - first > span && now - last > NANO / 10;
		if ((!received || over) && now - asked > NANO / 4) {
			asked = now;
			send(fd, over ? &query : &go, sizeof go, 0);
		}
		struct pollfd ready = { fd, POLLIN, 0 };
		if (poll(&ready, 1, 50) != 1)
			continue;
		int count = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
		now = clock_ns();
		for (int i = 0; i < count; i++) {
			struct head *head = (struct head *)payload[i];
			if (!is_ours(head, messages[i].msg_len) || head->run != run)
				continue;
			if (head->kind == ANSWER) {
				udp_result(head->first, received, last - first);
				return 0;
			}
			if (!received++)
				first = now;
			last = now;
		}
	}
	fprintf(stderr, "netload: %llu datagrams, but the peer's count did not arrive\n", (unsigned long long)received);
	return 1;
}

static int dns(char **args)
{
	int fd = datagram_socket(args), window = atoi(args[3]), outstanding = 0;
	static uint64_t asked[65536]; /* by id; 0 = not outstanding */
	uint64_t start = clock_ns(), now = start, end = start + in_seconds(args[4]), done = 0, wrong = 0, lost = 0, swept = start;
	uint16_t id = 0;
	int names = atoi(args[5]);
	uint8_t message[2048];
	while (now < end) {
		while (outstanding < window) {
			while (asked[++id])
				;
			char name[256];
			snprintf(name, sizeof name, "q%u.%s", id % names, args[2]);
			memcpy(message, "\0\0\1\0\0\1\0\0\0\0\0\0", 12);
			message[0] = id >> 8;
			message[1] = (uint8_t)id;
			size_t at = 12;
			for (char *label = strtok(name, "."); label; label = strtok(NULL, ".")) {
				message[at++] = (uint8_t)strlen(label);
				memcpy(message + at, label, strlen(label));
				at += strlen(label);
			}
			memcpy(message + at, "\0\0\1\0\1", 5);
			if (send(fd, message, at + 5, 0) < 0)
				break;
			asked[id] = clock_ns();
			outstanding++;
		}
		struct pollfd ready = { fd, POLLIN, 0 };
		if (poll(&ready, 1, 50) == 1) {
			ssize_t size;
			while ((size = recv(fd, message, sizeof message, MSG_DONTWAIT)) >= 12) {
				uint16_t reply = (uint16_t)(message[0] << 8 | message[1]);
				char label[16];
				int length = snprintf(label, sizeof label, "q%u", reply % names);
				if (!asked[reply] || !(message[2] & 0x80) || message[3] & 15 || !message[7] || size < 13 + length ||
				    memcmp(message + 13, label, length)) {
					wrong++;
					continue;
				}
				sample(clock_ns() - asked[reply]);
				asked[reply] = 0;
				outstanding--;
				done++;
			}
		}
		now = clock_ns();
		if (now - swept > NANO / 2) {
			swept = now;
			for (int i = 0; i < 65536; i++)
				if (asked[i] && now - asked[i] > NANO) {
					asked[i] = 0;
					outstanding--;
					lost++;
				}
		}
	}
	double seconds = (now - start) / 1e9;
	printf("{\"operations\": %llu, \"seconds\": %.6f, \"rate\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"wrong\": %llu, \"lost\": %llu}\n",
	       (unsigned long long)done, seconds, done / seconds, percentile_us(.5), percentile_us(.99),
	       (unsigned long long)wrong, (unsigned long long)lost);
	return 0;
}

/* ---- DHCP: the first offer ----------------------------------------------------------------------------------------- */

static const uint8_t client_mac[6] = { 0x02, 0x62, 0x65, 0x6e, 0x63, 0x68 };
#define XID 0x62656e63u

static size_t discover(uint8_t *frame)
{
	memset(frame, 0, 342);
	memset(frame, 0xff, 6);
	memcpy(frame + 6, client_mac, 6);
	memcpy(frame + 12, "\x08\x00\x45\x00\x01\x48\x00\x00\x00\x00\x40\x11\x00\x00\0\0\0\0\xff\xff\xff\xff", 22);
	uint32_t sum = 0;
	for (int i = 14; i < 34; i += 2)
		sum += frame[i] << 8 | frame[i + 1];
	sum = (sum & 0xffff) + (sum >> 16);
	frame[24] = (uint8_t)(~sum >> 8);
	frame[25] = (uint8_t)~sum;
	memcpy(frame + 34, "\0\x44\0\x43\x01\x34\0\0", 8); /* ports 68 and 67; 308 octets, no checksum */
	uint8_t *bootp = frame + 42;
	memcpy(bootp, "\1\1\6\0", 4);
	*(uint32_t *)(bootp + 4) = htonl(XID);
	bootp[10] = 0x80; /* answer by broadcast */
	memcpy(bootp + 28, client_mac, 6);
	memcpy(bootp + 236, "\x63\x82\x53\x63\x35\1\1\x37\4\1\3\6\x1a\xff", 14);
	return 342;
}

static int is_offer(const uint8_t *frame, ssize_t size)
{
	if (size < 42 + 244 || memcmp(frame + 12, "\x08\x00\x45", 3) || frame[23] != 17 || frame[36] || frame[37] != 68)
		return 0;
	const uint8_t *bootp = frame + 42, *end = frame + size;
	if (bootp[0] != 2 || *(const uint32_t *)(bootp + 4) != htonl(XID))
		return 0;
	for (const uint8_t *option = bootp + 240; option + 2 < end && *option != 255; option += *option ? option[1] + 2 : 1)
		if (*option == 53)
			return option[2] == 2;
	return 0;
}

static int offered(void)
{
	uint64_t now = clock_ns();
	printf("{\"monotonic\": %llu.%09llu}\n", (unsigned long long)(now / NANO), (unsigned long long)(now % NANO));
	return 0;
}

static int dhcp_tap(char **args)
{
	uint64_t end = clock_ns() + in_seconds(args[1]);
	uint8_t frame[2048], request[512];
	size_t length = discover(request);
	int fd = -1;
	while (clock_ns() < end) {
		if (fd < 0) {
			struct ifreq up = { .ifr_flags = IFF_UP };
			strncpy(up.ifr_name, args[0], IFNAMSIZ - 1);
			struct sockaddr_ll at = { .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP),
						  .sll_ifindex = (int)if_nametoindex(args[0]) };
			if (at.sll_ifindex) {
				fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_IP));
				if (fd < 0)
					fail("AF_PACKET");
				if (ioctl(fd, SIOCSIFFLAGS, &up) < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) < 0) {
					close(fd);
					fd = -1;
				}
			}
			if (fd < 0) {
				pause_ns(1000000);
				continue;
			}
		}
		send(fd, request, length, MSG_DONTWAIT);
		struct pollfd ready = { fd, POLLIN, 0 };
		for (uint64_t until = clock_ns() + 5000000; clock_ns() < until && poll(&ready, 1, 5) == 1;)
			if (is_offer(frame, recv(fd, frame, sizeof frame, MSG_DONTWAIT)))
				return offered();
	}
	fprintf(stderr, "netload: no DHCP offer\n");
	return 1;
}

static int dhcp_qemu(char **args)
{
	uint64_t end = clock_ns() + in_seconds(args[1]);
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	strncpy(at.sun_path, args[0], sizeof at.sun_path - 1);
	uint8_t request[512] = { 0, 0, 342 >> 8, 342 & 255 };
	static uint8_t stream[1 << 17];
	size_t length = 4 + discover(request + 4), held = 0;
	int fd = -1;
	while (clock_ns() < end) {
		if (fd < 0) {
			fd = socket(AF_UNIX, SOCK_STREAM, 0);
			if (connect(fd, (struct sockaddr *)&at, sizeof at) < 0) {
				close(fd);
				fd = -1;
				pause_ns(1000000);
				continue;
			}
			held = 0;
		}
		if (send(fd, request, length, MSG_NOSIGNAL) < 0) {
			close(fd);
			fd = -1;
			continue;
		}
		struct pollfd ready = { fd, POLLIN, 0 };
		while (poll(&ready, 1, 20) == 1) {
			ssize_t size = recv(fd, stream + held, sizeof stream - held, 0);
			if (size <= 0)
				break;
			held += (size_t)size;
			for (size_t frame; held >= 4; held -= frame, memmove(stream, stream + frame, held)) {
				frame = 4 + ((size_t)stream[2] << 8 | stream[3]);
				if (held < frame)
					break;
				if (is_offer(stream + 4, (ssize_t)frame - 4))
					return offered();
			}
		}
	}
	fprintf(stderr, "netload: no DHCP offer\n");
	return 1;
}

static const struct {
	const char *name;
	int arguments;
	int (*run)(char **);
} commands[] = {
	{ "serve", 2, serve },       { "dns-serve", 2, dns_serve }, { "probe", 3, probe },       { "rr", 4, rr },
	{ "crr", 4, crr },           { "idle", 4, idle },           { "udp-up", 5, udp_up },     { "udp-down", 5, udp_down },
	{ "dns", 6, dns },           { "dhcp-tap", 2, dhcp_tap },   { "dhcp-qemu", 2, dhcp_qemu },
	{ "short", 4, short_connections },
};

int main(int argc, char **argv)
{
	struct rlimit limit;
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	signal(SIGPIPE, SIG_IGN);
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
		if (argc > 1 && !strcmp(argv[1], commands[i].name) && argc - 2 == commands[i].arguments)
			return commands[i].run(argv + 2);
	fprintf(stderr, "usage: netload");
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
		fprintf(stderr, " %s%s(%d arguments)", i ? "| " : "", commands[i].name, commands[i].arguments);
	fprintf(stderr, "\n");
	return 2;
}
