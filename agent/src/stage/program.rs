//! The program: its filter, its working directory, where it is, and becoming it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use super::{Failure, OrFail, Step, refusal};
use crate::oci::{Personality, Process, Seccomp};
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
pub(super) fn set_personality(personality: &Personality) -> Step {
    let domain = match personality.domain.as_str() {
        "LINUX" => PER_LINUX,
        "LINUX32" => PER_LINUX32,
        other => {
            return Err(refusal(format!(
                "linux.personality: {other:?} is not known"
            )));
        }
    };
    if let Some(flag) = personality.flags.first() {
        return Err(refusal(format!(
            "linux.personality.flags: {flag:?} is not known, as none is defined"
        )));
    }
    sys::set_personality(domain).or_fail(|| format!("set the personality {}", personality.domain))
}

/// linux/personality.h.
const PER_LINUX: u32 = 0;
const PER_LINUX32: u32 = 8;

/// Makes the working directory if it is not there, while there is the right to.
pub(super) fn make_cwd(process: &Process) -> Step {
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

/// Goes there. Where root may not go, which a network's file system may have it so, the user may:
/// answers with whether to try again as him.
pub(super) fn try_cwd(process: &Process) -> Step<bool> {
    match rustix::process::chdir(&process.cwd) {
        Ok(()) => Ok(false),
        Err(Errno::ACCESS | Errno::PERM) => Ok(true),
        Err(error) => Err(no_cwd(process, error)),
    }
}

/// Goes there, as the user that the program runs as.
pub(super) fn enter_cwd(process: &Process) -> Step {
    rustix::process::chdir(&process.cwd).map_err(|error| no_cwd(process, error))
}

fn no_cwd(process: &Process, error: Errno) -> Failure {
    refusal(format!(
        "chdir to cwd ({}) set in config.json failed: {}",
        process.cwd.display(),
        std::io::Error::from(error)
    ))
}

/// All that execve takes, made while every file can still be read.
pub(super) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Finds it, and completes its environment.
    pub(super) fn prepare(process: &Process) -> Step<Program> {
        let path = find(process)?;
        Ok(Program {
            path: c_string(path.as_os_str().as_bytes())?,
            args: c_strings(&process.args)?,
            env: c_strings(&environment(process, home_of)?)?,
        })
    }

    /// Becomes it.
    pub(super) fn execute(&self) -> Step {
        sys::restore_sigpipe().or_fail(|| "restore SIGPIPE".into())?;
        let error = match nix::unistd::execve(&self.path, &self.args, &self.env) {
            Ok(never) => never_returns(never),
            Err(error) => error,
        };
        let reason = std::io::Error::from(error);
        let path = self.path.to_string_lossy();
        Err(refusal(format!("exec {path}: {reason}")))
    }
}

/// The environment, where of several lines with one name the last counts, and with a HOME.
fn environment(process: &Process, home_of: impl FnOnce(u32) -> String) -> Step<Vec<String>> {
    let mut lines: Vec<String> = Vec::with_capacity(process.env.len() + 1);
    let mut places = HashMap::new();
    for line in &process.env {
        let Some((name, _)) = line.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(refusal(format!(
                "process.env: {line:?} is not of the form NAME=value"
            )));
        };
        match places
            .get(name)
            .and_then(|&place: &usize| lines.get_mut(place))
        {
            Some(earlier) => earlier.clone_from(line),
            None => {
                places.insert(name, lines.len());
                lines.push(line.clone());
            }
        }
    }
    lines.retain(|line| line != "HOME=");
    if !lines.iter().any(|line| line.starts_with("HOME=")) {
        lines.push(format!("HOME={}", home_of(process.user.uid)));
    }
    Ok(lines)
}

/// Finds the program as execvp would, in the container's own PATH.
fn find(process: &Process) -> Step<PathBuf> {
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

fn never_returns(never: Infallible) -> ! {
    match never {}
}

fn c_string(text: &[u8]) -> Step<CString> {
    CString::new(text).map_err(|_| refusal("process: a string holds a zero byte".into()))
}

fn c_strings(strings: &[String]) -> Step<Vec<CString>> {
    strings
        .iter()
        .map(|text| c_string(text.as_bytes()))
        .collect()
}

/// The home directory by the container's own /etc/passwd, `/` where it says none.
fn home_of(uid: u32) -> String {
    let mut passwd = Vec::new();
    // The image's file: it may be anything, and a part of it is enough then.
    let read = File::open("/etc/passwd")
        .and_then(|file| file.take(PASSWD_BYTES_MAX).read_to_end(&mut passwd));
    let found = read
        .ok()
        .and_then(|_| home_in(&String::from_utf8_lossy(&passwd), uid));
    found.unwrap_or_else(|| "/".to_owned())
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, id, _, _, home, ..] = fields[..] else {
            return None;
        };
        (id.parse() == Ok(uid) && !home.is_empty()).then(|| home.to_owned())
    })
}

/// As much of /etc/passwd is read.
const PASSWD_BYTES_MAX: u64 = 1024 * 1024;

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
        assert!(make_cwd(&process).unwrap_err().is_request_at_fault);
    }

    fn environment_of(lines: &[&str]) -> Step<Vec<String>> {
        environment(&process(&[], lines), |uid| format!("/home/{uid}"))
    }

    #[test]
    fn lines_that_are_no_variables_are_refused() {
        for line in ["WORD", "", "=x"] {
            let failure = environment_of(&["A=1", line]).unwrap_err();
            assert!(failure.is_request_at_fault, "{line}");
        }
    }

    #[test]
    fn last_line_of_a_name_counts() {
        let lines = environment_of(&["A=1", "HOME=/x", "B=", "A=2=3"]).unwrap();
        assert_eq!(lines, ["A=2=3", "HOME=/x", "B="]);
    }

    #[test]
    fn empty_home_is_none() {
        assert_eq!(environment_of(&["HOME="]).unwrap(), ["HOME=/home/0"]);
        assert_eq!(environment_of(&[]).unwrap(), ["HOME=/home/0"]);
    }

    #[test]
    fn home_is_read_past_broken_lines() {
        let passwd = "\nroot:x:0\na:b:c:d:e:f:g\nnobody:x:7:7::\nuser:x:7:8::/home/user:/bin/sh\n";
        assert_eq!(home_in(passwd, 7).as_deref(), Some("/home/user"));
        assert_eq!(home_in(passwd, 8), None);
    }

    #[test]
    fn personalities_that_are_none_are_refused() {
        for (domain, flags) in [("LINUX64", vec![]), ("LINUX", vec!["UNAME26".to_owned()])] {
            let domain = domain.to_owned();
            let failure = set_personality(&Personality { domain, flags }).unwrap_err();
            assert!(failure.is_request_at_fault);
        }
    }

    #[test]
    fn zero_byte_is_refused() {
        assert!(c_strings(&["a\0b".to_owned()]).is_err());
    }
}
