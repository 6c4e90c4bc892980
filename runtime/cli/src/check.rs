//! `husk check`: whether this machine can run Husk, and what to do where it can't.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

use husk_sandbox::{Install, Settings};
use kvm_ioctls::{Cap, Kvm};
use serde::Serialize;

/// Say whether this machine can run Husk, and what to do where it can't
///
/// Ends with 0 if everything that is needed is there. What is marked "note" is missing, but not
/// needed by everybody.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// One answer.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it; empty if nothing.
    advice: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Missing, and not needed by everybody.
    Note,
    No,
}

const KVM: &str = "/dev/kvm";

/// The one version there has been since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// The oldest kernel with every system call the host's side makes: pidfds, openat2, and a procfs
/// that shows processes only.
const KERNEL_MIN: (u32, u32) = (5, 10);

const SHIM: &str = "containerd-shim-husk-v2";

pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let findings = look();
    if arguments.json {
        match serde_json::to_string_pretty(&findings) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("husk: {error}"),
        }
    } else {
        findings.iter().for_each(print);
    }
    let is_able = findings.iter().all(|found| found.verdict != Verdict::No);
    if !arguments.json {
        println!(
            "\n{}",
            match is_able {
                true => "This machine can run Husk.",
                false => "This machine can't run Husk yet.",
            }
        );
    }
    ExitCode::from(u8::from(!is_able))
}

fn print(finding: &Finding) {
    let mark = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Note => "note",
        Verdict::No => "NO",
    };
    println!("{mark:<5} {:<17} {}", finding.name, finding.found);
    if !finding.advice.is_empty() {
        println!("{:<23} -> {}", "", finding.advice);
    }
}

fn look() -> Vec<Finding> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut findings = vec![
        check_cpu(&cpuinfo),
        check_kvm(),
        check_root(rustix::process::geteuid().is_root()),
        check_kernel(&rustix::system::uname().release().to_string_lossy()),
        check_cgroup(Path::new("/sys/fs/cgroup")),
    ];
    findings.extend(check_install());
    findings.push(check_shim());
    findings
}

/// The machine's own virtualization, by the flags of its first CPU.
fn check_cpu(cpuinfo: &str) -> Finding {
    let flags: Vec<&str> = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .map(|rest| rest.split_ascii_whitespace().collect())
        .unwrap_or_default();
    let name = "CPU";
    let is_nested = flags.contains(&"hypervisor");
    for (flag, technology) in [("vmx", "Intel VT-x"), ("svm", "AMD-V")] {
        if flags.contains(&flag) {
            let nested = match is_nested {
                true => ", nested: this machine is a virtual one",
                false => "",
            };
            return ok(name, format!("{technology}{nested}"));
        }
    }
    let advice = match is_nested {
        true => {
            "this machine is a virtual one: switch nested virtualization on in the machine that \
             runs it (kvm_intel or kvm_amd with nested=1, and a CPU model that shows it)"
        }
        false => "switch virtualization (VT-x, AMD-V, SVM) on in the firmware's settings",
    };
    no(name, "no hardware virtualization".to_owned(), advice)
}

fn check_kvm() -> Finding {
    let name = KVM;
    match fs::OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let advice = "load the module: modprobe kvm_intel, or modprobe kvm_amd";
            return no(name, "does not exist".to_owned(), advice);
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let advice = "run as root, or join the group that owns it: usermod -aG kvm $USER";
            return no(name, "no right to open it".to_owned(), advice);
        }
        Err(error) => {
            let advice = "see what the kernel says: dmesg | grep -i kvm";
            return no(name, format!("can't be opened: {error}"), advice);
        }
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return no(name, format!("can't be opened: {error}"), ""),
    };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        let found = format!("speaks version {version} of its interface, not {KVM_API_VERSION}");
        return no(name, found, "it is no KVM of Linux: use another kernel");
    }
    let missing: Vec<_> = [
        ("user memory", Cap::UserMemory),
        ("irqfd", Cap::Irqfd),
        ("ioeventfd", Cap::Ioeventfd),
        ("an interrupt controller", Cap::Irqchip),
        ("immediate exit", Cap::ImmediateExit),
    ]
    .into_iter()
    .filter(|(_, capability)| !kvm.check_extension(*capability))
    .map(|(what, _)| what)
    .collect();
    if !missing.is_empty() {
        let found = format!("lacks {}", missing.join(", "));
        return no(name, found, "use a newer kernel, or a more complete KVM");
    }
    ok(name, format!("opens, version {version}"))
}

fn check_root(is_root: bool) -> Finding {
    match is_root {
        true => ok("rights", "root".to_owned()),
        false => note(
            "rights",
            "not root".to_owned(),
            "husk run needs root: use sudo. containerd runs as root by itself",
        ),
    }
}

fn check_kernel(release: &str) -> Finding {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse::<u32>().ok());
    let version = (numbers.next(), numbers.next());
    let (major, minor) = KERNEL_MIN;
    match version {
        (Some(found_major), Some(found_minor)) if (found_major, found_minor) >= KERNEL_MIN => {
            ok("kernel", release.to_owned())
        }
        _ => no(
            "kernel",
            release.to_owned(),
            &format!("Linux {major}.{minor} or newer is needed"),
        ),
    }
}

fn check_cgroup(root: &Path) -> Finding {
    match root.join("cgroup.controllers").exists() {
        true => ok("cgroup", "version 2".to_owned()),
        false => note(
            "cgroup",
            "no version 2".to_owned(),
            "virtual machines won't be limited on the host: boot with \
             systemd.unified_cgroup_hierarchy=1",
        ),
    }
}

fn check_install() -> Vec<Finding> {
    let settings = match Settings::load() {
        Ok(settings) => settings,
        Err(error) => {
            let found = format!("{:#}", anyhow::Error::new(error));
            return vec![no("settings", found, "correct the file, or remove it")];
        }
    };
    match Install::locate_with(&settings) {
        Ok(install) => vec![
            check_file("VMM", &install.vmm, true),
            check_file("guest kernel", &install.kernel, false),
            check_file("initrd", &install.initrd, false),
        ],
        Err(error) => vec![no("installation", error.to_string(), "")],
    }
}

fn check_file(name: &'static str, path: &Path, is_program: bool) -> Finding {
    let advice = "install it (make install), or name it in the settings, /etc/husk/config.toml";
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() || metadata.len() == 0 => no(
            name,
            format!("{} is no file, or empty", path.display()),
            advice,
        ),
        Ok(metadata) if is_program && metadata.permissions().mode() & 0o111 == 0 => {
            let advice = format!("make it executable: chmod +x {}", path.display());
            no(
                name,
                format!("{} is not executable", path.display()),
                &advice,
            )
        }
        Ok(_) => ok(name, path.display().to_string()),
        Err(error) => no(name, format!("{}: {error}", path.display()), advice),
    }
}

/// Whether containerd would find the shim: in the PATH it runs with, if it runs.
fn check_shim() -> Finding {
    let name = "containerd's shim";
    let (whose, path) = match containerd_path() {
        Some(path) => ("containerd's PATH", Some(path)),
        None => ("PATH", env::var_os("PATH")),
    };
    let found = path.and_then(|path| find_program(&path, SHIM));
    match found {
        Some(found) => ok(name, found.display().to_string()),
        None => note(
            name,
            format!("{SHIM} is not in {whose}"),
            "needed by containerd only: install it where containerd looks, such as /usr/local/bin",
        ),
    }
}

fn find_program(path: &OsStr, program: &str) -> Option<PathBuf> {
    env::split_paths(path)
        .map(|directory| directory.join(program))
        .find(|file| {
            fs::metadata(file)
                .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
        })
}

/// PATH of a containerd that runs.
fn containerd_path() -> Option<std::ffi::OsString> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let process = entry.path();
        let name = fs::read_to_string(process.join("comm")).ok()?;
        if name.trim_end() != "containerd" {
            return None;
        }
        let environment = fs::read(process.join("environ")).ok()?;
        environment
            .split(|&byte| byte == 0)
            .find_map(|variable| variable.strip_prefix(b"PATH="))
            .map(|path| OsStr::from_bytes(path).to_owned())
    })
}

fn ok(name: &'static str, found: String) -> Finding {
    Finding {
        name,
        verdict: Verdict::Ok,
        found,
        advice: String::new(),
    }
}

fn note(name: &'static str, found: String, advice: &str) -> Finding {
    Finding {
        name,
        verdict: Verdict::Note,
        found,
        advice: advice.to_owned(),
    }
}

fn no(name: &'static str, found: String, advice: &str) -> Finding {
    Finding {
        name,
        verdict: Verdict::No,
        found,
        advice: advice.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_without_virtualization_is_a_no() {
        for cpuinfo in ["", "flags\t\t: fpu sse vmxnet", "vmx", "flags : hypervisor"] {
            assert_eq!(check_cpu(cpuinfo).verdict, Verdict::No, "{cpuinfo}");
        }
    }

    #[test]
    fn virtual_machine_is_advised_of_nesting() {
        assert!(
            check_cpu("flags : fpu hypervisor")
                .advice
                .contains("nested")
        );
        assert!(check_cpu("flags : fpu").advice.contains("firmware"));
    }

    #[test]
    fn either_vendor_will_do() {
        for cpuinfo in [
            "flags\t\t: fpu vmx",
            "x\nflags : svm hypervisor\nflags : none",
        ] {
            assert_eq!(check_cpu(cpuinfo).verdict, Verdict::Ok, "{cpuinfo}");
        }
    }

    #[test]
    fn old_and_unreadable_kernels_are_a_no() {
        for release in ["", "x", "5", "4.19.0-27-amd64", "5.9.16", "5.x"] {
            assert_eq!(check_kernel(release).verdict, Verdict::No, "{release}");
        }
        for release in ["5.10.0", "6.1.0-18-amd64", "10.0"] {
            assert_eq!(check_kernel(release).verdict, Verdict::Ok, "{release}");
        }
    }

    #[test]
    fn program_must_be_executable() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("program");
        assert_eq!(check_file("x", &file, true).verdict, Verdict::No);
        fs::write(&file, "").unwrap();
        assert_eq!(check_file("x", &file, false).verdict, Verdict::No);
        fs::write(&file, "x").unwrap();
        assert_eq!(check_file("x", &file, true).verdict, Verdict::No);
        assert_eq!(check_file("x", &file, false).verdict, Verdict::Ok);
        assert_eq!(find_program(directory.path().as_os_str(), "program"), None);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(check_file("x", &file, true).verdict, Verdict::Ok);
        assert_eq!(
            find_program(directory.path().as_os_str(), "program"),
            Some(file)
        );
    }
}
