//! The wall clock of a container is that of its host.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::ctr::Ctr;
use crate::fifo::{Place, Reader, Writer};
use crate::host::DEADLINE;
use crate::shim::{Shim, Streams, granted};

/// By how much the two may differ.
const DIFFERENCE_MAX: Duration = Duration::from_millis(10);

/// What a comparison may leave open, on a machine that is too busy for better.
const DOUBT_MAX: Duration = Duration::from_millis(50);

/// How long the container is paused.
const PAUSE: Duration = Duration::from_secs(60);

/// How far the host's clock is set, forth and back.
const STEP_SECONDS: i64 = 5;

/// Prints the time, without another process, for each line that it reads.
const SCRIPT: &str = "while read line; do echo $EPOCHREALTIME; done";

pub(super) fn wall_clock(ctr: &Ctr) -> Result<()> {
    ctr.detach(&[], &["sleep", "1000"])?;
    let shim = Shim::of(&ctr.id)?;
    let place = Place::make("clock")?;
    let (stdin, stdout) = (place.fifo("in")?, place.fifo("out")?);
    let stderr = place.fifo("err")?;
    // runc's shim waits for somebody who listens.
    let _listener = stderr.reader()?;
    let streams = Streams {
        stdin: stdin.name(),
        stdout: stdout.name(),
        stderr: stderr.name(),
        ..Streams::default()
    };
    let answers = stdout.reader()?;
    granted(shim.exec("clock", &streams, &["sh", "-c", SCRIPT]))?;
    granted(shim.start("clock"))?;
    let clock = Clock {
        questions: stdin.writer()?,
        answers,
    };
    clock.is_right().context("at the start")?;

    granted(shim.pause())?;
    // What is tested is that time passes meanwhile.
    std::thread::sleep(PAUSE);
    granted(shim.resume())?;
    clock.is_right().context("after a pause")?;

    for seconds in [STEP_SECONDS, -STEP_SECONDS] {
        step(seconds)?;
        let result = clock.becomes_right();
        if result.is_err() && seconds > 0 {
            step(-seconds)?;
        }
        result.with_context(|| format!("after the host's clock was set by {seconds} s"))?;
    }
    ctr.bury();
    Ok(())
}

/// Sets the host's clock.
fn step(seconds: i64) -> Result<()> {
    let now = clock_gettime(ClockId::Realtime);
    let then = Timespec {
        tv_sec: now.tv_sec + seconds,
        ..now
    };
    clock_settime(ClockId::Realtime, then).context("cannot set the clock")
}

/// The clock of a container.
struct Clock {
    questions: Writer,
    answers: Reader,
}

/// By how much it was wrong for certain, and by how much more it may have been.
#[derive(Debug, Clone, Copy)]
struct Difference {
    ahead_us: i128,
    doubt_us: i128,
}

impl Clock {
    fn is_right(&self) -> Result<()> {
        let best = self.compare()?;
        best.says_enough()?;
        ensure!(!best.is_large(), "{best:?}");
        Ok(())
    }

    /// The same, but it may take a while.
    fn becomes_right(&self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < DEADLINE {
            let best = self.compare()?;
            best.says_enough()?;
            if !best.is_large() {
                return Ok(());
            }
        }
        bail!("it is not set within {DEADLINE:?}: {:?}", self.compare()?)
    }

    /// Asks until the answer says enough. On a machine that does much else that may take a while.
    fn compare(&self) -> Result<Difference> {
        let began = Instant::now();
        let mut best = self.ask()?;
        while !best.is_certain() && began.elapsed() < DEADLINE {
            let difference = self.ask()?;
            if difference.is_certain() || difference.doubt_us < best.doubt_us {
                best = difference;
            }
        }
        Ok(best)
    }

    /// The container has read its clock between the question and the answer; the middle of the two
    /// is off by half the time between them at most.
    fn ask(&self) -> Result<Difference> {
        let asked = now_us()?;
        self.questions.write(b"\n")?;
        let line = self.answers.line()?;
        let answered = now_us()?;
        let digits: String = line.chars().filter(char::is_ascii_digit).collect();
        let told: i128 = digits
            .parse()
            .with_context(|| format!("it says {line:?}"))?;
        Ok(Difference {
            ahead_us: told - (asked + answered) / 2,
            doubt_us: (answered - asked) / 2,
        })
    }
}

impl Difference {
    /// Whether it is small for certain.
    fn is_small(self) -> bool {
        self.ahead_us.abs() + self.doubt_us <= max_us()
    }

    fn is_certain(self) -> bool {
        self.is_small() || self.is_large()
    }

    fn says_enough(self) -> Result<()> {
        let max = i128::try_from(DOUBT_MAX.as_micros())?;
        ensure!(
            self.is_large() || self.doubt_us <= max,
            "no quick answer: {self:?}"
        );
        Ok(())
    }

    /// Whether it is too large for certain.
    fn is_large(self) -> bool {
        self.ahead_us.abs() - self.doubt_us > max_us()
    }
}

fn max_us() -> i128 {
    i128::try_from(DIFFERENCE_MAX.as_micros()).unwrap_or_default()
}

fn now_us() -> Result<i128> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
    Ok(i128::try_from(since.as_micros())?)
}
