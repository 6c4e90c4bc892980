//! The system calls that no safe wrapper of our dependencies covers: the agent's only unsafe code.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Which side of [`clone_sibling`] this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// The caller, told the child's pid.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Forks a child that is a sibling of the caller, in new namespaces (`CLONE_NEW…`) and born in a
/// cgroup.
///
/// Only for a process with a single thread: the child goes on in a copy of the whole program.
pub fn clone_sibling(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Fork> {
    // exit_signal stays 0: clone3 wants it so with CLONE_PARENT, and the caller's is used.
    let mut args = libc::clone_args {
        flags: namespaces | flag(libc::CLONE_PARENT),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: args is a whole clone_args that asks for no shared memory and no new stack, so the
    // child runs on its own copy of this stack; with one thread no lock is held by another.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match pid {
        0 => Ok(Fork::Child),
        pid if pid > 0 => Ok(Fork::Parent(
            i32::try_from(pid)
                .ok()
                .and_then(Pid::from_raw)
                .ok_or_else(|| io::Error::other("clone3 answered no pid"))?,
        )),
        _ => Err(io::Error::last_os_error()),
    }
}

/// linux/sched.h; libc has it as a type too small to hold it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A `CLONE_…` flag as clone3 takes it.
pub fn flag(flag: i32) -> u64 {
    u64::from(flag.cast_unsigned())
}

/// Threads of this process, by /proc.
pub fn thread_count() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// One instruction of a classic BPF program.
pub type BpfInstruction = libc::sock_filter;

/// Filters the caller's system calls from now on. Needs no_new_privs or CAP_SYS_ADMIN.
pub fn install_seccomp(program: &[BpfInstruction], flags: u64) -> io::Result<()> {
    let len = u16::try_from(program.len())
        .map_err(|_| io::Error::other("the filter has more than 65535 instructions"))?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: program names a slice of len instructions that lives through the call and that the
    // kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Adds bytes to the kernel's entropy pool and credits them in full.
pub fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    /// linux/random.h: `struct rand_pool_info` with room for the bytes.
    #[repr(C)]
    struct PoolInfo {
        entropy_count: i32,
        buf_size: i32,
        buf: [u8; ENTROPY_BYTES_MAX],
    }
    let bytes = &bytes[..bytes.len().min(ENTROPY_BYTES_MAX)];
    let size = i32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut info = PoolInfo {
        entropy_count: size * 8,
        buf_size: size,
        buf: [0; ENTROPY_BYTES_MAX],
    };
    info.buf[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: RNDADDENTROPY reads buf_size bytes behind the header, which is less than buf holds.
    let result = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// linux/random.h: `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// The most that [`add_entropy`] takes.
pub const ENTROPY_BYTES_MAX: usize = 512;

/// One instruction of an eBPF program, as the kernel lays it out (linux/bpf.h `struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EbpfInstruction {
    /// Operation.
    pub code: u8,
    /// Destination register in the low half, source register in the high half.
    pub registers: u8,
    /// Offset of a jump or of a load.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

/// Loads a cgroup device program and returns its descriptor.
pub fn load_device_program(program: &[EbpfInstruction]) -> io::Result<OwnedFd> {
    /// linux/bpf.h: the first members of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct Load {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
    }
    const BPF_PROG_LOAD: u32 = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let license = c"Apache-2.0";
    let load = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
    };
    // SAFETY: the attribute's two pointers name a program and a string that live through the call
    // and are only read.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const load,
            size_of_val(&load),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: bpf has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to a cgroup, beside those of its parents.
pub fn attach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    /// linux/bpf.h: the members of `union bpf_attr` for BPF_PROG_ATTACH.
    #[repr(C)]
    struct Attach {
        target: u32,
        program: u32,
        attach_type: u32,
        flags: u32,
    }
    const BPF_PROG_ATTACH: u32 = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attach = Attach {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        attach_type: BPF_CGROUP_DEVICE,
        // A container that nests others attaches programs below; all of them must allow.
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attribute holds numbers only, and both descriptors are open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of_val(&attach),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets and clears attributes (`MOUNT_ATTR_…`) of a mount, or of the whole tree below it.
pub fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    is_recursive: bool,
) -> io::Result<()> {
    change_mount(
        mount,
        is_recursive,
        libc::mount_attr {
            attr_set: set,
            attr_clr: clear,
            propagation: 0,
            userns_fd: 0,
        },
    )
}

/// Maps the ids of a mount that is mounted nowhere yet by those of a user namespace.
pub fn map_mount_ids(
    mount: BorrowedFd<'_>,
    user_namespace: BorrowedFd<'_>,
    is_recursive: bool,
) -> io::Result<()> {
    change_mount(
        mount,
        is_recursive,
        libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: u64::from(user_namespace.as_raw_fd().unsigned_abs()),
        },
    )
}

fn change_mount(
    mount: BorrowedFd<'_>,
    is_recursive: bool,
    attributes: libc::mount_attr,
) -> io::Result<()> {
    let recursive = if is_recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a terminated string, the attributes are whole and only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a child that does nothing, in a user namespace of its own, until it is killed or its
/// parent ends.
///
/// Only for a process with a single thread, as it forks.
pub fn idle_in_user_namespace() -> io::Result<Pid> {
    // SAFETY: with one thread no lock is held by another, and the child below only makes system
    // calls.
    let pid = unsafe { libc::syscall(libc::SYS_clone, CLONE_IDLE, 0, 0, 0, 0) };
    if pid == 0 {
        loop {
            // SAFETY: prctl takes numbers here and touches no memory of ours.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            // SAFETY: pause takes nothing.
            unsafe { libc::pause() };
        }
    }
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .filter(|_| pid > 0)
        .ok_or_else(io::Error::last_os_error)
}

/// A new user namespace, and a signal to the parent at the end as fork has it.
const CLONE_IDLE: libc::c_int = libc::CLONE_NEWUSER | libc::SIGCHLD;

/// Brings the loopback interface of the current network namespace up.
pub fn raise_loopback(socket: BorrowedFd<'_>) -> io::Result<()> {
    /// linux/if.h: the part of `struct ifreq` that SIOCSIFFLAGS reads, at the full size.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: i16,
        rest: [u8; 22],
    }
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        rest: [0; 22],
    };
    request.name[..2].copy_from_slice(b"lo");
    request.flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    // SAFETY: the request is as large as struct ifreq and only read.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Marks every descriptor from this number on to be closed by execve.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: no descriptor is closed here, only a flag of each is set.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes ownership of a descriptor that a call has just returned.
pub(crate) fn own_fd(fd: i32) -> OwnedFd {
    assert!(fd >= 0, "a call that succeeds returns a descriptor");
    // SAFETY: the caller got the descriptor from a call that makes one, and gives it up here.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Gives SIGPIPE its usual meaning again, which Rust's runtime takes and execve passes on.
pub fn restore_sigpipe() -> io::Result<()> {
    // SAFETY: the default disposition runs no code of ours.
    let previous = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    if previous == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Any signal by its number, real-time ones as well.
pub(crate) fn signal_of(number: i32) -> Option<rustix::process::Signal> {
    /// The kernel's `_NSIG`.
    const SIGNALS: i32 = 64;
    if !(1..=SIGNALS).contains(&number) {
        return None;
    }
    // SAFETY: a number in range can be sent whatever it means; only handling the signals that a C
    // library keeps for itself would be wrong, and none is handled here.
    Some(unsafe { rustix::process::Signal::from_raw_unchecked(number) })
}

/// Registers a descriptor, which must not block, with the runtime.
pub fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd answers the same open descriptor for as long as it lives, and AsyncFd
    // deregisters it before dropping it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest)? })
}

/// Sets the caller's execution domain.
pub fn set_personality(domain: u32) -> io::Result<()> {
    // SAFETY: personality takes a number and touches no memory of ours.
    let previous = unsafe { libc::personality(libc::c_ulong::from(domain)) };
    if previous < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves the wall clock at once.
pub(crate) fn step_clock(by_ns: i64) -> io::Result<()> {
    const NS: i64 = 1_000_000_000;
    // SAFETY: timex is made of integers alone, of which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    // The kernel wants the part of a second to be positive.
    change.time.tv_sec = by_ns.div_euclid(NS);
    change.time.tv_usec = by_ns.rem_euclid(NS);
    adjust_clock(&mut change)
}

/// Moves the wall clock little by little, 500 microseconds a second.
pub(crate) fn slew_clock(by_ns: i64) -> io::Result<()> {
    const NS_PER_US: i64 = 1_000;
    // SAFETY: timex is made of integers alone, of which zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = by_ns / NS_PER_US;
    adjust_clock(&mut change)
}

fn adjust_clock(change: &mut libc::timex) -> io::Result<()> {
    // SAFETY: change is a whole timex, read and filled in.
    let state = unsafe { libc::adjtimex(change) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What sched_setattr(2) takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulingAttributes {
    /// `SCHED_…`.
    pub policy: u32,
    /// `SCHED_FLAG_…`.
    pub flags: u64,
    /// Nice value.
    pub nice: i32,
    /// Static priority.
    pub priority: u32,
    /// Nanoseconds per period.
    pub runtime_ns: u64,
    /// Nanoseconds after the start of a period.
    pub deadline_ns: u64,
    /// Nanoseconds of a period.
    pub period_ns: u64,
}

/// Sets how a process with a single thread is scheduled.
pub fn set_scheduling(pid: i32, attributes: &SchedulingAttributes) -> io::Result<()> {
    /// linux/sched/types.h: the first version of `struct sched_attr`.
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    const SIZE: usize = size_of::<Attributes>();
    let attributes = Attributes {
        size: u32::try_from(SIZE).map_err(io::Error::other)?,
        policy: attributes.policy,
        flags: attributes.flags,
        nice: attributes.nice,
        priority: attributes.priority,
        runtime: attributes.runtime_ns,
        deadline: attributes.deadline_ns,
        period: attributes.period_ns,
    };
    // SAFETY: the attributes are as long as they say, live through the call and are only read.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets a process's I/O priority, class and number in one (linux/ioprio.h).
pub fn set_io_priority(pid: i32, priority: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: ioprio_set takes three numbers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, priority) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
