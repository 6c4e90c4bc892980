//! Which devices a container may use: the rules of a spec as an eBPF program of its cgroup.
//!
//! The kernel calls the program for every open and mknod of a device with the kind of access and
//! the device's numbers; it answers 1 for yes. Later rules win, so the program asks them from the
//! last to the first.

use std::io;
use std::path::Path;

use crate::cgroup;
use crate::oci::DeviceRule;
use crate::sys::{self, EbpfInstruction};

/// Most rules; the kernel takes no program that is longer.
const RULES_MAX: usize = 400;

/// Why rules can't be compiled.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A type that is none of a, b, c, u.
    #[error("devices: the type {0:?} is not known")]
    UnknownType(String),
    /// Access other than r, w, m.
    #[error("devices: the access {0:?} is not made of r, w and m")]
    UnknownAccess(String),
    /// A number that is none.
    #[error("devices: {0} is not the number of a device")]
    NotANumber(i64),
    /// Too many.
    #[error("devices: {0} rules are more than {RULES_MAX}")]
    TooMany(usize),
}

/// Compiles rules. What every container may use comes on top, what no rule names is denied.
pub fn compile(rules: &[DeviceRule]) -> Result<Vec<EbpfInstruction>, RuleError> {
    if rules.len() > RULES_MAX {
        return Err(RuleError::TooMany(rules.len()));
    }
    // struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; } with the kind of device
    // in access_type's low half and the access in its high half.
    let mut program = vec![
        op(LOAD_WORD, TYPE, CONTEXT, 0, 0),
        op(AND, TYPE, 0, 0, 0xffff),
        op(LOAD_WORD, ACCESS, CONTEXT, 0, 0),
        op(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        op(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        op(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for (kind, major, minor, access) in ALWAYS {
        let rule = DeviceRule {
            allow: true,
            kind: Some(kind.into()),
            major,
            minor,
            access: Some(access.into()),
        };
        program.extend(compile_rule(&rule)?);
    }
    for rule in rules.iter().rev() {
        let compiled = compile_rule(rule)?;
        let is_last_word = compiled.len() == answer(rule.allow).len();
        program.extend(compiled);
        if is_last_word {
            // It answers whatever is asked. The kernel refuses a program with instructions that
            // can't be reached.
            return Ok(program);
        }
    }
    program.extend(answer(false));
    Ok(program)
}

/// Puts a program in force for a cgroup.
pub fn attach(path: &Path, program: &[EbpfInstruction]) -> io::Result<()> {
    cgroup::attach_to(path, sys::load_device_program(program)?)
}

/// As runc has it: a node may be made for every device, which is not to say that it may be opened;
/// and null, zero, full, random, urandom, tty, console, ptmx, and pseudo terminals may be.
const ALWAYS: [(&str, Option<i64>, Option<i64>, &str); 11] = [
    ("c", None, None, "m"),
    ("b", None, None, "m"),
    ("c", Some(1), Some(3), "rwm"),
    ("c", Some(1), Some(5), "rwm"),
    ("c", Some(1), Some(7), "rwm"),
    ("c", Some(1), Some(8), "rwm"),
    ("c", Some(1), Some(9), "rwm"),
    ("c", Some(5), Some(0), "rwm"),
    ("c", Some(5), Some(1), "rwm"),
    ("c", Some(5), Some(2), "rwm"),
    ("c", Some(136), None, "rwm"),
];

fn compile_rule(rule: &DeviceRule) -> Result<Vec<EbpfInstruction>, RuleError> {
    let mut tests = Vec::new();
    match rule.kind.as_deref().unwrap_or("a") {
        "a" => {}
        "b" => tests.push(op(JUMP_UNLESS_EQUAL, TYPE, 0, 0, BPF_DEVCG_DEV_BLOCK)),
        "c" | "u" => tests.push(op(JUMP_UNLESS_EQUAL, TYPE, 0, 0, BPF_DEVCG_DEV_CHAR)),
        kind => return Err(RuleError::UnknownType(kind.to_owned())),
    }
    let access = access_bits(rule.access.as_deref().unwrap_or("rwm"))?;
    if access != ALL_ACCESS {
        if rule.allow {
            // Allowed if nothing beyond the rule's access is asked for.
            tests.push(op(JUMP_IF_ANY_BIT, ACCESS, 0, 0, ALL_ACCESS & !access));
        } else {
            // Denied if anything of it is asked for: skips the jump away.
            tests.push(op(JUMP_IF_ANY_BIT, ACCESS, 0, 1, access));
            tests.push(op(JUMP, 0, 0, 0, 0));
        }
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        match number {
            None | Some(-1) => {}
            Some(number) => {
                let number = i32::try_from(number)
                    .ok()
                    .filter(|&number| number >= 0)
                    .ok_or(RuleError::NotANumber(number))?;
                tests.push(op(JUMP_UNLESS_EQUAL, register, 0, 0, number));
            }
        }
    }
    // Every test but the one that skips jumps behind the answer.
    let answer = answer(rule.allow);
    let mut distance = i16::try_from(tests.len() + answer.len()).unwrap_or(i16::MAX);
    for test in &mut tests {
        distance -= 1;
        if test.offset == 0 {
            test.offset = distance;
        }
    }
    tests.extend(answer);
    Ok(tests)
}

fn access_bits(text: &str) -> Result<i32, RuleError> {
    text.chars().try_fold(0, |bits, letter| {
        Ok(bits
            | match letter {
                'm' => BPF_DEVCG_ACC_MKNOD,
                'r' => BPF_DEVCG_ACC_READ,
                'w' => BPF_DEVCG_ACC_WRITE,
                _ => return Err(RuleError::UnknownAccess(text.to_owned())),
            })
    })
}

fn answer(is_allowed: bool) -> [EbpfInstruction; 2] {
    [
        op(MOVE, RESULT, 0, 0, i32::from(is_allowed)),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// linux/bpf.h.
const BPF_DEVCG_ACC_MKNOD: i32 = 1;
const BPF_DEVCG_ACC_READ: i32 = 2;
const BPF_DEVCG_ACC_WRITE: i32 = 4;
const ALL_ACCESS: i32 = BPF_DEVCG_ACC_MKNOD | BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE;
const BPF_DEVCG_DEV_BLOCK: i32 = 1;
const BPF_DEVCG_DEV_CHAR: i32 = 2;

/// Registers.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Operations: class, source and operation bits of linux/bpf.h and linux/bpf_common.h put together.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const MOVE: u8 = 0xb7;
const JUMP: u8 = 0x05;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const JUMP_IF_ANY_BIT: u8 = 0x45;
const EXIT: u8 = 0x95;

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> EbpfInstruction {
    EbpfInstruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn is_allowed(program: &[EbpfInstruction], kind: i32, access: i32, numbers: [i32; 2]) -> bool {
        let context = [access << 16 | kind, numbers[0], numbers[1]];
        let mut registers = [0i32; 16];
        let mut at = 0usize;
        loop {
            let EbpfInstruction {
                code,
                registers: which,
                offset,
                immediate,
            } = program[at];
            let to = usize::from(which & 15);
            let skip = usize::try_from(offset).unwrap();
            at += 1;
            match code {
                LOAD_WORD => registers[to] = context[skip / 4],
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                MOVE => registers[to] = immediate,
                JUMP => at += skip,
                JUMP_UNLESS_EQUAL if registers[to] != immediate => at += skip,
                JUMP_IF_ANY_BIT if registers[to] & immediate != 0 => at += skip,
                JUMP_UNLESS_EQUAL | JUMP_IF_ANY_BIT => {}
                EXIT => return registers[0] == 1,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    fn rules(text: &str) -> Result<Vec<EbpfInstruction>, RuleError> {
        compile(&serde_json::from_str::<Vec<DeviceRule>>(text).unwrap())
    }

    const CHAR: i32 = BPF_DEVCG_DEV_CHAR;
    const READ: i32 = BPF_DEVCG_ACC_READ;
    const WRITE: i32 = BPF_DEVCG_ACC_WRITE;

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        assert!(rules(r#"[{"allow":true,"type":"x"}]"#).is_err());
        assert!(rules(r#"[{"allow":true,"access":"rx"}]"#).is_err());
        assert!(rules(r#"[{"allow":true,"type":"c","major":-2}]"#).is_err());
        assert!(compile(&vec![DeviceRule::default(); RULES_MAX + 1]).is_err());
    }

    #[test]
    fn no_rule_denies_but_the_usual_devices() {
        let program = rules("[]").unwrap();
        assert!(!is_allowed(&program, CHAR, READ, [10, 232]));
        assert!(is_allowed(&program, CHAR, READ | WRITE, [1, 3]));
        assert!(is_allowed(&program, CHAR, READ, [136, 9]));
        assert!(!is_allowed(&program, BPF_DEVCG_DEV_BLOCK, READ, [1, 3]));
    }

    #[test]
    fn node_may_be_made_for_every_device() {
        let program = rules(r#"[{"allow":false,"access":"rwm"}]"#).unwrap();
        for kind in [CHAR, BPF_DEVCG_DEV_BLOCK] {
            assert!(is_allowed(&program, kind, BPF_DEVCG_ACC_MKNOD, [10, 232]));
            let both = BPF_DEVCG_ACC_MKNOD | READ;
            assert!(!is_allowed(&program, kind, both, [10, 232]));
        }
    }

    #[test]
    fn later_rule_wins() {
        let program = rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"c","major":10,"minor":200,"access":"rw"}]"#,
        )
        .unwrap();
        assert!(is_allowed(&program, CHAR, READ, [10, 200]));
        assert!(!is_allowed(
            &program,
            CHAR,
            READ | BPF_DEVCG_ACC_MKNOD,
            [10, 200]
        ));
        assert!(!is_allowed(&program, CHAR, READ, [10, 201]));
    }

    #[test]
    fn nothing_follows_a_rule_that_always_applies() {
        let denied = rules(r#"[{"allow":false,"access":"rwm"}]"#).unwrap();
        assert_eq!(denied.len(), rules("[]").unwrap().len());
        let all = rules(r#"[{"allow":false,"type":"c"},{"allow":true}]"#).unwrap();
        assert_eq!(all.len(), denied.len());
        assert!(is_allowed(&all, CHAR, READ, [10, 200]));
    }

    #[test]
    fn denial_of_a_part_denies_what_asks_for_it() {
        let program = rules(r#"[{"allow":true},{"allow":false,"access":"w"}]"#).unwrap();
        assert!(is_allowed(&program, CHAR, READ, [10, 200]));
        assert!(!is_allowed(&program, CHAR, READ | WRITE, [10, 200]));
    }
}
