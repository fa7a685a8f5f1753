/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Makes one sendto() to an IPv4 address from each of COUNT threads at the same time, and ends when all of
 * them have returned. In C, because threads of a Python program would also wait for its interpreter.
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#define STACK (64 << 10)

static struct sockaddr_in to = { .sin_family = AF_INET };
static pthread_barrier_t all;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *one(void *unused)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (fd < 0)
		fail("socket");
	pthread_barrier_wait(&all);
	if (sendto(fd, "x", 1, 0, (struct sockaddr *)&to, sizeof(to)) < 0)
		fail("sendto");
	return unused;
}

int main(int argc, char **argv)
{
	int count = argc == 4 ? atoi(argv[3]) : 0;
	pthread_t *threads = calloc(count, sizeof(*threads));
	pthread_attr_t small;

	if (!count || !threads || !inet_aton(argv[1], &to.sin_addr))
		fail("usage: hold_threads ADDRESS PORT COUNT");
	to.sin_port = htons(atoi(argv[2]));
	pthread_barrier_init(&all, 0, count);
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, STACK);
	for (int i = 0; i < count; i++)
		if (pthread_create(&threads[i], &small, one, 0))
			fail("pthread_create");
	for (int i = 0; i < count; i++)
		pthread_join(threads[i], 0);
	return 0;
}
