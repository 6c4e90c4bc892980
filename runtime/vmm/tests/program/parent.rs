//! What a test is to the VMM: its parent, with a kernel of a few instructions.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use husk_vmm_control::{
    Answer, BootConfig, Call, Channel, ChannelError, Event, ExitReason, Message, Request,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use tempfile::TempDir;

/// How long any message may take, on a machine that is very busy.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// mov dx, 0x600; xor eax, eax; out dx, al; hlt
pub(crate) const POWER_OFF: &[u8] = b"\x66\xba\x00\x06\x31\xc0\xee\xf4";
/// mov al, 0xfe; out 0x64, al; hlt
pub(crate) const RESET: &[u8] = b"\xb0\xfe\xe6\x64\xf4";
/// ud2, with no handler for it
pub(crate) const TRIPLE_FAULT: &[u8] = b"\x0f\x0b";
/// jmp to itself
pub(crate) const SPIN: &[u8] = b"\xeb\xfe";

/// Why the tests of this file can't run here; printed, so that nobody takes them for passed.
pub(crate) fn is_able() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    let has_kvm = open_kvm().is_some();
    if !is_root || !has_kvm {
        eprintln!("SKIPPED: needs root ({is_root}) and /dev/kvm ({has_kvm})");
    }
    is_root && has_kvm
}

pub(crate) struct Parent {
    pub(crate) channel: Channel,
    pub(crate) first: Child,
    pub(crate) share: TempDir,
    pub(crate) console: PathBuf,
    pub(crate) config: BootConfig,
    /// What comes with the boot request.
    pub(crate) files: Vec<OwnedFd>,
    _agent: UnixStream,
    next_id: u64,
}

impl Parent {
    /// Starts a VMM that waits for its boot request.
    pub(crate) fn new(code: &[u8]) -> Self {
        let share = tempfile::tempdir().unwrap();
        let console = share.path().with_extension("log");
        let (channel, end) = Channel::pair().unwrap();
        set_socket_timeout(&channel, Timeout::Recv, Some(MESSAGE_TIMEOUT)).unwrap();
        let first = Command::new(env!("CARGO_BIN_EXE_husk-vmm"))
            .stdin(Stdio::from(end.into_socket()))
            .spawn()
            .unwrap();
        let (agent, agent_end) = UnixStream::pair().unwrap();
        let files = vec![
            open_kvm().unwrap().into(),
            kernel(code).into(),
            file_of(b"initrd").into(),
            File::create(&console).unwrap().into(),
            agent_end.into(),
        ];
        let config = BootConfig {
            vcpus: 1,
            memory_mib: 64,
            memory_max_mib: 0,
            cmdline_extra: String::new(),
            shared_dir: share.path().to_str().unwrap().to_owned(),
            cgroup_dir: String::new(),
            net: Vec::new(),
            disks: 0,
            share_cache_ms: 0,
            share_echo_group: None,
        };
        Self {
            channel,
            first,
            share,
            console,
            config,
            files,
            _agent: agent,
            next_id: 0,
        }
    }

    /// Sends the boot request and does not wait.
    pub(crate) fn send_boot(&mut self) {
        let call = Call::Boot(self.config.clone());
        let request = Request { id: 0, call };
        let files: Vec<_> = self.files.iter().map(AsFd::as_fd).collect();
        self.channel.send(&request, &files).unwrap();
    }

    /// Boots. Returns the machine's process.
    pub(crate) fn boot(&mut self) -> i32 {
        self.send_boot();
        let pid = self.launched();
        match self.next().unwrap() {
            Message::Reply { id: 0, result } => {
                assert!(matches!(result.unwrap(), Answer::Booted(_)));
            }
            other => panic!("no reply but {other:?}"),
        }
        assert!(self.first.wait().unwrap().success());
        pid
    }

    /// Boots, to no avail. Returns why.
    pub(crate) fn boot_failure(&mut self) -> String {
        self.send_boot();
        let failure = loop {
            match self.next().unwrap() {
                Message::Launched { .. } => {}
                Message::Reply { id: 0, result } => break result.unwrap_err().text,
                other => panic!("no reply but {other:?}"),
            }
        };
        let exit = ExitReason::Error {
            text: failure.clone(),
        };
        assert_eq!(self.exit(), exit);
        failure
    }

    pub(crate) fn launched(&self) -> i32 {
        let (message, descriptors) = self.channel.receive().unwrap();
        let Message::Launched { pid } = message else {
            panic!("not launched but {message:?}");
        };
        assert_eq!(descriptors.len(), 1, "the pidfd");
        pid
    }

    pub(crate) fn next(&self) -> Result<Message, ChannelError> {
        self.channel.receive().map(|(message, _)| message)
    }

    pub(crate) fn ask(&mut self, call: Call) -> Result<Answer, String> {
        self.next_id += 1;
        let id = self.next_id;
        self.channel.send(&Request { id, call }, &[]).unwrap();
        match self.next().unwrap() {
            Message::Reply { id: of, result } if of == id => result.map_err(|f| f.text),
            other => panic!("no reply but {other:?}"),
        }
    }

    pub(crate) fn exit(&self) -> ExitReason {
        match self.next().unwrap() {
            Message::Event(Event::Exited { reason }) => reason,
            other => panic!("no exit but {other:?}"),
        }
    }

    /// Waits until no process has the other end of the control socket any more.
    pub(crate) fn await_hang_up(&self) {
        loop {
            match self.next() {
                Ok(_) => {}
                Err(ChannelError::HungUp) => return,
                Err(other) => panic!("no hang-up but {other}"),
            }
        }
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        // The VMM ends when the channel is dropped; the first process may wait for its request.
        let _ = self.first.kill();
        let _ = self.first.wait();
        let _ = fs::remove_file(&self.console);
    }
}

/// How a machine's process has ended.
pub(crate) fn status_of(pid: i32) -> WaitStatus {
    waitpid(Pid::from_raw(pid), None).unwrap()
}

/// A value of `/proc/<path>`'s line that begins with `key`.
pub(crate) fn proc_value(path: &str, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{path}")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_else(|| panic!("no {key} in {path}"))
        .trim()
        .to_owned()
}

fn open_kvm() -> Option<File> {
    File::options().read(true).write(true).open("/dev/kvm").ok()
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF file with `code` at 16 MiB.
fn kernel(code: &[u8]) -> File {
    const START: u64 = 16 << 20;
    let code_bytes = code.len() as u64;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // An executable for x86-64, version 1.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend(START.to_le_bytes());
    // Program headers follow; no section headers, no flags.
    elf.extend(64_u64.to_le_bytes());
    elf.extend([0; 12]);
    // Sizes and numbers of headers.
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // A segment to load, readable and executable: offset, addresses, sizes, alignment.
    elf.extend(1_u32.to_le_bytes());
    elf.extend(5_u32.to_le_bytes());
    for word in [120, START, START, code_bytes, code_bytes, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    file_of(&elf)
}
