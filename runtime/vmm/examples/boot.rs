//! Boots a kernel and an initrd in a jailed VMM, without containerd: for working on the VMM.
//!
//! ```text
//! boot [--vcpus N] [--memory MIB] [--append TEXT] [--share DIR] [--vmm PROGRAM] KERNEL INITRD
//! ```
//!
//! The guest's console appears on standard output. The program ends as the guest does: 0 after a
//! power-off, 1 otherwise. The VMM is `husk-vmm` beside the directory of this program, as cargo
//! builds it.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use husk_vmm_control::{BootConfig, Call, Channel, Event, ExitReason, Message, Request};

struct Arguments {
    vcpus: u8,
    memory_mib: u32,
    cmdline_extra: String,
    share: PathBuf,
    vmm: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

fn main() -> Result<ExitCode> {
    let arguments = parse(std::env::args().skip(1))?;
    let began = Instant::now();
    let (channel, vmm_end) = Channel::pair().context("socketpair")?;
    let mut vmm = Command::new(&arguments.vmm)
        .stdin(Stdio::from(vmm_end.into_socket()))
        .spawn()
        .with_context(|| format!("cannot start {}", arguments.vmm.display()))?;
    let (mut console, console_end) = io::pipe().context("pipe")?;
    let printer = thread::spawn(move || {
        let mut stdout = io::stdout().lock();
        let copied = io::copy(&mut console, &mut stdout);
        copied.and_then(|_| stdout.flush())
    });
    let (_agent, agent_end) = UnixStream::pair().context("socketpair")?;
    let files: [OwnedFd; 5] = [
        open_kvm()?,
        open(&arguments.kernel)?,
        open(&arguments.initrd)?,
        console_end.into(),
        agent_end.into(),
    ];
    let boot = Call::Boot(BootConfig {
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory_mib,
        memory_max_mib: 0,
        cmdline_extra: arguments.cmdline_extra,
        shared_dir: arguments.share.to_string_lossy().into_owned(),
        cgroup_dir: String::new(),
        net: Vec::new(),
        disks: 0,
        share_cache_ms: 1000,
        share_echo_group: None,
    });
    channel.send(
        &Request { id: 1, call: boot },
        &files.each_ref().map(AsFd::as_fd),
    )?;
    drop(files);
    await_done(&channel, 1)?;
    eprintln!("boot: machine built and jailed after {:?}", began.elapsed());
    let call = Call::Start;
    channel.send(&Request { id: 2, call }, &[])?;
    await_done(&channel, 2)?;
    eprintln!("boot: guest started after {:?}", began.elapsed());
    let reason = await_exit(&channel)?;
    vmm.wait().context("wait for the VMM")?;
    printer
        .join()
        .expect("the printer does not panic")
        .context("console")?;
    eprintln!("boot: {reason:?} after {:?}", began.elapsed());
    Ok(match reason {
        ExitReason::Stopped => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    let me = std::env::current_exe().context("current_exe")?;
    // Cargo puts examples one directory below the programs.
    let beside = me.ancestors().nth(2).map(|dir| dir.join("husk-vmm"));
    let mut arguments = Arguments {
        vcpus: 1,
        memory_mib: 256,
        cmdline_extra: String::new(),
        share: std::env::temp_dir(),
        vmm: beside.unwrap_or_default(),
        kernel: PathBuf::new(),
        initrd: PathBuf::new(),
    };
    let mut files = Vec::new();
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .with_context(|| format!("{word} needs a value"))
        };
        match word.as_str() {
            "--vcpus" => arguments.vcpus = value()?.parse().context("--vcpus")?,
            "--memory" => arguments.memory_mib = value()?.parse().context("--memory")?,
            "--append" => arguments.cmdline_extra = value()?,
            "--share" => arguments.share = fs::canonicalize(value()?).context("--share")?,
            "--vmm" => arguments.vmm = value()?.into(),
            _ => files.push(PathBuf::from(word)),
        }
    }
    let [kernel, initrd] = <[PathBuf; 2]>::try_from(files)
        .ok()
        .context("usage: boot [OPTIONS] KERNEL INITRD")?;
    if io::stdin().is_terminal() {
        eprintln!("boot: the console is output only");
    }
    Ok(Arguments {
        kernel,
        initrd,
        ..arguments
    })
}

fn open(path: &PathBuf) -> Result<OwnedFd> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(file.into())
}

fn open_kvm() -> Result<OwnedFd> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    Ok(kvm.context("cannot open /dev/kvm")?.into())
}

fn await_done(channel: &Channel, id: u64) -> Result<()> {
    loop {
        match channel.receive::<Message>()?.0 {
            Message::Launched { pid } => eprintln!("boot: the VMM is process {pid}"),
            Message::Reply { id: of, result } if of == id => {
                result?;
                return Ok(());
            }
            other => bail!("unexpected {other:?}"),
        }
    }
}

fn await_exit(channel: &Channel) -> Result<ExitReason> {
    loop {
        if let Message::Event(Event::Exited { reason }) = channel.receive()?.0 {
            return Ok(reason);
        }
    }
}
