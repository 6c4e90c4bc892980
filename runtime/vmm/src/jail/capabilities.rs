//! Capabilities: those that serving other people's files as root takes, and no others.

use rustix::io::Errno;
use rustix::thread::{self, CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::JailError;

/// What the jailed process keeps.
///
/// `SETUID` and `SETGID` create files in the caller's name; `SETFCAP` lets a package manager in the
/// guest set file capabilities. Not `DAC_READ_SEARCH`, although it is the lesser of two: it also
/// opens any file of a file system by its handle, which no mount namespace holds back.
pub const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Number of bits in a capability set.
const CAPABILITY_BITS: u32 = 64;

/// Empties the inheritable and ambient sets and reduces all others to [`KEPT`].
pub(super) fn drop_all_but_kept() -> Result<(), JailError> {
    for bit in 0..CAPABILITY_BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if KEPT.contains(capability) {
            continue;
        }
        match thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number this kernel has no capability for; there are none above it.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(JailError::step("drop from the bounding set")(errno)),
        }
    }
    // Threads that create files in the name of a guest's user keep what they have.
    let bits =
        CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED;
    thread::set_capabilities_secure_bits(bits).map_err(JailError::step("set secure bits"))?;
    thread::clear_ambient_capability_set().map_err(JailError::step("clear ambient set"))?;
    let sets = CapabilitySets {
        effective: KEPT,
        permitted: KEPT,
        inheritable: CapabilitySet::empty(),
    };
    thread::set_capabilities(None, sets).map_err(JailError::step("set capabilities"))
}
