//! Requests and answers as they lie in guest memory (virtio 1.2, 5.15.6).

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;

/// `struct virtio_mem_req`: type, padding, address, number of blocks, padding.
const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`: type, padding, state.
const ANSWER_BYTES: usize = 10;

/// What a driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug { start: u64, blocks: u16 },
    Unplug { start: u64, blocks: u16 },
    UnplugAll,
    State { start: u64, blocks: u16 },
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Ack,
    State(BlockState),
    /// More than was requested.
    Nack,
    /// Not now.
    Busy,
    /// Not a request that makes sense.
    Error,
}

/// Of several blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged,
    Unplugged,
    Mixed,
}

/// The request that a chain begins with, if it is one.
pub(super) fn read(chain: DescriptorChain<&GuestRam>, memory: &GuestRam) -> Option<Request> {
    let mut bytes = [0; REQUEST_BYTES];
    let mut rest = bytes.as_mut_slice();
    for piece in chain.readable() {
        let length = usize::try_from(piece.len()).ok()?.min(rest.len());
        let (now, later) = rest.split_at_mut_checked(length)?;
        memory.read_slice(now, piece.addr()).ok()?;
        rest = later;
    }
    if !rest.is_empty() {
        return None;
    }
    let [
        k0,
        k1,
        _,
        _,
        _,
        _,
        _,
        _,
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        n0,
        n1,
        ..,
    ] = bytes;
    let start = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    let blocks = u16::from_le_bytes([n0, n1]);
    Some(match u16::from_le_bytes([k0, k1]) {
        0 => Request::Plug { start, blocks },
        1 => Request::Unplug { start, blocks },
        2 => Request::UnplugAll,
        3 => Request::State { start, blocks },
        _ => return None,
    })
}

/// Writes the answer. Returns the bytes written: none if there is no room for all of them.
pub(super) fn write(chain: DescriptorChain<&GuestRam>, memory: &GuestRam, answer: Answer) -> usize {
    let (kind, state): (u16, u16) = match answer {
        Answer::Ack => (0, 0),
        Answer::State(BlockState::Plugged) => (0, 0),
        Answer::State(BlockState::Unplugged) => (0, 1),
        Answer::State(BlockState::Mixed) => (0, 2),
        Answer::Nack => (1, 0),
        Answer::Busy => (2, 0),
        Answer::Error => (3, 0),
    };
    let ([k0, k1], [s0, s1]) = (kind.to_le_bytes(), state.to_le_bytes());
    let bytes: [u8; ANSWER_BYTES] = [k0, k1, 0, 0, 0, 0, 0, 0, s0, s1];
    let pieces: Vec<(GuestAddress, usize)> = chain
        .writable()
        .map(|piece| (piece.addr(), usize::try_from(piece.len()).unwrap_or(0)))
        .take(ANSWER_BYTES)
        .collect();
    let room = pieces
        .iter()
        .fold(0_usize, |sum, (_, length)| sum.saturating_add(*length));
    if room < ANSWER_BYTES {
        return 0;
    }
    let mut rest = bytes.as_slice();
    for (address, length) in pieces {
        let Some((now, later)) = rest.split_at_checked(length.min(rest.len())) else {
            break;
        };
        if memory.write_slice(now, address).is_err() {
            return 0;
        }
        rest = later;
    }
    ANSWER_BYTES
}
