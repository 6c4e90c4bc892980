//! A look into a guest from outside of its containers, where its first process is.
//!
//! No call of a shim tells how many descriptors that process has. But the kernel runs the program that
//! takes core dumps with every right and in none of the containers, so that a privileged container
//! can have one of its own run there.

use anyhow::{Context, Result, ensure};

use crate::ctr::Ctr;

/// What the guest's kernel runs, with the root of the container that asks.
const PROGRAM: &str = r#"b=$1/busybox
{
    $b ls /proc/1/fd | $b wc -l
    $b ls /proc/1/task | $b wc -l
    $b grep -l ') Z ' /proc/[0-9]*/stat 2>/dev/null | $b wc -l
    # Into a file: the other end of a pipe may be there yet or not, and counts.
    $b grep -l ^VmSize: /proc/[0-9]*/status >$1/processes 2>/dev/null
    $b wc -l <$1/processes
} > $1/figures
"#;

/// Has it run, and prints what it says. The kernel waits for the program before the crash is over.
const ASK: &str = r#"test -e /busybox || cp "$(readlink -f /bin/sh)" /busybox
    echo 1 > /proc/sys/kernel/core_pipe_limit
    echo '|/proc/%P/root/busybox sh /proc/%P/root/program /proc/%P/root' > /proc/sys/kernel/core_pattern
    rm -f /figures
    sh -c 'kill -SEGV $$' 2>/dev/null
    cat /figures"#;

/// What there is in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Guest {
    /// Of the agent.
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
    /// Of all containers, and of none.
    pub(crate) zombies: usize,
    /// Those with memory: threads of the kernel come and go.
    pub(crate) processes: usize,
}

impl Guest {
    /// Looks at the guest of a container, which is privileged.
    pub(crate) fn look(ctr: &Ctr, exec: &str) -> Result<Self> {
        let script = format!("cat > /program <<'END'\n{PROGRAM}END\n{ASK}");
        let arguments = ["task", "exec", "--exec-id", exec, &ctr.id];
        let arguments = [&arguments[..], &["sh", "-c", &script]].concat();
        let said = ctr
            .ctr(&arguments)?
            .success()
            .context("the guest does not tell")?;
        let numbers: Result<Vec<usize>, _> = said.lines().map(str::parse).collect();
        let numbers = numbers.with_context(|| format!("the guest says {said:?}"))?;
        let [descriptors, threads, zombies, processes] = numbers[..] else {
            anyhow::bail!("the guest says {said:?}");
        };
        // There is no guest without them.
        ensure!(descriptors > 3 && processes > 1, "the guest says {said:?}");
        Ok(Self {
            descriptors,
            threads,
            zombies,
            processes,
        })
    }
}
