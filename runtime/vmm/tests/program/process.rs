//! The real program, seen from outside: its life, its jail, its death.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use husk_vmm_control::{Answer, Call, Connect, ExitReason, HOST_PORT_MIN, MEMORY_MIB_MIN};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::parent::{POWER_OFF, Parent, RESET, SPIN, TRIPLE_FAULT, is_able, proc_value, status_of};

/// {CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP}: bits 0, 1, 3, 4, 6, 7, 27
/// and 31 (Linux uapi, capability.h).
const KEPT_CAPABILITIES: u64 = 0b1101_1011 | 1 << 27 | 1 << 31;

fn sigkill(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[test]
fn bad_boot_requests_are_refused_by_name_and_end_the_process() {
    if !is_able() {
        return;
    }
    let refusal = |change: fn(&mut Parent)| {
        let mut parent = Parent::new(POWER_OFF);
        change(&mut parent);
        let text = parent.boot_failure();
        parent.await_hang_up();
        text
    };

    assert!(refusal(|p| p.config.vcpus = 0).contains("virtual CPUs"));
    assert!(refusal(|p| p.config.memory_mib = MEMORY_MIB_MIN - 1).contains("MiB"));
    assert!(refusal(|p| p.config.shared_dir = "share".to_owned()).contains("absolute"));
    assert!(refusal(|p| p.config.shared_dir = "/no/such".to_owned()).contains("/no/such"));
    assert!(refusal(|p| p.config.cgroup_dir = "/no/cgroup".to_owned()).contains("/no/cgroup"));
    assert!(refusal(|p| p.files.truncate(4)).contains("4 descriptors"));
    assert!(refusal(|p| p.files.swap(0, 3)).contains("/dev/kvm"));
    assert!(refusal(|p| p.files[0] = null()).contains("KVM"));
    assert!(refusal(|p| p.files.swap(1, 2)).contains("ELF"));
}

fn null() -> OwnedFd {
    fs::File::open("/dev/null").unwrap().into()
}

#[test]
fn calls_before_boot_are_refused_and_change_nothing() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(POWER_OFF);

    assert!(parent.ask(Call::Start).is_err());
    assert!(parent.ask(Call::Metrics).is_err());

    parent.boot();
}

#[test]
fn standard_error_that_takes_nothing_is_no_panic() {
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();

    let started_by_hand = Command::new(env!("CARGO_BIN_EXE_husk-vmm"))
        .stdin(Stdio::null())
        .stderr(full)
        .status()
        .unwrap();

    assert_eq!(started_by_hand.code(), Some(1));
}

#[test]
fn guest_that_powers_off_ends_the_process_well() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(POWER_OFF);
    let pid = parent.boot();

    assert_eq!(parent.ask(Call::Start), Ok(Answer::Done));

    assert_eq!(parent.exit(), ExitReason::Stopped);
    assert!(matches!(status_of(pid), WaitStatus::Exited(_, 0)));
    parent.await_hang_up();
}

#[test]
fn reset_and_triple_fault_are_told_apart_and_are_failures() {
    if !is_able() {
        return;
    }
    for (code, reason) in [
        (RESET, ExitReason::Reset),
        (TRIPLE_FAULT, ExitReason::TripleFault),
    ] {
        let mut parent = Parent::new(code);
        let pid = parent.boot();

        assert_eq!(parent.ask(Call::Start), Ok(Answer::Done));

        assert_eq!(parent.exit(), reason);
        assert!(matches!(status_of(pid), WaitStatus::Exited(_, 1)));
    }
}

#[test]
fn guest_that_never_ends_is_paused_resumed_and_stopped() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    // So many threads that glibc would look for the number of processors, given the choice.
    parent.config.vcpus = 8;
    let pid = parent.boot();

    assert!(parent.ask(Call::Pause).is_err());
    assert_eq!(parent.ask(Call::Start), Ok(Answer::Done));
    assert_eq!(parent.ask(Call::Pause), Ok(Answer::Done));
    assert!(parent.ask(Call::Pause).is_err());
    assert!(matches!(parent.ask(Call::Metrics), Ok(Answer::Metrics(_))));
    assert_eq!(parent.ask(Call::Resume), Ok(Answer::Done));
    assert!(parent.ask(Call::Start).is_err());
    assert_eq!(parent.ask(Call::Stop), Ok(Answer::Done));

    assert_eq!(parent.exit(), ExitReason::Stopped);
    assert!(matches!(status_of(pid), WaitStatus::Exited(_, 0)));
}

#[test]
fn connection_before_the_start_is_refused() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    parent.boot();

    let refused = parent.ask(Call::Connect(Connect {
        port: 1,
        host_port: HOST_PORT_MIN,
        stream: 1,
        source: false,
        sink: false,
        duplex: true,
    }));

    assert!(refused.unwrap_err().contains("not started"));
}

#[test]
fn malformed_message_ends_the_machine() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    let pid = parent.boot();

    parent.channel.send(&"nonsense", &[]).unwrap();

    assert!(matches!(parent.exit(), ExitReason::Error { .. }));
    assert!(matches!(status_of(pid), WaitStatus::Exited(_, 1)));
}

#[test]
fn every_thread_is_confined_before_the_start() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    parent.config.vcpus = 2;
    let pid = parent.boot();

    let threads: Vec<_> = fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    // The main one, 4 devices, 2 virtual CPUs and a file worker for each.
    assert_eq!(threads.len(), 9);
    for thread in threads {
        let status = format!("{pid}/task/{thread}/status");
        let mask = |key| u64::from_str_radix(&proc_value(&status, key), 16).unwrap();
        assert_eq!(proc_value(&status, "Seccomp:"), "2", "thread {thread}");
        assert_eq!(proc_value(&status, "NoNewPrivs:"), "1");
        assert_eq!(mask("CapEff:"), KEPT_CAPABILITIES);
        assert_eq!(mask("CapPrm:"), KEPT_CAPABILITIES);
        assert_eq!(mask("CapBnd:"), KEPT_CAPABILITIES);
        assert_eq!(mask("CapInh:"), 0);
        assert_eq!(mask("CapAmb:"), 0);
        assert_eq!(proc_value(&status, "Uid:"), "0\t0\t0\t0");
    }
}

#[test]
fn process_has_namespaces_of_its_own_but_for_the_network() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    let pid = parent.boot();
    let link = |of: &str, name: &str| fs::read_link(format!("/proc/{of}/ns/{name}")).unwrap();
    let pid = pid.to_string();

    for name in ["mnt", "pid", "ipc", "uts"] {
        assert_ne!(link(&pid, name), link("self", name), "{name}");
    }
    assert_eq!(link(&pid, "net"), link("self", "net"));
    assert!(proc_value(&format!("{pid}/status"), "NSpid:").ends_with("\t1"));
}

#[test]
fn share_is_the_root_and_nothing_else_is_mounted() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    fs::write(parent.share.path().join("marker"), "here").unwrap();
    let pid = parent.boot();

    let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root/"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();

    assert_eq!(root, ["marker"]);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
}

#[test]
fn open_descriptors_are_those_of_the_machine() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    // One that the parent forgot to close.
    let leaked = fs::File::open("/etc/passwd").unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let pid = parent.boot();
    let console = parent.console.to_str().unwrap().to_owned();

    let mut found = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let entry = entry.unwrap();
        let number = entry.file_name().into_string().unwrap();
        let target = fs::read_link(entry.path())
            .unwrap()
            .into_os_string()
            .into_string()
            .unwrap();
        // Standard error is whatever the test's is.
        if number != "2" {
            let is_socket = target.starts_with("socket:");
            found.insert(if is_socket {
                "socket".to_owned()
            } else {
                target
            });
        }
    }

    let expected = [
        "/",
        "/1/fd",
        "/dev/null",
        console.as_str(),
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "anon_inode:[timerfd]",
        "anon_inode:kvm-vcpu:0",
        "anon_inode:kvm-vm",
        "socket",
    ];
    let expected: BTreeSet<_> = expected.into_iter().map(str::to_owned).collect();
    assert_eq!(found, expected);
}

#[test]
fn process_leaves_no_core_file_and_may_open_many_files() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    let pid = parent.boot();
    let limit = |name| {
        let line = proc_value(&format!("{pid}/limits"), name);
        let soft = line.split_whitespace().next().unwrap().to_owned();
        soft.parse::<u64>().unwrap()
    };

    assert_eq!(limit("Max core file size"), 0);
    assert!(limit("Max open files") >= 4096);
}

#[test]
fn hang_up_ends_a_machine_that_runs() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    let pid = parent.boot();
    parent.ask(Call::Start).unwrap();

    drop(parent);

    assert!(matches!(status_of(pid), WaitStatus::Exited(_, 1)));
}

#[test]
fn hang_up_before_boot_ends_the_process() {
    if !is_able() {
        return;
    }
    let parent = Parent::new(SPIN);
    let pid = parent.first.id().cast_signed();
    let Parent { channel, .. } = &parent;
    rustix::net::shutdown(channel, rustix::net::Shutdown::Both).unwrap();

    assert!(matches!(status_of(pid), WaitStatus::Exited(_, 1)));
}

#[test]
fn first_process_killed_at_any_moment_leaves_none() {
    if !is_able() {
        return;
    }
    for turn in 0..20_u32 {
        let mut parent = Parent::new(SPIN);
        parent.send_boot();
        // Any moment: how far the process gets differs from turn to turn.
        for _ in 0..turn * 20_000 {
            std::hint::spin_loop();
        }
        parent.first.kill().unwrap();
        parent.first.wait().unwrap();
        rustix::net::shutdown(&parent.channel, rustix::net::Shutdown::Both).unwrap();

        parent.await_hang_up();
    }
}

#[test]
fn machine_killed_is_a_hang_up_for_the_parent() {
    if !is_able() {
        return;
    }
    for is_started in [false, true] {
        let mut parent = Parent::new(SPIN);
        let pid = parent.boot();
        if is_started {
            parent.ask(Call::Start).unwrap();
        }

        sigkill(pid);

        parent.await_hang_up();
        assert!(matches!(
            status_of(pid),
            WaitStatus::Signaled(_, Signal::SIGKILL, _)
        ));
    }
}

#[test]
fn machine_killed_as_it_is_built_is_a_hang_up_for_the_parent() {
    if !is_able() {
        return;
    }
    let mut parent = Parent::new(SPIN);
    parent.send_boot();
    let pid = parent.launched();

    sigkill(pid);

    parent.await_hang_up();
    assert!(matches!(status_of(pid), WaitStatus::Signaled(..)));
}
