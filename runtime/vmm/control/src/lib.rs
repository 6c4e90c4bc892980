//! Messages between a VMM process and its parent.
//!
//! They travel on one `AF_UNIX` `SOCK_SEQPACKET` socket, a datagram each: JSON, and descriptors as
//! `SCM_RIGHTS`. The parent owns the other end; when it hangs up, the VMM ends.
//!
//! | from | message |
//! |---|---|
//! | parent | [`Request`], with the descriptors that its [`Call`] names, in that order |
//! | VMM | [`Message::Launched`] once, [`Message::Reply`] to each request, [`Message::Event`] |
//!
//! A call that does not fit the state of the machine, or comes with other descriptors than it
//! names, is answered with a [`Failure`] and changes nothing. A [`Call::Boot`] that fails is the
//! end: [`Event::Exited`] follows. So does it after a datagram that is no request, which can't be
//! answered for want of an id.

mod channel;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub use channel::{Channel, ChannelError, DESCRIPTORS_MAX, MESSAGE_BYTES_MAX};

/// The descriptor on which a VMM process finds its control socket: standard input, the one that
/// a parent can hand over without running code of its own between fork and exec.
pub const CONTROL_FD: i32 = 0;

/// One call, and the id its reply will carry.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the parent; never reused while a reply is outstanding.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// What a parent asks of a VMM.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "call")]
pub enum Call {
    /// Builds the machine and enters the jail; the guest does not run yet. The first call, once.
    /// Descriptors: /dev/kvm, guest kernel, initrd, console log (opened for writing),
    /// agent stream (one end of a `SOCK_STREAM` pair), and a tap for each of [`BootConfig::net`]
    /// that has an address.
    Boot(BootConfig),
    /// Runs the first guest instruction. Once, after `Boot`.
    Start,
    /// Connects a vsock port of the guest to descriptors. Answered when the guest has accepted
    /// or refused. Descriptors: the source if [`Connect::source`], then the sink if
    /// [`Connect::sink`]; or a single socket if [`Connect::duplex`].
    Connect(Connect),
    /// Stops all vCPUs at an instruction boundary; answered when they stand still.
    Pause,
    /// Lets the vCPUs run again.
    Resume,
    /// Plugs a tap into a network device, or pulls it out. Descriptors: the tap if [`PlugNet::tap`].
    /// The one that was there before is closed.
    PlugNet(PlugNet),
    /// Plugs a disk into a slot, or pulls it out. Descriptors: its file if [`PlugDisk::disk`], open for
    /// what the guest may do to it. What was there before must have been pulled out by a parent who had
    /// the guest let go of it.
    PlugDisk(PlugDisk),
    /// Has the guest take more memory, or give some back: see [`ResizeMemory`].
    ResizeMemory(ResizeMemory),
    /// Ends the virtual machine at once, whatever the guest does.
    Stop,
    /// Asks for the counters of the machine.
    Metrics,
}

/// The machine to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// Number of virtual CPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// Guest memory in MiB, [`MEMORY_MIB_MIN`] to [`MEMORY_MIB_MAX`].
    pub memory_mib: u32,
    /// Most memory that it may be given by [`Call::ResizeMemory`], in MiB, no more than
    /// [`MEMORY_MIB_MAX`]. If that is not more than it has, it never has more.
    #[serde(default)]
    pub memory_max_mib: u32,
    /// Added to the kernel's command line, which is otherwise the VMM's own.
    #[serde(default)]
    pub cmdline_extra: String,
    /// Absolute path of the directory that becomes the VMM's root and the guest's share.
    pub shared_dir: String,
    /// Absolute path of the cgroup v2 directory to join before the guest runs; empty: stay.
    #[serde(default)]
    pub cgroup_dir: String,
    /// The network devices, in the order in which the guest meets them; at most [`NET_DEVICES_MAX`].
    #[serde(default)]
    pub net: Vec<NetConfig>,
    /// How many slots for disks there are, for [`Call::PlugDisk`]; at most [`DISKS_MAX`]. They are the
    /// last devices that the guest meets, and nothing to it while they are empty.
    #[serde(default)]
    pub disks: usize,
    /// How long the guest may believe names and attributes of the share, in milliseconds.
    pub share_cache_ms: u64,
    /// Requests to the share that are made in this group's name, or in that of the three after it,
    /// change nothing: they tell the guest's inotify of what the host has done.
    #[serde(default)]
    pub share_echo_group: Option<u32>,
}

/// A network device. Its tap does not block, and has a header of 12 bytes before each frame
/// (`IFF_VNET_HDR`, `TUNSETVNETHDRSZ`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Its Ethernet address. A device without one gets its tap later, by [`Call::PlugNet`], and lets
    /// the guest choose.
    pub mac: Option<[u8; 6]>,
}

/// Least [`Connect::host_port`]; those below are for services of the host.
pub const HOST_PORT_MIN: u32 = 0x1_0000;
/// Greatest [`Connect::host_port`]: the number above means "any".
pub const HOST_PORT_MAX: u32 = u32::MAX - 1;
/// Most network devices of a machine.
pub const NET_DEVICES_MAX: usize = 8;
/// Most disks of a machine.
pub const DISKS_MAX: usize = 16;
/// Most virtual CPUs a machine may have.
pub const VCPUS_MAX: u8 = 64;
/// Least guest memory, in MiB, a stock kernel and the agent get up in.
pub const MEMORY_MIB_MIN: u32 = 64;
/// Most guest memory in MiB.
pub const MEMORY_MIB_MAX: u32 = 1024 * 1024;

/// The memory that a guest is to have. Answered once it has at least as much: at once if it is to give
/// some back, which it does in its own time and as far as it can. A further call takes the place of
/// one that is not answered yet, which fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeMemory {
    /// In all, in MiB. Less than it booted with is as much as that.
    pub memory_mib: u32,
}

/// A network device, and whether a tap comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlugNet {
    /// Its place in [`BootConfig::net`].
    pub device: usize,
    /// A tap is sent; none: what is there is pulled out.
    pub tap: bool,
}

/// A slot for a disk, and what comes there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlugDisk {
    /// One of [`BootConfig::disks`], counted from 0.
    pub slot: usize,
    /// The disk; none: what is there is pulled out.
    pub disk: Option<DiskConfig>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Its size.
    pub bytes: u64,
    /// Its smallest unit: a power of two, 512 to 4096.
    pub block_bytes: u32,
    /// The guest may not write to it.
    pub is_read_only: bool,
    /// Parts of it can be given back to the host with fallocate(2), and then read as zeros.
    pub can_zero: bool,
    /// The name by which the guest finds it: 1 to 20 letters and digits.
    pub serial: String,
}

/// A vsock connection to be made from the host to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// The port on which the guest listens.
    pub port: u32,
    /// The port from which the guest sees the connection come: [`HOST_PORT_MIN`] to
    /// [`HOST_PORT_MAX`], and of no other connection. The guest tells connections apart by it, so a
    /// parent is wise to use none twice.
    pub host_port: u32,
    /// The parent's name for the connection, carried by [`Event::StreamClosed`].
    pub stream: u64,
    /// A descriptor is sent whose bytes go to the guest; its end closes the guest's input.
    #[serde(default)]
    pub source: bool,
    /// A descriptor is sent that the guest's bytes are written to.
    #[serde(default)]
    pub sink: bool,
    /// One socket is sent that serves as both.
    #[serde(default)]
    pub duplex: bool,
}

/// What a VMM says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "message")]
pub enum Message {
    /// The jailed process exists. Carries one descriptor, its pidfd. It is a direct child of
    /// the parent.
    Launched {
        /// The pid in the namespace of the parent.
        pid: i32,
    },
    /// The answer to the request of that id.
    Reply {
        /// See [`Request::id`].
        id: u64,
        /// What came of it.
        result: Result<Answer, Failure>,
    },
    /// Something happened.
    Event(Event),
}

/// The answer to a call that succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// Done; nothing more to say.
    Done,
    /// To [`Call::Boot`]: the machine is built and jailed.
    Booted(BootTimes),
    /// To [`Call::Metrics`].
    Metrics(Metrics),
}

/// When the steps of a boot were done, as [`monotonic_us`] counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootTimes {
    /// The process has entered its jail.
    pub jailed_us: u64,
    /// KVM has made the machine.
    pub kvm_us: u64,
    /// Kernel, initrd and tables are in guest memory.
    pub loaded_us: u64,
    /// Everything is built, and every thread under its filter.
    pub built_us: u64,
}

/// `CLOCK_MONOTONIC` in microseconds: the same for all processes of a host, and for its kernel's
/// tracing.
#[must_use]
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // It counts from the host's start: neither part is ever negative.
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000
}

/// Why a call failed, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{text}")]
pub struct Failure {
    /// A sentence that names the thing and what was wrong.
    pub text: String,
}

/// What a VMM reports of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// The sink of a connection has refused bytes, which are lost. [`Event::StreamClosed`] follows
    /// when the guest has heard of it.
    StreamFailed {
        /// See [`Connect::stream`].
        stream: u64,
        /// The host's error.
        text: String,
    },
    /// Both directions of a connection are over, every byte the guest sent is written to the
    /// sink, and the descriptors are closed.
    StreamClosed {
        /// See [`Connect::stream`].
        stream: u64,
        /// Bytes that went to the guest.
        sent: u64,
        /// Bytes that came from the guest.
        received: u64,
        /// When the first of them was written to the sink, as [`monotonic_us`] counts; 0: never.
        #[serde(default)]
        first_us: u64,
    },
    /// The virtual machine has ended; the process follows. The last message.
    Exited {
        /// How.
        reason: ExitReason,
    },
}

/// How a virtual machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "reason")]
pub enum ExitReason {
    /// The guest powered itself off, or [`Call::Stop`] ended it.
    Stopped,
    /// The guest asked for a reset; a kernel that panics does.
    Reset,
    /// The guest's CPU shut down after a triple fault.
    TripleFault,
    /// The VMM could not go on.
    Error {
        /// A sentence that says why.
        text: String,
    },
}

/// Counters since the machine was built.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Exits from the guest to the VMM process, by all vCPUs.
    pub exits_io: u64,
    /// See `exits_io`.
    pub exits_mmio: u64,
    /// vsock connections ever made.
    pub vsock_connections: u64,
    /// vsock connections open now.
    pub vsock_open: u64,
    /// Memory in bytes that the guest has beyond what it booted with.
    pub memory_plugged_bytes: u64,
    /// FUSE requests served.
    pub fs_requests: u64,
    /// Bytes read from the share by the guest.
    pub fs_read_bytes: u64,
    /// Bytes written to the share by the guest.
    pub fs_written_bytes: u64,
    /// Inodes of the share the guest has not forgotten.
    pub fs_inodes: u64,
    /// Frames that the guest received, over all its network devices.
    pub net_received_frames: u64,
    /// Their bytes, each with a header of 12.
    pub net_received_bytes: u64,
    /// Frames that the guest sent.
    pub net_sent_frames: u64,
    /// Their bytes, each with a header of 12.
    pub net_sent_bytes: u64,
    /// Frames of either direction that were lost in the machine.
    pub net_dropped_frames: u64,
}
