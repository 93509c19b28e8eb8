/*
 * floor measures what raw sockets can do between two threads, one at each
 * end: the least that a mirror over TCP could cost. Nothing is done with the
 * bytes. What is compared with it runs on the same machine, in the same run,
 * under the same congestion control.
 *
 *   floor pingpong [-s BYTES] [-n ROUNDS] [-b] [-m] ...  BYTES out, 8 back
 *   floor stream   [-k CONNS] [-t MIB] [-w KIB] [-b] [-m] ...
 *   floor serve    -l ADDRESS -p PORT [-a PEER] [-m] [-g ALGO]
 *
 *   -b  block in the kernel (default: busy loop with MSG_DONTWAIT)
 *   -m  sign with TCP_MD5SIG
 *   -g  congestion control (default cubic, as the transport uses)
 *   -w  KiB per write of a stream (default 64, the largest frame)
 *   -a  address of the other end; pingpong and stream start a server of
 *       their own on loopback unless -a and -p name one
 *
 * Prints one JSON object a line.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char key[] = "the-key-of-the-floor";
static const char *algo = "cubic";
static int md5;

/* What the client wants of a connection; the first bytes on it. */
struct hello {
	uint32_t stream; /* 0: pingpong */
	uint32_t block;
	uint64_t size;  /* bytes per message, or of the whole stream */
	uint64_t count; /* messages, 1 for a stream */
};

static void die(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void prepare(int fd, struct in_addr peer)
{
	int one = 1;
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one))
		die("TCP_NODELAY");
	if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, algo, strlen(algo)))
		die("TCP_CONGESTION");
	if (md5) {
		struct tcp_md5sig s = { .tcpm_keylen = sizeof key - 1 };
		struct sockaddr_in *a = (struct sockaddr_in *)&s.tcpm_addr;
		a->sin_family = AF_INET;
		a->sin_addr = peer;
		memcpy(s.tcpm_key, key, sizeof key - 1);
		if (setsockopt(fd, IPPROTO_TCP, TCP_MD5SIG, &s, sizeof s))
			die("TCP_MD5SIG");
	}
}

/* get returns 0 at the end of the stream before the first byte. */
static int get(int fd, void *p, size_t n, int block)
{
	size_t done = 0;
	while (done < n) {
		ssize_t r = recv(fd, (char *)p + done, n - done, block ? 0 : MSG_DONTWAIT);
		if (r > 0)
			done += r;
		else if (r == 0 && done == 0)
			return 0;
		else if (r == 0)
			errno = EPIPE, die("recv");
		else if (errno != EAGAIN && errno != EINTR)
			die("recv");
	}
	return 1;
}

static void put(int fd, const void *p, size_t n, int block)
{
	while (n > 0) {
		ssize_t r = send(fd, p, n, MSG_NOSIGNAL | (block ? 0 : MSG_DONTWAIT));
		if (r >= 0) {
			p = (const char *)p + r;
			n -= r;
		} else if (errno != EAGAIN && errno != EINTR)
			die("send");
	}
}

enum { DRAIN = 1 << 20 };

/* buffer is prefaulted, so that no fault falls into the measurement. */
static char *buffer(size_t n)
{
	char *p = malloc(n);
	if (!p)
		die("malloc");
	memset(p, 1, n);
	return p;
}

static void *serve_one(void *arg)
{
	int fd = (int)(intptr_t)arg;
	struct hello h;
	if (get(fd, &h, sizeof h, 1)) {
		uint64_t reply = 0;
		size_t cap = h.stream ? DRAIN : h.size;
		char *p = buffer(cap);
		put(fd, &reply, sizeof reply, 1); /* ready */
		for (uint64_t i = 0; i < h.count; i++) {
			for (uint64_t left = h.size; left > 0;) {
				size_t want = left < cap ? left : cap;
				if (!h.stream) {
					get(fd, p, want, h.block);
					left -= want;
					continue;
				}
				/* whatever is there, as a receiver would */
				ssize_t r = recv(fd, p, want, h.block ? 0 : MSG_DONTWAIT);
				if (r > 0)
					left -= r;
				else if (r == 0 || (errno != EAGAIN && errno != EINTR))
					die("recv");
			}
			put(fd, &reply, sizeof reply, h.block);
		}
		free(p);
	}
	close(fd);
	return NULL;
}

static int listen_on(struct sockaddr_in *at, struct in_addr peer)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	socklen_t len = sizeof *at;
	if (fd < 0)
		die("socket");
	prepare(fd, peer);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(fd, (struct sockaddr *)at, len) || listen(fd, 16))
		die("listen");
	if (getsockname(fd, (struct sockaddr *)at, &len))
		die("getsockname");
	return fd;
}

static void serve(int listener, struct in_addr peer)
{
	for (;;) {
		pthread_t t;
		int fd = accept(listener, NULL, NULL), one = 1;
		if (fd < 0)
			die("accept");
		(void)peer; /* the key is inherited; the options need not be */
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, algo, strlen(algo));
		if (pthread_create(&t, NULL, serve_one, (void *)(intptr_t)fd))
			die("pthread_create");
		pthread_detach(t);
	}
}

static int session(const struct sockaddr_in *to, const struct hello *h)
{
	uint64_t ready;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		die("socket");
	prepare(fd, to->sin_addr);
	if (connect(fd, (const struct sockaddr *)to, sizeof *to))
		die("connect");
	put(fd, h, sizeof *h, 1);
	get(fd, &ready, sizeof ready, 1);
	return fd;
}

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static void pingpong(const struct sockaddr_in *to, size_t size, uint64_t rounds, int block)
{
	uint64_t warm = rounds / 10, reply;
	struct hello h = { .block = block, .size = size, .count = rounds + warm };
	char *p = buffer(size);
	double *us = calloc(rounds, sizeof *us);
	int fd = session(to, &h);
	for (uint64_t i = 0; i < h.count; i++) {
		double start = now();
		put(fd, p, size, block);
		get(fd, &reply, sizeof reply, block);
		if (i >= warm)
			us[i - warm] = (now() - start) * 1e6;
	}
	close(fd);
	qsort(us, rounds, sizeof *us, by_value);
	printf("{\"mode\":\"pingpong\",\"bytes\":%zu,\"md5\":%s,\"wait\":\"%s\",\"congestion\":\"%s\",\"rounds\":%llu,"
	       "\"p50_us\":%.2f,\"p99_us\":%.2f}\n", size, md5 ? "true" : "false", block ? "block" : "poll", algo,
	       (unsigned long long)rounds, us[rounds / 2], us[rounds * 99 / 100]);
}

static struct {
	pthread_barrier_t go;
	uint64_t bytes; /* of each connection */
	size_t chunk;
	int block;
} stream_of;

static void *stream_one(void *arg)
{
	uint64_t reply;
	int fd = (int)(intptr_t)arg;
	char *p = buffer(stream_of.chunk);
	pthread_barrier_wait(&stream_of.go);
	for (uint64_t left = stream_of.bytes; left > 0; left -= stream_of.chunk)
		put(fd, p, stream_of.chunk, stream_of.block);
	get(fd, &reply, sizeof reply, stream_of.block);
	close(fd);
	free(p);
	return NULL;
}

static void stream(const struct sockaddr_in *to, int conns, uint64_t mib, size_t chunk, int block)
{
	pthread_t t[64];
	stream_of.chunk = chunk;
	stream_of.block = block;
	stream_of.bytes = ((mib << 20) / conns) / chunk * chunk;
	struct hello h = { .stream = 1, .block = block, .size = stream_of.bytes, .count = 1 };
	pthread_barrier_init(&stream_of.go, NULL, conns + 1);
	for (int i = 0; i < conns; i++)
		if (pthread_create(&t[i], NULL, stream_one, (void *)(intptr_t)session(to, &h)))
			die("pthread_create");
	pthread_barrier_wait(&stream_of.go);
	double start = now();
	for (int i = 0; i < conns; i++)
		pthread_join(t[i], NULL);
	double s = now() - start;
	printf("{\"mode\":\"stream\",\"connections\":%d,\"write_bytes\":%zu,\"md5\":%s,\"wait\":\"%s\",\"congestion\":\"%s\","
	       "\"seconds\":%.3f,\"gb_per_s\":%.3f}\n", conns, chunk, md5 ? "true" : "false", block ? "block" : "poll",
	       algo, s, stream_of.bytes * (double)conns / s / 1e9);
}

static int usage(void)
{
	fprintf(stderr, "usage: floor pingpong [-s BYTES] [-n ROUNDS] [-b] [-m] [-g ALGO] [-a ADDRESS -p PORT]\n"
			"       floor stream [-k CONNS] [-t MIB] [-w KIB] [-b] [-m] [-g ALGO] [-a ADDRESS -p PORT]\n"
			"       floor serve -l ADDRESS -p PORT [-a PEER] [-m] [-g ALGO]\n");
	return 2;
}

int main(int argc, char **argv)
{
	size_t size = 64, chunk = 64 << 10;
	uint64_t rounds = 20000, mib = 1024;
	int conns = 1, block = 0, c;
	struct sockaddr_in to = { .sin_family = AF_INET }, at = to;
	const char *mode = argc > 1 ? argv[1] : "";
	to.sin_addr.s_addr = at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	optind = 2;
	while ((c = getopt(argc, argv, "s:n:k:t:w:bmg:a:l:p:")) != -1) {
		switch (c) {
		case 's': size = strtoull(optarg, NULL, 0); break;
		case 'n': rounds = strtoull(optarg, NULL, 0); break;
		case 'k': conns = atoi(optarg); break;
		case 't': mib = strtoull(optarg, NULL, 0); break;
		case 'w': chunk = strtoull(optarg, NULL, 0) << 10; break;
		case 'b': block = 1; break;
		case 'm': md5 = 1; break;
		case 'g': algo = optarg; break;
		case 'a': if (!inet_aton(optarg, &to.sin_addr)) return usage(); break;
		case 'l': if (!inet_aton(optarg, &at.sin_addr)) return usage(); break;
		case 'p': to.sin_port = at.sin_port = htons(atoi(optarg)); break;
		default: return usage();
		}
	}
	if (optind != argc || size < 1 || rounds < 10 || conns < 1 || conns > 16 || chunk < 1 || mib < 1)
		return usage();
	if (!strcmp(mode, "serve")) {
		serve(listen_on(&at, to.sin_addr), to.sin_addr);
		return 0;
	}
	if (strcmp(mode, "pingpong") && strcmp(mode, "stream"))
		return usage();
	pid_t child = 0;
	if (to.sin_port == 0) {
		struct sockaddr_in own = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
		int listener = listen_on(&own, own.sin_addr);
		to = own;
		child = fork();
		if (child < 0)
			die("fork");
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			serve(listener, own.sin_addr);
		}
		close(listener);
	}
	if (!strcmp(mode, "pingpong"))
		pingpong(&to, size, rounds, block);
	else
		stream(&to, conns, mib, chunk, block);
	fflush(stdout);
	if (child > 0) {
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
	return 0;
}
