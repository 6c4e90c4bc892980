//! Compiles the seccomp section of a spec into one classic BPF program.
//!
//! A profile knows several actions, an errno for each rule, conditions on arguments and 32-bit
//! programs, all in one. The program first looks at the architecture, then walks a list: a rule
//! without conditions is one comparison; one with conditions is a small block per rule. The kernel
//! caches calls that are always allowed, so that the length of the list costs little.
//!
//! As in libseccomp: a rule without conditions on a call makes its conditional rules pointless, an
//! architecture that the profile does not list is killed, and names that this kernel does not have
//! are passed over. As in runc: a call that is newer than all that the profile names does not exist
//! (ENOSYS) where the profile would forbid it, so that programs fall back on an older one.

use std::collections::BTreeMap;
use std::io;

use crate::oci::{Seccomp, SeccompArg};
use crate::sys::{self, BpfInstruction};
use crate::syscalls::{X86, X86_64};

/// Why a profile can't be compiled.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// An action's name.
    #[error("the action {0:?} is not known")]
    UnknownAction(String),
    /// SCMP_ACT_NOTIFY.
    #[error("the action {0:?} needs a listener on the host, which a guest can't reach")]
    Notify(String),
    /// A comparison's name.
    #[error("the comparison {0:?} is not known")]
    UnknownComparison(String),
    /// An architecture's name.
    #[error("the architecture {0:?} is not known")]
    UnknownArchitecture(String),
    /// A flag's name.
    #[error("the flag {0:?} is not known")]
    UnknownFlag(String),
    /// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV.
    #[error("the flag {0:?} is for a listener, which a guest can't have")]
    ListenerFlag(String),
    /// An argument beyond the sixth.
    #[error("system calls have no argument {0}")]
    NoSuchArgument(u32),
    /// The kernel's limit.
    #[error("the filter would have {0} instructions, more than the kernel's {INSTRUCTIONS_MAX}")]
    TooLong(usize),
}

/// A compiled filter.
#[derive(Debug)]
pub struct Filter {
    program: Vec<BpfInstruction>,
    flags: u64,
}

/// linux/bpf_common.h: BPF_MAXINSNS.
const INSTRUCTIONS_MAX: usize = 4096;

impl Filter {
    /// Compiles a profile.
    pub fn compile(profile: &Seccomp) -> Result<Filter, CompileError> {
        let default = action(&profile.default_action, profile.default_errno_ret)?;
        let flags = flags(profile.flags.as_deref())?;
        let architectures = Architectures::parse(&profile.architectures)?;
        check_rules(profile)?;
        let mut program = vec![load(ARCHITECTURE_OFFSET)];
        if architectures.is_x86_listed {
            let section = section(profile, &X86, default, &[])?;
            program.extend(unless_equal(AUDIT_ARCH_I386, section));
        }
        // Every other architecture, x32 as well as it shares the number of x86-64.
        program.extend([
            jump(JEQ, AUDIT_ARCH_X86_64, 1, 0),
            ret(libc::SECCOMP_RET_KILL_PROCESS),
        ]);
        let x32 = if architectures.is_x32_listed {
            NO_SUCH_CALL
        } else {
            libc::SECCOMP_RET_KILL_PROCESS
        };
        program.extend(section(
            profile,
            &X86_64,
            default,
            &[jump(JGE, X32_SYSCALL_BIT, 0, 1), ret(x32)],
        )?);
        if program.len() > INSTRUCTIONS_MAX {
            return Err(CompileError::TooLong(program.len()));
        }
        Ok(Filter { program, flags })
    }

    /// Filters this thread's system calls from now on.
    pub fn install(&self) -> io::Result<()> {
        sys::install_seccomp(&self.program, self.flags)
    }
}

/// linux/audit.h.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// What a kernel says of a call that it does not have.
const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();

/// Set in the number of a call by the x32 ABI, which the guest's kernel does not have.
const X32_SYSCALL_BIT: u32 = 0x4000_0000;

/// linux/seccomp.h: offsets in `struct seccomp_data`.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const ARGUMENT_BYTES: u32 = 8;

/// Arguments of a system call.
const ARGUMENTS: u32 = 6;

#[derive(Debug, Default)]
struct Architectures {
    is_x86_listed: bool,
    is_x32_listed: bool,
}

impl Architectures {
    fn parse(names: &[String]) -> Result<Architectures, CompileError> {
        let mut listed = Architectures::default();
        for name in names {
            match name.as_str() {
                "SCMP_ARCH_X86" => listed.is_x86_listed = true,
                "SCMP_ARCH_X32" => listed.is_x32_listed = true,
                // The native one always is; the others never run here.
                name if name.starts_with("SCMP_ARCH_") => {}
                _ => return Err(CompileError::UnknownArchitecture(name.clone())),
            }
        }
        Ok(listed)
    }
}

/// Refuses what is wrong in rules of calls that this kernel does not have as well.
fn check_rules(profile: &Seccomp) -> Result<(), CompileError> {
    for rule in &profile.syscalls {
        action(&rule.action, rule.errno_ret)?;
        for arg in &rule.args {
            comparison(arg, 0)?;
        }
    }
    Ok(())
}

/// What happens to one system call.
#[derive(Debug, Default)]
struct Rules<'a> {
    /// In the profile's order, first match wins.
    conditional: Vec<(&'a [SeccompArg], u32)>,
    always: Option<u32>,
}

/// The part of the program for one architecture; the jumps in it stay inside.
fn section(
    profile: &Seccomp,
    table: &[(&str, u32)],
    default: u32,
    prologue: &[BpfInstruction],
) -> Result<Vec<BpfInstruction>, CompileError> {
    let mut rules: BTreeMap<u32, Rules<'_>> = BTreeMap::new();
    for rule in &profile.syscalls {
        let outcome = action(
            &rule.action,
            rule.errno_ret.or(Some(libc::EPERM.unsigned_abs())),
        )?;
        for name in &rule.names {
            let Ok(at) = table.binary_search_by(|(known, _)| known.cmp(&name.as_str())) else {
                continue;
            };
            let Some(&(_, number)) = table.get(at) else {
                continue;
            };
            let entry = rules.entry(number).or_default();
            if rule.args.is_empty() {
                entry.always.get_or_insert(outcome);
            } else if has_repeated_index(&rule.args) {
                // As runc gives it to libseccomp, which can't have an argument twice in one rule:
                // each condition becomes a rule of its own.
                entry
                    .conditional
                    .extend(rule.args.chunks(1).map(|arg| (arg, outcome)));
            } else {
                entry.conditional.push((&rule.args, outcome));
            }
        }
    }
    let mut program = vec![load(NUMBER_OFFSET)];
    if let Some((&last, _)) = rules.last_key_value()
        && !is_permissive(default)
    {
        program.extend([jump(JGT, last, 0, 1), ret(NO_SUCH_CALL)]);
    }
    program.extend_from_slice(prologue);
    for (number, rules) in rules {
        let outcome = rules.always.unwrap_or(default);
        if rules.always == Some(default) || rules.conditional.is_empty() {
            if outcome != default {
                program.extend([jump(JEQ, number, 0, 1), ret(outcome)]);
            }
            continue;
        }
        let mut block = Vec::new();
        if rules.always.is_none() {
            for (args, outcome) in rules.conditional {
                block.extend(conditional(args, outcome)?);
            }
        }
        block.push(ret(outcome));
        program.extend(unless_equal(number, block));
    }
    program.push(ret(default));
    Ok(program)
}

/// Whether a call may go through by that outcome. A tracer may let it.
fn is_permissive(outcome: u32) -> bool {
    [
        libc::SECCOMP_RET_ALLOW,
        libc::SECCOMP_RET_LOG,
        libc::SECCOMP_RET_TRACE,
    ]
    .contains(&(outcome & libc::SECCOMP_RET_ACTION_FULL))
}

fn has_repeated_index(args: &[SeccompArg]) -> bool {
    args.iter().enumerate().any(|(at, arg)| {
        args.iter()
            .skip(at + 1)
            .any(|other| other.index == arg.index)
    })
}

/// `ret(outcome)` if all conditions hold, else on to what follows.
fn conditional(args: &[SeccompArg], outcome: u32) -> Result<Vec<BpfInstruction>, CompileError> {
    // Built from the end, as each condition must know how far it is to what follows.
    let mut block = vec![ret(outcome)];
    for arg in args.iter().rev() {
        let mut test = comparison(arg, block.len())?;
        test.append(&mut block);
        block = test;
    }
    Ok(block)
}

/// One condition: falls through when it holds, else skips `rest` instructions behind it.
fn comparison(arg: &SeccompArg, rest: usize) -> Result<Vec<BpfInstruction>, CompileError> {
    if arg.index >= ARGUMENTS {
        return Err(CompileError::NoSuchArgument(arg.index));
    }
    let low_at = ARGUMENTS_OFFSET + arg.index * ARGUMENT_BYTES;
    let high_at = low_at + ARGUMENT_BYTES / 2;
    let (high, low) = halves(arg.value);
    // A block is never that long: at most six conditions of at most eight instructions.
    let rest = u8::try_from(rest).map_err(|_| CompileError::TooLong(rest))?;
    // Each row is a jump's two distances, counted from behind it. Rows follow one another:
    // load high, (mask), compare high, [compare high again], load low, (mask), compare low.
    Ok(match arg.op.as_str() {
        "SCMP_CMP_EQ" => vec![
            load(high_at),
            jump(JEQ, high, 0, rest + 2),
            load(low_at),
            jump(JEQ, low, 0, rest),
        ],
        "SCMP_CMP_NE" => vec![
            load(high_at),
            jump(JEQ, high, 0, 2),
            load(low_at),
            jump(JEQ, low, rest, 0),
        ],
        "SCMP_CMP_MASKED_EQ" => {
            // value is the mask, valueTwo what the masked argument must be.
            let (high_mask, low_mask) = (high, low);
            let (high, low) = halves(arg.value_two);
            vec![
                load(high_at),
                and(high_mask),
                jump(JEQ, high, 0, rest + 3),
                load(low_at),
                and(low_mask),
                jump(JEQ, low, 0, rest),
            ]
        }
        "SCMP_CMP_GT" => ordered(high_at, low_at, high, jump(JGT, low, 0, rest), true, rest),
        "SCMP_CMP_GE" => ordered(high_at, low_at, high, jump(JGE, low, 0, rest), true, rest),
        "SCMP_CMP_LT" => ordered(high_at, low_at, high, jump(JGE, low, rest, 0), false, rest),
        "SCMP_CMP_LE" => ordered(high_at, low_at, high, jump(JGT, low, rest, 0), false, rest),
        op => return Err(CompileError::UnknownComparison(op.to_owned())),
    })
}

/// Compares 64 bits: a greater high half decides for `is_greater_true`, a smaller one against it,
/// equal ones leave it to the low half.
fn ordered(
    high_at: u32,
    low_at: u32,
    high: u32,
    low: BpfInstruction,
    is_greater_true: bool,
    rest: u8,
) -> Vec<BpfInstruction> {
    // Behind the two comparisons of the high half stand two instructions for the low half.
    let (greater, smaller) = if is_greater_true {
        (3, rest + 2)
    } else {
        (rest + 3, 2)
    };
    vec![
        load(high_at),
        jump(JGT, high, greater, 0),
        jump(JEQ, high, 0, smaller),
        load(low_at),
        low,
    ]
}

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
    (
        u32::from_be_bytes([a, b, c, d]),
        u32::from_be_bytes([e, f, g, h]),
    )
}

/// Runs `block` if the accumulator is the value, else jumps over it. The block never falls through
/// its end, so the accumulator behind it is what it was before.
fn unless_equal(value: u32, block: Vec<BpfInstruction>) -> Vec<BpfInstruction> {
    // A conditional jump reaches 255 instructions, an unconditional one any distance.
    let length = u32::try_from(block.len()).unwrap_or(u32::MAX);
    let mut program = vec![jump(JEQ, value, 1, 0), always_jump(length)];
    program.extend(block);
    program
}

fn action(name: &str, errno: Option<u32>) -> Result<u32, CompileError> {
    let data = errno.unwrap_or(libc::EPERM.unsigned_abs()) & libc::SECCOMP_RET_DATA;
    Ok(match name {
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | data,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => libc::SECCOMP_RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | data,
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        "SCMP_ACT_NOTIFY" => return Err(CompileError::Notify(name.to_owned())),
        _ => return Err(CompileError::UnknownAction(name.to_owned())),
    })
}

fn flags(names: Option<&[String]>) -> Result<u64, CompileError> {
    let Some(names) = names else {
        // As runc: without it, every filter would switch a costly mitigation on.
        return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    };
    let mut flags = 0;
    for name in names {
        flags |= match name.as_str() {
            "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // One thread: there is none to synchronise with.
            "SECCOMP_FILTER_FLAG_TSYNC" => 0,
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => {
                return Err(CompileError::ListenerFlag(name.clone()));
            }
            _ => return Err(CompileError::UnknownFlag(name.clone())),
        };
    }
    Ok(flags)
}

/// Operations of classic BPF, linux/bpf_common.h.
const LD_W_ABS: u16 = 0x20;
const AND_K: u16 = 0x54;
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RET_K: u16 = 0x06;

fn load(offset: u32) -> BpfInstruction {
    BpfInstruction {
        code: LD_W_ABS,
        jt: 0,
        jf: 0,
        k: offset,
    }
}

fn and(mask: u32) -> BpfInstruction {
    BpfInstruction {
        code: AND_K,
        jt: 0,
        jf: 0,
        k: mask,
    }
}

fn jump(code: u16, value: u32, if_true: u8, if_false: u8) -> BpfInstruction {
    BpfInstruction {
        code,
        jt: if_true,
        jf: if_false,
        k: value,
    }
}

fn always_jump(distance: u32) -> BpfInstruction {
    BpfInstruction {
        code: JA,
        jt: 0,
        jf: 0,
        k: distance,
    }
}

fn ret(outcome: u32) -> BpfInstruction {
    BpfInstruction {
        code: RET_K,
        jt: 0,
        jf: 0,
        k: outcome,
    }
}

#[cfg(test)]
mod tests;
