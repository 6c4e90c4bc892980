//! The buffers of one request: from a descriptor chain to lists of raw ranges.
//!
//! Unsafe lives here because of one promise: that the ranges are memory of this process. They are
//! never made into references; the server copies from and to them as volatile memory, or passes them
//! to the kernel.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::ops::Deref;

use husk_virtiofs::{ReplyWriter, RequestReader};
use libc::iovec;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryBackend;

use crate::memory::GuestRam;

/// Most ranges of one request: 1 MiB in pages with its headers, and twice as many again. A chain
/// through an indirect table may be longer than any queue.
const RANGES_MAX: usize = 1024;

/// Room for the ranges of one request at a time.
pub(super) struct Buffers {
    readable: Vec<iovec>,
    writable: Vec<iovec>,
}

/// The chain is not one that virtio 1.2, 2.7.4 allows, or lies outside of guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Buffers {
    pub(super) fn new() -> Self {
        Self {
            readable: Vec::with_capacity(RANGES_MAX),
            writable: Vec::with_capacity(RANGES_MAX),
        }
    }

    /// The request and the place for the reply that `chain` describes, in `memory`, which it is
    /// of.
    pub(super) fn of<'m, M>(
        &'m mut self,
        chain: DescriptorChain<M>,
        memory: &'m GuestRam,
    ) -> Result<(RequestReader<'m>, ReplyWriter<'m>), Malformed>
    where
        M: Deref<Target = GuestRam>,
    {
        self.readable.clear();
        self.writable.clear();
        for descriptor in chain {
            let list = if descriptor.is_write_only() {
                &mut self.writable
            } else if self.writable.is_empty() {
                &mut self.readable
            } else {
                // virtio 1.2, 2.7.4.2: what the device reads comes first.
                return Err(Malformed);
            };
            let bytes = usize::try_from(descriptor.len()).map_err(|_| Malformed)?;
            for slice in GuestMemoryBackend::get_slices(memory, descriptor.addr(), bytes) {
                let slice = slice.map_err(|_| Malformed)?;
                if list.len() >= RANGES_MAX {
                    return Err(Malformed);
                }
                list.push(iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        // SAFETY: `get_slices` has found the ranges in `memory`, which is mapped readable and
        // writable for as long as it is borrowed, 'm. The VMM makes no reference into it.
        let request = unsafe { RequestReader::from_ranges(&self.readable) };
        // SAFETY: as above.
        let reply = unsafe { ReplyWriter::from_ranges(&self.writable) };
        Ok((request, reply))
    }
}
