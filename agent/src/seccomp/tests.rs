use super::*;

/// Runs a filter as the kernel would.
fn outcome(filter: &Filter, arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(arch.to_ne_bytes());
    data.extend(0u64.to_ne_bytes());
    for arg in args {
        data.extend(arg.to_ne_bytes());
    }
    let (mut accumulator, mut at) = (0u32, 0usize);
    loop {
        let instruction = filter.program[at];
        at += 1;
        let mut branch = |holds: bool| {
            at += usize::from(if holds {
                instruction.jt
            } else {
                instruction.jf
            });
        };
        match instruction.code {
            LD_W_ABS => {
                let from = instruction.k as usize;
                accumulator = u32::from_ne_bytes(data[from..from + 4].try_into().unwrap());
            }
            AND_K => accumulator &= instruction.k,
            JA => at += instruction.k as usize,
            JEQ => branch(accumulator == instruction.k),
            JGT => branch(accumulator > instruction.k),
            JGE => branch(accumulator >= instruction.k),
            RET_K => return instruction.k,
            code => panic!("instruction {code:#x}"),
        }
    }
}

fn compile(text: &str) -> Result<Filter, CompileError> {
    Filter::compile(&serde_json::from_str::<Seccomp>(text).unwrap())
}

fn native(filter: &Filter, name: &str, args: [u64; 6]) -> u32 {
    let number = X86_64.iter().find(|(known, _)| *known == name).unwrap().1;
    outcome(filter, AUDIT_ARCH_X86_64, number, args)
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.unsigned_abs()
}

#[test]
fn what_is_not_known_is_refused() {
    assert_eq!(
        compile(r#"{"defaultAction":"SCMP_ACT_MAYBE"}"#).unwrap_err(),
        CompileError::UnknownAction("SCMP_ACT_MAYBE".into())
    );
    assert_eq!(
        compile(r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#).unwrap_err(),
        CompileError::Notify("SCMP_ACT_NOTIFY".into())
    );
    assert_eq!(
        compile(r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["PDP11"]}"#).unwrap_err(),
        CompileError::UnknownArchitecture("PDP11".into())
    );
    assert_eq!(
        compile(r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["UP"]}"#).unwrap_err(),
        CompileError::UnknownFlag("UP".into())
    );
    let flag = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";
    assert_eq!(
        compile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","flags":["{flag}"]}}"#
        ))
        .unwrap_err(),
        CompileError::ListenerFlag(flag.into())
    );
}

#[test]
fn rule_is_checked_even_if_its_call_does_not_exist() {
    let rule = |rule: &str| {
        let text = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rule}]}}"#);
        compile(&text).unwrap_err()
    };
    assert_eq!(
        rule(r#"{"names":["fly"],"action":"SCMP_ACT_MAYBE"}"#),
        CompileError::UnknownAction("SCMP_ACT_MAYBE".into())
    );
    assert_eq!(
        rule(
            r#"{"names":["fly"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"IS"}]}"#
        ),
        CompileError::UnknownComparison("IS".into())
    );
    assert_eq!(
        rule(
            r#"{"names":[],"action":"SCMP_ACT_ALLOW","args":[{"index":9,"value":0,"op":"SCMP_CMP_EQ"}]}"#
        ),
        CompileError::NoSuchArgument(9)
    );
}

#[test]
fn argument_that_does_not_exist_is_refused() {
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],
        "action":"SCMP_ACT_ERRNO","args":[{"index":6,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#;
    assert_eq!(compile(text).unwrap_err(), CompileError::NoSuchArgument(6));
}

#[test]
fn unlisted_architecture_is_killed() {
    let filter = compile(r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
    assert_eq!(outcome(&filter, AUDIT_ARCH_I386, 1, [0; 6]), KILL);
    assert_eq!(outcome(&filter, 0x1234, 1, [0; 6]), KILL);
    assert_eq!(
        outcome(&filter, AUDIT_ARCH_X86_64, X32_SYSCALL_BIT | 1, [0; 6]),
        KILL
    );
}

#[test]
fn listed_x86_has_numbers_of_its_own() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,
        "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
        "syscalls":[{"names":["read","exit"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    // exit is 1 for 32-bit programs, where 64-bit ones have write.
    assert_eq!(outcome(&filter, AUDIT_ARCH_I386, 1, [0; 6]), ALLOW);
    assert_eq!(native(&filter, "write", [0; 6]), errno(38));
    assert_eq!(native(&filter, "read", [0; 6]), ALLOW);
    assert_eq!(native(&filter, "clone3", [0; 6]), errno(38));
    let x32 = outcome(&filter, AUDIT_ARCH_X86_64, X32_SYSCALL_BIT, [0; 6]);
    assert_eq!(x32, errno(libc::ENOSYS));
}

#[test]
fn names_that_do_not_exist_are_passed_over() {
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["fly","getpid"],"action":"SCMP_ACT_ERRNO","errnoRet":7}]}"#;
    let filter = compile(text).unwrap();
    assert_eq!(native(&filter, "getpid", [0; 6]), errno(7));
    assert_eq!(native(&filter, "getppid", [0; 6]), ALLOW);
}

#[test]
fn rule_without_conditions_beats_those_with() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["read"],"action":"SCMP_ACT_TRAP",
         "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
        {"names":["read"],"action":"SCMP_ACT_ERRNO","errnoRet":5}]}"#,
    )
    .unwrap();
    assert_eq!(native(&filter, "read", [1, 0, 0, 0, 0, 0]), errno(5));
}

/// Whether one comparison holds, by the compiled filter.
fn holds(op: &str, argument: u64, value: u64, value_two: u64) -> bool {
    let text = format!(
        r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["read"],
        "action":"SCMP_ACT_ALLOW",
        "args":[{{"index":2,"value":{value},"valueTwo":{value_two},"op":"{op}"}}]}}]}}"#
    );
    native(&compile(&text).unwrap(), "read", [0, 0, argument, 0, 0, 0]) == ALLOW
}

#[test]
fn every_comparison_is_on_64_bits() {
    let values = [
        0,
        1,
        2,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0001,
        0x2_0000_0000,
        u64::MAX,
    ];
    for a in values {
        for b in values {
            assert_eq!(holds("SCMP_CMP_EQ", a, b, 0), a == b, "{a:#x} == {b:#x}");
            assert_eq!(holds("SCMP_CMP_NE", a, b, 0), a != b, "{a:#x} != {b:#x}");
            assert_eq!(holds("SCMP_CMP_LT", a, b, 0), a < b, "{a:#x} < {b:#x}");
            assert_eq!(holds("SCMP_CMP_LE", a, b, 0), a <= b, "{a:#x} <= {b:#x}");
            assert_eq!(holds("SCMP_CMP_GT", a, b, 0), a > b, "{a:#x} > {b:#x}");
            assert_eq!(holds("SCMP_CMP_GE", a, b, 0), a >= b, "{a:#x} >= {b:#x}");
            for c in values {
                let masked = holds("SCMP_CMP_MASKED_EQ", a, b, c);
                assert_eq!(masked, a & b == c, "{a:#x} & {b:#x} == {c:#x}");
            }
        }
    }
}

#[test]
fn all_conditions_of_a_rule_must_hold() {
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],
        "action":"SCMP_ACT_ALLOW","args":[
        {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":5,"op":"SCMP_CMP_LT"}]}]}"#,
    )
    .unwrap();
    assert_eq!(native(&filter, "read", [1, 4, 0, 0, 0, 0]), ALLOW);
    assert_eq!(
        native(&filter, "read", [1, 5, 0, 0, 0, 0]),
        errno(libc::EPERM)
    );
    assert_eq!(
        native(&filter, "read", [0, 4, 0, 0, 0, 0]),
        errno(libc::EPERM)
    );
}

#[test]
fn rules_behind_a_failed_condition_are_tried() {
    // As in the usual profile: personality is allowed for a few values.
    let filter = compile(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"names":["personality"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
        {"names":["write"],"action":"SCMP_ACT_ALLOW"}]}"#,
    )
    .unwrap();
    assert_eq!(native(&filter, "personality", [8, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(
        native(&filter, "personality", [9, 0, 0, 0, 0, 0]),
        errno(libc::EPERM)
    );
    assert_eq!(native(&filter, "write", [0; 6]), ALLOW);
}

/// What a profile whose newest call is `exit_group` makes of calls before and after it.
fn older_and_newer(default: &str) -> [u32; 2] {
    let text = format!(
        r#"{{"defaultAction":"{default}",
        "syscalls":[{{"names":["read","exit_group","fly"],"action":"SCMP_ACT_ALLOW"}}]}}"#
    );
    let filter = compile(&text).unwrap();
    ["write", "clone3"].map(|name| native(&filter, name, [0; 6]))
}

#[test]
fn call_newer_than_the_profile_does_not_exist() {
    let enosys = errno(libc::ENOSYS);
    assert_eq!(
        older_and_newer("SCMP_ACT_ERRNO"),
        [errno(libc::EPERM), enosys]
    );
    assert_eq!(older_and_newer("SCMP_ACT_KILL_PROCESS"), [KILL, enosys]);
    assert_eq!(
        older_and_newer("SCMP_ACT_TRAP"),
        [libc::SECCOMP_RET_TRAP, enosys]
    );
}

#[test]
fn permissive_profile_lets_newer_calls_through() {
    let trace = libc::SECCOMP_RET_TRACE | libc::EPERM.unsigned_abs();
    assert_eq!(older_and_newer("SCMP_ACT_ALLOW"), [ALLOW; 2]);
    assert_eq!(older_and_newer("SCMP_ACT_LOG"), [libc::SECCOMP_RET_LOG; 2]);
    assert_eq!(older_and_newer("SCMP_ACT_TRACE"), [trace; 2]);
}

#[test]
fn every_action_has_its_outcome() {
    for (name, outcome) in [
        ("SCMP_ACT_KILL", libc::SECCOMP_RET_KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", libc::SECCOMP_RET_KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", KILL),
        ("SCMP_ACT_TRAP", libc::SECCOMP_RET_TRAP),
        ("SCMP_ACT_ERRNO", errno(7)),
        ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE | 7),
        ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
        ("SCMP_ACT_ALLOW", ALLOW),
    ] {
        let text = format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO",
            "syscalls":[{{"names":["read"],"action":"{name}","errnoRet":7}}]}}"#
        );
        assert_eq!(
            native(&compile(&text).unwrap(), "read", [0; 6]),
            outcome,
            "{name}"
        );
    }
}

#[test]
fn absent_flags_are_not_the_empty_list() {
    let flags = |flags: &str| {
        let text = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW"{flags}}}"#);
        compile(&text).unwrap().flags
    };
    assert_eq!(flags(""), libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    assert_eq!(flags(r#","flags":[]"#), 0);
    assert_eq!(
        flags(r#","flags":["SECCOMP_FILTER_FLAG_LOG"]"#),
        libc::SECCOMP_FILTER_FLAG_LOG
    );
}

#[test]
fn tables_are_sorted() {
    assert!(X86_64.is_sorted_by_key(|(name, _)| *name));
    assert!(X86.is_sorted_by_key(|(name, _)| *name));
}
