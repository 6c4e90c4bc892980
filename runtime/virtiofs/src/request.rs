//! Arguments of a request: structures, names, data. Everything here is the guest's, and wrong
//! until it was looked at.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::ffi::CStr;

use rustix::io::Errno;
use zerocopy::FromBytes;

/// Longest name of a directory entry on Linux.
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// Longest symbolic link on Linux, without the NUL.
const LINK_BYTES_MAX: usize = 4095;

/// What is left of a request's arguments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arguments<'a>(pub(crate) &'a [u8]);

impl<'a> Arguments<'a> {
    /// The structure at the front.
    pub(crate) fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    /// `length` bytes from the front.
    pub(crate) fn take_bytes(&mut self, length: usize) -> Result<&'a [u8], Errno> {
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// The string at the front.
    pub(crate) fn take_string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.take_bytes(string.count_bytes().saturating_add(1))?;
        Ok(string)
    }

    /// The name of a directory entry: one component, not a way up or out.
    pub(crate) fn take_name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.take_string()?;
        match name.to_bytes() {
            b"" => Err(Errno::NOENT),
            b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_BYTES_MAX => Err(Errno::NAMETOOLONG),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }

    /// The target of a symbolic link: any string, it is never followed here.
    pub(crate) fn take_link_target(&mut self) -> Result<&'a CStr, Errno> {
        let target = self.take_string()?;
        match target.count_bytes() {
            0 => Err(Errno::NOENT),
            length if length > LINK_BYTES_MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(target),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(bytes: &[u8]) -> Result<&CStr, Errno> {
        Arguments(bytes).take_name()
    }

    #[test]
    fn names_that_lead_away_are_refused() {
        assert_eq!(name(b".\0"), Err(Errno::INVAL));
        assert_eq!(name(b"..\0"), Err(Errno::INVAL));
        assert_eq!(name(b"a/b\0"), Err(Errno::INVAL));
        assert_eq!(name(b"/\0"), Err(Errno::INVAL));
        assert_eq!(name(b"\0"), Err(Errno::NOENT));
    }

    #[test]
    fn name_without_an_end_is_refused() {
        assert_eq!(name(b"abc"), Err(Errno::INVAL));
        assert_eq!(name(b""), Err(Errno::INVAL));
    }

    #[test]
    fn name_longer_than_linux_allows_is_refused() {
        let mut bytes = vec![b'a'; NAME_BYTES_MAX + 1];
        bytes.push(0);
        assert_eq!(name(&bytes), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn odd_names_are_names() {
        assert_eq!(name(b"...\0"), Ok(c"..."));
        assert_eq!(name(b"\xff\n\0"), Ok(c"\xff\n"));
    }

    #[test]
    fn arguments_are_taken_one_after_the_other() {
        let mut arguments = Arguments(b"\x07\0\0\0one\0two\0rest");
        assert_eq!(arguments.take::<u32>(), Ok(7));
        assert_eq!(arguments.take_name(), Ok(c"one"));
        assert_eq!(arguments.take_name(), Ok(c"two"));
        assert_eq!(arguments.take_bytes(5), Err(Errno::INVAL));
        assert_eq!(arguments.take_bytes(4), Ok(&b"rest"[..]));
        assert_eq!(arguments.take::<u8>(), Err(Errno::INVAL));
    }
}
