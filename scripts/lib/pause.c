/*
 * The pause container of the tests' pods: holds the pod's namespaces until it is
 * told to end, and buries the orphans of a shared pid namespace.
 */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal)
{
	_exit(signal == SIGKILL);
}

static void bury(int signal)
{
	(void)signal;
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

int main(void)
{
	struct sigaction ended = { .sa_handler = end }, dead = { .sa_handler = bury };

	sigaction(SIGTERM, &ended, NULL);
	sigaction(SIGINT, &ended, NULL);
	sigaction(SIGCHLD, &dead, NULL);
	for (;;)
		pause();
}
