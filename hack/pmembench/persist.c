// Times pmem_memcpy_persist of libpmem and pmemlog_append of libpmemlog, the
// yardsticks of the Go benchmark BenchmarkPersist: same sizes, same walk over
// 64 MiB on tmpfs.
//
//	persist memcpy DIR SIZE SECONDS
//	persist append DIR SIZE SECONDS
//
// prints the nanoseconds per operation.
#include <libpmem.h>
#include <libpmemlog.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { AREA = 64 << 20 };

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static double run_memcpy(const char *path, const char *src, size_t size, double seconds)
{
	size_t mapped;
	int is_pmem;
	char *dst = pmem_map_file(path, AREA, PMEM_FILE_CREATE, 0600, &mapped, &is_pmem);
	if (!dst) {
		fprintf(stderr, "pmem_map_file %s: %s\n", path, pmem_errormsg());
		exit(1);
	}
	memset(dst, 0, AREA); // prefault
	size_t off = 0;
	long ops = 0;
	double start = now(), end;
	do {
		for (int i = 0; i < 64; i++) {
			pmem_memcpy_persist(dst + off, src, size);
			off += size;
			if (off + size > AREA)
				off = 0;
		}
		ops += 64;
		end = now();
	} while (end - start < seconds);
	pmem_unmap(dst, mapped);
	return (end - start) / ops * 1e9;
}

static double run_append(const char *path, const char *src, size_t size, double seconds)
{
	PMEMlogpool *log = pmemlog_create(path, AREA, 0600);
	if (!log) {
		fprintf(stderr, "pmemlog_create %s: %s\n", path, pmemlog_errormsg());
		exit(1);
	}
	// Fill it once, so that no page fault is timed.
	while (pmemlog_append(log, src, size) == 0)
		;
	pmemlog_rewind(log);
	long ops = 0;
	double start = now(), end;
	do {
		for (int i = 0; i < 64; i++)
			if (pmemlog_append(log, src, size))
				pmemlog_rewind(log);
		ops += 64;
		end = now();
	} while (end - start < seconds);
	pmemlog_close(log);
	return (end - start) / ops * 1e9;
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fprintf(stderr, "usage: %s memcpy|append DIR SIZE SECONDS\n", argv[0]);
		return 2;
	}
	size_t size = strtoul(argv[3], 0, 10);
	double seconds = atof(argv[4]);
	if (size == 0 || size > AREA || seconds <= 0) {
		fprintf(stderr, "%s: SIZE must be 1..%d and SECONDS above 0\n", argv[0], AREA);
		return 2;
	}
	char path[4096];
	snprintf(path, sizeof path, "%s/pmembench-%d", argv[2], (int)getpid());
	char *src = malloc(size);
	if (!src) {
		perror("malloc");
		return 1;
	}
	for (size_t i = 0; i < size; i++)
		src[i] = (char)rand();
	double ns;
	if (strcmp(argv[1], "memcpy") == 0)
		ns = run_memcpy(path, src, size, seconds);
	else
		ns = run_append(path, src, size, seconds);
	unlink(path);
	printf("%.1f\n", ns);
	return 0;
}
