//! The ports of the machine: power and nothing else.
//!
//! Port 0x600 is ours: a zero written there powers the machine off. Port 0x64 is the keyboard
//! controller's, of which there is only what a reset needs. All other ports are as on a bus with
//! nobody on it: ones are read, and what is written is lost.

use crate::end::EndReason;

/// Power-off, one byte.
pub(crate) const POWER_PORT: u16 = 0x600;
/// What to write there.
const POWER_OFF: u8 = 0;

/// Status and command of the keyboard controller.
pub(crate) const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// The command that pulses the reset line of the CPU.
const KEYBOARD_RESET: u8 = 0xfe;
/// Both buffers are empty. Linux waits for that before it sends the reset command.
const KEYBOARD_IDLE: u8 = 0;

/// What is read where nobody answers.
const NOBODY: u8 = 0xff;

/// Answers a read.
pub(crate) fn read(port: u16, data: &mut [u8]) {
    data.fill(match port {
        KEYBOARD_COMMAND_PORT => KEYBOARD_IDLE,
        _ => NOBODY,
    });
}

/// Takes a write, which may end the guest.
pub(crate) fn write(port: u16, data: &[u8]) -> Option<EndReason> {
    match (port, data.first()) {
        (POWER_PORT, Some(&POWER_OFF)) => Some(EndReason::Stopped),
        (KEYBOARD_COMMAND_PORT, Some(&KEYBOARD_RESET)) => Some(EndReason::Reset),
        _ => None,
    }
}
