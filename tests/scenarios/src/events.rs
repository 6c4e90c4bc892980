//! What containerd says has happened: `ctr events`.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// For an event that is due, in the testbed.
const EVENT_DEADLINE: Duration = Duration::from_secs(60);

/// For `ctr events` to hear of one label being set; then it is set again.
const LISTENING_DEADLINE: Duration = Duration::from_secs(5);

/// So often is a label set before it is certain that nobody listens.
const LISTENING_TRIES: u32 = 8;

/// A subscription.
pub(crate) struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Events {
    /// Listens: every event from now on is seen.
    pub(crate) fn listen() -> Result<Self> {
        let mut child = Command::new("ctr")
            .arg("events")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run ctr events")?;
        let stdout = child.stdout.take().context("ctr events has no output")?;
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    break;
                }
            }
        });
        let events = Self { child, lines };
        // ctr does not say when it has subscribed, but an event of our own does.
        for number in 0..LISTENING_TRIES {
            let label = format!("husk-scenarios={number}");
            Command::new("ctr")
                .args(["namespaces", "label", "default", &label])
                .status()
                .context("cannot run ctr namespaces label")?;
            if events
                .wait(&["/namespaces/update"], LISTENING_DEADLINE)?
                .is_some()
            {
                return Ok(events);
            }
        }
        bail!("ctr events says nothing")
    }

    /// Waits for an event whose line has all these words, and returns the line.
    pub(crate) fn until(&self, words: &[&str]) -> Result<String> {
        self.wait(words, EVENT_DEADLINE)?
            .with_context(|| format!("no event with {words:?} within {EVENT_DEADLINE:?}"))
    }

    fn wait(&self, words: &[&str], deadline: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + deadline;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if words.iter().all(|word| line.contains(word)) => return Ok(Some(line)),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => bail!("ctr events has ended"),
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Killed, it ends at once; that it has ended before is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
