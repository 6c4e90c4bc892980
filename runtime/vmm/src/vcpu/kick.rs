//! Bringing a thread out of the guest.
//!
//! A signal interrupts `KVM_RUN`, but one that comes just before is lost to it. So the handler sets
//! `immediate_exit` in the memory that the thread shares with KVM: the next `KVM_RUN` then returns at
//! once. This is one of the modules that allow unsafe code, for that handler.

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

thread_local! {
    /// `immediate_exit` of the virtual CPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// Makes this thread one that can be kicked, until dropped. Must be dropped before the `VcpuFd`.
pub(super) struct Kickable {
    /// The thread-local belongs to one thread.
    _not_send: PhantomData<*mut u8>,
}

impl Kickable {
    pub(super) fn new(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self {
            _not_send: PhantomData,
        }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Installs the handler of the signal. Once per process is enough.
pub(crate) fn install_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid value: no flags, no signals masked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as *const () as libc::sighandler_t;
    // SAFETY: both pointers are valid or null as sigaction(2) asks, and the handler does only what
    // is allowed in one: it reads a thread-local without a destructor and writes a byte.
    let failed = unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, ptr::null_mut()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Interrupts a thread, in the guest or on its way there.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the thread was not joined, since its handle exists, so its id is still its own. The
    // only possible error is that it has ended, and then there is nothing to interrupt.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: a `Kickable` lives on this thread, so the pointer is to a byte of a mapping that
        // the thread's `VcpuFd` keeps.
        unsafe { immediate_exit.write_volatile(1) };
    }
}
