//! The lists. Each call stands in the group of the reason it is there for.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompRule,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_WRITE, ioctl_expr};

use super::ThreadKind;

/// What the C library and Rust's standard library do on any thread: allocate, lock, unwind a
/// signal, end. `write` is for events and for the last words on stderr.
pub(super) const EVERY_THREAD: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
];

/// Waiting for one of a few descriptors.
const WAITING: &[c_long] = &[libc::SYS_poll, libc::SYS_ppoll];

/// Waiting for one of many descriptors.
const EVENT_LOOP: &[c_long] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
];

/// Setting the deadline of a stream that the guest may never accept.
const DEADLINE: &[c_long] = &[libc::SYS_timerfd_settime];

/// Control messages and streams. Only on sockets there are already.
const MESSAGES: &[c_long] = &[libc::SYS_recvmsg, libc::SYS_sendmsg];

/// Bytes between descriptors and guest memory.
const STREAM_BYTES: &[c_long] = &[libc::SYS_readv, libc::SYS_shutdown, libc::SYS_writev];

/// Frames between a tap and guest memory.
const FRAMES: &[c_long] = &[libc::SYS_readv, libc::SYS_writev];

/// Bytes between a disk's file and guest memory.
const DISK_CONTENTS: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_preadv,
    libc::SYS_pwritev,
];

/// Looking at a descriptor that was handed over, and watching it.
const STREAM_DESCRIPTORS: &[c_long] = &[libc::SYS_epoll_create1, libc::SYS_fstat];

/// Files of the share: names.
const FILE_NAMES: &[c_long] = &[
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_getdents64,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_renameat2,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// Files of the share: what is in them.
const FILE_CONTENTS: &[c_long] = &[
    libc::SYS_copy_file_range,
    // With the close of the copy, it reports to the guest what close(2) has to say.
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwritev2,
    libc::SYS_syncfs,
];

/// Files of the share: extended attributes. Their path is the number of a descriptor, in the
/// directory of the process's descriptors.
const FILE_ATTRIBUTES: &[c_long] = &[
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_setxattr,
];

/// Taking on the identity of the guest's caller, and giving it up again. The jail has left no
/// capability that another identity would add to.
const FILE_IDENTITY: &[c_long] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_umask,
];

/// Linux uapi, kvm.h: the type byte of KVM's requests.
const KVMIO: u32 = 0xae;

/// Requests on a machine that runs.
const MACHINE_REQUESTS: &[libc::c_ulong] = &[
    // KVM_SET_USER_MEMORY_REGION, as the guest's memory grows
    ioctl_expr(_IOC_WRITE, KVMIO, 0x46, 32),
];

/// Requests that do work on a virtual CPU that runs.
const VCPU_REQUESTS: &[libc::c_ulong] = &[
    // KVM_RUN
    ioctl_expr(_IOC_NONE, KVMIO, 0x80, 0),
    // KVM_KVMCLOCK_CTRL, at a resume
    ioctl_expr(_IOC_NONE, KVMIO, 0xad, 0),
];

/// Requests on a tap.
const TAP_REQUESTS: &[libc::c_ulong] = &[
    // TUNSETOFFLOAD, each time the driver sets the device up, or a tap is plugged in
    0x4004_54d0,
];

/// Requests on files of the share.
const FILE_REQUESTS: &[libc::c_ulong] = &[
    // FS_IOC_GETFLAGS
    0x8008_6601,
];

/// The rules of one kind of thread.
pub(super) fn of(kind: ThreadKind) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let mut rules = Rules::default();
    rules.allow(EVERY_THREAD);
    rules.allow_data_mappings()?;
    // Rust's debug builds look whether a descriptor is open before they close it.
    rules.allow_descriptor_command(libc::F_GETFD)?;
    match kind {
        ThreadKind::Control => {
            rules.allow(WAITING);
            rules.allow(DEADLINE);
            rules.allow(MESSAGES);
            // Whether a descriptor that came is a tap.
            rules.allow_requests(TAP_REQUESTS)?;
            rules.allow_requests(MACHINE_REQUESTS)?;
        }
        ThreadKind::Vcpu => {
            rules.allow_requests(VCPU_REQUESTS)?;
        }
        ThreadKind::Device => {
            rules.allow_copies()?;
            rules.allow(WAITING);
        }
        ThreadKind::Vsock => {
            rules.allow_copies()?;
            rules.allow(WAITING);
            rules.allow(EVENT_LOOP);
            rules.allow(DEADLINE);
            rules.allow(STREAM_BYTES);
            rules.allow(STREAM_DESCRIPTORS);
            // Streams that are sockets: only there can a single call be told not to wait.
            rules.allow(MESSAGES);
            // Only asked: others share the open file description, so nothing may change it.
            rules.allow_descriptor_command(libc::F_GETFL)?;
        }
        ThreadKind::Net => {
            rules.allow_copies()?;
            rules.allow(WAITING);
            rules.allow(FRAMES);
            rules.allow_requests(TAP_REQUESTS)?;
        }
        ThreadKind::Blk => {
            rules.allow_copies()?;
            rules.allow(WAITING);
            rules.allow(DISK_CONTENTS);
        }
        ThreadKind::FsWorker => {
            rules.allow(WAITING);
            rules.allow(FILE_NAMES);
            rules.allow(FILE_CONTENTS);
            rules.allow(FILE_ATTRIBUTES);
            rules.allow(FILE_IDENTITY);
            rules.allow_copies()?;
            rules.allow_requests(FILE_REQUESTS)?;
        }
    }
    Ok(rules.by_call)
}

#[derive(Default)]
struct Rules {
    by_call: BTreeMap<c_long, Vec<SeccompRule>>,
}

impl Rules {
    fn allow(&mut self, calls: &[c_long]) {
        for call in calls {
            self.by_call.insert(*call, Vec::new());
        }
    }

    fn allow_if(&mut self, call: c_long, condition: Condition) -> Result<(), BackendError> {
        let rule = SeccompRule::new(vec![condition])?;
        self.by_call.entry(call).or_default().push(rule);
        Ok(())
    }

    /// Memory that can't hold code.
    fn allow_data_mappings(&mut self) -> Result<(), BackendError> {
        const PROTECTION_ARGUMENT: u8 = 2;
        let exec = u64::from(libc::PROT_EXEC.unsigned_abs());
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            let data = Condition::new(PROTECTION_ARGUMENT, Len::Dword, Op::MaskedEq(exec), 0)?;
            self.allow_if(call, data)?;
        }
        Ok(())
    }

    /// `ioctl` with one of `requests`. The kernel looks at 32 bits of the number only.
    fn allow_requests(&mut self, requests: &[libc::c_ulong]) -> Result<(), BackendError> {
        const REQUEST_ARGUMENT: u8 = 1;
        for request in requests {
            let this = Condition::new(REQUEST_ARGUMENT, Len::Dword, Op::Eq, *request)?;
            self.allow_if(libc::SYS_ioctl, this)?;
        }
        Ok(())
    }

    /// Copies of descriptors. The transport gives a device those of its events, each time the
    /// driver sets it up.
    fn allow_copies(&mut self) -> Result<(), BackendError> {
        self.allow_descriptor_command(libc::F_DUPFD_CLOEXEC)
    }

    /// `fcntl` with one command.
    fn allow_descriptor_command(&mut self, command: libc::c_int) -> Result<(), BackendError> {
        const COMMAND_ARGUMENT: u8 = 1;
        let command = u64::from(command.unsigned_abs());
        let this = Condition::new(COMMAND_ARGUMENT, Len::Dword, Op::Eq, command)?;
        self.allow_if(libc::SYS_fcntl, this)
    }
}
