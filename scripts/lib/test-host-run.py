#!/usr/bin/env python3
"""Starts the test host's QEMU and joins this process to the command inside.

Called by scripts/test-host, which prepares everything. Standard streams,
signals, window size and exit code go over four virtio-serial ports (the other
end: test-host-pid1.c). Exit codes of our own: 124 the run hung or took too
long, 125 the test host ended without reporting one.
"""
import argparse
import ctypes
import fcntl
import os
import queue
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import tty


def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def winsize():
    rows, cols = struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))[:2]
    return rows, cols


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Output(threading.Thread):
    """Copies one port to one of our descriptors, counting."""

    def __init__(self, sock, fd, broken):
        super().__init__(daemon=True)
        self.sock, self.fd, self.broken = sock, fd, broken
        self.count = 0
        self.changed = threading.Condition()

    def run(self):
        lost = False
        while data := self.sock.recv(1 << 18):
            try:
                if not lost:
                    write_all(self.fd, data)
            except OSError:  # our reader is gone: tell the command, keep draining
                lost = True
                self.broken()
            with self.changed:
                self.count += len(data)
                self.changed.notify()

    def wait_for(self, count, seconds):
        with self.changed:
            self.changed.wait_for(lambda: self.count >= count, seconds)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--dir", required=True)
    ap.add_argument("--timeout", type=float, required=True)
    ap.add_argument("--slow", type=float, default=1)
    ap.add_argument("--tty", action="store_true")
    ap.add_argument("qemu", nargs="+")
    a = ap.parse_args()

    events = queue.SimpleQueue()
    pairs = {name: socket.socketpair() for name in ("ctl", "in", "out", "err")}
    cmd = a.qemu + ["-device", "virtio-serial-pci,max_ports=5"]
    for nr, (name, (_, theirs)) in enumerate(pairs.items(), 1):
        theirs.set_inheritable(True)
        cmd += ["-chardev", f"socket,id={name},fd={theirs.fileno()}",
                "-device", f"virtserialport,chardev={name},nr={nr},name=vmshim.{name}"]
    ctl, stdin, stdout, stderr = (ours for ours, _ in pairs.values())

    console = os.path.join(a.dir, "console")
    # Handlers must stand before QEMU does, or an early Ctrl-C would leave it.
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
                signal.SIGUSR2, signal.SIGWINCH):
        signal.signal(sig, lambda s, _: events.put(("signal", s)))
    with open(os.path.join(a.dir, "qemu"), "wb") as qlog:
        qemu = subprocess.Popen(
            cmd, stdin=subprocess.DEVNULL, stdout=qlog, stderr=qlog, start_new_session=True,
            pass_fds=[t.fileno() for _, t in pairs.values()], preexec_fn=die_with_parent)
    for _, theirs in pairs.values():
        theirs.close()

    def tell(line):
        try:
            ctl.sendall(line.encode() + b"\n")
        except OSError:
            pass

    def read_ctl():
        try:
            with ctl.makefile("r", errors="replace") as lines:
                for line in lines:
                    events.put(tuple(line.split()))
        except OSError:
            pass
        qemu.wait()
        events.put(("gone",))

    def read_stdin():
        count = 0
        try:
            while data := os.read(0, 1 << 16):
                count += len(data)
                stdin.sendall(data)
        except OSError:
            pass
        tell(f"eof {count}")

    saved = None
    outs = [Output(s, fd, lambda: tell(f"signal {signal.SIGPIPE:d}"))
            for s, fd in ((stdout, 1), (stderr, 2))]
    threading.Thread(target=read_ctl, daemon=True).start()
    for o in outs:
        o.start()

    def trouble(code, why):
        lines = []
        for path in ("qemu", "console"):
            with open(os.path.join(a.dir, path), "rb") as f:
                lines += f.read()[-65536:].decode(errors="replace").splitlines()[-40:]
        text = "".join(f"    | {line.rstrip()}\r\n" for line in lines)
        os.write(2, f"\r\ntest-host: {why}; the end of its console:\r\n{text}".encode())
        return code

    started = time.monotonic()
    beat, ready, interrupts, code = started, False, 0, None
    try:
        while code is None:
            try:
                event, *args = events.get(timeout=1)
            except queue.Empty:
                event, args = None, []
            now = time.monotonic()
            if event == "ready":
                ready, beat = True, now
                if a.tty:
                    saved = termios.tcgetattr(0)
                    tty.setraw(0)
                threading.Thread(target=read_stdin, daemon=True).start()
            elif event == "beat":
                beat = now
            elif event == "signal":
                sig = args[0]
                if sig == signal.SIGWINCH:
                    if a.tty and ready:
                        tell("winsize %d %d" % winsize())
                    continue
                interrupts += sig in (signal.SIGINT, signal.SIGTERM)
                if not ready or interrupts >= 3:
                    code = 128 + sig
                tell(f"signal {sig:d}")
            elif event == "exit":
                code = int(args[0])
                for o, count in zip(outs, args[1:]):
                    o.wait_for(int(count), 60)
            elif event == "gone":
                code = trouble(125, "it ended without an exit code")
            if code is None:
                if now - started > a.timeout:
                    code = trouble(124, f"the command ran longer than {a.timeout:g} s (--timeout)")
                elif not ready and now - started > 180 * a.slow:
                    code = trouble(124, "it did not come up")
                elif ready and now - beat > 120 * a.slow:
                    code = trouble(125, "it stopped responding")
    finally:
        if saved:
            termios.tcsetattr(0, termios.TCSADRAIN, saved)
        qemu.kill()
        qemu.wait()
        shutil.rmtree(a.dir, ignore_errors=True)
    os._exit(code)  # not waiting for the thread that reads stdin


if __name__ == "__main__":
    main()
