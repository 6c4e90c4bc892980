//! The user's terminal: raw while a container has it, and as it was again on every way out.

use std::io;
use std::os::fd::AsFd;
use std::panic;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, Termios};

/// The terminal is raw while this lives.
#[derive(Debug)]
pub(crate) struct Raw(());

/// How the terminal was. Here and not in [`Raw`] for the way out that drops nothing: a panic that
/// aborts.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

impl Raw {
    /// Makes the terminal at standard input raw.
    pub(crate) fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let found = rustix::termios::tcgetattr(stdin.as_fd())?;
        let mut raw = found.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        let tell = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            restore();
            tell(panic);
        }));
        rustix::termios::tcsetattr(stdin.as_fd(), OptionalActions::Drain, &raw)?;
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // Not waited for: the panicking thread may be the one that has it.
    let Ok(mut saved) = SAVED.try_lock() else {
        return;
    };
    if let Some(saved) = saved.take() {
        // Nothing more can be done about a terminal that is gone.
        let _ = rustix::termios::tcsetattr(io::stdin().as_fd(), OptionalActions::Drain, &saved);
    }
}

/// Columns and rows of the terminal at a descriptor.
pub(crate) fn size(of: impl AsFd) -> Option<(u32, u32)> {
    let size = rustix::termios::tcgetwinsize(of).ok()?;
    Some((size.ws_col.into(), size.ws_row.into())).filter(|&(columns, rows)| columns * rows > 0)
}
