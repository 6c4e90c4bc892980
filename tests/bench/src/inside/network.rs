//! Network: TCP between a pod and the host, and between two pods, each in a network namespace that
//! a pair of veths ties to a bridge, as CNI's bridge plugin makes them.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Bench;
use super::command::{self, Running};
use super::containers;
use super::work;
use crate::record::Subject;

const BRIDGE: &str = "husk-bench0";
const HOST_ADDRESS: &str = "10.99.0.1";
const PODS: [(&str, &str); 2] = [("husk-bench-a", "10.99.0.2"), ("husk-bench-b", "10.99.0.3")];
const PREFIX_LENGTH: &str = "24";

const TO_HOST: [&str; 3] = ["net_to_host", "net_from_host", "net_requests"];
const TO_POD: [&str; 3] = ["net_pod_to_pod", "-", "net_pod_requests"];

/// gVisor has no network here, see [`containers::runtimes`].
const SUBJECTS: [Subject; 2] = [Subject::Runc, Subject::Husk];

pub(super) fn measure(bench: &mut Bench) -> Result<()> {
    let directory = work::install()?;
    ip(&["link", "add", BRIDGE, "type", "bridge"])?;
    ip(&["address", "add", &with_prefix(HOST_ADDRESS), "dev", BRIDGE])?;
    ip(&["link", "set", BRIDGE, "up"])?;
    for round in 0..bench.plan.choose(3, 1) {
        for subject in SUBJECTS {
            let said = to_host(subject, round, &directory);
            take(bench, TO_HOST, subject, said)?;
            let said = to_pod(subject, round, &directory);
            take(bench, TO_POD, subject, said)?;
        }
    }
    Ok(())
}

fn take(
    bench: &mut Bench,
    names: [&str; 3],
    subject: Subject,
    said: Result<Vec<(String, f64)>>,
) -> Result<()> {
    match said {
        Ok(values) => {
            for (measure, value) in values {
                bench.sample(&measure, subject, value)?;
            }
        }
        Err(error) => {
            for measure in names.iter().filter(|name| **name != "-") {
                bench.failure(measure, subject, &error)?;
            }
        }
    }
    Ok(())
}

/// The server on the host, the client in a pod.
fn to_host(subject: Subject, round: u32, directory: &Path) -> Result<Vec<(String, f64)>> {
    let server = directory.join("husk-workload");
    let server = Running::start_with_input(Command::new(server).arg("serve"))?;
    let (namespace, address) = PODS[0];
    with_server(server, || {
        let _namespace = Namespace::make(namespace, address)?;
        client(subject, round, directory, namespace, HOST_ADDRESS, TO_HOST)
    })
}

/// The server in one pod, the client in another.
fn to_pod(subject: Subject, round: u32, directory: &Path) -> Result<Vec<(String, f64)>> {
    let [(server_namespace, server_address), (namespace, address)] = PODS;
    let _server_namespace = Namespace::make(server_namespace, server_address)?;
    let _namespace = Namespace::make(namespace, address)?;
    let id = format!("net-server-{}-{round}", subject.name());
    let flags = flags(directory, server_namespace);
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let words = ["/bench/husk-workload", "serve"];
    let server = containers::start_with_input(subject, &id, &flags, &words)?;
    let said = with_server(server, || {
        client(subject, round, directory, namespace, server_address, TO_POD)
    });
    if said.is_err() {
        containers::bury(&id);
    }
    said
}

/// Does something while a server runs, and ends it.
fn with_server<T>(mut server: Running, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = server.wait_for_line("ready").and_then(|()| work());
    server.end_input();
    let ended = server.finish();
    let done = done?;
    ended?;
    Ok(done)
}

fn client(
    subject: Subject,
    round: u32,
    directory: &Path,
    namespace: &str,
    server: &str,
    names: [&str; 3],
) -> Result<Vec<(String, f64)>> {
    let id = format!("net-client-{}-{round}", subject.name());
    let flags = flags(directory, namespace);
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let [up, down, requests] = names;
    let words = ["/bench/husk-workload", "net", server, up, down, requests];
    let ended = containers::run(subject, &id, &flags, &words)?;
    work::parse(&ended.stdout)
}

fn flags(directory: &Path, namespace: &str) -> [String; 4] {
    [
        "--mount".to_owned(),
        containers::mount_words(directory),
        "--with-ns".to_owned(),
        format!("network:/run/netns/{namespace}"),
    ]
}

/// A network namespace with an address on the bridge; gone when this goes.
struct Namespace {
    name: &'static str,
}

impl Namespace {
    fn make(name: &'static str, address: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let namespace = Self { name };
        let (outer, inner) = (format!("{name}-o"), "eth0");
        let peer = ["peer", "name", inner, "netns", name];
        let mut words = vec!["link", "add", &outer, "type", "veth"];
        words.extend(peer);
        ip(&words)?;
        ip(&["link", "set", &outer, "master", BRIDGE, "up"])?;
        let inside = |words: &[&str]| {
            let mut all = vec!["-n", name];
            all.extend(words);
            ip(&all)
        };
        inside(&["link", "set", "lo", "up"])?;
        inside(&["address", "add", &with_prefix(address), "dev", inner])?;
        inside(&["link", "set", inner, "up"])?;
        inside(&["route", "add", "default", "via", HOST_ADDRESS])?;
        Ok(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Its interfaces go with it.
        let _ = ip(&["netns", "delete", self.name]);
    }
}

fn with_prefix(address: &str) -> String {
    format!("{address}/{PREFIX_LENGTH}")
}

fn ip(words: &[&str]) -> Result<()> {
    command::run(Command::new("ip").args(words))?;
    Ok(())
}
