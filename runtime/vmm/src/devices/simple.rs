//! The loop of a device that waits for nothing but its queues.

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::fd::borrow;
use crate::device::{DeviceError, ReadyQueue};

/// A queue whose requests are answered one by one.
pub(super) struct SimpleQueue<'m> {
    device: &'static str,
    index: usize,
    /// `None` if the driver has left it disabled.
    ready: Option<ReadyQueue>,
    memory: &'m GuestMemoryMmap,
}

impl<'m> SimpleQueue<'m> {
    pub(super) fn new(
        device: &'static str,
        index: usize,
        ready: Option<ReadyQueue>,
        memory: &'m GuestMemoryMmap,
    ) -> Self {
        Self {
            device,
            index,
            ready,
            memory,
        }
    }

    /// Calls `answer` for each request until `stop` is readable; it returns the bytes written.
    pub(super) fn serve(
        &mut self,
        stop: &EventFd,
        mut answer: impl FnMut(
            DescriptorChain<&'m GuestMemoryMmap>,
            &'m GuestMemoryMmap,
        ) -> Result<usize, DeviceError>,
    ) -> Result<(), DeviceError> {
        let queues = std::slice::from_mut(self);
        serve_all(queues, stop, |_, chain, memory| answer(chain, memory))
    }

    /// Answers what the queue holds now. What comes meanwhile has its own kick.
    fn answer_all(
        &mut self,
        mut answer: impl FnMut(
            DescriptorChain<&'m GuestMemoryMmap>,
            &'m GuestMemoryMmap,
        ) -> Result<usize, DeviceError>,
    ) -> Result<(), DeviceError> {
        let broken = |source| DeviceError::Queue {
            device: self.device,
            index: self.index,
            source,
        };
        let Some(ReadyQueue {
            queue, interrupt, ..
        }) = &mut self.ready
        else {
            return Ok(());
        };
        let mut has_used = false;
        for _ in 0..queue.size() {
            let chain = queue.iter(self.memory).map_err(broken)?.next();
            let Some(chain) = chain else { break };
            let head = chain.head_index();
            let bytes = answer(chain, self.memory)?;
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            match queue.add_used(self.memory, head, bytes) {
                // A head outside of the table can't be given back.
                Ok(()) | Err(virtio_queue::Error::InvalidDescriptorIndex) => has_used = true,
                Err(error) => return Err(broken(error)),
            }
        }
        if has_used {
            interrupt.signal_used();
        }
        Ok(())
    }
}

/// As [`SimpleQueue::serve`], for all queues of a device; `answer` is also told the queue's index.
pub(super) fn serve_all<'m>(
    queues: &mut [SimpleQueue<'m>],
    stop: &EventFd,
    mut answer: impl FnMut(
        usize,
        DescriptorChain<&'m GuestMemoryMmap>,
        &'m GuestMemoryMmap,
    ) -> Result<usize, DeviceError>,
) -> Result<(), DeviceError> {
    // The driver may have kicked before this thread existed, so look before waiting.
    loop {
        for queue in &mut *queues {
            let index = queue.index;
            queue.answer_all(|chain, memory| answer(index, chain, memory))?;
        }
        if wait(queues, stop)? {
            return Ok(());
        }
    }
}

/// Waits for a kick or the end. Whether it is the end.
fn wait(queues: &[SimpleQueue<'_>], stop: &EventFd) -> Result<bool, DeviceError> {
    let ready = queues.iter().filter_map(|queue| queue.ready.as_ref());
    let mut fds: Vec<_> = [stop]
        .into_iter()
        .chain(ready.map(|ready| &ready.kick))
        .map(|event| PollFd::from_borrowed_fd(borrow(event), PollFlags::IN))
        .collect();
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => {
            return Err(DeviceError::Host {
                device: queues.first().map_or("", |queue| queue.device),
                what: "poll",
                source: errno.into(),
            });
        }
    }
    let is_readable = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::IN);
    if fds.first().is_some_and(is_readable) {
        return Ok(true);
    }
    for kick in fds.iter().filter(|fd| is_readable(fd)) {
        // It is readable, and nobody else reads it.
        let _ = rustix::io::read(kick.as_fd(), &mut [0_u8; size_of::<u64>()]);
    }
    Ok(false)
}
