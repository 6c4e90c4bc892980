//! Every call of the Task API in every state, with the code of its answer.
//!
//! runc's shim says `Unknown` wherever it has no code of its own. There Husk says what it is, and
//! that is the only way in which the two may differ.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;

use crate::ctr::Ctr;
use crate::shim::{Answer, Refused, Shim, Streams, granted};

use Code::{ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, NOT_FOUND, OK, UNIMPLEMENTED};

/// How much longer than an exec that works one of a missing command may take.
const MISSING_COMMAND_FACTOR: u32 = 2;

/// Of so many tries the quickest counts: the machine may do something else during the others.
const MISSING_COMMAND_TRIES: usize = 5;

/// For a shim to end after it has answered Shutdown.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// A call and the code it is answered with.
struct Case {
    what: &'static str,
    call: fn(&Shim) -> Answer<()>,
    code: Code,
    runc: Runc,
}

/// What runc's shim makes of a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Runc {
    /// The same.
    Same,
    /// It has no code for it.
    Unknown,
    /// It is not asked: containerd 1.7's panics later because of it.
    Spared,
}

const fn case(what: &'static str, call: fn(&Shim) -> Answer<()>, code: Code) -> Case {
    Case {
        what,
        call,
        code,
        runc: Runc::Same,
    }
}

/// A case in which runc's shim says `Unknown`.
const fn finer(what: &'static str, call: fn(&Shim) -> Answer<()>, code: Code) -> Case {
    Case {
        runc: Runc::Unknown,
        ..case(what, call, code)
    }
}

/// A case that runc's shim is spared.
const fn spared(what: &'static str, call: fn(&Shim) -> Answer<()>, code: Code) -> Case {
    Case {
        runc: Runc::Spared,
        ..case(what, call, code)
    }
}

fn no_matter<T>(answer: Answer<T>) -> Answer<()> {
    Ok(answer?.map(|_| ()))
}

fn sleep(shim: &Shim, exec: &str) -> Answer<()> {
    shim.exec(exec, &Streams::default(), &["sleep", "1000"])
}

/// Calls about a task or an exec that is not there.
const ABSENT: &[Case] = &[
    case("State", |shim| no_matter(shim.state("")), NOT_FOUND),
    case("Wait", |shim| no_matter(shim.wait("")), NOT_FOUND),
    case("Start", |shim| no_matter(shim.start("")), NOT_FOUND),
    case("Delete", |shim| no_matter(shim.delete("")), NOT_FOUND),
    case("Kill", |shim| shim.kill("", 9, true), NOT_FOUND),
    case("Exec", |shim| sleep(shim, "e0"), NOT_FOUND),
    case("Pids", |shim| no_matter(shim.pids()), NOT_FOUND),
    case("Pause", Shim::pause, NOT_FOUND),
    case("Resume", Shim::resume, NOT_FOUND),
    case("ResizePty", |shim| shim.resize("", 80, 24), NOT_FOUND),
    case("CloseIO", |shim| shim.close_stdin(""), NOT_FOUND),
    case("Update", |shim| shim.update("{}"), NOT_FOUND),
    case("Stats", |shim| no_matter(shim.stats()), NOT_FOUND),
    case("Checkpoint", Shim::checkpoint, NOT_FOUND),
    case("Connect", |shim| no_matter(shim.connect()), OK),
];

const RUNNING: &[Case] = &[
    finer(
        "Create again",
        |shim| shim.create(&shim.bundle, &Streams::default()),
        ALREADY_EXISTS,
    ),
    finer(
        "Start again",
        |shim| no_matter(shim.start("")),
        FAILED_PRECONDITION,
    ),
    finer(
        "Delete",
        |shim| no_matter(shim.delete("")),
        FAILED_PRECONDITION,
    ),
    finer("Resume", Shim::resume, FAILED_PRECONDITION),
    case("Kill with 0", |shim| shim.kill("", 0, false), OK),
    finer(
        "Kill with 1000",
        |shim| shim.kill("", 1000, false),
        INVALID_ARGUMENT,
    ),
    case(
        "ResizePty without a terminal",
        |shim| shim.resize("", 80, 24),
        OK,
    ),
    case("CloseIO without stdin", |shim| shim.close_stdin(""), OK),
    case(
        "Update",
        |shim| shim.update(r#"{"pids": {"limit": 100}}"#),
        OK,
    ),
    finer(
        "Update with nonsense",
        |shim| shim.update("{"),
        INVALID_ARGUMENT,
    ),
    case("Stats", |shim| no_matter(shim.stats()), OK),
    case("Pids", |shim| no_matter(shim.pids()), OK),
    finer("Checkpoint", Shim::checkpoint, UNIMPLEMENTED),
    case("Shutdown", |shim| shim.shutdown(false), OK),
    case("Shutdown now", |shim| shim.shutdown(true), OK),
    case("Connect", |shim| no_matter(shim.connect()), OK),
    finer(
        "Exec of nonsense",
        |shim| shim.exec_json("e0", &Streams::default(), "{"),
        INVALID_ARGUMENT,
    ),
    case(
        "State of a missing exec",
        |shim| no_matter(shim.state("e9")),
        NOT_FOUND,
    ),
    case(
        "Wait for a missing exec",
        |shim| no_matter(shim.wait("e9")),
        NOT_FOUND,
    ),
    case(
        "Start of a missing exec",
        |shim| no_matter(shim.start("e9")),
        NOT_FOUND,
    ),
    case(
        "Kill of a missing exec",
        |shim| shim.kill("e9", 9, false),
        NOT_FOUND,
    ),
    case(
        "Delete of a missing exec",
        |shim| no_matter(shim.delete("e9")),
        NOT_FOUND,
    ),
    case(
        "ResizePty of a missing exec",
        |shim| shim.resize("e9", 80, 24),
        NOT_FOUND,
    ),
];

/// The life of an exec, and of one that never ran.
const EXECS: &[Case] = &[
    case("Exec", |shim| sleep(shim, "e1"), OK),
    case("Exec again", |shim| sleep(shim, "e1"), ALREADY_EXISTS),
    case(
        "Kill before Start",
        |shim| shim.kill("e1", 9, false),
        FAILED_PRECONDITION,
    ),
    case(
        "ResizePty before Start",
        |shim| shim.resize("e1", 80, 24),
        OK,
    ),
    case("Start", |shim| no_matter(shim.start("e1")), OK),
    spared(
        "Start again",
        |shim| no_matter(shim.start("e1")),
        FAILED_PRECONDITION,
    ),
    finer(
        "Delete while it runs",
        |shim| no_matter(shim.delete("e1")),
        FAILED_PRECONDITION,
    ),
    case("CloseIO", |shim| shim.close_stdin("e1"), OK),
    case("Kill", |shim| shim.kill("e1", 9, false), OK),
    case("Wait", |shim| no_matter(shim.wait("e1")), OK),
    case("Wait again", |shim| no_matter(shim.wait("e1")), OK),
    case(
        "Kill after its end",
        |shim| shim.kill("e1", 9, false),
        NOT_FOUND,
    ),
    spared(
        "Start after its end",
        |shim| no_matter(shim.start("e1")),
        FAILED_PRECONDITION,
    ),
    case("Delete", |shim| no_matter(shim.delete("e1")), OK),
    case(
        "Delete again",
        |shim| no_matter(shim.delete("e1")),
        NOT_FOUND,
    ),
    case(
        "Wait after Delete",
        |shim| no_matter(shim.wait("e1")),
        NOT_FOUND,
    ),
    case("Exec of one that never runs", |shim| sleep(shim, "e2"), OK),
    case(
        "Delete of one that never ran",
        |shim| no_matter(shim.delete("e2")),
        OK,
    ),
    case("Exec of the same name", |shim| sleep(shim, "e2"), OK),
    case("Delete of it", |shim| no_matter(shim.delete("e2")), OK),
];

const PAUSED: &[Case] = &[
    finer("Pause again", Shim::pause, FAILED_PRECONDITION),
    finer(
        "Start",
        |shim| no_matter(shim.start("")),
        FAILED_PRECONDITION,
    ),
    finer(
        "Delete",
        |shim| no_matter(shim.delete("")),
        FAILED_PRECONDITION,
    ),
    finer("Exec", |shim| sleep(shim, "e0"), FAILED_PRECONDITION),
    case("Stats", |shim| no_matter(shim.stats()), OK),
    case("Pids", |shim| no_matter(shim.pids()), OK),
];

const STOPPED: &[Case] = &[
    case("Wait again", |shim| no_matter(shim.wait("")), OK),
    case("Kill", |shim| shim.kill("", 9, false), NOT_FOUND),
    finer(
        "Start",
        |shim| no_matter(shim.start("")),
        FAILED_PRECONDITION,
    ),
    finer("Exec", |shim| sleep(shim, "e0"), FAILED_PRECONDITION),
    finer("Pause", Shim::pause, FAILED_PRECONDITION),
    finer("Resume", Shim::resume, FAILED_PRECONDITION),
    finer("Update", |shim| shim.update("{}"), NOT_FOUND),
    case("ResizePty", |shim| shim.resize("", 80, 24), OK),
    case("CloseIO", |shim| shim.close_stdin(""), OK),
    case("Connect", |shim| no_matter(shim.connect()), OK),
];

/// Tries all cases and tells of all that are wrong.
fn check(ctr: &Ctr, shim: &Shim, state: &str, cases: &[Case]) -> Result<()> {
    let mut wrong = Vec::new();
    for case in cases {
        let wanted = match case.runc {
            Runc::Spared if !ctr.is_husk() => continue,
            Runc::Unknown if !ctr.is_husk() => Code::UNKNOWN,
            _ => case.code,
        };
        let answer = (case.call)(shim).with_context(|| format!("{state}: {}", case.what))?;
        match answer {
            Ok(()) if wanted == OK => {}
            Err(refused) if refused.code == wanted && !refused.text.is_empty() => {}
            answer => wrong.push(format!("{}: {answer:?}, not {wanted:?}", case.what)),
        }
    }
    ensure!(wrong.is_empty(), "{state}: {}", wrong.join("; "));
    Ok(())
}

pub(super) fn codes(ctr: &Ctr) -> Result<()> {
    ctr.detach(&[], &["sleep", "1000"])?;
    let shim = Shim::of(&ctr.id)?;
    let mut wrong = Vec::new();
    let mut note = |result: Result<()>| {
        if let Err(error) = result {
            wrong.push(format!("{error:#}"));
        }
    };
    note(check(ctr, &shim.about("absent"), "absent", ABSENT));
    note(check(ctr, &shim, "running", RUNNING));
    note(check(ctr, &shim, "execs", EXECS));
    note(missing_command(&shim));
    granted(shim.pause())?;
    note(expect_status(&shim, "", Status::PAUSED));
    note(check(ctr, &shim, "paused", PAUSED));
    granted(shim.resume())?;
    note(expect_status(&shim, "", Status::RUNNING));
    granted(shim.kill("", 9, false))?;
    let status = granted(shim.wait(""))?.exit_status();
    note(check(ctr, &shim, "stopped", STOPPED));
    ensure!(status == 137, "it ended with {status}");
    note(ends(ctr, &shim));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n        "));
    ctr.bury();
    Ok(())
}

fn expect_status(shim: &Shim, exec: &str, wanted: Status) -> Result<()> {
    let status = granted(shim.state(exec))?.status();
    ensure!(status == wanted, "it is {status:?}, not {wanted:?}");
    Ok(())
}

/// An exec of a command that is missing is answered as soon as one that is there.
fn missing_command(shim: &Shim) -> Result<()> {
    let (mut there, mut missing) = (Duration::MAX, Duration::MAX);
    for _ in 0..MISSING_COMMAND_TRIES {
        let (took, answer) = time_exec(shim, "true")?;
        granted(Ok(answer))?;
        there = there.min(took);
        let (took, answer) = time_exec(shim, "no-such-command")?;
        let Err(refused) = answer else {
            bail!("a missing command was started");
        };
        ensure!(
            refused.text.contains("no-such-command"),
            "not named: {refused:?}"
        );
        missing = missing.min(took);
    }
    ensure!(
        missing <= there * MISSING_COMMAND_FACTOR,
        "it took {missing:?}, and {there:?} for a command that is there"
    );
    Ok(())
}

/// From the exec of a command to the answer to its start, which is returned.
fn time_exec(shim: &Shim, command: &str) -> Result<(Duration, Result<(), Refused>)> {
    let began = Instant::now();
    granted(shim.exec("timed", &Streams::default(), &[command]))?;
    let answer = shim.start("timed")?.map(drop);
    let took = began.elapsed();
    granted(shim.wait("timed"))?;
    granted(shim.delete("timed"))?;
    Ok((took, answer))
}

/// Who deletes or shuts down second is told so, once the first is done.
fn ends(ctr: &Ctr, shim: &Shim) -> Result<()> {
    let other = shim.clone();
    let second = thread::spawn(move || other.delete(""));
    let first = shim.delete("")?;
    let Ok(second) = second.join() else {
        bail!("the second call panicked");
    };
    let answers = [first, second?];
    let deleted: Vec<_> = answers
        .iter()
        .filter_map(|answer| answer.as_ref().ok())
        .collect();
    let refused: Vec<_> = answers
        .iter()
        .filter_map(|answer| answer.as_ref().err())
        .collect();
    ensure!(
        matches!(deleted[..], [deleted] if deleted.exit_status() == 137)
            && matches!(refused[..], [refused] if refused.code == NOT_FOUND),
        "two Deletes at once were answered {answers:?}"
    );
    let connected = granted(shim.connect())?;
    ensure!(
        connected.task_pid() == 0,
        "it has a pid still: {connected:?}"
    );
    let pid = i32::try_from(connected.shim_pid())?;
    let other = shim.clone();
    let second = thread::spawn(move || other.shutdown(false));
    // One of them may find the shim gone; runc's of containerd 1.6 goes without an answer.
    let answers = [Ok(shim.shutdown(false)), second.join()];
    let is_granted = answers.iter().flatten().any(|it| matches!(it, Ok(Ok(_))));
    ensure!(
        is_granted || !ctr.is_husk(),
        "no Shutdown was granted: {answers:?}"
    );
    let mut shims = crate::host::Process::all()?;
    shims.retain(|process| process.pid == pid);
    for process in shims {
        let ended = process.ends_before(Instant::now() + END_DEADLINE)?;
        ensure!(ended, "the shim is there still");
    }
    Ok(())
}
