//! Keeps the guest's wall clock at the host's.
//!
//! A guest takes the time of its boot from KVM and counts on by KVM's clock, so it starts right and
//! stays right while it is paused. It goes wrong when the host's clock is stepped, and slowly when
//! that is slewed. Both are looked after here: a timer of the kernel's tells at once of a step
//! (timerfd_create(2), `TFD_TIMER_CANCEL_ON_SET`), and now and then it just expires.
//!
//! A comparison is one call: the guest has read its clock at some moment between the question and
//! the answer, and the middle of the two is wrong by half the time between them at most. A clock is
//! touched only if it is wrong beyond that, so that a slow call never makes a right clock wrong. All
//! that a guest can do with a false answer is to have its own clock set wrong.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use husk_protocol::messages::{AdjustClockRequest, ReadClockRequest};
use husk_protocol::service::AgentClient;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::agent::context;
use crate::error::VmEnd;
use crate::readiness;

/// How often the clocks are compared when nothing happens. A host's clock that is being slewed
/// gains or loses some 10 millionths, and 500 millionths at the most.
const COMPARE_INTERVAL: Duration = Duration::from_secs(60);

/// For one answer. A later one says too little.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// Most questions for one comparison; the quickest answer counts.
const QUESTIONS_MAX: u32 = 8;

/// An answer that leaves no more doubt than this needs no further question.
const DOUBT_NS_GOOD: i64 = 2_000_000;

/// Most corrections after one another: each is seen to have worked.
const CORRECTIONS_MAX: u32 = 3;

/// An error up to this is removed little by little, so that no program sees time jump; Linux takes
/// two seconds for each millisecond.
const SLEW_NS_MAX: i64 = 2_000_000;

/// Two ways of counting the time between question and answer that differ by more than this: the
/// host's clock was stepped between them.
const STEP_NS: i128 = 1_000_000;

/// Compares and corrects until the virtual machine ends.
pub(crate) async fn keep(client: AgentClient, mut ended: watch::Receiver<Option<VmEnd>>) {
    let keep = async {
        loop {
            // Armed before the comparison, so that no step is missed.
            let timer = match Timer::arm() {
                Ok(timer) => timer,
                Err(error) => {
                    tracing::warn!(%error, "the guest's clock is not kept: no timer");
                    return;
                }
            };
            if let Err(error) = correct(&client).await {
                // Mostly a guest that is ending; one that hangs is told of by whoever needs it.
                tracing::debug!(error, "the guest's clock could not be compared");
            }
            timer.rings().await;
        }
    };
    tokio::select! {
        _ = ended.wait_for(Option::is_some) => {}
        () = keep => {}
    }
}

/// Compares, and corrects what is wrong beyond doubt.
async fn correct(client: &AgentClient) -> Result<(), String> {
    for _ in 0..CORRECTIONS_MAX {
        let Some(correction) = compare(client).await?.and_then(Comparison::correction) else {
            return Ok(());
        };
        tracing::debug!(?correction, "the guest's clock is corrected");
        let mut request = AdjustClockRequest::new();
        request.adjust_ns = correction.adjust_ns;
        request.gradually = correction.is_gradual;
        call(client.adjust_clock(context(), &request)).await?;
        if correction.is_gradual {
            return Ok(());
        }
    }
    Ok(())
}

/// Asks for the guest's clock until the answer is good enough. `None` if the host's own clock makes
/// no sense meanwhile.
async fn compare(client: &AgentClient) -> Result<Option<Comparison>, String> {
    let mut best: Option<Comparison> = None;
    for _ in 0..QUESTIONS_MAX {
        let (asked, began) = (realtime_ns(), Instant::now());
        let response = call(client.read_clock(context(), &ReadClockRequest::new())).await?;
        let (took, answered) = (began.elapsed(), realtime_ns());
        let comparison = Comparison::of(asked, response.realtime_ns, answered, took);
        best = [best, comparison]
            .into_iter()
            .flatten()
            .min_by_key(|comparison| comparison.doubt_ns);
        if best.is_some_and(|best| best.doubt_ns <= DOUBT_NS_GOOD) {
            break;
        }
    }
    Ok(best)
}

async fn call<T>(answer: impl Future<Output = ttrpc::Result<T>>) -> Result<T, String> {
    match timeout(CALL_DEADLINE, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {CALL_DEADLINE:?}")),
    }
}

/// What one question has told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Comparison {
    /// By how much the guest is ahead.
    ahead_ns: i64,
    /// By how much that may be wrong.
    doubt_ns: i64,
}

/// What is to be done to the guest's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Correction {
    adjust_ns: i64,
    is_gradual: bool,
}

impl Comparison {
    /// From the host's clock at the question, the guest's, and the host's at the answer.
    fn of(asked_ns: u64, guest_ns: u64, answered_ns: u64, took: Duration) -> Option<Self> {
        let (asked, answered) = (i128::from(asked_ns), i128::from(answered_ns));
        let took_ns = i128::try_from(took.as_nanos()).ok()?;
        if ((answered - asked) - took_ns).abs() > STEP_NS {
            return None;
        }
        let middle = asked + took_ns / 2;
        Some(Self {
            ahead_ns: clamp(i128::from(guest_ns) - middle),
            doubt_ns: clamp(took_ns / 2),
        })
    }

    fn correction(self) -> Option<Correction> {
        let wrong_ns = self.ahead_ns.saturating_abs();
        (wrong_ns > self.doubt_ns).then_some(Correction {
            adjust_ns: self.ahead_ns.saturating_neg(),
            is_gradual: wrong_ns <= SLEW_NS_MAX,
        })
    }
}

fn clamp(ns: i128) -> i64 {
    i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX })
}

fn realtime_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or_default()
}

/// Rings when the host's clock is stepped, or the interval is over.
struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    fn arm() -> io::Result<Self> {
        let timer = timerfd_create(
            TimerfdClockId::Realtime,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let until = SystemTime::now() + COMPARE_INTERVAL;
        let since = until.duration_since(UNIX_EPOCH).unwrap_or_default();
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(since).map_err(io::Error::other)?,
        };
        // Only a timer at a point in time can be cancelled by a step.
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&timer, flags, &once)?;
        Ok(Self(readiness::watch(timer, Interest::READABLE)?))
    }

    async fn rings(&self) {
        // Both the expiry and the cancellation make it readable; which of them it is does not matter.
        let _ = self.0.readable().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn clock_is_left_alone_while_it_may_be_right() {
        // The answer took 10 ms, so the guest is 5 ms off at most.
        let took = Duration::from_millis(10);
        let compared = Comparison::of(SECOND, SECOND + 1_000_000, SECOND + 10_000_000, took);
        let compared = compared.unwrap();
        assert_eq!(compared.doubt_ns, 5_000_000);
        assert_eq!(compared.ahead_ns, -4_000_000);
        assert_eq!(compared.correction(), None);
    }

    #[test]
    fn clock_that_is_wrong_is_set_by_the_difference() {
        let took = Duration::from_millis(2);
        let compared = Comparison::of(SECOND, 3 * SECOND, SECOND + 2_000_000, took).unwrap();
        let correction = compared.correction().unwrap();
        assert_eq!(correction.adjust_ns, -1_999_000_000);
        assert!(!correction.is_gradual);
    }

    #[test]
    fn small_error_is_removed_little_by_little() {
        let took = Duration::from_micros(100);
        let compared = Comparison::of(SECOND, SECOND - 950_000, SECOND + 100_000, took).unwrap();
        let correction = compared.correction().unwrap();
        assert_eq!(correction.adjust_ns, 1_000_000);
        assert!(correction.is_gradual);
    }

    #[test]
    fn step_of_the_host_between_question_and_answer_says_nothing() {
        let took = Duration::from_millis(1);
        for answered in [0, SECOND, 2 * SECOND] {
            assert_eq!(
                Comparison::of(SECOND, SECOND, answered, took).is_none(),
                answered != SECOND
            );
        }
    }

    #[test]
    fn absurd_answers_of_a_guest_are_numbers_like_others() {
        for guest in [0, u64::MAX] {
            let compared = Comparison::of(SECOND, guest, SECOND, Duration::ZERO).unwrap();
            assert!(!compared.correction().unwrap().is_gradual);
        }
    }

    #[tokio::test]
    async fn timer_does_not_ring_by_itself_at_once() {
        let timer = Timer::arm().unwrap();
        let rung = timeout(Duration::from_millis(50), timer.rings()).await;
        assert!(rung.is_err());
    }
}
