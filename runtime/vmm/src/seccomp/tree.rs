//! The part of a filter that looks at nothing but a call's number, as a search tree.
//!
//! At each installation the kernel runs a filter for every number there is, to remember which of them
//! it allows whatever the arguments. A list of fifty comparisons costs milliseconds there, for each
//! thread; a tree costs a tenth.

use std::ops::RangeInclusive;

use seccompiler::{BpfProgram, sock_filter};

/// linux/audit.h: x86-64, little-endian, 64 bits.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Offsets in linux/seccomp.h's `struct seccomp_data`.
const DATA_NR: u32 = 0;
const DATA_ARCH: u32 = 4;

/// linux/filter.h: load a word of the data; compare; return.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
const JUMP: u16 = 0x05;
const RETURN: u16 = 0x06;

/// What a filter returns for a call that may go on.
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// A program that allows the calls of `numbers`, and leaves all others, and those of other
/// architectures, to `rest`, which follows it.
pub(super) fn allow_or_else(
    numbers: impl IntoIterator<Item = u32>,
    rest: BpfProgram,
) -> BpfProgram {
    let ranges = ranges(numbers);
    let search = search(&ranges);
    let to_rest = u32::try_from(search.len()).unwrap_or(u32::MAX);
    let mut program = vec![
        statement(LOAD, DATA_ARCH),
        branch(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        // Over the next statement and the search.
        statement(JUMP, to_rest.saturating_add(1)),
        statement(LOAD, DATA_NR),
    ];
    program.extend(search);
    program.extend(rest);
    program
}

/// Runs of numbers without a gap, in their order.
fn ranges(numbers: impl IntoIterator<Item = u32>) -> Vec<RangeInclusive<u32>> {
    let mut numbers: Vec<_> = numbers.into_iter().collect();
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|before, after| before + 1 == *after);
    runs.filter_map(|run| Some(*run.first()?..=*run.last()?))
        .collect()
}

/// Statements that return if the accumulator is in one of the ranges, and run over their end if not.
fn search(ranges: &[RangeInclusive<u32>]) -> Vec<sock_filter> {
    match ranges {
        [] => Vec::new(),
        [range] => vec![
            // Below or above: over what is left of these.
            branch(JUMP_IF_GREATER_OR_EQUAL, *range.start(), 0, 2),
            branch(JUMP_IF_GREATER, *range.end(), 1, 0),
            statement(RETURN, ALLOW),
        ],
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let first_high = high.first().map_or(u32::MAX, |range| *range.start());
            let (mut low, high) = (search(low), search(high));
            // A number that is not found among the low ones is in none of the high ones.
            let over_high = u32::try_from(high.len()).unwrap_or(u32::MAX);
            low.push(statement(JUMP, over_high));
            // A conditional jump reaches 255 statements, any other all of them.
            let over_low = u32::try_from(low.len()).unwrap_or(u32::MAX);
            let mut all = vec![
                branch(JUMP_IF_GREATER_OR_EQUAL, first_high, 0, 1),
                statement(JUMP, over_low),
            ];
            all.extend(low);
            all.extend(high);
            all
        }
    }
}

fn statement(code: u16, k: u32) -> sock_filter {
    branch(code, k, 0, 0)
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

    /// As the kernel runs the statements that are used here.
    fn run(program: &[sock_filter], arch: u32, number: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let line = &program[at];
            at += 1;
            let mut jump = |is_true: bool| {
                at += usize::from(if is_true { line.jt } else { line.jf });
            };
            match line.code {
                LOAD if line.k == DATA_NR => accumulator = number,
                LOAD => accumulator = arch,
                JUMP => at += line.k as usize,
                JUMP_IF_EQUAL => jump(accumulator == line.k),
                JUMP_IF_GREATER => jump(accumulator > line.k),
                JUMP_IF_GREATER_OR_EQUAL => jump(accumulator >= line.k),
                RETURN => return line.k,
                code => panic!("statement {code:#x}"),
            }
        }
    }

    fn program(numbers: &[u32]) -> Vec<sock_filter> {
        let rest = vec![statement(RETURN, KILL)];
        allow_or_else(numbers.iter().copied(), rest)
    }

    #[test]
    fn just_the_numbers_of_the_list_are_allowed() {
        let lists: [&[u32]; 6] = [
            &[],
            &[0],
            &[7, 7, 8, 9, 3],
            &[u32::MAX],
            &[0, 1, 2, 5, 6, 9, 100, 101, 439],
            &(0..2000).step_by(2).collect::<Vec<_>>(),
        ];
        for numbers in lists {
            let program = program(numbers);
            for number in (0..2100).chain([u32::MAX - 1, u32::MAX]) {
                let expected = if numbers.contains(&number) {
                    ALLOW
                } else {
                    KILL
                };
                let found = run(&program, AUDIT_ARCH_X86_64, number);
                assert_eq!(found, expected, "{number} of {numbers:?}");
            }
        }
    }

    #[test]
    fn calls_of_other_architectures_are_left_to_the_rest() {
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        let program = program(&[0, 1, 2]);
        for number in 0..4 {
            assert_eq!(run(&program, AUDIT_ARCH_I386, number), KILL);
        }
    }
}
