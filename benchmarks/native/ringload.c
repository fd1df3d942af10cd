/* ringload: TCP, in bulk or octet by octet, by a guest that has no kernel, at the speed of the rings.
 *
 *   ringload [OPTIONS] SOCKET up|down|rr ADDRESS PORT STREAMS SECONDS
 *
 *   --ring N           descriptors of each virtqueue, a power of two [256]
 *   --rx-size N        octets of a receive buffer [4096]; several make up a frame
 *   --window N         octets that a stream may have on the way to the guest [4194304]
 *   --publish N        frames before the back-end is told of them [1]
 *   --copy             move the payload as a kernel does for its program, between the rings' memory and 128 KiB of its own
 *   --lose N           of the frames with payload, each Nth is lost here: it is not sent, or not looked at
 *   --no-tx-calls      no interrupts for frames that were sent
 *   --no-event-idx     no VIRTIO_F_EVENT_IDX: notifications are only switched on and off
 *
 * Stands in for a guest and the load program in it, with `netload serve` at ADDRESS and PORT: opens STREAMS connections,
 * moves octets for SECONDS in one direction, closes in good order, compares the server's count with its own and prints one
 * line of JSON. With SECONDS 0 it is over as soon as all are open. `rr` is that of netload: on every connection one octet,
 * its answer, and the next.
 *
 * It costs what the protocol costs and nothing else: without --copy no payload is copied, written or looked at here. What
 * goes up is sent from 4 MiB of memory, over and over; what comes down stays where the back-end put it until the buffer is
 * given back. Frames, acknowledgements and notifications are laid out and timed as by Linux:
 *
 *   up     as much as window and ring allow, in frames of 44 segments (TSO, checksum left to the device): an indirect table
 *          with the headers in a descriptor of their own, then fragments of at most 32 KiB. Each is made known by itself.
 *          After 3 duplicate ACKs, or 200 ms without progress, everything from SND.UNA on is sent again.
 *   down   a poll takes up to 64 frames, each of as many mergeable buffers as its header says; then one ACK per stream that
 *          got something, and the buffers are given back when more than half of such a budget is out.
 *   rr     headers and octet in one descriptor, each made known by itself; the ACK of an answer is in the next request.
 *   sleep  when a poll found nothing: the queues are armed, looked at again, and the calls waited for (epoll). For sent
 *          frames it asks for a call when three quarters of them are through.
 *
 * There is no congestion window and no SACK of its own: the link does not lose. What was sent twice or came out of order is
 * counted, and so is a sleep that ended by itself, after 50 ms, with frames there: a call that was owed. The guest is
 * 192.168.65.3/24, its gateway 192.168.65.1.
 */
#define PROGRAM "ringload"
#include "vhost_front.h"
#include "latency.h"

#include <arpa/inet.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/ip.h>
#include <linux/tcp.h>

static struct {
	unsigned ring, rx_size, window, publish, lose;
	bool copy, tx_calls, event_idx;
} wanted = { .ring = 256, .rx_size = 4096, .window = 4 << 20, .publish = 1, .tx_calls = true, .event_idx = true };

static bool down, rr;
static uint32_t peer, next_hop; /* network byte order */
static uint16_t peer_port;
static unsigned streams;
static uint64_t span; /* ns to be measured */

#define GUEST htonl(0xc0a84103)	  /* 192.168.65.3 */
#define GATEWAY htonl(0xc0a84101) /* 192.168.65.1 */
#define NETMASK htonl(0xffffff00)

static const uint8_t our_mac[6] = { 0x02, 0x70, 0x76, 0x6b, 0x00, 0x03 };
static uint8_t peer_mac[6];
static bool resolved;

#define NANO 1000000000ull
#define RETRANSMIT (NANO / 5)
#define PATIENCE (10 * NANO) /* without progress */
#define TICK (NANO / 20)     /* the longest sleep */

static uint64_t clock_ns(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NANO + (uint64_t)now.tv_nsec;
}

static uint64_t now; /* read once per turn */

/* ---- streams ------------------------------------------------------------------------------------------------------- */

#define MSS 1460
#define SEGMENTS 44 /* what Linux packs into a frame of 64 KiB */
#define SCALE 7
#define STREAMS_MAX 64
#define BURST 16 /* frames of one stream before the next has its turn */

enum state { SYN_SENT, OPEN };

/* Octet n of what we send has the number `iss` + 1 + n. Octet 0 is the request; at `end` comes the FIN. */
static struct stream {
	enum state state;
	uint16_t port;
	uint32_t iss, rcv_nxt;
	uint16_t mss;
	unsigned snd_scale, duplicates;
	uint64_t snd_una, snd_nxt, snd_max, snd_wnd, end;
	uint64_t received; /* in order */
	uint64_t progress; /* when SND.UNA last moved, or something was sent when nothing was outstanding */
	uint64_t asked; /* rr: when the request went out that has no answer yet */
	bool ack_due, fin_received, failed;
	uint8_t tail[8]; /* the last octets received */
} all[STREAMS_MAX];

static uint16_t first_port; /* another in each run: what a killed one left open does not matter */
static uint64_t start, end, measured; /* the interval, 0 before it is reached, and what was moved in it */
static uint64_t retransmissions, out_of_order, sleeps, missed_calls;
static uint64_t operations, errors; /* rr: in the interval; streams that ended in another way than ours */

static uint8_t program[128 << 10]; /* with --copy: where the load program of a real guest has its octets */

/* ---- frames to the back-end ---------------------------------------------------------------------------------------- */

/* A slot holds the headers and the table; the payload lies in an area that all streams have in common, in blocks as Linux
 * allots its sockets' memory, apart from each other. */
#define TX_SLOT 256
#define TABLE 128
#define BLOCK 32768
#define BLOCK_STRIDE (BLOCK + PAGE)
#define BLOCKS 128
#define AREA ((uint64_t)BLOCKS * BLOCK)
#define HEADERS (HEADER + 54)

static uint8_t *tx_memory, *area;
static unsigned *tx_free, tx_free_count;

static void make_tx(void)
{
	make_queue(&tx, wanted.ring, 1);
	tx_memory = allot((size_t)tx.slots * TX_SLOT);
	area = allot((size_t)BLOCKS * BLOCK_STRIDE);
	for (uint32_t word = 0; word < AREA / 4; word++) /* so that who looks can tell what was sent from where */
		memcpy(area + word / (BLOCK / 4) * BLOCK_STRIDE + word % (BLOCK / 4) * 4, &word, 4);
	tx_free = malloc(tx.slots * sizeof *tx_free);
	for (unsigned slot = 0; slot < tx.slots; slot++)
		tx_free[tx_free_count++] = tx.slots - 1 - slot;
}

static void reap(void)
{
	uint32_t length;
	for (unsigned count = waiting(&tx); count; count--)
		tx_free[tx_free_count++] = take(&tx, &length);
}

static bool room(void)
{
	if (!tx_free_count)
		reap();
	return tx_free_count;
}

static void dispatch(unsigned slot, struct descriptor *pieces, unsigned count)
{
	struct descriptor *table = (struct descriptor *)(tx_memory + (size_t)slot * TX_SLOT + TABLE);
	for (unsigned i = 0; i < count; i++)
		tx.octets += pieces[i].length;
	tx.octets -= HEADER;
	tx.frames++;
	describe(&tx, slot, pieces, count, table);
	offer(&tx, slot);
	if ((uint16_t)(tx.filled - tx.published) >= wanted.publish)
		publish(&tx);
}

/* ARP for IPv4 over Ethernet (RFC 826), operation 1 or 2. */
static void send_arp(uint16_t operation, uint32_t target, const uint8_t *target_mac)
{
	static const uint8_t broadcast[6] = { 255, 255, 255, 255, 255, 255 };
	if (!room())
		return;
	unsigned slot = tx_free[--tx_free_count];
	uint8_t *at = tx_memory + (size_t)slot * TX_SLOT, *frame = at + HEADER, *arp = frame + 14;
	uint32_t source = GUEST;
	memset(at, 0, HEADER + 60);
	memcpy(frame, target_mac ? target_mac : broadcast, 6);
	memcpy(frame + 6, our_mac, 6);
	memcpy(frame + 12, "\x08\x06\0\1\x08\0\6\4", 8);
	arp[7] = (uint8_t)operation;
	memcpy(arp + 8, our_mac, 6);
	memcpy(arp + 14, &source, 4);
	if (target_mac)
		memcpy(arp + 18, target_mac, 6);
	memcpy(arp + 24, &target, 4);
	dispatch(slot, &(struct descriptor){ .address = physical(at), .length = HEADER + 60 }, 1);
}

static uint32_t sum(const void *at, size_t size, uint32_t total)
{
	const uint8_t *octet = at;
	for (; size > 1; size -= 2, octet += 2)
		total += (uint32_t)octet[0] << 8 | octet[1];
	return size ? total + ((uint32_t)octet[0] << 8) : total;
}

static uint16_t folded(uint32_t total)
{
	total = (total & 0xffff) + (total >> 16);
	return (uint16_t)(total + (total >> 16));
}

static bool lost(void)
{
	static uint64_t count;
	return wanted.lose && ++count % wanted.lose == 0;
}

enum { FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16 };

/* One segment, or a frame of several, from `from` on. There is room. */
static void send_segment(struct stream *stream, uint8_t flags, uint64_t from, unsigned size)
{
	static uint16_t identification;
	unsigned slot = tx_free[--tx_free_count], options = flags & SYN ? 12 : 0;
	uint8_t *at = tx_memory + (size_t)slot * TX_SLOT, *frame = at + HEADER;
	struct virtio_net_hdr_v1 *header = (struct virtio_net_hdr_v1 *)at;
	struct iphdr *ip = (struct iphdr *)(frame + 14);
	struct tcphdr *tcp = (struct tcphdr *)(frame + 34);
	uint16_t length = (uint16_t)(20 + options + size);

	*header = (struct virtio_net_hdr_v1){ .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, .csum_start = 34, .csum_offset = 16 };
	if (size > stream->mss) {
		header->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
		header->gso_size = stream->mss;
		header->hdr_len = 54;
	}
	memcpy(frame, peer_mac, 6);
	memcpy(frame + 6, our_mac, 6);
	memcpy(frame + 12, "\x08", 2);
	*ip = (struct iphdr){ .version = 4, .ihl = 5, .tot_len = htons(20 + length), .id = htons(identification++),
			      .frag_off = htons(0x4000), .ttl = 64, .protocol = 6, .saddr = GUEST, .daddr = peer };
	ip->check = htons((uint16_t)~folded(sum(ip, 20, 0)));
	*tcp = (struct tcphdr){ .source = htons(stream->port), .dest = peer_port,
				.seq = htonl(stream->iss + (flags & SYN ? 0 : 1 + (uint32_t)from)),
				.doff = (uint16_t)(5 + options / 4) };
	if (flags & ACK) {
		tcp->ack_seq = htonl(stream->rcv_nxt);
		stream->ack_due = false;
	}
	((uint8_t *)tcp)[13] = flags;
	tcp->window = htons((uint16_t)(flags & SYN ? (wanted.window < 65535 ? wanted.window : 65535) : wanted.window >> SCALE));
	tcp->check = htons(folded(sum(&ip->saddr, 8, 6 + length)));
	if (options)
		memcpy(tcp + 1, (uint8_t[12]){ 2, 4, MSS >> 8, MSS & 255, 4, 2, 1, 1, 1, 3, 3, SCALE }, 12);

	struct descriptor pieces[5] = { { .address = physical(at), .length = HEADERS + options } };
	unsigned count = 1;
	if (size && lost()) {
		tx_free[tx_free_count++] = slot;
		return;
	}
	if (size && (!from || rr)) { /* small: with the headers */
		memset(at + HEADERS, rr ? 'r' : down ? 'd' : 'u', size);
		pieces[0].length += size;
	} else {
		for (uint64_t place = from - 1; size; count++) {
			unsigned inside = place % BLOCK, piece = size < BLOCK - inside ? size : BLOCK - inside;
			uint8_t *block = area + place / BLOCK % BLOCKS * BLOCK_STRIDE;
			pieces[count] = (struct descriptor){ .address = physical(block + inside), .length = piece };
			if (wanted.copy)
				memcpy(block + inside, program + place % sizeof program, piece); /* whole blocks: it does not wrap */
			place += piece;
			size -= piece;
		}
	}
	dispatch(slot, pieces, count);
}

/* What the stream may send now, at most a burst; true when only the burst's end stopped it. */
static bool send_stream(struct stream *stream)
{
	unsigned largest = stream->mss * SEGMENTS;
	for (unsigned count = 0; count < BURST; count++) {
		uint64_t flight = stream->snd_nxt - stream->snd_una;
		uint64_t window = stream->snd_wnd > flight ? stream->snd_wnd - flight : 0;
		uint64_t size = stream->snd_nxt < stream->end ? stream->end - stream->snd_nxt : 0;
		uint8_t flags = ACK | PSH;
		if (!stream->snd_nxt) {
			size = 1;
		} else if (size) {
			if (size > largest)
				size = largest;
			if (size > window) { /* no small frames while an ACK will come that opens the window further */
				size = flight ? 0 : window;
				size -= size > stream->mss ? size % stream->mss : 0;
			}
		} else if (end && stream->snd_nxt == stream->end && window) { /* a FIN has a place in the window too */
			flags = ACK | FIN;
		}
		if (!size && !(flags & FIN))
			return false;
		if (!room())
			return false;
		if (!flight)
			stream->progress = now;
		send_segment(stream, flags, stream->snd_nxt, (unsigned)size);
		stream->snd_nxt += size + (flags & FIN);
		if (stream->snd_nxt > stream->snd_max)
			stream->snd_max = stream->snd_nxt;
	}
	return true;
}

/* ---- frames from the back-end -------------------------------------------------------------------------------------- */

#define BUDGET 64
#define BUFFERS_MAX 1024

static struct iovec buffers[BUFFERS_MAX]; /* of a frame, behind the virtio-net header */
static unsigned buffer_count;

static void copy_out(void)
{
	size_t at = 0;
	for (unsigned i = 0; i < buffer_count; i++) {
		if (at + buffers[i].iov_len > sizeof program)
			at = 0;
		memcpy(program + at, buffers[i].iov_base, buffers[i].iov_len);
		at += buffers[i].iov_len;
	}
}

static void keep_tail(struct stream *stream, size_t fresh)
{
	size_t want = fresh < sizeof stream->tail ? fresh : sizeof stream->tail;
	memmove(stream->tail, stream->tail + want, sizeof stream->tail - want);
	uint8_t *to = stream->tail + sizeof stream->tail;
	for (unsigned i = buffer_count; want && i--;) {
		size_t here = buffers[i].iov_len < want ? buffers[i].iov_len : want;
		to -= here;
		memcpy(to, (uint8_t *)buffers[i].iov_base + buffers[i].iov_len - here, here);
		want -= here;
	}
}

/* rr: the stream has no further part in it. */
static void give_up(struct stream *stream)
{
	if (stream->failed)
		return;
	errors++;
	stream->failed = true;
	stream->ack_due = false;
	if (room())
		send_segment(stream, RST, stream->snd_max, 0);
}

/* rr: octets of one stream arrived, and the buffers end with them. The next request goes out once the poll is through. */
static void take_answer(struct stream *stream)
{
	if (stream->received > stream->end || stream->tail[7] != 'r') {
		give_up(stream);
	} else if (start && !end) {
		uint64_t at = clock_ns();
		operations++;
		sample(at - stream->asked);
		stream->asked = at;
		stream->end++;
	}
}

static void take_syn_ack(struct stream *stream, const struct tcphdr *tcp)
{
	const uint8_t *option = (const uint8_t *)(tcp + 1), *end = (const uint8_t *)tcp + tcp->doff * 4;
	if (!tcp->ack || ntohl(tcp->ack_seq) != stream->iss + 1)
		complain("a SYN that does not answer ours");
	stream->mss = 536;
	while (option < end && *option) {
		if (*option == 1) {
			option++;
			continue;
		}
		if (option + 2 > end || option[1] < 2 || option + option[1] > end)
			complain("bad TCP options");
		if (option[0] == 2 && option[1] == 4)
			stream->mss = (uint16_t)(option[2] << 8 | option[3]);
		else if (option[0] == 3 && option[1] == 3)
			stream->snd_scale = option[2] < 14 ? option[2] : 14;
		option += option[1];
	}
	if (stream->mss > MSS)
		stream->mss = MSS;
	if (!stream->mss)
		complain("the peer's MSS is 0");
	stream->state = OPEN;
	stream->rcv_nxt = ntohl(tcp->seq) + 1;
	stream->snd_wnd = ntohs(tcp->window);
	stream->progress = now;
	stream->ack_due = true;
}

static void take_ack(struct stream *stream, const struct tcphdr *tcp, bool pure)
{
	uint64_t window = (uint64_t)ntohs(tcp->window) << stream->snd_scale;
	uint64_t fresh = (uint32_t)(ntohl(tcp->ack_seq) - (stream->iss + 1 + (uint32_t)stream->snd_una));
	if (fresh > 1ull << 31)
		return; /* an old one */
	if (fresh > stream->snd_max - stream->snd_una)
		complain("octets were acknowledged that were not sent");
	if (fresh) {
		stream->snd_una += fresh;
		if (stream->snd_nxt < stream->snd_una)
			stream->snd_nxt = stream->snd_una;
		stream->progress = now;
		stream->duplicates = 0;
	} else if (pure && window == stream->snd_wnd && stream->snd_nxt > stream->snd_una) {
		if (++stream->duplicates == 3) {
			stream->snd_nxt = stream->snd_una;
			retransmissions++;
		}
	}
	stream->snd_wnd = window;
}

static void take_tcp(const struct tcphdr *tcp, size_t payload)
{
	unsigned index = (unsigned)(ntohs(tcp->dest) - first_port);
	if (index >= streams || tcp->source != peer_port) { /* of a run that was killed */
		struct stream stray = { .port = ntohs(tcp->dest), .iss = ntohl(tcp->ack_seq) - 1 };
		if (tcp->ack && !tcp->rst && room())
			send_segment(&stray, RST, 0, 0);
		return;
	}
	struct stream *stream = &all[index];
	if (tcp->rst && rr && start)
		give_up(stream);
	else if (tcp->rst)
		complain("the connection was %s", stream->state == SYN_SENT ? "refused" : "reset");
	if (stream->failed) {
		if (!tcp->rst && room())
			send_segment(stream, RST, stream->snd_max, 0);
		return;
	}
	if (stream->state == SYN_SENT) {
		if (tcp->syn)
			take_syn_ack(stream, tcp);
		return;
	}
	if (tcp->syn) { /* our ACK of it was late */
		stream->ack_due = true;
		return;
	}
	if (tcp->ack)
		take_ack(stream, tcp, !payload && !tcp->fin);
	if (!payload && !tcp->fin) {
		stream->ack_due |= ntohl(tcp->seq) != stream->rcv_nxt; /* 3.10.7.4: not acceptable */
		return;
	}
	if (payload && lost())
		return;
	stream->ack_due = true;
	uint32_t old = stream->rcv_nxt - ntohl(tcp->seq); /* octets of it that we have */
	if (old > payload) {
		out_of_order++;
		if (room()) /* at once, and one for each (RFC 5681, 4.2) */
			send_segment(stream, ACK, stream->snd_nxt, 0);
		return;
	}
	stream->rcv_nxt += (uint32_t)(payload - old);
	stream->received += payload - old;
	keep_tail(stream, payload - old);
	if (wanted.copy)
		copy_out();
	if (rr && payload > old)
		take_answer(stream);
	if (tcp->fin && !stream->fin_received) {
		stream->fin_received = true;
		stream->rcv_nxt++;
		if (rr && (!end || stream->received != stream->end))
			give_up(stream);
	}
}

/* A device that leaves out DATA_VALID gives whole checksums. */
static bool whole(const struct iphdr *ip, unsigned length)
{
	uint32_t total = sum(&ip->saddr, 8, 6 + length);
	size_t skip = (size_t)((const uint8_t *)ip + ip->ihl * 4 - (const uint8_t *)buffers[0].iov_base);
	for (unsigned i = 0; i < buffer_count; i++, skip = 0) /* all but the last have an even length */
		total = folded(sum((uint8_t *)buffers[i].iov_base + skip, buffers[i].iov_len - skip, total));
	return total == 0xffff;
}

static void take_frame(const struct virtio_net_hdr_v1 *header, size_t octets)
{
	const uint8_t *frame = buffers[0].iov_base;
	size_t head = buffers[0].iov_len;
	uint32_t to;
	if (head < 42)
		complain("a frame that begins with %zu octets", head);
	if (frame[12] == 8 && frame[13] == 6) {
		memcpy(&to, frame + 38, 4);
		if (to != GUEST)
			return;
		if (frame[21] == 1) {
			memcpy(&to, frame + 28, 4);
			send_arp(2, to, frame + 22);
		} else if (!memcmp(frame + 28, &next_hop, 4)) {
			memcpy(peer_mac, frame + 22, 6);
			resolved = true;
		}
		return;
	}
	const struct iphdr *ip = (const struct iphdr *)(frame + 14);
	if (frame[12] != 8 || frame[13] != 0 || ip->protocol != 6 || ip->daddr != GUEST || ip->saddr != peer)
		return;
	unsigned ip_size = ip->ihl * 4u, length = ntohs(ip->tot_len);
	const struct tcphdr *tcp = (const struct tcphdr *)(frame + 14 + ip_size);
	if (head < 14 + ip_size + 20 || head < 14 + ip_size + tcp->doff * 4u || ip_size < 20 || tcp->doff < 5)
		complain("a frame whose headers do not lie in one buffer");
	if (14 + length > octets || length < ip_size + tcp->doff * 4u)
		complain("an IP datagram of %u octets in a frame of %zu", length, octets);
	for (size_t padding = octets - 14 - length; padding; padding = octets - 14 - length) {
		struct iovec *last = &buffers[buffer_count - 1];
		size_t cut = padding < last->iov_len ? padding : last->iov_len;
		octets -= cut;
		last->iov_len -= cut;
		buffer_count -= !last->iov_len;
	}
	if (!(header->flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID)) && !whole(ip, length - ip_size))
		complain("a wrong TCP checksum");
	take_tcp(tcp, length - ip_size - tcp->doff * 4u);
}

/* What the back-end gave, at most a budget; true when there may be more. */
static bool poll_rx(void)
{
	unsigned there = 0, count = 0;
	for (; count < BUDGET; count++) {
		if (!there && !(there = waiting(&rx)))
			break;
		uint32_t length;
		unsigned slot = take(&rx, &length);
		uint8_t *at = rx_memory + slot * rx_slot;
		const struct virtio_net_hdr_v1 *header = (const struct virtio_net_hdr_v1 *)at;
		unsigned of = header->num_buffers;
		if (length <= HEADER || length > rx_slot)
			complain("a used rx buffer of %u octets", length);
		size_t octets = length - HEADER;
		if (!of || of > there || of > BUFFERS_MAX)
			complain("a frame of %u buffers where %u are used", of, there);
		rx_free[rx_free_count++] = slot;
		buffers[0] = (struct iovec){ at + HEADER, length - HEADER };
		for (buffer_count = 1; buffer_count < of; buffer_count++) {
			slot = take(&rx, &length);
			if (!length || length > rx_slot)
				complain("a used rx buffer of %u octets", length);
			rx_free[rx_free_count++] = slot;
			buffers[buffer_count] = (struct iovec){ rx_memory + slot * rx_slot, length };
			octets += length;
		}
		there -= of;
		rx.frames++;
		rx.octets += octets;
		take_frame(header, octets);
	}
	if (rx_free_count > (rx.slots < BUDGET ? rx.slots : BUDGET) / 2)
		give_back();
	return count == BUDGET;
}

/* ---- all together -------------------------------------------------------------------------------------------------- */

static uint64_t moved(const struct stream *stream)
{
	return down || rr ? stream->received : stream->snd_una ? stream->snd_una - 1 : 0;
}

static uint64_t moved_by_all(void)
{
	uint64_t total = 0;
	for (unsigned i = 0; i < streams; i++)
		total += moved(&all[i]);
	return total;
}

static bool closed(const struct stream *stream)
{
	return stream->failed || (stream->fin_received && stream->snd_una == stream->end + 1 && !stream->ack_due);
}

/* What time alone brings about: requests that were not answered, and what was lost. */
static void repeat(void)
{
	static uint64_t asked, begun;
	if (!begun)
		begun = now;
	if (!resolved && now - asked >= RETRANSMIT) {
		if (now - begun > PATIENCE)
			complain("no answer to ARP");
		asked = now;
		send_arp(1, next_hop, NULL);
	}
	for (unsigned i = 0; resolved && i < streams; i++) {
		struct stream *stream = &all[i];
		if (stream->state == SYN_SENT && now - stream->progress >= RETRANSMIT && room()) {
			if (stream->progress)
				retransmissions++;
			stream->progress = now;
			send_segment(stream, SYN, 0, 0);
		} else if (stream->state == OPEN && !stream->failed && stream->snd_nxt > stream->snd_una && now - stream->progress >= RETRANSMIT) {
			stream->snd_nxt = stream->snd_una;
			stream->progress = now;
			retransmissions++;
		}
	}
}

/* Everything that is to be sent now; tells how many streams are open and how many at their end. True when there is more. */
static bool send_all(unsigned *open, unsigned *done)
{
	static unsigned first;
	bool more = false;
	*open = *done = 0;
	for (unsigned i = 0; i < streams; i++) {
		struct stream *stream = &all[(first + i) % streams];
		if (stream->state == OPEN && (start || rr) && !stream->failed)
			more |= send_stream(stream);
		if (stream->ack_due && room())
			send_segment(stream, ACK, stream->snd_nxt, 0);
		*open += stream->state == OPEN && (!rr || stream->received); /* netload asks each once before it begins */
		*done += closed(stream);
	}
	first++;
	if (tx.filled != tx.published)
		publish(&tx);
	return more;
}

/* Begin and end the interval when it is time for that: true when one of them was. */
static bool mark(unsigned open)
{
	if (!start && open == streams) {
		start = now;
		for (unsigned i = 0; rr && i < streams; i++) {
			all[i].asked = now;
			all[i].end = 2;
		}
		return true;
	}
	if (!start || end || now - start < span)
		return false;
	end = now;
	measured = moved_by_all();
	for (unsigned i = 0; !down && !rr && i < streams; i++)
		all[i].end = all[i].snd_max > 1 ? all[i].snd_max : 1;
	return true;
}

static void insist_on_progress(unsigned open, unsigned done)
{
	static uint64_t before, last;
	uint64_t progress = moved_by_all() + open + done;
	if (progress != before || !last) {
		before = progress;
		last = now;
	} else if (now - last > PATIENCE) {
		complain("nothing has moved for 10 s: %u of %u connections open, %u closed", open, streams, done);
	}
}

/* Ask for calls; false when there is something to do at once. */
static bool arm_all(void)
{
	unsigned outstanding = tx.slots - tx_free_count;
	if (!arm(&rx, 1))
		return false;
	if (!outstanding || (tx_free_count && !wanted.tx_calls))
		return true;
	return arm(&tx, outstanding * 3 / 4 + 1);
}

/* What is there to be told, within so much time; returns how many called. */
static int look(int epoll, int limit_ms)
{
	struct epoll_event ready[4];
	int count = epoll_wait(epoll, ready, 4, limit_ms);
	if (count < 0 && errno != EINTR)
		fail("epoll_wait");
	for (int i = 0; i < count; i++)
		if (ready[i].data.fd == control)
			complain("the back-end hung up");
	return count;
}

/* Until all streams are closed. */
static void carry(void)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	watch(epoll, EPOLL_CTL_ADD, rx.call, EPOLLIN | EPOLLET);
	watch(epoll, EPOLL_CTL_ADD, tx.call, EPOLLIN | EPOLLET);
	watch(epoll, EPOLL_CTL_ADD, control, EPOLLIN | EPOLLRDHUP);
	for (unsigned turns = 1;; turns++) {
		unsigned open, done;
		now = clock_ns();
		bool more = poll_rx();
		reap();
		repeat();
		more |= send_all(&open, &done);
		if (done == streams) {
			end = end ? end : now; /* rr, when all failed */
			return;
		}
		insist_on_progress(open, done);
		more |= mark(open);
		if (!more && arm_all()) {
			uint64_t left = start && !end ? start + span - now : TICK;
			sleeps++;
			int called = look(epoll, (int)((left < TICK ? left : TICK) / 1000000 + 1));
			missed_calls += !called && left >= TICK && waiting(&rx);
		} else if (turns % 256 == 0) {
			look(epoll, 0);
		}
		disarm(&rx);
		disarm(&tx);
	}
}

static void report_operations(void)
{
	double seconds = (double)(end - start) / 1e9;
	printf("{\"operations\": %" PRIu64 ", \"seconds\": %.6f, \"rate\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f"
	       ", \"errors\": %" PRIu64,
	       operations, seconds, seconds > 0 ? (double)operations / seconds : 0, percentile_us(.5), percentile_us(.99),
	       errors);
}

static void report_octets(void)
{
	uint64_t counted = 0, total = 0;
	for (unsigned i = 0; i < streams; i++) {
		uint64_t server = 0, ours = down ? all[i].received - sizeof all[i].tail : all[i].end - 1;
		for (unsigned octet = 0; octet < sizeof all[i].tail; octet++)
			server = server << 8 | all[i].tail[octet];
		if (all[i].received < sizeof all[i].tail || server != ours)
			complain("stream %u: %" PRIu64 " octets here, %" PRIu64 " by the server's count", i, ours, server);
		counted += server;
		total += ours;
	}
	double seconds = (double)(end - start) / 1e9;
	printf("{\"octets\": %" PRIu64 ", \"seconds\": %.6f, \"bits_per_second\": %.0f, \"total\": %" PRIu64
	       ", \"counted\": %" PRIu64,
	       measured, seconds, seconds > 0 ? (double)measured * 8 / seconds : 0, total, counted);
}

static void report(void)
{
	tally(&rx);
	tally(&tx);
	if (rr)
		report_operations();
	else
		report_octets();
	printf(", \"retransmissions\": %" PRIu64 ", \"out_of_order\": %" PRIu64
	       ", \"frames_out\": %" PRIu64 ", \"kicks_out\": %" PRIu64 ", \"calls_out\": %" PRIu64 ", \"frames_in\": %" PRIu64
	       ", \"kicks_in\": %" PRIu64 ", \"calls_in\": %" PRIu64 ", \"sleeps\": %" PRIu64
	       ", \"missed_calls\": %" PRIu64 ", \"features\": %" PRIu64 "}\n",
	       retransmissions, out_of_order, tx.frames, tx.kicks, tx.calls, rx.frames, rx.kicks, rx.calls, sleeps, missed_calls,
	       features);
}

__attribute__((noreturn)) static void misused(const char *what, const char *value)
{
	fprintf(stderr, "ringload: %s, not %s\n", what, value);
	exit(2);
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "ring", required_argument, NULL, 'r' },    { "rx-size", required_argument, NULL, 'b' },
		{ "window", required_argument, NULL, 'w' },  { "publish", required_argument, NULL, 'p' },
		{ "copy", no_argument, NULL, 'c' },	     { "lose", required_argument, NULL, 'l' },
		{ "no-tx-calls", no_argument, NULL, 't' },   { "no-event-idx", no_argument, NULL, 'e' },
		{ 0 },
	};
	for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
		switch (option) {
		case 'r':
			wanted.ring = number(optarg, 2, 32768, "--ring");
			if (wanted.ring & (wanted.ring - 1))
				misused("--ring must be a power of two", optarg);
			break;
		case 'b':
			wanted.rx_size = number(optarg, 128, 131072, "--rx-size");
			if (wanted.rx_size & 1)
				misused("--rx-size must be even", optarg);
			break;
		case 'w':
			wanted.window = number(optarg, 1 << SCALE, 65535 << SCALE, "--window");
			break;
		case 'p':
			wanted.publish = number(optarg, 1, 256, "--publish");
			break;
		case 'c':
			wanted.copy = true;
			break;
		case 'l':
			wanted.lose = number(optarg, 10, 1000000, "--lose");
			break;
		case 't':
			wanted.tx_calls = false;
			break;
		case 'e':
			wanted.event_idx = false;
			break;
		default:
			exit(2);
		}
	}
	if (argc - optind != 6) {
		fprintf(stderr, "usage: ringload [OPTIONS] SOCKET up|down|rr ADDRESS PORT STREAMS SECONDS; the source says which options\n");
		exit(2);
	}
	argv += optind;
	char *end;
	double seconds = strtod(argv[5], &end);
	down = !strcmp(argv[1], "down");
	rr = !strcmp(argv[1], "rr");
	if (!down && !rr && strcmp(argv[1], "up"))
		misused("what to do is up, down or rr", argv[1]);
	if (inet_pton(AF_INET, argv[2], &peer) != 1)
		misused("ADDRESS must be IPv4", argv[2]);
	peer_port = htons((uint16_t)number(argv[3], 1, 65535, "PORT"));
	streams = number(argv[4], 1, STREAMS_MAX, "STREAMS");
	if (*end || end == argv[5] || !(seconds >= 0 && seconds <= 3600))
		misused("SECONDS must be a number from 0 to 3600", argv[5]);
	span = (uint64_t)(seconds * 1e9);
	next_hop = (peer & NETMASK) == (GUEST & NETMASK) ? peer : GATEWAY;
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	connect_to(argv[optind]);
	negotiate(wanted.event_idx ? 0 : 1ull << VIRTIO_RING_F_EVENT_IDX);
	if (!has(VIRTIO_NET_F_MRG_RXBUF) || !has(VIRTIO_RING_F_INDIRECT_DESC) || !has(VIRTIO_NET_F_CSUM) ||
	    !has(VIRTIO_NET_F_HOST_TSO4))
		complain("the back-end lacks mergeable buffers, indirect descriptors, checksums or TSO");
	make_memory((1u << 20) + (size_t)BLOCKS * BLOCK_STRIDE + (size_t)wanted.ring * (TX_SLOT + wanted.rx_size + 64));
	make_mergeable_rx(wanted.ring, wanted.rx_size);
	make_tx();
	hand_over_memory();
	hand_over(0, &rx);
	hand_over(1, &tx);
	publish(&rx);
	first_port = (uint16_t)(32768 + clock_ns() / 1000 % 32000);
	for (unsigned i = 0; i < streams; i++)
		all[i] = (struct stream){
			.iss = (uint32_t)clock_ns() * (i + 1), .port = (uint16_t)(first_port + i),
			.mss = MSS, .end = down || rr ? 1 : UINT64_MAX,
		};
	carry();
	report();
	return 0;
}
