//! Each test runs a system call in a forked child under a filter and looks at how the child ended.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::*;

#[derive(Debug, PartialEq, Eq)]
enum End {
    Returned,
    Killed(Signal),
}

/// Runs `call` in a child under the filter of `kind`.
fn under(kind: ThreadKind, call: impl FnOnce()) -> End {
    let filters = Filters::compile().unwrap();
    // SAFETY: the child allocates nothing: it installs a compiled filter and makes system calls.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let installed = filters.install(kind).is_ok();
            call();
            // SAFETY: ends this process without running anything of the test harness.
            unsafe { libc::_exit(i32::from(!installed)) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).unwrap() {
            WaitStatus::Exited(_, 0) => End::Returned,
            WaitStatus::Signaled(_, signal, _) => End::Killed(signal),
            other => panic!("unexpected end {other:?}"),
        },
    }
}

fn raw(number: c_long, arguments: [c_long; 4]) {
    let [a, b, c, d] = arguments;
    // SAFETY: every caller passes arguments with which the call either is refused by the filter,
    // fails, or changes nothing but the forked child.
    unsafe { libc::syscall(number, a, b, c, d) };
}

use libc::c_long;

const KILLED: End = End::Killed(Signal::SIGSYS);

#[test]
fn no_thread_makes_a_socket_a_process_or_a_mount_or_leaves_the_share() {
    for kind in ThreadKind::ALL {
        for number in [
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_execve,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_prctl,
            libc::SYS_memfd_create,
            // Would open files of the host that are not in the share.
            libc::SYS_open_by_handle_at,
        ] {
            let end = under(kind, || raw(number, [-1, 0, 0, 0]));
            assert_eq!(end, KILLED, "{kind:?}, system call {number}");
        }
    }
}

#[test]
fn only_file_workers_open_files() {
    let path = CString::new("/").unwrap();
    for kind in ThreadKind::ALL {
        let open = || raw(libc::SYS_openat, [-100, path.as_ptr() as c_long, 0, 0]);
        let expected = match kind {
            ThreadKind::FsWorker => End::Returned,
            _ => KILLED,
        };
        assert_eq!(under(kind, open), expected, "{kind:?}");
    }
}

#[test]
fn only_what_moves_streams_and_frames_has_the_calls_for_it() {
    for kind in ThreadKind::ALL {
        let may = |is_allowed| if is_allowed { End::Returned } else { KILLED };
        let moves_bytes = matches!(kind, ThreadKind::Vsock | ThreadKind::Net);
        for (number, is_allowed) in [
            (libc::SYS_readv, moves_bytes),
            (libc::SYS_writev, moves_bytes),
            (libc::SYS_shutdown, kind == ThreadKind::Vsock),
            (libc::SYS_epoll_ctl, kind == ThreadKind::Vsock),
            (libc::SYS_sendto, false),
            (libc::SYS_recvfrom, false),
        ] {
            let end = under(kind, || raw(number, [-1, 0, 0, 0]));
            assert_eq!(end, may(is_allowed), "{kind:?}, system call {number}");
        }
    }
}

#[test]
fn only_what_serves_files_and_disks_has_the_calls_for_it() {
    for kind in ThreadKind::ALL {
        let may = |is_allowed| if is_allowed { End::Returned } else { KILLED };
        let (is_file, is_disk) = (kind == ThreadKind::FsWorker, kind == ThreadKind::Blk);
        for (number, is_allowed) in [
            (libc::SYS_preadv, is_file || is_disk),
            (libc::SYS_pwritev, is_disk),
            (libc::SYS_fdatasync, is_file || is_disk),
            (libc::SYS_fallocate, is_file || is_disk),
            (libc::SYS_ftruncate, is_file),
            (libc::SYS_statx, is_file),
        ] {
            let end = under(kind, || raw(number, [-1, 0, 0, 0]));
            assert_eq!(end, may(is_allowed), "{kind:?}, system call {number}");
        }
    }
}

#[test]
fn memory_is_never_executable() {
    let page = 4096;
    let private_anonymous = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let data = c_long::from(libc::PROT_READ | libc::PROT_WRITE);
    let code = c_long::from(libc::PROT_READ | libc::PROT_EXEC);
    for kind in ThreadKind::ALL {
        let map = |protection| {
            under(kind, || {
                raw(libc::SYS_mmap, [0, page, protection, private_anonymous]);
            })
        };
        let protect = |protection| {
            under(kind, || {
                raw(libc::SYS_mprotect, [0, page, protection, 0]);
            })
        };
        assert_eq!(map(data), End::Returned, "{kind:?}");
        assert_eq!(protect(data), End::Returned, "{kind:?}");
        assert_eq!(map(code), KILLED, "{kind:?}");
        assert_eq!(protect(code), KILLED, "{kind:?}");
    }
}

#[test]
fn ioctl_is_limited_to_what_a_thread_does() {
    const KVM_RUN: c_long = 0xae80;
    const KVM_CREATE_VM: c_long = 0xae01;
    const KVM_SET_USER_MEMORY_REGION: c_long = 0x4020_ae46;
    const TUNSETOFFLOAD: c_long = 0x4004_54d0;
    const TUNSETIFF: c_long = 0x4004_54ca;
    const TIOCSTI: c_long = 0x5412;
    const FS_IOC_GETFLAGS: c_long = 0x8008_6601;
    let null = File::open("/dev/null").unwrap();
    let fd = c_long::from(null.as_raw_fd());
    let request = |kind, request| under(kind, || raw(libc::SYS_ioctl, [fd, request, 0, 0]));

    assert_eq!(request(ThreadKind::Vcpu, KVM_RUN), End::Returned);
    assert_eq!(request(ThreadKind::Vcpu, KVM_CREATE_VM), KILLED);
    assert_eq!(
        request(ThreadKind::FsWorker, FS_IOC_GETFLAGS),
        End::Returned
    );
    assert_eq!(request(ThreadKind::FsWorker, KVM_RUN), KILLED);
    assert_eq!(request(ThreadKind::Net, TUNSETOFFLOAD), End::Returned);
    assert_eq!(request(ThreadKind::Net, TUNSETIFF), KILLED);
    assert_eq!(request(ThreadKind::Device, TUNSETOFFLOAD), KILLED);
    for kind in ThreadKind::ALL {
        let end = request(kind, KVM_SET_USER_MEMORY_REGION);
        let is_allowed = kind == ThreadKind::Control;
        assert_eq!(end == End::Returned, is_allowed, "{kind:?}");
    }
    for kind in ThreadKind::ALL {
        assert_eq!(request(kind, TIOCSTI), KILLED, "{kind:?}");
    }
}

#[test]
fn permitted_calls_pass() {
    for kind in ThreadKind::ALL {
        let end = under(kind, || {
            raw(libc::SYS_getpid, [0; 4]);
            raw(libc::SYS_futex, [0; 4]);
            raw(libc::SYS_madvise, [0; 4]);
            raw(libc::SYS_read, [-1, 0, 0, 0]);
        });
        assert_eq!(end, End::Returned, "{kind:?}");
    }
    let waits = [
        ThreadKind::Control,
        ThreadKind::Device,
        ThreadKind::Vsock,
        ThreadKind::Net,
        ThreadKind::Blk,
        ThreadKind::FsWorker,
    ];
    for kind in waits {
        let end = under(kind, || raw(libc::SYS_poll, [0, 0, 0, 0]));
        assert_eq!(end, End::Returned, "{kind:?}");
    }
    let control = under(ThreadKind::Control, || {
        raw(libc::SYS_recvmsg, [-1, 0, 0, 0]);
    });
    assert_eq!(control, End::Returned);
}

#[test]
fn foreign_system_call_tables_are_refused() {
    // The x32 table: the numbers of x86-64 with this bit set.
    const X32_SYSCALL_BIT: c_long = 0x4000_0000;
    for kind in ThreadKind::ALL {
        let end = under(kind, || raw(libc::SYS_getpid | X32_SYSCALL_BIT, [0; 4]));
        assert_eq!(end, KILLED, "{kind:?}");
    }
}

#[test]
fn thread_that_ends_under_its_filter_does_not_end_the_process() {
    for kind in ThreadKind::ALL {
        let filters = Filters::compile().unwrap();
        // SAFETY: see `under`; the test harness's other threads hold no lock that starting a thread
        // takes, since glibc's fork handlers reset those of its allocator.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let thread = std::thread::spawn(move || {
                    filters.install(kind).unwrap();
                    let grown: Vec<u8> = std::hint::black_box(vec![1; 8 << 20]);
                    grown.len()
                });
                let len = thread.join().unwrap();
                // SAFETY: see `under`.
                unsafe { libc::_exit(i32::from(len != 8 << 20)) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(
                    waitpid(child, None).unwrap(),
                    WaitStatus::Exited(child, 0),
                    "{kind:?}"
                );
            }
        }
    }
}
