//! Pods of the Sandbox API.

use containerd_shim_protos::api::Mount;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;

use super::*;

/// For an exit that is due.
const DEADLINE: Duration = Duration::from_secs(20);

/// The pod of the fixture's shim.
const POD: &str = "p1";

fn request(fixture: &Fixture) -> CreateSandboxRequest {
    let mut request = CreateSandboxRequest::new();
    request.set_sandbox_id(POD.to_owned());
    request.set_bundle_path(fixture.bundle.path().display().to_string());
    request.set_netns_path("/run/netns/x".to_owned());
    request
}

async fn created() -> Fixture {
    let fixture = Fixture::new();
    let request = request(&fixture);
    fixture.service.create_sandbox(&request).await.unwrap();
    fixture
}

async fn started() -> Fixture {
    let fixture = created().await;
    fixture.service.start_sandbox(POD).await.unwrap();
    fixture
}

/// The pod's exit, which is due.
async fn ended(fixture: &Fixture) -> Exit {
    let exit = fixture.service.wait_sandbox(POD);
    tokio::time::timeout(DEADLINE, exit).await.unwrap().unwrap()
}

fn state(fixture: &Fixture) -> String {
    let status = fixture.service.sandbox_status(POD, false).unwrap();
    status.state().to_owned()
}

#[tokio::test]
async fn sandbox_that_is_not_there_is_not_found() {
    let (none, other) = (Fixture::new(), started().await);
    for (fixture, id) in [(none, POD), (other, "p2")] {
        let service = &fixture.service;
        assert_eq!(code(service.start_sandbox(id).await), Code::NOT_FOUND);
        assert_eq!(code(service.stop_sandbox(id).await), Code::NOT_FOUND);
        assert_eq!(code(service.wait_sandbox(id).await), Code::NOT_FOUND);
        assert_eq!(code(service.sandbox_status(id, true)), Code::NOT_FOUND);
        assert_eq!(code(service.sandbox_metrics(id).await), Code::NOT_FOUND);
        assert_eq!(code(service.ping_sandbox(id)), Code::NOT_FOUND);
        assert_eq!(code(service.shutdown_sandbox("p2").await), Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn requests_that_cannot_be_served_are_refused_by_name() {
    let fixture = Fixture::new();
    let refused = async |change: fn(&mut CreateSandboxRequest)| {
        let mut request = request(&fixture);
        change(&mut request);
        let error = fixture.service.create_sandbox(&request).await.unwrap_err();
        (error.code, error.text)
    };
    for (change, wanted, name) in [
        (
            (|request| request.set_sandbox_id("p2".to_owned())) as fn(&mut CreateSandboxRequest),
            Code::INVALID_ARGUMENT,
            "sandbox_id",
        ),
        (
            |request| request.rootfs.push(Mount::new()),
            Code::INVALID_ARGUMENT,
            "rootfs",
        ),
        (
            |request| request.mut_options().type_url = "x.Y".to_owned(),
            Code::INVALID_ARGUMENT,
            "options: \"x.Y\"",
        ),
        (
            |request| request.set_bundle_path("/no/bundle".to_owned()),
            Code::FAILED_PRECONDITION,
            "bundle_path",
        ),
    ] {
        let (code, text) = refused(change).await;
        assert_eq!(code, wanted, "{text}");
        assert!(text.contains(name), "{text}, not {name}");
    }
    // What was refused is not there.
    fixture
        .service
        .create_sandbox(&request(&fixture))
        .await
        .unwrap();
}

#[tokio::test]
async fn each_step_of_its_life_is_made_once() {
    let fixture = created().await;
    let service = &fixture.service;
    assert_eq!(state(&fixture), "SANDBOX_NOTREADY");
    let again = service.create_sandbox(&request(&fixture)).await;
    assert_eq!(code(again), Code::ALREADY_EXISTS);

    let (pid, created_at) = service.start_sandbox(POD).await.unwrap();
    assert_eq!(
        code(service.start_sandbox(POD).await),
        Code::FAILED_PRECONDITION
    );
    let status = service.sandbox_status(POD, true).unwrap();
    assert_eq!(status.sandbox_id(), POD);
    assert_eq!((status.state(), status.pid()), ("SANDBOX_READY", pid));
    assert_eq!(*status.created_at(), timestamp(created_at));
    assert!(status.exited_at.is_none());
    let info = r#"{"pid":42,"processStatus":"running"}"#;
    assert_eq!(status.info["info"], info);
    assert_eq!(service.connect(POD).task_pid(), pid);

    service.stop_sandbox(POD).await.unwrap();
    service.stop_sandbox(POD).await.unwrap();
    let exit = ended(&fixture).await;
    let status = service.sandbox_status(POD, false).unwrap();
    assert_eq!((status.state(), status.pid()), ("SANDBOX_NOTREADY", 0));
    assert_eq!(*status.exited_at(), timestamp(exit.at));
    assert_eq!(
        code(service.start_sandbox(POD).await),
        Code::FAILED_PRECONDITION
    );
    assert_eq!(service.connect(POD).task_pid(), 0);

    service.shutdown_sandbox(POD).await.unwrap();
    service.shutdown_sandbox(POD).await.unwrap();
    service.ended().await;
}

#[tokio::test]
async fn containers_join_only_while_it_runs() {
    let fixture = created().await;
    assert_eq!(code(fixture.create("t1").await), Code::FAILED_PRECONDITION);
    fixture.service.start_sandbox(POD).await.unwrap();
    fixture.create("t1").await.unwrap();
    fixture.service.stop_sandbox(POD).await.unwrap();
    assert_eq!(code(fixture.create("t2").await), Code::FAILED_PRECONDITION);
    assert_eq!(fixture.service.wait("t1", "").await.unwrap().status, 137);
}

#[tokio::test]
async fn no_container_can_stand_for_it() {
    let fixture = started().await;
    let annotations = r#"{"io.kubernetes.cri.container-type": "sandbox"}"#;
    let config = format!(r#"{{"ociVersion": "1.1.0", "annotations": {annotations}}}"#);
    fs::write(fixture.bundle.path().join("config.json"), config).unwrap();
    assert_eq!(code(fixture.create("t1").await), Code::INVALID_ARGUMENT);
}

#[tokio::test(start_paused = true)]
async fn it_outlives_its_containers() {
    let fixture = started().await;
    let service = &fixture.service;
    fixture.create("t1").await.unwrap();
    service.kill("t1", "", 9, false).await.unwrap();
    service.wait("t1", "").await.unwrap();
    service.delete("t1", "").await.unwrap();
    assert_eq!(code(fixture.create("bad").await), Code::INVALID_ARGUMENT);
    // As containerd asks when it buries a task that it does not know.
    service.shutdown(false).await;
    service.end_if_unused().await;

    assert!(!*service.ended.borrow());
    assert_eq!(state(&fixture), "SANDBOX_READY");
    fixture.create("t2").await.unwrap();
}

#[tokio::test]
async fn end_of_the_machine_is_its_end() {
    let fixture = started().await;
    let service = &fixture.service;
    service.pod().unwrap().shutdown().await;
    assert_eq!(ended(&fixture).await.status, 137);
    assert_eq!(state(&fixture), "SANDBOX_NOTREADY");
    assert_eq!(
        code(service.sandbox_metrics(POD).await),
        Code::FAILED_PRECONDITION
    );
    service.stop_sandbox(POD).await.unwrap();
    service.shutdown_sandbox(POD).await.unwrap();
}

#[tokio::test]
async fn failed_start_is_its_end() {
    let fixture = Fixture::new();
    let mut request = request(&fixture);
    request
        .annotations
        .insert("unbootable".to_owned(), String::new());
    fixture.service.create_sandbox(&request).await.unwrap();
    let service = &fixture.service;
    assert_eq!(code(service.start_sandbox(POD).await), Code::INTERNAL);
    assert_eq!(ended(&fixture).await.status, 137);
    assert_eq!(state(&fixture), "SANDBOX_NOTREADY");
    service.shutdown_sandbox(POD).await.unwrap();
    service.ended().await;
}

#[tokio::test]
async fn stop_comes_after_the_start_that_is_under_way() {
    let fixture = created().await;
    let service = &fixture.service;
    let (started, stopped) = tokio::join!(service.start_sandbox(POD), service.stop_sandbox(POD));
    started.unwrap();
    stopped.unwrap();
    assert_eq!(state(&fixture), "SANDBOX_NOTREADY");
}

#[tokio::test]
async fn shutdown_before_the_start_ends_it_for_who_waits() {
    let fixture = created().await;
    let service = &fixture.service;
    let (waited, shut_down) =
        tokio::join!(service.wait_sandbox(POD), service.shutdown_sandbox(POD));
    waited.unwrap();
    shut_down.unwrap();
    service.ended().await;
}

#[tokio::test]
async fn shim_without_it_ends_when_it_is_shut_down() {
    let unused = Fixture::new();
    unused.service.shutdown_sandbox(POD).await.unwrap();
    unused.service.ended().await;
    let late = unused.service.create_sandbox(&request(&unused)).await;
    assert_eq!(code(late), Code::UNAVAILABLE);
}

#[tokio::test]
async fn pod_of_a_task_is_none_of_the_sandbox_api() {
    let fixture = Fixture::new();
    fixture.create("t1").await.unwrap();
    let service = &fixture.service;
    let refused = service.create_sandbox(&request(&fixture)).await;
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
    let refused = service.shutdown_sandbox(POD).await;
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
    assert!(!*service.ended.borrow());
}

#[tokio::test]
async fn figures_are_those_of_what_runs() {
    let fixture = started().await;
    for id in ["t1", "t2", "t3"] {
        fixture.create(id).await.unwrap();
    }
    for id in ["t1", "t2"] {
        fixture.service.start(id, "").await.unwrap();
    }
    let figures = fixture.service.sandbox_metrics(POD).await.unwrap();
    assert_eq!(figures.pids.current, 4);
}
