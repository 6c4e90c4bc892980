//! The loop of a device with one queue and no other events.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::fd::borrow;
use crate::device::{DeviceError, ReadyQueue};
use crate::memory::GuestRam;

/// A queue whose requests are answered one by one.
pub(super) struct SimpleQueue<'m> {
    device: &'static str,
    index: usize,
    /// `None` if the driver has left it disabled.
    ready: Option<ReadyQueue>,
    memory: &'m GuestRam,
}

impl<'m> SimpleQueue<'m> {
    pub(super) fn new(
        device: &'static str,
        index: usize,
        ready: Option<ReadyQueue>,
        memory: &'m GuestRam,
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
            DescriptorChain<&'m GuestRam>,
            &'m GuestRam,
        ) -> Result<usize, DeviceError>,
    ) -> Result<(), DeviceError> {
        // The driver may have kicked before this thread existed, so look before waiting.
        loop {
            self.answer_all(&mut answer)?;
            if self.wait(stop)? {
                return Ok(());
            }
        }
    }

    /// Answers what the queue holds now. What comes meanwhile has its own kick.
    fn answer_all(
        &mut self,
        mut answer: impl FnMut(
            DescriptorChain<&'m GuestRam>,
            &'m GuestRam,
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

    /// Waits for a kick or the end. Whether it is the end.
    fn wait(&self, stop: &EventFd) -> Result<bool, DeviceError> {
        let kick = self.ready.as_ref().map_or(stop, |ready| &ready.kick);
        let (stop, kick) = (borrow(stop), borrow(kick));
        let mut fds = [
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(kick, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(DeviceError::Host {
                    device: self.device,
                    what: "poll",
                    source: errno.into(),
                });
            }
        }
        let [is_stopped, is_kicked] = fds.map(|fd| fd.revents().contains(PollFlags::IN));
        if is_kicked && !is_stopped {
            // It is readable, and nobody else reads it.
            let _ = rustix::io::read(kick, &mut [0_u8; size_of::<u64>()]);
        }
        Ok(is_stopped)
    }
}
