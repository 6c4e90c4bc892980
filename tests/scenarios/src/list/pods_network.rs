//! Networks of pods, through CRI.

use anyhow::{Context, Result, bail, ensure};
use husk_cri::{Pod, WebSocket, container, pod};

use crate::ctr::Ctr;
use crate::kubelet::Kubelet;

/// The stream protocol with which ports are forwarded.
pub(super) const PORT_PROTOCOL: &str = "v4.channel.k8s.io";

/// More than any buffer on the way.
const BLOB_BYTES: usize = 3 * 1024 * 1024;

/// What `kubectl port-forward` does: to listeners of both families, with more than a buffer of bytes,
/// several at once, and to a port where nobody listens.
pub(super) fn ports_forwarded(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        // What is sent to port 9000 is answered with its sum, and the end.
        let script = format!(
            "mkdir /www; echo hello > /www/index.html
            head -c {BLOB_BYTES} /dev/urandom > /www/blob
            httpd -p 127.0.0.1:8080 -h /www; httpd -p '[::1]:8081' -h /www
            mkfifo /sum; nc -l -p 9000 < /sum | {{ head -c {BLOB_BYTES} | sha256sum; }} > /sum
            exec sleep 1000"
        );
        let id = kubelet.start(pod, container("a", &["sh", "-c", &script]))?;
        // All of them listen once the last does.
        let listens = "until netstat -ltn | grep -q :9000; do sleep 1; done; sha256sum < /www/blob";
        let sum = kubelet.shell(&id, listens)?;

        let streams = [open(kubelet, pod, 8080)?, open(kubelet, pod, 8081)?];
        for mut stream in streams.into_iter().rev() {
            ask(&mut stream, "/index.html")?;
            let page = body(stream.finish_port()?)?;
            ensure!(page == b"hello\n", "of two at once one answers {page:?}");
        }
        let mut stream = open(kubelet, pod, 8080)?;
        ask(&mut stream, "/blob")?;
        let blob = body(stream.finish_port()?)?;
        ensure!(blob.len() == BLOB_BYTES, "{} bytes came", blob.len());

        let nobody = open(kubelet, pod, 7777).and_then(WebSocket::finish_port);
        let Err(nobody) = nobody else {
            bail!("somebody listens where nobody does");
        };
        let nobody = format!("{nobody:#}");
        ensure!(nobody.contains("7777"), "it is refused with {nobody:?}");

        let mut stream = open(kubelet, pod, 9000)?;
        for part in blob.chunks(64 * 1024) {
            stream.write(part)?;
        }
        let got = String::from_utf8(stream.finish_port()?)?;
        ensure!(
            got.trim_end() == sum,
            "it went as {sum} and came back as {got}"
        );
        Ok(())
    })
}

fn open(kubelet: &Kubelet, pod: &Pod, port: u16) -> Result<WebSocket> {
    let url = kubelet.cri.port_forward(&pod.id, port)?;
    WebSocket::connect(&url, PORT_PROTOCOL)
}

/// Asks for a page, and for the end of the connection after it.
pub(super) fn ask(stream: &mut WebSocket, path: &str) -> Result<()> {
    stream.write(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())
}

/// What follows the head of an answer.
pub(super) fn body(answer: Vec<u8>) -> Result<Vec<u8>> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.with_context(|| {
        let text = String::from_utf8_lossy(&answer).into_owned();
        format!("no answer: {text:?}")
    })?;
    let mut answer = answer;
    Ok(answer.split_off(end + 4))
}
