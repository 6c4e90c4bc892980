//! gRPC as far as CRI needs it: one message there, one back, over HTTP/2 on a Unix socket.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes};
use h2::RecvStream;
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// A connection to a server. Its calls block. A thread moves its bytes, and ends with it.
pub(crate) struct Connection {
    runtime: Handle,
    sender: SendRequest<Bytes>,
}

impl Connection {
    pub(crate) fn open(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the client's runtime")?;
        let (sender, connection) = runtime
            .block_on(async {
                let stream = UnixStream::connect(socket).await?;
                anyhow::Ok(h2::client::handshake(stream).await?)
            })
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        let handle = runtime.handle().clone();
        thread::Builder::new()
            .name("cri".to_owned())
            // Calls that are under way when it fails are told by their own streams.
            .spawn(move || runtime.block_on(connection))
            .context("cannot start the client's thread")?;
        Ok(Self {
            runtime: handle,
            sender,
        })
    }

    /// Calls `service/method`; the server's refusal is an error with its own words.
    pub(crate) fn call<A: Message>(
        &self,
        path: &str,
        request: &impl Message,
        deadline: Duration,
    ) -> Result<A> {
        let called = async {
            timeout(deadline, self.exchange(path, request))
                .await
                .with_context(|| format!("no answer within {deadline:?}"))?
        };
        self.runtime
            .block_on(called)
            .with_context(|| path.to_owned())
    }

    /// Calls a method that answers with any number of messages.
    pub(crate) fn subscribe(self, path: &str, request: &impl Message) -> Result<Messages> {
        let response = self
            .runtime
            .block_on(self.send(path, request))
            .with_context(|| path.to_owned())?;
        Ok(Messages {
            connection: self,
            answer: Answer {
                response: Some(response),
                body: None,
            },
            received: Vec::new(),
        })
    }

    async fn send(&self, path: &str, request: &impl Message) -> Result<ResponseFuture> {
        let head = Request::post(format!("http://localhost/{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let mut sender = self.sender.clone().ready().await?;
        let (response, mut body) = sender.send_request(head, false)?;
        body.send_data(frame(request)?, true)?;
        Ok(response)
    }

    async fn exchange<A: Message>(&self, path: &str, request: &impl Message) -> Result<A> {
        let response = self.send(path, request).await?.await?;
        let status = response.status();
        ensure!(status.is_success(), "HTTP status {status}");
        let (head, mut body) = response.into_parts();
        let answer = collect(&mut body).await?;
        match body.trailers().await? {
            Some(trailers) => check_status(&trailers)?,
            // An answer without a body has its status in front.
            None => check_status(&head.headers)?,
        }
        unframe(answer)
    }
}

/// An answer of many messages.
pub(crate) struct Messages {
    connection: Connection,
    answer: Answer,
    received: Vec<u8>,
}

/// Servers don't begin an answer before the first message is there.
struct Answer {
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
}

impl Messages {
    /// The next one; none if it does not come in time.
    pub(crate) fn next<A: Message>(&mut self, deadline: Duration) -> Result<Option<A>> {
        loop {
            if let Some(length) = message_length(&self.received)? {
                let rest = self.received.split_off(length);
                return unframe(std::mem::replace(&mut self.received, rest)).map(Some);
            }
            let answer = &mut self.answer;
            let runtime = &self.connection.runtime;
            let more = runtime.block_on(async { timeout(deadline, answer.more()).await });
            let Ok(more) = more else { return Ok(None) };
            self.received.extend_from_slice(&more?);
            let length = self.received.len();
            ensure!(length <= ANSWER_BYTES_MAX, "too long a message");
        }
    }
}

impl Answer {
    async fn more(&mut self) -> Result<Bytes> {
        if let Some(response) = &mut self.response {
            let body = response.await?.into_body();
            self.response = None;
            self.body = Some(body);
        }
        let body = self.body.as_mut().context("there is no answer")?;
        let data = body.data().await.context("the messages have ended")??;
        body.flow_control().release_capacity(data.len())?;
        Ok(data)
    }
}

/// How long the first of the messages is with its prefix, if all of it is there.
fn message_length(received: &[u8]) -> Result<Option<usize>> {
    let Some(mut prefix) = received.get(..PREFIX_BYTES) else {
        return Ok(None);
    };
    prefix.advance(1);
    let length = usize::try_from(prefix.get_u32())? + PREFIX_BYTES;
    Ok((received.len() >= length).then_some(length))
}

/// The whole body, as far as it is not too long.
async fn collect(body: &mut RecvStream) -> Result<Vec<u8>> {
    let mut collected = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        collected.extend_from_slice(&data);
        ensure!(
            collected.len() <= ANSWER_BYTES_MAX,
            "the answer is too long"
        );
    }
    Ok(collected)
}

/// The message with its prefix: not compressed, and its length.
fn frame(message: &impl Message) -> Result<Bytes> {
    let message = message.write_to_bytes()?;
    let length = u32::try_from(message.len())?;
    let mut frame = vec![0];
    frame.extend(length.to_be_bytes());
    frame.extend(message);
    Ok(frame.into())
}

fn unframe<A: Message>(answer: Vec<u8>) -> Result<A> {
    let mut answer = Bytes::from(answer);
    ensure!(answer.len() >= PREFIX_BYTES, "the answer has no message");
    ensure!(answer.get_u8() == 0, "the answer is compressed");
    let length = answer.get_u32();
    ensure!(
        usize::try_from(length)? == answer.len(),
        "the answer is not one message"
    );
    A::parse_from_bytes(&answer).context("cannot decode the answer")
}

fn check_status(headers: &HeaderMap) -> Result<()> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        Some("0") => Ok(()),
        Some(code) => {
            let message = text("grpc-message").map(decode).unwrap_or_default();
            bail!("{message} (gRPC code {code})")
        }
        None => bail!("the answer has no status"),
    }
}

/// Undoes the percent-encoding of a message.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::new();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = (byte == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// Compressed or not, and the length.
const PREFIX_BYTES: usize = 5;

const ANSWER_BYTES_MAX: usize = 32 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::StartContainerRequest;

    #[test]
    fn answer_that_is_no_message_is_refused() {
        for bytes in [
            &[][..],
            &[0, 0, 0, 0],
            &[1, 0, 0, 0, 0],
            &[0, 0, 0, 0, 9, 1],
        ] {
            assert!(unframe::<StartContainerRequest>(bytes.to_vec()).is_err());
        }
    }

    #[test]
    fn message_survives_its_frame() {
        let mut message = StartContainerRequest::new();
        message.container_id = "c1".to_owned();
        let framed = frame(&message).unwrap();
        let back: StartContainerRequest = unframe(framed.to_vec()).unwrap();
        assert_eq!(back.container_id, "c1");
    }

    #[test]
    fn refusal_is_told_in_its_own_words() {
        let mut headers = HeaderMap::new();
        assert!(check_status(&headers).is_err());
        headers.insert("grpc-status", "5".parse().unwrap());
        headers.insert("grpc-message", "no %22c1%22 %e2%".parse().unwrap());
        let text = check_status(&headers).unwrap_err().to_string();
        assert!(text.starts_with("no \"c1\" "), "{text}");
    }
}
