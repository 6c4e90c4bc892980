//! The life of the VMM process, from its first instruction to its exit code.
//!
//! 1. The parent's first request says what to build. A request that can't be fulfilled is answered
//!    with a failure and ends the process.
//! 2. The process makes another one in a PID namespace of its own and in the pod's cgroup, a child of
//!    the same parent, and ends. Everything from here on happens in that one.
//! 3. It enters the jail. Nothing is opened by name after that, except by the file server in the
//!    share.
//! 4. It builds the machine from the descriptors it was given. Each thread confines itself; when all
//!    have, the boot request is answered.
//! 5. It serves the parent until the end.

use std::panic;
use std::process::ExitCode;

use husk_vmm_control::{
    Answer, Call, Channel, ChannelError, ExitReason, Failure, Message, Request,
};

use crate::allocator;
use crate::assembly::{self, Assembled};
use crate::boot_request::Boot;
use crate::control::{self, Outcome, describe};
use crate::jail::{self, LaunchError, Launched};
use crate::last_words;

/// The exit code when the virtual machine has ended in any other way than by being stopped.
const EXIT_FAILURE: i32 = 1;

/// The exit code after a panic, as Rust's own.
const EXIT_PANIC: i32 = 101;

/// Runs the process. Called once, by `main`, while there is one thread.
pub fn run() -> ExitCode {
    allocator::use_one_arena();
    let channel = match jail::take_control_socket() {
        Ok(socket) => Channel::from_socket(socket),
        Err(error) => {
            last_words::print(format_args!("husk-vmm: {}", describe(&error)));
            return ExitCode::FAILURE;
        }
    };
    end_at_panic();
    let (id, boot) = match receive_boot(&channel) {
        Ok(Some(received)) => received,
        Ok(None) => return ExitCode::FAILURE,
        Err(text) => return fail(&channel, None, &text),
    };
    let boot = match boot {
        Ok(boot) => boot,
        Err(text) => return fail(&channel, Some(id), &text),
    };
    match jail::launch(&channel, boot.cgroup_dir.as_deref()) {
        Ok(Launched::First) => ExitCode::SUCCESS,
        Ok(Launched::Jailed) => run_jailed(&channel, id, boot),
        // Whoever killed the first process has made it look like the end of this one.
        Err(LaunchError::Orphaned) => ExitCode::FAILURE,
        Err(error) => fail(&channel, Some(id), &describe(&error)),
    }
}

/// What the boot request holds, or why it can't be fulfilled.
type Received = (u64, Result<Boot, String>);

/// Waits for the boot request; refuses all others. `None` if the parent has hung up.
fn receive_boot(channel: &Channel) -> Result<Option<Received>, String> {
    loop {
        let (request, descriptors) = match channel.receive::<Request>() {
            Ok(received) => received,
            Err(ChannelError::HungUp) => return Ok(None),
            Err(error) => return Err(describe(&error)),
        };
        let Request { id, call } = request;
        if let Call::Boot(config) = call {
            let boot = Boot::new(config, descriptors).map_err(|error| describe(&error));
            return Ok(Some((id, boot)));
        }
        let text = "there is no machine: it has to be booted first".to_owned();
        if reply(channel, id, Err(Failure { text })).is_err() {
            return Ok(None);
        }
    }
}

/// The life of the process that becomes the virtual machine.
fn run_jailed(channel: &Channel, id: u64, boot: Boot) -> ExitCode {
    match assembly::assemble(boot) {
        Ok(mut assembled) => {
            let code = match reply(channel, id, Ok(Answer::Booted(assembled.times))) {
                Ok(()) => serve(channel, &mut assembled),
                Err(_) => EXIT_FAILURE,
            };
            // While the machine is there: without it, each of its threads would be waited for. Those
            // that still run end with the process.
            std::process::exit(code)
        }
        Err(error) => fail(channel, Some(id), &describe(&error)),
    }
}

/// Serves the parent. Returns the exit code.
fn serve(channel: &Channel, assembled: &mut Assembled) -> i32 {
    match control::serve(channel, &mut assembled.guest, &assembled.vsock) {
        Outcome::Exited(ExitReason::Stopped) => 0,
        Outcome::Exited(_) | Outcome::HungUp => EXIT_FAILURE,
    }
}

fn reply(channel: &Channel, id: u64, result: Result<Answer, Failure>) -> Result<(), ChannelError> {
    channel.send(&Message::Reply { id, result }, &[])
}

/// Says why there will be no virtual machine, as the answer to the boot request if there was one,
/// and as the last message.
fn fail(channel: &Channel, id: Option<u64>, text: &str) -> ExitCode {
    let answered = id.map_or(Ok(()), |id| {
        let text = text.to_owned();
        reply(channel, id, Err(Failure { text }))
    });
    let told = answered.and_then(|()| {
        let text = text.to_owned();
        control::report_exit(channel, ExitReason::Error { text })
    });
    if told.is_err() {
        last_words::print(format_args!("husk-vmm: {text}"));
    }
    ExitCode::FAILURE
}

/// A thread that panics leaves a machine that can't be trusted, so the process ends, with a line on
/// standard error. Nothing that the filters forbid is needed for it.
fn end_at_panic() {
    panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        last_words::print(format_args!("husk-vmm: thread {name}: {info}"));
        std::process::exit(EXIT_PANIC);
    }));
}
