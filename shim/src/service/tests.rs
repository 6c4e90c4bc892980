mod sandbox;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::api::CreateTaskRequest;
use husk_sandbox::NetworkCounters;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

use super::*;
use crate::events::Item;
use crate::pod::{GuestProcess, NewContainer};
use crate::stdio::{Ends, Paths};

/// A pod whose processes end when they are signalled; their status is the signal's number.
#[derive(Default)]
struct FakePod {
    exits: Mutex<HashMap<String, watch::Sender<Option<u32>>>>,
    /// OOM kills that containers have had.
    kills: Mutex<HashMap<String, u64>>,
    is_gone: AtomicBool,
}

impl FakePod {
    fn process(&self, container: &str, exec: &str) -> watch::Sender<Option<u32>> {
        let mut exits = self.exits.lock().unwrap();
        exits
            .entry(format!("{container}/{exec}"))
            .or_insert_with(|| {
                let is_gone = self.is_gone.load(Ordering::Relaxed);
                watch::Sender::new(is_gone.then_some(STATUS_KILLED))
            })
            .clone()
    }
}

#[async_trait]
impl Pod for FakePod {
    fn host_pid(&self) -> u32 {
        42
    }

    async fn create_container(&self, new: NewContainer) -> Result<(), PodError> {
        if new.id == "bad" {
            return Err(PodError::new(Code::INVALID_ARGUMENT, "bad container"));
        }
        Ok(())
    }

    async fn create_process(
        &self,
        _: &str,
        _: &str,
        _: Vec<u8>,
        _: bool,
        _: Ends,
    ) -> Result<(), PodError> {
        Ok(())
    }

    async fn start_process(&self, container: &str, exec: &str) -> Result<(), PodError> {
        self.process(container, exec);
        if exec == "missing" || container == "broken" {
            return Err(PodError::new(Code::NOT_FOUND, "no such file"));
        }
        Ok(())
    }

    async fn wait_process(&self, container: &str, exec: &str) -> Exit {
        let mut exit = self.process(container, exec).subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Exit {
            status,
            at: SystemTime::now(),
        }
    }

    async fn signal_process(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), PodError> {
        self.process(container, exec).send_replace(Some(signal));
        if all {
            for process in self.exits.lock().unwrap().values() {
                process.send_replace(Some(signal));
            }
        }
        Ok(())
    }

    async fn resize_terminal(&self, _: &str, _: &str, _: u32, _: u32) -> Result<(), PodError> {
        Err(PodError::new(Code::FAILED_PRECONDITION, "no terminal"))
    }

    async fn processes(&self, _: &str) -> Result<Vec<GuestProcess>, PodError> {
        let process = |pid, exec_id: Option<&str>| GuestProcess {
            pid,
            exec_id: exec_id.map(str::to_owned),
        };
        Ok(vec![
            process(6, Some("")),
            process(7, Some("e1")),
            process(8, None),
        ])
    }

    async fn pause(&self, _: &str) -> Result<(), PodError> {
        Ok(())
    }

    async fn resume(&self, _: &str) -> Result<(), PodError> {
        Ok(())
    }

    async fn update(&self, _: &str, _: &LinuxResources) -> Result<(), PodError> {
        Ok(())
    }

    async fn stats(&self, _: &str) -> Result<HashMap<String, String>, PodError> {
        Ok([("pids.current".to_owned(), "2\n".to_owned())].into())
    }

    async fn network_counters(&self) -> Result<Vec<NetworkCounters>, PodError> {
        Ok(Vec::new())
    }

    async fn out_of_memory(&self, container: &str, seen: u64) -> Result<u64, PodError> {
        let kills = self.kills.lock().unwrap().get(container).copied();
        match kills {
            Some(kills) if kills > seen => Ok(seen + 1),
            _ => Err(PodError::new(Code::NOT_FOUND, "the container has ended")),
        }
    }

    async fn output_drained(&self, _: &str, _: &str) {}

    async fn delete_process(&self, _: &str, _: &str) -> Result<(), PodError> {
        Ok(())
    }

    async fn delete_container(&self, _: &str) -> Result<(), PodError> {
        tokio::task::yield_now().await;
        Ok(())
    }

    async fn shutdown(&self) {
        self.is_gone.store(true, Ordering::Relaxed);
        for process in self.exits.lock().unwrap().values() {
            process.send_if_modified(|exit| {
                let is_alive = exit.is_none();
                exit.get_or_insert(STATUS_KILLED);
                is_alive
            });
        }
    }
}

struct FakeMaker;

#[async_trait]
impl PodMaker for FakeMaker {
    type Pod = FakePod;

    async fn make(&self, first: &NewContainer) -> Result<FakePod, PodError> {
        tokio::task::yield_now().await;
        let annotations = first.spec.annotations().as_ref();
        if annotations.is_some_and(|all| all.contains_key("unbootable")) {
            return Err(PodError::new(Code::INTERNAL, "no guest"));
        }
        Ok(FakePod {
            kills: Mutex::new([("hungry".to_owned(), 2), ("liar".to_owned(), u64::MAX)].into()),
            ..FakePod::default()
        })
    }
}

struct Fixture {
    service: Arc<Service<FakeMaker>>,
    events: UnboundedReceiver<Item>,
    bundle: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(
            bundle.path().join("config.json"),
            r#"{"ociVersion": "1.1.0"}"#,
        )
        .unwrap();
        let (publisher, events) = Publisher::channel();
        Self {
            service: Service::new("n".to_owned(), "p1".to_owned(), FakeMaker, publisher),
            events,
            bundle,
        }
    }

    fn request(&self, id: &str) -> CreateTaskRequest {
        let mut request = CreateTaskRequest::new();
        request.set_id(id.to_owned());
        request.set_bundle(self.bundle.path().display().to_string());
        request
    }

    async fn create(&self, id: &str) -> Result<u32, PodError> {
        self.service.create(&self.request(id)).await
    }

    /// The kinds of all events so far, a word each.
    fn published(&mut self) -> Vec<String> {
        let mut words = Vec::new();
        while let Ok(Item::Event(event)) = self.events.try_recv() {
            words.push(match *event {
                Event::Create(_) => "create".to_owned(),
                Event::Start(_) => "start".to_owned(),
                Event::ExecAdded(_) => "exec-added".to_owned(),
                Event::ExecStarted(_) => "exec-started".to_owned(),
                Event::Exit(exit) => format!("exit {} {}", exit.id(), exit.exit_status()),
                Event::Paused(_) => "paused".to_owned(),
                Event::Resumed(_) => "resumed".to_owned(),
                Event::Oom(oom) => format!("oom {}", oom.container_id()),
                Event::Delete(_) => "delete".to_owned(),
            });
        }
        words
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, PodError>) -> Code {
    result.unwrap_err().code
}

#[tokio::test]
async fn unknown_names_are_not_found() {
    let fixture = Fixture::new();
    let service = &fixture.service;
    assert_eq!(code(service.start("t1", "").await), Code::NOT_FOUND);
    assert_eq!(code(service.wait("t1", "").await), Code::NOT_FOUND);
    assert_eq!(code(service.delete("t1", "").await), Code::NOT_FOUND);
    fixture.create("t1").await.unwrap();
    assert_eq!(code(service.start("t1", "e1").await), Code::NOT_FOUND);
    assert_eq!(
        code(service.kill("t1", "e1", 9, false).await),
        Code::NOT_FOUND
    );
}

#[tokio::test(start_paused = true)]
async fn server_that_is_asked_for_nothing_ends() {
    let unused = Fixture::new();
    unused.service.end_if_unused().await;
    unused.service.ended().await;
    assert_eq!(code(unused.create("t1").await), Code::UNAVAILABLE);

    let used = Fixture::new();
    used.create("t1").await.unwrap();
    used.service.end_if_unused().await;
    used.create("t2").await.unwrap();
}

#[tokio::test]
async fn failed_create_leaves_no_task_and_no_event() {
    let mut fixture = Fixture::new();
    assert_eq!(code(fixture.create("bad").await), Code::INVALID_ARGUMENT);
    assert_eq!(code(fixture.service.state("bad", "")), Code::NOT_FOUND);
    assert!(fixture.published().is_empty());
}

#[tokio::test]
async fn second_task_of_the_same_id_is_refused() {
    let fixture = Fixture::new();
    fixture.create("t1").await.unwrap();
    assert_eq!(code(fixture.create("t1").await), Code::ALREADY_EXISTS);
}

#[tokio::test]
async fn whole_life_publishes_its_events_in_order() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    assert_eq!(fixture.create("t1").await.unwrap(), 42);
    service.start("t1", "").await.unwrap();
    assert_eq!(
        code(service.delete("t1", "").await),
        Code::FAILED_PRECONDITION
    );
    service.pause("t1", true).await.unwrap();
    assert_eq!(
        code(service.pause("t1", true).await),
        Code::FAILED_PRECONDITION
    );
    service.pause("t1", false).await.unwrap();
    service.kill("t1", "", 15, false).await.unwrap();
    assert_eq!(service.wait("t1", "").await.unwrap().status, 15);
    assert_eq!(
        code(service.kill("t1", "", 15, false).await),
        Code::NOT_FOUND
    );
    assert_eq!(service.delete("t1", "").await.unwrap().exit_status(), 15);
    assert_eq!(
        fixture.published(),
        [
            "create",
            "start",
            "paused",
            "resumed",
            "exit t1 15",
            "delete"
        ]
    );
}

#[tokio::test]
async fn exit_of_init_comes_after_the_exits_of_its_execs() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.start("t1", "").await.unwrap();
    service
        .exec("t1", "e1", Paths::default(), Vec::new())
        .await
        .unwrap();
    let again = service.exec("t1", "e1", Paths::default(), Vec::new()).await;
    assert_eq!(code(again), Code::ALREADY_EXISTS);
    service.start("t1", "e1").await.unwrap();
    service.kill("t1", "", 9, true).await.unwrap();
    service.wait("t1", "").await.unwrap();
    assert_eq!(
        fixture.published(),
        [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit e1 9",
            "exit t1 9"
        ]
    );
}

#[tokio::test]
async fn exec_that_cannot_start_can_be_deleted() {
    let fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.start("t1", "").await.unwrap();
    service
        .exec("t1", "missing", Paths::default(), Vec::new())
        .await
        .unwrap();
    assert_eq!(code(service.start("t1", "missing").await), Code::NOT_FOUND);
    service.delete("t1", "missing").await.unwrap();
    assert_eq!(code(service.state("t1", "missing")), Code::NOT_FOUND);
}

/// What the guest makes of a start that failed, nobody knows.
#[tokio::test]
async fn task_that_could_not_start_is_killed_and_ends_before_it_is_deleted() {
    let mut fixture = Fixture::new();
    fixture.create("broken").await.unwrap();
    let service = fixture.service.clone();
    assert!(service.start("broken", "").await.is_err());

    let deleted = service.delete("broken", "").await.unwrap();

    assert_eq!(deleted.exit_status(), 9);
    assert_eq!(fixture.published(), ["create", "exit broken 9", "delete"]);
}

#[tokio::test]
async fn task_that_was_never_started_can_be_killed_and_deleted() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.kill("t1", "", 9, false).await.unwrap();
    assert_eq!(service.wait("t1", "").await.unwrap().status, 9);
    service.delete("t1", "").await.unwrap();
    assert_eq!(fixture.published(), ["create", "exit t1 9", "delete"]);
}

#[tokio::test]
async fn shutdown_waits_for_the_last_task_unless_it_must_be_now() {
    let fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.shutdown(false).await;
    assert!(!*service.ended.borrow());
    service.shutdown(true).await;
    service.ended().await;
}

#[tokio::test]
async fn task_whose_creator_has_gone_is_removed() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    let (answer, answered) = oneshot::channel();
    drop(answered);
    service.create_for(&fixture.request("t1"), answer).await;
    assert_eq!(fixture.published(), ["create", "exit t1 9", "delete"]);
    service.ended().await;
    assert_eq!(service.state("t1", "").unwrap_err().code, Code::NOT_FOUND);
}

#[tokio::test]
async fn shutdown_comes_after_the_creation_that_is_under_way() {
    let fixture = Fixture::new();
    let (service, request) = (fixture.service.clone(), fixture.request("t1"));
    let (answer, answered) = oneshot::channel();
    tokio::join!(
        service.create_for(&request, answer),
        service.shutdown(false)
    );
    assert!(answered.await.unwrap().is_ok());
    assert!(!*service.ended.borrow());
}

#[tokio::test]
async fn out_of_memory_is_told_before_the_exit_it_caused() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("hungry").await.unwrap();
    service.start("hungry", "").await.unwrap();
    service.kill("hungry", "", 9, false).await.unwrap();
    service.wait("hungry", "").await.unwrap();

    let events = fixture.published();
    let ooms = events.iter().filter(|event| *event == "oom hungry").count();
    assert_eq!(ooms, 2, "{events:?}");
    assert_eq!(events.last().unwrap(), "exit hungry 9");
}

#[tokio::test]
async fn guest_that_invents_oom_kills_is_heard_so_often_only() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("liar").await.unwrap();
    service.kill("liar", "", 9, false).await.unwrap();
    service.wait("liar", "").await.unwrap();

    let events = fixture.published();
    let ooms = events.iter().filter(|event| *event == "oom liar").count();
    assert_eq!(ooms, OOM_EVENTS_MAX as usize);
}

#[tokio::test]
async fn processes_say_which_exec_they_are() {
    let fixture = Fixture::new();
    fixture.create("t1").await.unwrap();

    let processes = fixture.service.pids("t1").await.unwrap();

    assert!(processes[0].info.is_none());
    assert_eq!(
        processes[1].info().type_url,
        "containerd.runc.v1.ProcessDetails"
    );
    assert_eq!(processes[1].info().value, b"\x0a\x02e1");
    assert!(processes[2].info.is_none());
}

#[tokio::test]
async fn pids_of_guests_are_none_of_the_hosts() {
    let fixture = Fixture::new();
    let told = fixture.create("t1").await.unwrap();

    let processes = fixture.service.pids("t1").await.unwrap();

    assert_eq!(processes[0].pid(), told);
    assert_eq!(processes[1].pid(), HOST_PIDS_MAX + 7);
    assert_eq!(processes[2].pid(), HOST_PIDS_MAX + 8);
}

#[tokio::test]
async fn figures_and_limits_are_of_running_tasks() {
    let fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    assert_eq!(service.stats("t1").await.unwrap().pids.current, 2);
    let limits = br#"{"memory": {"limit": 1048576}}"#;
    service.update("t1", limits).await.unwrap();
    let nonsense = service.update("t1", b"{").await;
    assert_eq!(code(nonsense), Code::INVALID_ARGUMENT);

    service.kill("t1", "", 9, false).await.unwrap();
    service.wait("t1", "").await.unwrap();
    assert_eq!(code(service.stats("t1").await), Code::NOT_FOUND);
    assert_eq!(code(service.update("t1", limits).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn second_delete_waits_for_the_first_and_finds_nothing() {
    let mut fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.start("t1", "").await.unwrap();
    service.kill("t1", "", 9, false).await.unwrap();
    service.wait("t1", "").await.unwrap();

    let (first, second) = tokio::join!(service.delete("t1", ""), async {
        let second = service.delete("t1", "").await;
        assert_eq!(code(service.state("t1", "")), Code::NOT_FOUND);
        second
    });

    assert_eq!(first.unwrap().exit_status(), 9);
    assert_eq!(code(second), Code::NOT_FOUND);
    let deletes = fixture.published().into_iter();
    assert_eq!(deletes.filter(|event| event == "delete").count(), 1);
}

#[tokio::test]
async fn resize_without_a_terminal_changes_nothing_and_is_no_error() {
    let fixture = Fixture::new();
    fixture.create("t1").await.unwrap();
    fixture.service.resize("t1", "", 80, 24).await.unwrap();
    let missing = fixture.service.resize("t1", "e1", 80, 24).await;
    assert_eq!(code(missing), Code::NOT_FOUND);
}

#[tokio::test]
async fn paused_container_takes_no_execs_and_its_own_are_paused_too() {
    let fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.start("t1", "").await.unwrap();
    service
        .exec("t1", "e1", Paths::default(), Vec::new())
        .await
        .unwrap();
    service.start("t1", "e1").await.unwrap();
    service.pause("t1", true).await.unwrap();

    let refused = service.exec("t1", "e2", Paths::default(), Vec::new()).await;
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
    let state = service.state("t1", "e1").unwrap();
    assert_eq!(state.status(), Status::PAUSED);
}

#[tokio::test]
async fn signal_zero_asks_and_sends_nothing() {
    let fixture = Fixture::new();
    let service = fixture.service.clone();
    fixture.create("t1").await.unwrap();
    service.start("t1", "").await.unwrap();
    service.kill("t1", "", 0, false).await.unwrap();
    assert_eq!(service.state("t1", "").unwrap().status(), Status::RUNNING);
    service.kill("t1", "", 9, false).await.unwrap();
    service.wait("t1", "").await.unwrap();
    assert_eq!(
        code(service.kill("t1", "", 0, false).await),
        Code::NOT_FOUND
    );
}

#[tokio::test]
async fn checkpoint_is_not_implemented_for_tasks_that_are_there() {
    let fixture = Fixture::new();
    assert_eq!(code(fixture.service.checkpoint("t1")), Code::NOT_FOUND);
    fixture.create("t1").await.unwrap();
    assert_eq!(code(fixture.service.checkpoint("t1")), Code::UNIMPLEMENTED);
}
