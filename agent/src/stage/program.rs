//! The program: its filter, its working directory, where it is, and becoming it.

use std::convert::Infallible;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use super::{OrFail, Step, refusal};
use crate::oci::{Process, Seccomp, Spec};
use crate::seccomp::Filter;
use crate::sys;

/// Compiles the spec's filter.
pub(super) fn compile(seccomp: &Seccomp) -> Step<Filter> {
    Filter::compile(seccomp).map_err(|error| refusal(format!("linux.seccomp: {error}")))
}

/// Puts the filter in force.
pub(super) fn install(filter: &Filter) -> Step {
    filter
        .install()
        .or_fail(|| "install the system call filter".into())
}

/// Sets the execution domain.
pub(super) fn set_personality(spec: &Spec) -> Step {
    let Some(personality) = &spec.linux.personality else {
        return Ok(());
    };
    let domain = match personality.domain.as_str() {
        "LINUX" => PER_LINUX,
        "LINUX32" => PER_LINUX32,
        other => {
            return Err(refusal(format!(
                "linux.personality: {other:?} is not known"
            )));
        }
    };
    sys::set_personality(domain).or_fail(|| format!("set the personality {}", personality.domain))
}

/// linux/personality.h.
const PER_LINUX: u32 = 0;
const PER_LINUX32: u32 = 8;

/// Makes the working directory if it is not there, while there is the right to.
pub(super) fn prepare_cwd(process: &Process) -> Step {
    let cwd = &process.cwd;
    if !cwd.is_absolute() {
        return Err(refusal(format!(
            "process.cwd: {} is not absolute",
            cwd.display()
        )));
    }
    if cwd.symlink_metadata().is_ok() {
        return Ok(());
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(cwd)
        .map_err(|error| {
            refusal(format!(
                "cannot make the working directory {}: {error}",
                cwd.display()
            ))
        })?;
    Ok(())
}

/// Goes there, as the user that the program runs as.
pub(super) fn enter_cwd(process: &Process) -> Step {
    let cwd = &process.cwd;
    rustix::process::chdir(cwd).map_err(|error| {
        refusal(format!(
            "chdir to cwd ({}) set in config.json failed: {error}",
            cwd.display()
        ))
    })
}

/// Finds the program as execvp would, in the container's own PATH.
pub(super) fn find(process: &Process) -> Step<PathBuf> {
    let Some(name) = process.args.first().filter(|name| !name.is_empty()) else {
        return Err(refusal("process.args: there is no program to run".into()));
    };
    let failed = |reason: &str| Err(refusal(format!("exec: {name:?}: {reason}")));
    if name.contains('/') {
        return match check_executable(Path::new(name)) {
            Ok(()) => Ok(name.into()),
            Err(Errno::NOENT) => failed(&format!("stat {name}: no such file or directory")),
            Err(Errno::ACCESS) => failed("permission denied"),
            Err(error) => failed(&std::io::Error::from(error).to_string()),
        };
    }
    let path = process
        .env
        .iter()
        .rev()
        .find_map(|line| line.strip_prefix("PATH="));
    let mut is_denied = false;
    for directory in path.unwrap_or_default().split(':') {
        // An empty part is the working directory, which is not safe to search.
        if !directory.starts_with('/') {
            continue;
        }
        let candidate = Path::new(directory).join(name);
        match check_executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ACCESS) => is_denied = true,
            Err(_) => {}
        }
    }
    if is_denied {
        return failed("permission denied");
    }
    failed("executable file not found in $PATH")
}

fn check_executable(path: &Path) -> Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => return Err(Errno::ISDIR),
        FileType::RegularFile => {}
        _ => return Err(Errno::ACCESS),
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// Becomes the program.
pub(super) fn execute(path: &Path, process: &Process) -> Step {
    let args = c_strings(&process.args)?;
    let mut env = c_strings(&process.env)?;
    if !process.env.iter().any(|line| line.starts_with("HOME=")) {
        env.extend(CString::new(format!("HOME={}", home_of(process.user.uid))));
    }
    let program = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| refusal("process.args: a string holds a zero byte".into()))?;
    sys::restore_sigpipe().or_fail(|| "restore SIGPIPE".into())?;
    let error = match nix::unistd::execve::<CString, CString>(&program, &args, &env) {
        Ok(never) => never_returns(never),
        Err(error) => error,
    };
    let reason = std::io::Error::from(error);
    Err(refusal(format!("exec {}: {reason}", path.display())))
}

fn never_returns(never: Infallible) -> ! {
    match never {}
}

fn c_strings(strings: &[String]) -> Step<Vec<CString>> {
    strings
        .iter()
        .map(|text| CString::new(text.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|_| refusal("process: a string holds a zero byte".into()))
}

/// The home directory by the container's own /etc/passwd, `/` where it says none.
fn home_of(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [_, _, id, _, _, home, ..] = fields[..] else {
                return None;
            };
            (id.parse() == Ok(uid) && !home.is_empty()).then(|| home.to_owned())
        })
        .unwrap_or_else(|| "/".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        Process {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: env.iter().map(|&line| line.to_owned()).collect(),
            ..Process::default()
        }
    }

    #[test]
    fn no_program_is_refused() {
        assert!(find(&process(&[], &[])).is_err());
        assert!(find(&process(&[""], &[])).is_err());
    }

    #[test]
    fn missing_command_is_named() {
        let failure = find(&process(&["no-such-command"], &["PATH=/bin:/usr/bin"])).unwrap_err();
        assert_eq!(
            failure.text,
            r#"exec: "no-such-command": executable file not found in $PATH"#
        );
    }

    #[test]
    fn missing_file_is_named() {
        let failure = find(&process(&["/no/such/file"], &[])).unwrap_err();
        assert_eq!(
            failure.text,
            r#"exec: "/no/such/file": stat /no/such/file: no such file or directory"#
        );
    }

    #[test]
    fn file_without_execute_permission_is_denied() {
        let failure = find(&process(&["/etc/passwd"], &[])).unwrap_err();
        assert_eq!(failure.text, r#"exec: "/etc/passwd": permission denied"#);
    }

    #[test]
    fn directory_is_no_program() {
        assert!(find(&process(&["/etc"], &[])).is_err());
    }

    #[test]
    fn program_is_found_in_the_given_path_only() {
        assert_eq!(
            find(&process(&["sh"], &["PATH=/bin"])).unwrap(),
            Path::new("/bin/sh")
        );
        assert!(find(&process(&["sh"], &["PATH=/etc"])).is_err());
    }

    #[test]
    fn relative_cwd_is_refused() {
        let mut process = process(&["sh"], &[]);
        process.cwd = "tmp".into();
        assert!(prepare_cwd(&process).unwrap_err().is_request_at_fault);
    }

    #[test]
    fn zero_byte_is_refused() {
        assert!(c_strings(&["a\0b".to_owned()]).is_err());
    }
}
