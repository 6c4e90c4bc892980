#!/usr/bin/python3
"""The testbed's inner end: starts containerd, runs the command, relays its streams.

Frames on the port are one byte of kind, four of length (big-endian), and the data.
To here:    C argument, one frame each   D directory   T rows, columns: use a terminal
            G go   I standard input (empty: its end)   W rows, columns: a new size
From here:  R the command starts   O, E standard output and error
            X its exit status, the last frame   F why it could not start, likewise
"""

import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys

CHUNK = 64 * 1024
# Input held back for a command that doesn't read it; then the port waits.
PENDING_MAX = 1024 * 1024
CONTAINERD_READY_SECONDS = 120
TESTBED_FAILED = 125
SERIES = ("1.6", "1.7", "2.1")
BUSYBOX = "/usr/lib/husk-testbed/busybox.tar"


class Failure(Exception):
    """Why the testbed could not get as far as running the command."""


def main():
    mode, series = sys.argv[1], sys.argv[2]
    if mode == "prepare":
        prepare()
    elif mode == "host":
        run_here(series, sys.argv[3:])
    else:
        relay(Port(find_port()), series)


def run_here(series, arguments):
    """Without a machine of its own, the command has the streams it was called with."""
    try:
        start_containerd(series)
        status = subprocess.call(arguments, cwd="/root")
    except (Failure, OSError) as error:
        print(f"testbed: {error}", file=sys.stderr)
        sys.exit(TESTBED_FAILED)
    sys.exit(status if status >= 0 else 128 - status)


class Port:
    """The virtio port to the host, as frames."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR)
        self.buffer = bytearray()

    def send(self, kind, data=b""):
        frame = kind + struct.pack(">I", len(data)) + data
        while frame:
            frame = frame[os.write(self.fd, frame):]

    def frames(self):
        """Reads once, and returns the frames that are complete."""
        self.buffer += os.read(self.fd, CHUNK)
        complete = []
        while len(self.buffer) >= 5:
            (length,) = struct.unpack(">I", self.buffer[1:5])
            if len(self.buffer) < 5 + length:
                break
            complete.append((bytes(self.buffer[:1]), bytes(self.buffer[5:5 + length])))
            del self.buffer[:5 + length]
        return complete


def find_port():
    ports = "/sys/class/virtio-ports"
    for name in os.listdir(ports):
        with open(f"{ports}/{name}/name") as file:
            if file.read().strip() == "husk.testbed":
                return f"/dev/{name}"
    raise Failure("no virtio port husk.testbed")


def relay(port, series):
    try:
        start_containerd(series)
        # PID 1's own setting up ends by closing this.
        while os.read(0, CHUNK):
            pass
        command = Command(port)
    except (Failure, OSError) as error:
        port.send(b"F", str(error).encode())
        return
    status = command.run()
    # What the command wrote to the host's directory must be there by now.
    subprocess.run(["sync"], check=False)
    port.send(b"X", bytes([status]))
    # The host ends the machine now; should it not, PID 1 does.
    signal.pause()


def containerd_environment(series):
    environment = dict(os.environ)
    binaries = f"/opt/containerd-{series}/bin"
    if os.path.isdir(binaries):
        environment["PATH"] = f"{binaries}:{environment['PATH']}"
    elif series != installed_series():
        raise Failure(f"containerd {series} is not in this image: the Debian mirror had none")
    return environment


def installed_series():
    """The series of Debian's own containerd, which is installed as a package."""
    with open("/var/lib/dpkg/status") as file:
        for paragraph in file.read().split("\n\n"):
            if paragraph.startswith("Package: containerd\n"):
                version = paragraph.split("\nVersion: ")[1]
                return ".".join(version.split(".")[:2])
    return None


def start_containerd(series):
    """Starts containerd and returns when it says, as systemd would hear it, that it is ready."""
    os.environ.update(containerd_environment(series))
    root = f"/var/lib/containerd-{series}"
    os.makedirs(root, exist_ok=True)
    os.makedirs("/var/lib/containerd", exist_ok=True)
    subprocess.run(["mount", "--bind", root, "/var/lib/containerd"], check=True)
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ready.bind("/run/containerd-ready")
    ready.settimeout(CONTAINERD_READY_SECONDS)
    with open("/var/log/containerd.log", "ab") as log:
        process = subprocess.Popen(
            ["containerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "NOTIFY_SOCKET": "/run/containerd-ready"}, start_new_session=True)
    try:
        while b"READY=1" not in ready.recv(4096):
            pass
    except TimeoutError:
        with open("/var/log/containerd.log") as log:
            raise Failure(f"containerd was not ready in {CONTAINERD_READY_SECONDS} s:\n"
                          + log.read()[-2000:]) from None
    os.unlink("/run/containerd-ready")
    return process


class Command:
    """The command and its streams."""

    def __init__(self, port):
        self.port = port
        self.pending = bytearray()
        self.input_ended = False
        arguments, directory, size, go = [], "/root", None, False
        # Nothing else can come before the command is known, but what follows it may.
        early = []
        while not go:
            for kind, data in port.frames():
                if kind == b"C":
                    arguments.append(data)
                elif kind == b"D":
                    directory = data
                elif kind == b"T":
                    size = data
                elif kind == b"G":
                    go = True
                else:
                    early.append((kind, data))
        port.send(b"R")
        self.start(arguments, directory, size)
        for kind, data in early:
            self.take(kind, data)

    def start(self, arguments, directory, size):
        if size is None:
            self.terminal = None
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        else:
            self.terminal, inner = os.openpty()
            self.resize(size)
            pipes = dict(stdin=inner, stdout=inner, stderr=inner)
            os.environ["TERM"] = "xterm-256color"
        try:
            self.process = subprocess.Popen(
                arguments, cwd=directory, bufsize=0, start_new_session=True,
                preexec_fn=None if size is None else own_terminal, **pipes)
        except OSError as error:
            raise Failure(f"cannot run {arguments[0].decode(errors='replace')}: "
                          f"{error.strerror}") from None
        if size is None:
            self.input = self.process.stdin.fileno()
            self.outputs = {self.process.stdout.fileno(): b"O", self.process.stderr.fileno(): b"E"}
        else:
            os.close(inner)
            self.input = self.terminal
            self.outputs = {self.terminal: b"O"}
        os.set_blocking(self.input, False)
        for output in self.outputs:
            os.set_blocking(output, False)

    def run(self):
        """Relays until the command has ended, and everything it wrote until then is sent."""
        ended = os.pidfd_open(self.process.pid)
        while True:
            reading = [ended, *self.outputs]
            if len(self.pending) < PENDING_MAX:
                reading.append(self.port.fd)
            writing = [self.input] if self.pending and self.input is not None else []
            readable, writable, _ = select.select(reading, writing, [])
            if self.port.fd in readable:
                for kind, data in self.port.frames():
                    self.take(kind, data)
            if writable:
                self.feed()
            for output in [fd for fd in readable if fd in self.outputs]:
                self.pass_on(output)
            if ended in readable:
                break
        # A process that lives on may hold the streams open: take what is there.
        for output in list(self.outputs):
            while self.pass_on(output):
                pass
        status = self.process.wait()
        return status if status >= 0 else 128 - status

    def take(self, kind, data):
        if kind == b"W" and self.terminal is not None:
            self.resize(data)
        elif kind == b"I" and self.input is not None:
            self.input_ended |= not data
            self.pending += data
            self.feed()

    def feed(self):
        try:
            del self.pending[:os.write(self.input, self.pending)]
        except BlockingIOError:
            return
        except OSError:
            self.pending.clear()
            self.input_ended = True
        if self.input_ended and not self.pending and self.terminal is None:
            self.process.stdin.close()
            self.input = None

    def pass_on(self, output):
        """Sends one piece of output; says whether there may be more at once."""
        try:
            data = os.read(output, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            del self.outputs[output]
            return False
        self.port.send(self.outputs[output], data)
        return True

    def resize(self, size):
        rows, columns = struct.unpack(">HH", size)
        tiocswinsz = 0x5414
        fcntl.ioctl(self.terminal, tiocswinsz, struct.pack("HHHH", rows, columns, 0, 0))


def own_terminal():
    tiocsctty = 0x540E
    fcntl.ioctl(0, tiocsctty, 0)


def prepare():
    """Lets each containerd import the test image once, while the image is being made."""
    path = os.environ["PATH"]
    for series in SERIES:
        os.environ["PATH"] = path
        try:
            containerd = start_containerd(series)
        except Failure as failure:
            print(f"prepare: {failure}", flush=True)
            continue
        subprocess.run(["ctr", "image", "import", BUSYBOX], check=True)
        containerd.terminate()
        containerd.wait()
        subprocess.run(["umount", "/var/lib/containerd"], check=True)
        print(f"prepare: containerd {series} has its image", flush=True)
    os.unlink(BUSYBOX)
    os.unlink("/var/log/containerd.log")
    print("prepare: done", flush=True)


if __name__ == "__main__":
    main()
