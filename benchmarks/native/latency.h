/* Latencies: 16 buckets per power of two, so a percentile is right within 6 %. Included once by a program. */
#include <stdint.h>

static uint64_t buckets[64 * 16], samples;

static void sample(uint64_t ns)
{
	int power = 63 - __builtin_clzll(ns | 16);
	buckets[power * 16 + ((ns >> (power - 4)) & 15)]++;
	samples++;
}

static double percentile_us(double fraction)
{
	uint64_t seen = 0;
	for (int i = 0; i < 64 * 16; i++) {
		seen += buckets[i];
		if (seen && seen >= fraction * samples)
			return (16 + i % 16) * (double)(1ull << (i / 16)) / 16 / 1000;
	}
	return 0;
}
