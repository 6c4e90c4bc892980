//! Taking over the descriptor of `/dev/kvm`. One of the modules that allow unsafe code.

use std::os::fd::FromRawFd;
use std::os::fd::IntoRawFd;
use std::os::fd::OwnedFd;

use kvm_ioctls::Kvm;

use crate::machine::BuildError;

/// The only version there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Makes the descriptor one that KVM requests can be made on, after it has answered the first.
pub(crate) fn open(descriptor: OwnedFd) -> Result<Kvm, BuildError> {
    // SAFETY: the descriptor is open and owned, and the ownership is passed on. Should it be no
    // descriptor of KVM, its requests fail.
    let kvm = unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) };
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version => Err(BuildError::NotKvm { version }),
    }
}
