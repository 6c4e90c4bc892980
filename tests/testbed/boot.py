#!/usr/bin/python3
"""Boots the testbed in QEMU and runs a command in it. `run` is the way to call this.

QEMU gets its console and the port of the inner relay (guest/relay.py, where the frames are
described) as inherited sockets, opens the images as a snapshot it has unlinked already, and dies
with this process: nothing is on disk that would have to be cleaned up.
"""

import argparse
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import tty

CHUNK = 64 * 1024
BOOT_SECONDS_MAX = int(os.environ.get("HUSK_TESTBED_BOOT_SECONDS", "400"))
QEMU_END_SECONDS_MAX = 5
PREPARE_SECONDS_MAX = 900
CONSOLE_TAIL = 4000
# The testbed itself failed, as opposed to the command in it.
TESTBED_FAILED = 125


class Failure(Exception):
    """The testbed could not run the command to its end."""


def main():
    options = parse_arguments()
    try:
        machine = Machine(options)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end_by_signal)
        try:
            sys.exit(machine.prepare() if options.prepare else machine.run(options))
        finally:
            machine.end()
    except Failure as failure:
        print(f"testbed: {failure}", file=sys.stderr)
        sys.exit(TESTBED_FAILED)


def parse_arguments():
    parser = argparse.ArgumentParser(
        prog="tests/testbed/run", description="Runs a command as root in Husk's testbed.")
    parser.add_argument("--cpus", type=int, default=1, metavar="N")
    parser.add_argument("--memory", default="4G", metavar="SIZE", help="as QEMU writes it: 4G, 2048M")
    parser.add_argument("--share", metavar="DIR", help="appears at /share, read-write")
    parser.add_argument("--deterministic", action="store_true",
                        help="one CPU, and a clock that counts instructions")
    parser.add_argument("--containerd", choices=("1.6", "1.7", "2.1"), default="1.7")
    parser.add_argument("--silence", type=int, metavar="SECONDS",
                        help="end a machine whose command says nothing for so long")
    parser.add_argument("--tty", action="store_true", help="give the command a terminal")
    parser.add_argument("--image", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--dist", help=argparse.SUPPRESS)
    parser.add_argument("--preload", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", metavar="COMMAND")
    options = parser.parse_args()
    if not options.prepare and not options.command:
        parser.error("no COMMAND")
    if options.share and not os.path.isdir(options.share):
        parser.error(f"--share {options.share}: no such directory")
    if options.silence is not None and options.silence <= 0:
        parser.error(f"--silence {options.silence}: not a number of seconds above 0")
    if options.deterministic:
        options.cpus = 1
    return options


class Machine:
    """One QEMU process with the testbed in it."""

    def __init__(self, options):
        self.console, console_end = socket.socketpair()
        self.port, port_end = socket.socketpair()
        self.tail = bytearray()
        self.silence = options.silence
        inherited = (console_end.fileno(), port_end.fileno())
        # Without this process nobody would end QEMU: let the kernel do it.
        command = ["setpriv", "--pdeathsig", "KILL"]
        if options.preload:
            command += ["env", "LD_PRELOAD=" + os.path.realpath(options.preload)]
        command += qemu_command(options, *inherited)
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True)
        console_end.close()
        port_end.close()

    def end(self):
        self.process.kill()
        self.process.wait()

    def run(self, options):
        session = Session(self.port, options)
        with selectors.DefaultSelector() as selector:
            try:
                return self.serve(selector, session)
            finally:
                session.restore_terminal()

    def serve(self, selector, session):
        selector.register(self.console, selectors.EVENT_READ, self.read_console)
        selector.register(self.process.stdout, selectors.EVENT_READ, self.read_qemu)
        session.register(selector)
        while session.status is None:
            timeout = None
            if not session.started:
                timeout = self.began + BOOT_SECONDS_MAX - time.monotonic()
                if timeout <= 0:
                    raise Failure(f"did not boot in {BOOT_SECONDS_MAX} s{self.console_tail()}")
            elif self.silence:
                timeout = session.heard + self.silence - time.monotonic()
                if timeout <= 0:
                    raise Failure(f"its command said nothing for {self.silence} s"
                                  f"{self.console_tail()}")
            for key, events in selector.select(timeout):
                if key.data(selector, events) is False:
                    # Data may have arrived right before the machine went away.
                    session.drain()
                    if session.status is None:
                        raise Failure(f"the machine went away{self.end_of_qemu()}"
                                      f"{self.console_tail()}")
                if session.status is not None:
                    break
        return session.status

    def prepare(self):
        """Waits until the machine has prepared its image and powered itself off."""
        deadline = time.monotonic() + PREPARE_SECONDS_MAX
        self.console.settimeout(PREPARE_SECONDS_MAX)
        while True:
            try:
                data = receive(self.console)
            except TimeoutError:
                data = b""
            if not data or time.monotonic() > deadline:
                break
            self.keep(data)
        if b"prepare: done" not in self.tail:
            raise Failure(f"the image could not be prepared{self.console_tail()}")
        return 0

    def read_console(self, _selector, _events):
        data = receive(self.console)
        self.keep(data)
        return bool(data)

    def read_qemu(self, selector, _events):
        data = os.read(self.process.stdout.fileno(), CHUNK)
        self.keep(data)
        if not data:
            selector.unregister(self.process.stdout)
        return bool(data)

    def keep(self, data):
        self.tail += data
        del self.tail[:-CONSOLE_TAIL]
        if os.environ.get("HUSK_TESTBED_VERBOSE"):
            sys.stderr.buffer.write(data)
            sys.stderr.flush()

    def end_of_qemu(self):
        """Its sockets are closed, so it ends now if it has not."""
        try:
            status = self.process.wait(QEMU_END_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return ""
        if status < 0:
            return f": QEMU was killed by {signal.Signals(-status).name}"
        return f": QEMU ended with {status}"

    def console_tail(self):
        text = self.tail.decode(errors="replace").replace("\r", "").strip()
        return f"; the end of its console:\n{text}" if text else "; its console is empty"


def qemu_command(options, console, port):
    share = "fsdev={0},mount_tag={0}"
    words = ["husk.containerd=" + options.containerd]
    if options.deterministic:
        accelerator = ["-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off"]
    else:
        accelerator = ["-accel", "tcg,thread=multi"]
    image = options.image
    snapshot = "off" if options.prepare else "on"
    command = [
        "qemu-system-x86_64", "-M", "q35", *accelerator, "-cpu", "max",
        "-smp", str(options.cpus), "-m", options.memory,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-kernel", f"{image}/kernel", "-initrd", f"{image}/initrd",
        "-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console",
        "-chardev", f"socket,id=port,fd={port}",
        "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=husk.testbed",
        "-drive", f"file={image}/root.ext4,if=virtio,format=raw,cache=unsafe,snapshot={snapshot}",
        "-device", "virtio-rng-pci",
    ]
    if options.prepare:
        words.append("husk.mode=prepare")
    else:
        command += ["-drive", f"file={image}/testdata.ext4,if=virtio,format=raw,readonly=on"]
    if options.dist:
        words.append("husk.dist=9p")
        command += ["-fsdev", f"local,id=dist,path={quoted(options.dist)},security_model=none,readonly=on",
                    "-device", "virtio-9p-pci," + share.format("dist")]
    if options.share:
        words.append("husk.share=9p")
        command += ["-fsdev", f"local,id=share,path={quoted(options.share)},security_model=none,multidevs=remap",
                    "-device", "virtio-9p-pci," + share.format("share")]
    return command + ["-append", "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off " + " ".join(words)]


def quoted(path):
    """A path as a value in QEMU's comma-separated options."""
    return os.path.realpath(path).replace(",", ",,")


class Session:
    """The outer end of the relay: this process's streams and the command's."""

    def __init__(self, port, options):
        self.port = port
        self.started = False
        # When the command said something last.
        self.heard = time.monotonic()
        self.status = None
        self.saved_terminal = None
        self.received = bytearray()
        self.outgoing = bytearray()
        self.port.setblocking(False)
        self.input_open = True
        self.is_tty = options.tty
        if options.tty:
            self.queue(b"T", terminal_size())
        for argument in options.command:
            self.queue(b"C", os.fsencode(argument))
        self.queue(b"G")
        # A person's terminal is not passed on, but what is piped in is.
        if not options.tty and os.isatty(0):
            self.end_input()

    def register(self, selector):
        self.selector = selector
        selector.register(self.port, selectors.EVENT_READ | selectors.EVENT_WRITE, self.serve)
        if self.is_tty:
            self.enter_raw_mode()
            # A signal's handler may not touch the selector: it writes to a socket that is in it.
            self.resized, wake = socket.socketpair()
            wake.setblocking(False)
            signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
            self.wake = wake
            signal.signal(signal.SIGWINCH, lambda *_: None)
            selector.register(self.resized, selectors.EVENT_READ, self.send_size)
        if self.input_open:
            self.watch_input()

    def watch_input(self):
        try:
            self.selector.register(0, selectors.EVENT_READ, self.read_input)
        except PermissionError:
            # A regular file, which is always ready, and which epoll refuses.
            self.read_file()

    def read_file(self):
        while data := os.read(0, CHUNK):
            self.queue(b"I", data)
        self.end_input()

    def enter_raw_mode(self):
        if os.isatty(0):
            self.saved_terminal = termios.tcgetattr(0)
            tty.setraw(0)

    def restore_terminal(self):
        if self.saved_terminal is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, self.saved_terminal)

    def send_size(self, _selector, _events):
        self.resized.recv(CHUNK)
        self.queue(b"W", terminal_size())
        return True

    def read_input(self, selector, _events):
        # Input the command does not read yet waits where it is, not here.
        if len(self.outgoing) > 16 * CHUNK:
            selector.unregister(0)
            return True
        try:
            data = os.read(0, CHUNK)
        except OSError:
            data = b""
        if data:
            self.queue(b"I", data)
        else:
            selector.unregister(0)
            self.end_input()
        return True

    def end_input(self):
        self.input_open = False
        self.queue(b"I")

    def queue(self, kind, data=b""):
        self.outgoing += kind + struct.pack(">I", len(data)) + data
        if hasattr(self, "selector"):
            self.selector.modify(self.port, selectors.EVENT_READ | selectors.EVENT_WRITE, self.serve)

    def serve(self, selector, events):
        if events & selectors.EVENT_WRITE:
            try:
                del self.outgoing[:self.port.send(self.outgoing[:CHUNK])]
            except (BrokenPipeError, ConnectionResetError):
                return False
            if not self.outgoing:
                selector.modify(self.port, selectors.EVENT_READ, self.serve)
                if self.input_open and 0 not in selector.get_map():
                    self.watch_input()
        if events & selectors.EVENT_READ:
            return self.receive()
        return True

    def drain(self):
        try:
            while self.status is None and self.receive():
                pass
        except BlockingIOError:
            pass

    def receive(self):
        data = receive(self.port)
        self.received += data
        while len(self.received) >= 5:
            (length,) = struct.unpack(">I", self.received[1:5])
            if len(self.received) < 5 + length:
                break
            frame = bytes(self.received[5:5 + length])
            kind = bytes(self.received[:1])
            del self.received[:5 + length]
            self.take(kind, frame)
        return bool(data)

    def take(self, kind, data):
        self.heard = time.monotonic()
        if kind == b"R":
            self.started = True
        elif kind == b"O":
            write_all(1, data)
        elif kind == b"E":
            write_all(2, data)
        elif kind == b"X":
            self.status = data[0]
        elif kind == b"F":
            raise Failure(data.decode(errors="replace"))


def receive(stream):
    """What has come; nothing when the other end is gone, however it went."""
    try:
        return stream.recv(CHUNK)
    except ConnectionResetError:
        return b""


def write_all(fd, data):
    while data:
        try:
            data = data[os.write(fd, data):]
        except BlockingIOError:
            with selectors.DefaultSelector() as writable:
                writable.register(fd, selectors.EVENT_WRITE)
                writable.select()
        except BrokenPipeError:
            # Whoever read this has gone; a local command would end likewise.
            sys.exit(128 + signal.SIGPIPE)


def terminal_size():
    size = shutil.get_terminal_size()
    return struct.pack(">HH", size.lines, size.columns)


def end_by_signal(number, _frame):
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
