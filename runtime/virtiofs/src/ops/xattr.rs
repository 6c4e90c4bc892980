//! SETXATTR, GETXATTR, LISTXATTR and REMOVEXATTR.
//!
//! There is no call that takes an `O_PATH` descriptor and works on the kernels of today. So the
//! thread's current directory is the one of the process's descriptors, and the path is a number.

use std::ffi::CStr;

use rustix::fs::{self, XattrFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use crate::abi::{self, GetxattrIn, GetxattrOut, SetxattrExtIn, SetxattrIn, init};
use crate::inodes;
use crate::server::{Call, Server};

/// Longest value, and longest list of names, on Linux.
const VALUE_BYTES_MAX: usize = 64 * 1024;
/// Longest name on Linux.
const NAME_BYTES_MAX: usize = 255;

const ACL_ACCESS: &CStr = c"system.posix_acl_access";

impl Server {
    pub(crate) fn setxattr(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: SetxattrIn = call.arguments.take()?;
        let more = if self.has(init::SETXATTR_EXT) {
            call.arguments.take()?
        } else {
            SetxattrExtIn::default()
        };
        let inode = self.inodes.find(call.header.nodeid)?;
        let name = take_name(call)?;
        let size = usize::try_from(request.size).map_err(|_| Errno::INVAL)?;
        if size > VALUE_BYTES_MAX {
            return Err(Errno::TOOBIG);
        }
        let value = call.arguments.take_bytes(size)?;
        let flags = XattrFlags::from_bits(request.flags).ok_or(Errno::INVAL)?;
        let path = inode.path();
        fs::setxattr(DecInt::from_fd(path).as_c_str(), name, value, flags)?;
        if name == ACL_ACCESS && more.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0 {
            const SET_GROUP_ID: u32 = 0o2000;
            let mode = u32::from(inodes::stat(path)?.stx_mode);
            if mode & SET_GROUP_ID != 0 {
                self.chmod(path, inode.kind, mode & !SET_GROUP_ID)?;
            }
        }
        Ok(())
    }

    pub(crate) fn getxattr(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: GetxattrIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let name = take_name(call)?;
        let path = inode.path();
        let number = DecInt::from_fd(path);
        reply_value(call, request.size, |buffer| match buffer {
            [] => fs::getxattr_query(number.as_c_str(), name),
            _ => fs::getxattr(number.as_c_str(), name, buffer),
        })
    }

    pub(crate) fn listxattr(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let request: GetxattrIn = call.arguments.take()?;
        let inode = self.inodes.find(call.header.nodeid)?;
        let path = inode.path();
        let number = DecInt::from_fd(path);
        reply_value(call, request.size, |buffer| match buffer {
            [] => fs::listxattr_query(number.as_c_str()),
            _ => fs::listxattr(number.as_c_str(), buffer),
        })
    }

    pub(crate) fn removexattr(&self, call: &mut Call<'_, '_>) -> Result<(), Errno> {
        let inode = self.inodes.find(call.header.nodeid)?;
        let name = take_name(call)?;
        let path = inode.path();
        fs::removexattr(DecInt::from_fd(path).as_c_str(), name)
    }
}

/// The name of an attribute.
fn take_name<'a>(call: &mut Call<'a, '_>) -> Result<&'a CStr, Errno> {
    let name = call.arguments.take_string()?;
    match name.count_bytes() {
        1..=NAME_BYTES_MAX => Ok(name),
        _ => Err(Errno::RANGE),
    }
}

/// Replies with what `read` puts into a buffer of the size asked for; with its length alone for
/// size 0.
fn reply_value(
    call: &mut Call<'_, '_>,
    size: u32,
    read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    let size = usize::try_from(size)
        .map_err(|_| Errno::INVAL)?
        .min(VALUE_BYTES_MAX);
    let mut output = std::mem::take(&mut call.worker.output);
    output.clear();
    output.resize(size, 0);
    let result = read(&mut output).and_then(|length| match output.get(..length) {
        Some(value) if size > 0 => call.reply.write(value),
        // Only the length was asked for.
        _ => call.reply_with(&GetxattrOut {
            size: u32::try_from(length).map_err(|_| Errno::TOOBIG)?,
            padding: 0,
        }),
    });
    call.worker.output = output;
    result
}
