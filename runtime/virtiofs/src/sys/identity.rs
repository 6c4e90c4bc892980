//! Who a thread is to the file system, and which directory it is in: for one thread, not for the
//! process.

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

/// Takes on `uid` and `gid` for files only. Both wrappers of the C library act on the thread.
///
/// The calls don't fail visibly: see [`can_change`].
pub(crate) fn set(uid: u32, gid: u32) {
    // The group first: without a root uid, the right to change it may be gone.
    if uid == 0 {
        set_uid(uid);
        set_gid(gid);
    } else {
        set_gid(gid);
        set_uid(uid);
    }
}

/// Whether [`set`] does what it says on this thread. Leaves the thread as root.
pub(crate) fn can_change() -> bool {
    const NOBODY: u32 = 65534;
    set(NOBODY, NOBODY);
    // A change to what is no id at all does nothing, and tells the present id.
    let changed = set_uid(u32::MAX) == NOBODY && set_gid(u32::MAX) == NOBODY;
    set(0, 0);
    changed
}

/// Gives the thread a umask and a current directory of its own.
///
/// # Errors
/// That of `unshare`.
pub(crate) fn unshare_directory() -> Result<(), Errno> {
    // SAFETY: the umask and the current and root directory become the thread's own; no descriptor
    // changes its meaning.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

fn set_uid(uid: u32) -> u32 {
    // SAFETY: setfsuid takes an integer and touches no memory of ours.
    let before = unsafe { libc::setfsuid(uid) };
    before.cast_unsigned()
}

fn set_gid(gid: u32) -> u32 {
    // SAFETY: setfsgid takes an integer and touches no memory of ours.
    let before = unsafe { libc::setfsgid(gid) };
    before.cast_unsigned()
}
