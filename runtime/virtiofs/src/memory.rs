//! Where requests come from and replies go to: lists of raw byte ranges.
//!
//! The ranges may be guest memory, which the guest writes to whenever it likes. So no Rust
//! reference into a range exists here: small things are copied by volatile access, and file data
//! goes between the ranges and the file by `preadv` and `pwritev`, without a copy of ours.
//!
//! Unsafe lives in this module and in [`crate::sys`] only.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::iovec;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::sys::last_errno;

/// Most ranges in one `preadv` or `pwritev`: 1 MiB in pages, and some to spare. A longer list
/// takes several calls. (The kernel's own limit, `UIO_MAXIOV`, is 1024.)
const RANGES_PER_CALL_MAX: usize = 264;

/// Bytes copied by one volatile access.
const COPY_STEP: usize = 16;

/// The request: what the device may read.
pub struct RequestReader<'m> {
    ranges: Ranges<'m>,
}

/// The reply: what the device may write. The first 16 bytes are kept for the header, which is
/// written last, by the server.
pub struct ReplyWriter<'m> {
    whole: Ranges<'m>,
    body: Ranges<'m>,
    written: usize,
}

impl<'m> RequestReader<'m> {
    /// A request that lies in `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &'m [u8]) -> Self {
        let range = iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        Self {
            ranges: Ranges::one(range),
        }
    }

    /// A request that lies in `ranges`, one after the other: the readable descriptors of one
    /// chain.
    ///
    /// # Safety
    /// For as long as `'m`, each range is mapped readable memory of this process. It may change
    /// under way, and the ranges may overlap each other and those of the reply. No Rust reference
    /// to it that other threads' or the guest's writes would make invalid is used in that time.
    #[must_use]
    pub unsafe fn from_ranges(ranges: &'m [iovec]) -> Self {
        Self {
            ranges: Ranges::list(ranges),
        }
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.ranges.remaining
    }

    /// Cuts the request off after `length` more bytes.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.ranges.remaining = self.ranges.remaining.min(length);
    }

    /// Fills `target` from the front, or takes nothing and returns `None` if there is not enough.
    pub(crate) fn read_exact(&mut self, target: &mut [u8]) -> Option<()> {
        if self.ranges.remaining < target.len() {
            return None;
        }
        let mut done: usize = 0;
        while let Some(rest) = target.get_mut(done..)
            && !rest.is_empty()
        {
            let range = self.ranges.front()?;
            let length = rest.len().min(range.iov_len);
            // SAFETY: `range` is what is left of a range that the maker of this reader vouched
            // for, readable for `iov_len` bytes; `rest` is ours and has room for `length`.
            unsafe { copy_volatile(range.iov_base.cast(), rest.as_mut_ptr(), length) };
            self.ranges.advance(length);
            done = done.saturating_add(length);
        }
        Some(())
    }

    /// Reads one structure from the front.
    pub(crate) fn read_struct<T: FromBytes + IntoBytes>(&mut self) -> Option<T> {
        let mut value = T::new_zeroed();
        self.read_exact(value.as_mut_bytes())?;
        Some(value)
    }

    /// Writes what is left, at most `length` bytes, to `file`. Returns how much was written; an
    /// error after the first byte is a short count.
    ///
    /// # Errors
    /// That of `pwritev2`.
    pub(crate) fn write_to_file_at(
        &mut self,
        file: BorrowedFd<'_>,
        length: usize,
        offset: u64,
        append: bool,
    ) -> Result<usize, Errno> {
        let flags = if append { libc::RWF_APPEND } else { 0 };
        self.ranges.transfer(length, offset, |list, count, at| {
            // SAFETY: `list` holds `count` ranges which the maker of this reader vouched for as
            // readable; the kernel checks them again and fails with EFAULT.
            unsafe { libc::pwritev2(file.as_raw_fd(), list, count, at, flags) }
        })
    }
}

impl<'m> ReplyWriter<'m> {
    /// A reply into `bytes`.
    #[must_use]
    pub fn from_bytes(bytes: &'m mut [u8]) -> Self {
        Self::new(Ranges::one(iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }))
    }

    /// A reply into `ranges`, one after the other: the writable descriptors of one chain.
    ///
    /// # Safety
    /// As for [`RequestReader::from_ranges`], and the memory is writable.
    #[must_use]
    pub unsafe fn from_ranges(ranges: &'m [iovec]) -> Self {
        Self::new(Ranges::list(ranges))
    }

    fn new(whole: Ranges<'m>) -> Self {
        let mut body = whole.clone();
        body.advance(HEADER_BYTES);
        Self {
            whole,
            body,
            written: 0,
        }
    }

    /// Whether there is room for a header.
    pub(crate) fn has_header(&self) -> bool {
        self.whole.remaining >= HEADER_BYTES
    }

    /// Bytes that still fit behind the header.
    #[must_use]
    pub fn room(&self) -> usize {
        self.body.remaining
    }

    /// Bytes of the body so far.
    pub(crate) fn written(&self) -> usize {
        self.written
    }

    /// Forgets the body.
    pub(crate) fn rewind(&mut self) {
        self.body = self.whole.clone();
        self.body.advance(HEADER_BYTES);
        self.written = 0;
    }

    /// Appends `bytes` to the body.
    ///
    /// # Errors
    /// `EIO` if they don't fit: the kernel sizes the buffers itself, so this is its mistake.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        if self.body.remaining < bytes.len() {
            return Err(Errno::IO);
        }
        self.body.fill(bytes);
        self.written = self.written.saturating_add(bytes.len());
        Ok(())
    }

    /// Appends at most `length` bytes of `file`, straight into the ranges.
    ///
    /// # Errors
    /// That of `preadv`. An error after the first byte is a short count.
    pub(crate) fn read_from_file_at(
        &mut self,
        file: BorrowedFd<'_>,
        length: usize,
        offset: u64,
    ) -> Result<usize, Errno> {
        let count = self.body.transfer(length, offset, |list, count, at| {
            // SAFETY: `list` holds `count` ranges which the maker of this writer vouched for as
            // writable and free of Rust references; the kernel checks them again.
            unsafe { libc::preadv(file.as_raw_fd(), list, count, at) }
        })?;
        self.written = self.written.saturating_add(count);
        Ok(count)
    }

    /// Writes the header.
    pub(crate) fn finish(&mut self, header: &[u8; HEADER_BYTES]) {
        let mut front = self.whole.clone();
        front.fill(header);
    }
}

/// Size of `fuse_out_header`.
pub(crate) const HEADER_BYTES: usize = 16;

/// What is left of a list of ranges.
#[derive(Clone)]
struct Ranges<'m> {
    /// A list of one needs no place elsewhere.
    single: iovec,
    list: Option<&'m [iovec]>,
    /// Index of the range at the front, and how much of it is gone.
    index: usize,
    gone: usize,
    remaining: usize,
    memory: PhantomData<&'m [u8]>,
}

impl<'m> Ranges<'m> {
    fn one(range: iovec) -> Self {
        Self {
            single: range,
            list: None,
            index: 0,
            gone: 0,
            remaining: range.iov_len,
            memory: PhantomData,
        }
    }

    fn list(list: &'m [iovec]) -> Self {
        let total = list
            .iter()
            .fold(0_usize, |sum, range| sum.saturating_add(range.iov_len));
        Self {
            list: Some(list),
            remaining: total,
            ..Self::one(iovec {
                iov_base: ptr::null_mut(),
                iov_len: 0,
            })
        }
    }

    fn all(&self) -> &[iovec] {
        self.list.unwrap_or(std::slice::from_ref(&self.single))
    }

    /// What is left of the first range that is not used up.
    fn front(&mut self) -> Option<iovec> {
        loop {
            let range = *self.all().get(self.index)?;
            if range.iov_len > self.gone {
                return Some(iovec {
                    iov_base: range.iov_base.wrapping_byte_add(self.gone),
                    iov_len: range.iov_len.saturating_sub(self.gone).min(self.remaining),
                });
            }
            self.index = self.index.saturating_add(1);
            self.gone = 0;
        }
    }

    /// Steps over `length` bytes, or to the end.
    fn advance(&mut self, length: usize) {
        let mut left = length.min(self.remaining);
        while left > 0
            && let Some(range) = self.front()
        {
            let step = left.min(range.iov_len);
            self.gone = self.gone.saturating_add(step);
            self.remaining = self.remaining.saturating_sub(step);
            left = left.saturating_sub(step);
        }
    }

    /// Copies all of `bytes`, which must fit, into the ranges.
    fn fill(&mut self, bytes: &[u8]) {
        let mut done: usize = 0;
        while let Some(rest) = bytes.get(done..)
            && !rest.is_empty()
            && let Some(range) = self.front()
        {
            let length = rest.len().min(range.iov_len);
            // SAFETY: `range` is what is left of a range that the maker of the writer vouched for,
            // writable for `iov_len` bytes; `rest` is ours and holds `length`.
            unsafe { copy_volatile(rest.as_ptr(), range.iov_base.cast(), length) };
            self.advance(length);
            done = done.saturating_add(length);
        }
    }

    /// Calls `call` with lists of ranges until `length` bytes are done, the ranges are used up, or
    /// a call does less than it could.
    fn transfer(
        &mut self,
        length: usize,
        offset: u64,
        mut call: impl FnMut(*const iovec, libc::c_int, libc::off_t) -> libc::ssize_t,
    ) -> Result<usize, Errno> {
        let wanted = length.min(self.remaining);
        let mut done: usize = 0;
        loop {
            let (list, count, asked) = self.next_ranges(wanted.saturating_sub(done));
            if asked == 0 {
                return Ok(done);
            }
            let at = u64::try_from(done)
                .ok()
                .and_then(|done| offset.checked_add(done))
                .and_then(|at| libc::off_t::try_from(at).ok())
                .ok_or(Errno::INVAL)?;
            let Ok(moved) = usize::try_from(call(list.as_ptr(), count, at)) else {
                let errno = last_errno();
                match errno {
                    Errno::INTR => continue,
                    _ if done > 0 => return Ok(done),
                    _ => return Err(errno),
                }
            };
            self.advance(moved);
            done = done.saturating_add(moved);
            if moved < asked {
                return Ok(done);
            }
        }
    }

    /// The next ranges, as many as fit one call and hold at most `length` bytes; their number; and
    /// their total.
    fn next_ranges(&mut self, length: usize) -> ([iovec; RANGES_PER_CALL_MAX], libc::c_int, usize) {
        let empty = iovec {
            iov_base: ptr::null_mut(),
            iov_len: 0,
        };
        let mut list = [empty; RANGES_PER_CALL_MAX];
        let mut ahead = self.clone();
        let mut count = 0;
        let mut total: usize = 0;
        for slot in &mut list {
            let left = length.saturating_sub(total);
            let Some(mut range) = ahead.front().filter(|_| left > 0 && ahead.remaining > 0) else {
                break;
            };
            range.iov_len = range.iov_len.min(left);
            ahead.advance(range.iov_len);
            total = total.saturating_add(range.iov_len);
            *slot = range;
            count += 1;
        }
        (list, count, total)
    }
}

/// Copies `length` bytes of which one side may be changed by others at any time.
///
/// # Safety
/// `from` is readable and `to` writable for `length` bytes; no Rust reference to the shared side
/// is alive.
unsafe fn copy_volatile(from: *const u8, to: *mut u8, length: usize) {
    let mut done = 0;
    while length.saturating_sub(done) >= COPY_STEP {
        let source = from.wrapping_add(done).cast::<[u8; COPY_STEP]>();
        // SAFETY: `done + COPY_STEP <= length`, so it is within what the caller vouches for; an
        // array of bytes has no alignment and any bytes are a value of it.
        let value = unsafe { source.read_volatile() };
        let target = to.wrapping_add(done).cast::<[u8; COPY_STEP]>();
        // SAFETY: as for `source`, and writable.
        unsafe { target.write_volatile(value) };
        done = done.saturating_add(COPY_STEP);
    }
    while done < length {
        // SAFETY: `done < length`.
        let value = unsafe { from.wrapping_add(done).read_volatile() };
        // SAFETY: `done < length`, and writable.
        unsafe { to.wrapping_add(done).write_volatile(value) };
        done = done.saturating_add(1);
    }
}

#[cfg(test)]
mod tests;
