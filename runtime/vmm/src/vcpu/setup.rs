//! The state in which the virtual CPUs begin: that of the 64-bit boot protocol for the first, and
//! of a processor after reset, waiting for its start-up message, for the others.

use kvm_bindings::CpuId;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::Msrs;
use kvm_bindings::kvm_fpu;
use kvm_bindings::kvm_msr_entry;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_segment;
use kvm_ioctls::Cap;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;

use super::cpuid;
use super::cpuid::Facts;
use crate::boot::BOOT_SEGMENTS;
use crate::boot::Segment;
use crate::layout::BOOT_PARAMS_GPA;
use crate::layout::GDT_END;
use crate::layout::GDT_GPA;
use crate::layout::PAGE_TABLES_GPA;
use crate::layout::STACK_TOP_GPA;

/// Which state KVM did not take.
#[derive(Debug, thiserror::Error)]
#[error("KVM refuses to {step} of virtual CPU {id}")]
pub struct SetupError {
    /// What was to be done.
    step: &'static str,
    /// Which one.
    id: u8,
    /// Why.
    source: kvm_ioctls::Error,
}

/// What all virtual CPUs have in common.
pub(crate) struct Template {
    supported: CpuId,
    has_tsc_deadline: bool,
    vcpus: u8,
}

const CR0_PROTECTED_MODE: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// After FNINIT: all exceptions masked, extended precision.
const FPU_CONTROL: u16 = 0x37f;
/// After reset: all exceptions masked.
const MXCSR: u32 = 0x1f80;

const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
/// Delivery modes, in bits 10 to 8 of a local vector.
const MODE_NMI: u32 = 4 << 8;
const MODE_EXTINT: u32 = 7 << 8;
const MODE_MASK: u32 = 7 << 8;

impl Template {
    /// Asks KVM what it can present on this host.
    pub(crate) fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, SetupError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| SetupError {
                step: "list the processor features",
                id: 0,
                source,
            })?;
        Ok(Self {
            supported,
            has_tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            vcpus,
        })
    }

    /// Makes a virtual CPU. The one with id 0 begins at `entry`.
    pub(crate) fn create(&self, vm: &VmFd, id: u8, entry: u64) -> Result<VcpuFd, SetupError> {
        let failed = |step| move |source| SetupError { step, id, source };
        let fd = vm
            .create_vcpu(id.into())
            .map_err(failed("create the descriptor"))?;
        let facts = Facts {
            vcpus: self.vcpus,
            has_tsc_deadline: self.has_tsc_deadline,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        };
        let entries = cpuid::of_vcpu(&self.supported, facts, id);
        // The table holds what KVM gave plus a few leaves; it refuses more than it can hold.
        let too_long = |_| SetupError {
            step: "hold the features",
            id,
            source: kvm_ioctls::Error::new(libc::E2BIG),
        };
        let table = CpuId::from_entries(&entries).map_err(too_long)?;
        fd.set_cpuid2(&table).map_err(failed("set the features"))?;
        set_msrs(&fd).map_err(failed("set the model-specific registers"))?;
        set_local_interrupts(&fd).map_err(failed("set the local interrupts"))?;
        if id == 0 {
            set_fpu(&fd).map_err(failed("set the floating-point state"))?;
            set_registers(&fd, entry).map_err(failed("set the registers"))?;
            set_system_registers(&fd).map_err(failed("set the system registers"))?;
        }
        Ok(fd)
    }
}

fn set_msrs(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        // All memory is cached; the kernel refines that by page attributes.
        msr(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ];
    let wrong = |_| kvm_ioctls::Error::new(libc::E2BIG);
    let msrs = Msrs::from_entries(&entries).map_err(wrong)?;
    // KVM says how many it took before the first it refused.
    if fd.set_msrs(&msrs)? < entries.len() {
        return Err(kvm_ioctls::Error::new(libc::EINVAL));
    }
    Ok(())
}

/// As firmware leaves it: LINT0 passes the old interrupt controller on, LINT1 is the NMI.
fn set_local_interrupts(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut lapic = fd.get_lapic()?;
    for (offset, mode) in [(LAPIC_LINT0, MODE_EXTINT), (LAPIC_LINT1, MODE_NMI)] {
        let bytes = &mut lapic.regs[offset..offset + size_of::<u32>()];
        let mut register = [0; size_of::<u32>()];
        for (to, from) in register.iter_mut().zip(bytes.iter()) {
            *to = from.cast_unsigned();
        }
        let value = (u32::from_le_bytes(register) & !MODE_MASK) | mode;
        for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *to = from.cast_signed();
        }
    }
    fd.set_lapic(&lapic)
}

fn set_fpu(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    fd.set_fpu(&kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    })
}

fn set_registers(fd: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    fd.set_regs(&kvm_regs {
        rip: entry,
        rsp: STACK_TOP_GPA,
        rbp: STACK_TOP_GPA,
        rsi: BOOT_PARAMS_GPA,
        rflags: RFLAGS_FIXED,
        ..Default::default()
    })
}

/// 64-bit mode, with the segments and page tables that [`crate::boot`] has written.
fn set_system_registers(fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = fd.get_sregs()?;
    let [code, data, task] = BOOT_SEGMENTS.map(kvm_segment::from);
    sregs.cs = code;
    sregs.tr = task;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.gdt.base = GDT_GPA;
    sregs.gdt.limit = u16::try_from(GDT_END - GDT_GPA - 1).unwrap_or(u16::MAX);
    // No interrupt table: the kernel brings its own before it allows interrupts.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PROTECTED_MODE | CR0_EXTENSION_TYPE | CR0_PAGING;
    sregs.cr3 = PAGE_TABLES_GPA;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    fd.set_sregs(&sregs)
}

impl From<Segment> for kvm_segment {
    fn from(segment: Segment) -> Self {
        Self {
            base: 0,
            limit: u32::MAX,
            selector: segment.selector,
            type_: segment.kind,
            present: 1,
            dpl: 0,
            db: 0,
            s: u8::from(segment.is_code_or_data),
            l: u8::from(segment.is_64_bit),
            g: u8::from(segment.is_code_or_data),
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }
}
