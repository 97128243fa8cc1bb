/*
 * PID 1 of the test host: runs one command and carries its standard streams,
 * signals and exit code over four virtio-serial ports (host side:
 * test-host-run.py).
 *
 *   port 1  lines.  host -> here: "signal N", "winsize ROWS COLS", "eof BYTES"
 *                   here -> host: "ready", "beat", "exit CODE OUTBYTES ERRBYTES"
 *   port 2  stdin, raw; it ends after the BYTES that "eof" names
 *   port 3  stdout, raw      port 4  stderr, raw
 *
 * Byte counts, not end-of-file, say when a stream is complete: a serial port
 * has no end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define DIR "/run/test-host/"

struct stream {
	int from, to;
	char data[65536];
	size_t start, end;
	uint64_t got, limit; /* bytes read so far, bytes there will be */
	bool closed;
};

static int ctl;
static struct stream in, out, err;

static void die(const char *what)
{
	fprintf(stderr, "test host: %s: %s\n", what, strerror(errno));
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

static void write_all(int fd, const char *p, size_t n)
{
	while (n) {
		ssize_t w = write(fd, p, n);
		if (w > 0) {
			p += w;
			n -= w;
		} else if (w < 0 && errno == EAGAIN) {
			struct pollfd pfd = { fd, POLLOUT, 0 };
			poll(&pfd, 1, -1);
		} else if (!(w < 0 && errno == EINTR)) {
			return;
		}
	}
}

static void tell(const char *fmt, ...)
{
	char line[128];
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(line, sizeof line, fmt, ap);
	va_end(ap);
	write_all(ctl, line, n);
}

/* A file of NUL-terminated strings as an argv-like array. */
static char **strings(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;
	if (fd < 0 || fstat(fd, &st))
		die(path);
	char *data = malloc(st.st_size + 1);
	if (read(fd, data, st.st_size) != st.st_size)
		die(path);
	close(fd);
	size_t n = 0;
	for (off_t i = 0; i < st.st_size; i++)
		n += !data[i];
	char **v = calloc(n + 1, sizeof *v), *p = data;
	for (size_t i = 0; i < n; i++, p += strlen(p) + 1)
		v[i] = p;
	return v;
}

static int port(int nr)
{
	char pattern[32];
	snprintf(pattern, sizeof pattern, "/dev/vport*p%d", nr);
	for (int i = 0; i < 500; i++) {
		glob_t g;
		int fd = glob(pattern, 0, NULL, &g) ? -1
			: open(g.gl_pathv[0], O_RDWR | O_NONBLOCK | O_CLOEXEC);
		if (fd >= 0)
			return fd;
		usleep(10000); /* the driver creates ports asynchronously */
	}
	die(pattern);
	return -1;
}

static void finish(struct stream *s)
{
	if (s->to >= 0)
		close(s->to);
	s->to = -1;
	s->closed = true;
}

/* Moves what can be moved without waiting. */
static void pump(struct stream *s)
{
	if (s->closed)
		return;
	if (s->start == s->end && s->got < s->limit) {
		ssize_t n = read(s->from, s->data, sizeof s->data);
		if (n > 0) {
			s->got += n;
			s->start = 0;
			s->end = n;
		} else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
			s->limit = s->got;
		}
	}
	while (s->start < s->end) {
		/* The command no longer reads: swallow, or the host would block. */
		ssize_t n = s->to < 0 ? (ssize_t)(s->end - s->start)
				      : write(s->to, s->data + s->start, s->end - s->start);
		if (n < 0 && errno == EAGAIN)
			return;
		if (n < 0 && errno != EINTR) {
			close(s->to);
			s->to = -1;
		}
		if (n > 0)
			s->start += n;
	}
	if (s->got >= s->limit)
		finish(s);
}

static short waits(struct stream *s, struct pollfd *p)
{
	p->fd = -1;
	p->events = 0;
	if (!s->closed) {
		bool full = s->start < s->end;
		p->fd = full ? s->to : s->from;
		p->events = full ? POLLOUT : POLLIN;
	}
	return p->events;
}

/* What the command had written when it ended, and nothing a stray child adds later. */
static void drain(struct stream *s)
{
	int left = 0;
	if (s->closed)
		return;
	ioctl(s->from, FIONREAD, &left);
	uint64_t end = s->got + left;
	write_all(s->to, s->data + s->start, s->end - s->start);
	while (s->got < end) {
		ssize_t n = read(s->from, s->data, sizeof s->data);
		if (n <= 0)
			break;
		s->got += n;
		write_all(s->to, s->data, n);
	}
}

static void command(char **argv, char **env, const char *cwd, int fds[3])
{
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	for (int i = 0; i < 3; i++)
		dup2(fds[i], i);
	ioctl(0, TIOCSCTTY, 0);
	if (chdir(cwd)) {
		fprintf(stderr, "test host: %s: %s\n", cwd, strerror(errno));
		_exit(126);
	}
	environ = env;
	execvp(argv[0], argv);
	int code = errno == ENOENT ? 127 : 126;
	fprintf(stderr, "test host: %s: %s\n", argv[0], strerror(errno));
	_exit(code);
}

int main(void)
{
	char **argv = strings(DIR "argv"), **env = strings(DIR "env");
	/* cwd, "tty"|"pipes"|"merged", beat in ms, rows, columns */
	char **set = strings(DIR "settings");
	bool tty = !strcmp(set[1], "tty"), merged = !strcmp(set[1], "merged");
	int tick = atoi(set[2]), fds[3];
	struct winsize size = { .ws_row = atoi(set[3]), .ws_col = atoi(set[4]) };

	ctl = port(1);
	in = (struct stream){ .from = port(2), .to = -1, .limit = UINT64_MAX };
	out = (struct stream){ .from = -1, .to = port(3), .limit = UINT64_MAX };
	err = (struct stream){ .from = -1, .to = port(4), .limit = UINT64_MAX };

	if (tty) {
		int master, slave;
		if (openpty(&master, &slave, NULL, NULL, &size))
			die("openpty");
		fcntl(master, F_SETFL, O_NONBLOCK);
		fcntl(master, F_SETFD, FD_CLOEXEC);
		fds[0] = fds[1] = fds[2] = slave;
		in.to = master;
		out.from = dup(master);
		fcntl(out.from, F_SETFD, FD_CLOEXEC);
		finish(&err);
	} else {
		int p[3][2];
		for (int i = 0; i < 3; i++) {
			if (pipe2(p[i], O_CLOEXEC))
				die("pipe");
			fcntl(p[i][i == 0], F_SETFL, O_NONBLOCK);
		}
		fds[0] = p[0][0];
		in.to = p[0][1];
		fds[1] = p[1][1];
		out.from = p[1][0];
		fds[2] = merged ? p[1][1] : p[2][1];
		err.from = p[2][0];
		if (merged)
			close(p[2][1]);
	}

	sigset_t chld;
	sigemptyset(&chld);
	sigaddset(&chld, SIGCHLD);
	sigprocmask(SIG_BLOCK, &chld, NULL);
	signal(SIGPIPE, SIG_IGN);
	int sfd = signalfd(-1, &chld, SFD_NONBLOCK | SFD_CLOEXEC);

	/* Under -icount the nested guest can spin for ever on a host that is
	 * otherwise idle; a 100 Hz tick here prevents most of that. */
	int tfd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC), ticks = 0;
	struct timespec every = { tick / 1000, tick % 1000 * 1000000L };
	struct itimerspec timer = { every, every };
	timerfd_settime(tfd, 0, &timer, NULL);

	tell("ready\n");
	pid_t child = fork();
	if (child == 0)
		command(argv, env, set[0], fds);
	if (child < 0)
		die("fork");
	close(fds[0]);
	if (!tty) {
		close(fds[1]);
		if (!merged)
			close(fds[2]);
	}

	char line[256];
	size_t have = 0;
	int status = -1;
	while (status < 0) {
		struct pollfd p[6] = { { ctl, POLLIN, 0 }, { sfd, POLLIN, 0 }, { tfd, POLLIN, 0 } };
		waits(&in, &p[3]);
		waits(&out, &p[4]);
		waits(&err, &p[5]);
		if (poll(p, 6, -1) < 0 && errno != EINTR)
			die("poll");

		if (p[0].revents & POLLIN) {
			ssize_t n = read(ctl, line + have, sizeof line - 1 - have);
			have += n > 0 ? n : 0;
			line[have] = 0;
			for (char *nl; (nl = strchr(line, '\n')); have = strlen(line)) {
				unsigned long a, b;
				if (sscanf(line, "signal %lu", &a) == 1)
					kill(-child, a);
				else if (sscanf(line, "eof %lu", &a) == 1)
					in.limit = a;
				else if (sscanf(line, "winsize %lu %lu", &a, &b) == 2 && tty) {
					struct winsize w = { .ws_row = a, .ws_col = b };
					ioctl(out.from, TIOCSWINSZ, &w);
				}
				memmove(line, nl + 1, strlen(nl));
			}
		} else if (p[0].revents & (POLLHUP | POLLERR)) {
			die("the host side is gone");
		}
		if (p[2].revents) {
			uint64_t n;
			(void)!read(tfd, &n, sizeof n);
			if (++ticks * tick >= 1000) {
				ticks = 0;
				tell("beat\n");
			}
		}
		pump(&in);
		pump(&out);
		pump(&err);
		if (p[1].revents) {
			struct signalfd_siginfo si;
			int s;
			pid_t pid;
			(void)!read(sfd, &si, sizeof si);
			while ((pid = waitpid(-1, &s, WNOHANG)) > 0)
				if (pid == child)
					status = WIFSIGNALED(s) ? 128 + WTERMSIG(s) : WEXITSTATUS(s);
		}
	}
	drain(&out);
	drain(&err);
	sync(); /* --out is a directory of the machine */
	tell("exit %d %llu %llu\n", status, (unsigned long long)out.got,
	     (unsigned long long)err.got);
	sleep(10);
	die("powering off");
}
