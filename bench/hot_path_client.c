/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Makes one kind of call over and over and prints what one costs, in nanoseconds. Reads commands
 * from standard input, each a line: KIND DESTINATIONS CALLS, where KIND is connect, sendto, send or
 * tcp, and DESTINATIONS says how many of the addresses it uses in turn. The addresses stand in the
 * file that is its only argument, one IPv4 address in hexadecimal each line.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 9
#define MOST 65536

static struct sockaddr_in to[MOST];
static char byte;
static unsigned int turn; /* goes on from one command to the next */

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int udp(void)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (fd < 0)
		fail("socket");
	return fd;
}

static double connects(int destinations, int calls)
{
	int fd = udp();
	double began = now();

	for (int i = 0; i < calls; i++)
		if (connect(fd, (struct sockaddr *)&to[turn++ % destinations], sizeof(to[0])))
			fail("connect");
	began = now() - began;
	close(fd);
	return began / calls;
}

static double sends(int destinations, int calls, int connected)
{
	int fd = udp();
	double began;

	if (connected && connect(fd, (struct sockaddr *)&to[0], sizeof(to[0])))
		fail("connect");
	began = now();
	for (int i = 0; i < calls; i++) {
		struct sockaddr_in *there = connected ? 0 : &to[turn++ % destinations];

		if (sendto(fd, &byte, 1, MSG_DONTWAIT, (struct sockaddr *)there,
			   there ? sizeof(*there) : 0) < 0)
			fail("sendto");
	}
	began = now() - began;
	close(fd);
	return began / calls;
}

static double tcp(int destinations, int calls)
{
	struct linger at_once = { 1, 0 };
	double sum = 0;

	for (int i = 0; i < calls; i++) {
		int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
		double began;

		if (fd < 0)
			fail("socket");
		setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
		began = now();
		connect(fd, (struct sockaddr *)&to[turn++ % destinations], sizeof(to[0]));
		sum += now() - began;
		close(fd);
	}
	return sum / calls;
}

int main(int argc, char **argv)
{
	FILE *list = argc == 2 ? fopen(argv[1], "r") : 0;
	char kind[16];
	unsigned int address;
	int destinations, calls, count = 0;

	if (!list)
		fail("usage: hot_path_client FILE");
	while (count < MOST && fscanf(list, "%x", &address) == 1) {
		to[count].sin_family = AF_INET;
		to[count].sin_port = htons(PORT);
		to[count++].sin_addr.s_addr = htonl(address);
	}
	while (scanf("%15s %d %d", kind, &destinations, &calls) == 3) {
		double cost;

		if (!strcmp(kind, "connect"))
			cost = connects(destinations, calls);
		else if (!strcmp(kind, "tcp"))
			cost = tcp(destinations, calls);
		else
			cost = sends(destinations, calls, !strcmp(kind, "send"));
		printf("%.1f\n", cost);
		fflush(stdout);
	}
	return 0;
}
