//! Why the guest is not running: KVM's exits, reduced to those that this machine can have.

use kvm_ioctls::VcpuExit;
use kvm_ioctls::VcpuFd;

use super::VcpuError;

/// What the guest wants, or what has happened to it.
#[derive(Debug)]
pub(super) enum Exit<'a> {
    /// Fill `data` with what is read from a port.
    PortRead { port: u16, data: &'a mut [u8] },
    /// `data` is written to a port.
    PortWrite { port: u16, data: &'a [u8] },
    /// Fill `data` with what is read from an address without memory. Registers are none.
    MmioRead { data: &'a mut [u8] },
    /// `data` is written to a device's register.
    MmioWrite { address: u64, data: &'a [u8] },
    /// No handler is left for an exception.
    TripleFault,
    /// Look at your requests.
    Interrupted,
}

/// Runs the guest until it needs something. An answer is written to the exit itself, and the guest
/// gets it when it is run again.
pub(super) fn run(id: u8, fd: &mut VcpuFd) -> Result<Exit<'_>, VcpuError> {
    let exit = match fd.run() {
        Ok(exit) => exit,
        // EAGAIN: a CPU that waited for its start-up message was woken.
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
            return Ok(Exit::Interrupted);
        }
        Err(source) => return Err(VcpuError::Run { id, source }),
    };
    Ok(match exit {
        VcpuExit::IoIn(port, data) => Exit::PortRead { port, data },
        VcpuExit::IoOut(port, data) => Exit::PortWrite { port, data },
        VcpuExit::MmioRead(_, data) => Exit::MmioRead { data },
        VcpuExit::MmioWrite(address, data) => Exit::MmioWrite { address, data },
        VcpuExit::Shutdown => Exit::TripleFault,
        VcpuExit::Intr => Exit::Interrupted,
        VcpuExit::FailEntry(reason, _) => return Err(VcpuError::Entry { id, reason }),
        VcpuExit::InternalError => return Err(VcpuError::Emulation { id }),
        other => {
            let exit = format!("{other:?}");
            return Err(VcpuError::Unknown { id, exit });
        }
    })
}
