//! What containerd says to a shim, said without containerd: the Task API, straight at its socket.
//!
//! So that answers can be compared down to their codes, and timed; `ctr` shows neither. Containers
//! are still made by `ctr`, and the shim's address is in their bundle.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::proto::{KeyValue, Request};
use containerd_shim_protos::ttrpc::{Client, Code, Error};

/// containerd's state of tasks.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task";

const NAMESPACE: &str = "default";

/// For one answer, in the testbed.
const CALL_DEADLINE: Duration = Duration::from_secs(120);

/// A call that was answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) code: Code,
    pub(crate) text: String,
}

/// An answer: the outer error is one of the connection.
pub(crate) type Answer<T> = Result<Result<T, Refused>>;

/// The streams of an exec: paths or URIs, empty for none.
#[derive(Debug, Default, Clone)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// One task's shim.
#[derive(Clone)]
pub(crate) struct Shim {
    client: Client,
    /// The version of the Task service it has.
    service: &'static str,
    /// The task's id.
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
}

impl Shim {
    /// Connects to the shim of a task.
    pub(crate) fn of(id: &str) -> Result<Self> {
        let bundle = Path::new(BUNDLES).join(NAMESPACE).join(id);
        let (address, service) = address(&bundle)?;
        let client = Client::connect(&address)
            .map_err(|error| anyhow!("cannot connect to {address:?}: {error}"))?;
        Ok(Self {
            client,
            service,
            id: id.to_owned(),
            bundle,
        })
    }

    /// The same connection, for a task that it may not have.
    pub(crate) fn about(&self, id: &str) -> Self {
        Self {
            id: id.to_owned(),
            ..self.clone()
        }
    }

    fn call<A: Message>(&self, method: &str, request: &impl Message) -> Answer<A> {
        let mut call = Request::new();
        call.service = self.service.to_owned();
        call.method = method.to_owned();
        call.payload = request.write_to_bytes()?;
        call.timeout_nano = i64::try_from(CALL_DEADLINE.as_nanos())?;
        let mut namespace = KeyValue::new();
        namespace.key = "containerd-namespace-ttrpc".to_owned();
        namespace.value = NAMESPACE.to_owned();
        call.metadata = vec![namespace];
        match self.client.request(call) {
            Ok(response) => Ok(Ok(A::parse_from_bytes(&response.payload)?)),
            Err(Error::RpcStatus(status)) => Ok(Err(Refused {
                code: status.code(),
                text: status.message().to_owned(),
            })),
            Err(error) => bail!("{method} was not answered: {error}"),
        }
    }

    /// Creates the task from a bundle that has its root.
    pub(crate) fn create(&self, bundle: &Path, streams: &Streams) -> Answer<()> {
        let mut request = CreateTaskRequest::new();
        request.set_id(self.id.clone());
        request.set_bundle(bundle.display().to_string());
        request.set_stdin(streams.stdin.clone());
        request.set_stdout(streams.stdout.clone());
        request.set_stderr(streams.stderr.clone());
        request.set_terminal(streams.terminal);
        done(self.call::<Empty>("Create", &request))
    }

    pub(crate) fn state(&self, exec: &str) -> Answer<StateResponse> {
        let mut request = StateRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        self.call("State", &request)
    }

    /// Registers an exec of a process as the specification's JSON has it.
    pub(crate) fn exec_json(&self, exec: &str, streams: &Streams, json: &str) -> Answer<()> {
        let mut request = ExecProcessRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        request.set_stdin(streams.stdin.clone());
        request.set_stdout(streams.stdout.clone());
        request.set_stderr(streams.stderr.clone());
        request.set_terminal(streams.terminal);
        request.set_spec(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: json.as_bytes().to_vec(),
            ..Any::default()
        });
        done(self.call::<Empty>("Exec", &request))
    }

    pub(crate) fn exec(&self, exec: &str, streams: &Streams, command: &[&str]) -> Answer<()> {
        let json = serde_json::json!({
            "terminal": streams.terminal,
            "user": {"uid": 0, "gid": 0},
            "args": command,
            "env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"],
            "cwd": "/",
        });
        self.exec_json(exec, streams, &json.to_string())
    }

    pub(crate) fn start(&self, exec: &str) -> Answer<StartResponse> {
        let mut request = StartRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        self.call("Start", &request)
    }

    pub(crate) fn wait(&self, exec: &str) -> Answer<WaitResponse> {
        let mut request = WaitRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        self.call("Wait", &request)
    }

    pub(crate) fn delete(&self, exec: &str) -> Answer<DeleteResponse> {
        let mut request = DeleteRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        self.call("Delete", &request)
    }

    pub(crate) fn kill(&self, exec: &str, signal: u32, all: bool) -> Answer<()> {
        let mut request = KillRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        request.set_signal(signal);
        request.set_all(all);
        done(self.call::<Empty>("Kill", &request))
    }

    pub(crate) fn pause(&self) -> Answer<()> {
        let mut request = PauseRequest::new();
        request.set_id(self.id.clone());
        done(self.call::<Empty>("Pause", &request))
    }

    pub(crate) fn resume(&self) -> Answer<()> {
        let mut request = ResumeRequest::new();
        request.set_id(self.id.clone());
        done(self.call::<Empty>("Resume", &request))
    }

    pub(crate) fn pids(&self) -> Answer<PidsResponse> {
        let mut request = PidsRequest::new();
        request.set_id(self.id.clone());
        self.call("Pids", &request)
    }

    pub(crate) fn resize(&self, exec: &str, width: u32, height: u32) -> Answer<()> {
        let mut request = ResizePtyRequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        request.set_width(width);
        request.set_height(height);
        done(self.call::<Empty>("ResizePty", &request))
    }

    pub(crate) fn close_stdin(&self, exec: &str) -> Answer<()> {
        let mut request = CloseIORequest::new();
        request.set_id(self.id.clone());
        request.set_exec_id(exec.to_owned());
        request.set_stdin(true);
        done(self.call::<Empty>("CloseIO", &request))
    }

    pub(crate) fn update(&self, json: &str) -> Answer<()> {
        let mut request = UpdateTaskRequest::new();
        request.set_id(self.id.clone());
        request.set_resources(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: json.as_bytes().to_vec(),
            ..Any::default()
        });
        done(self.call::<Empty>("Update", &request))
    }

    pub(crate) fn stats(&self) -> Answer<Metrics> {
        let mut request = StatsRequest::new();
        request.set_id(self.id.clone());
        match self.call::<StatsResponse>("Stats", &request)? {
            Ok(response) => Ok(Ok(Metrics::parse_from_bytes(&response.stats().value)?)),
            Err(refused) => Ok(Err(refused)),
        }
    }

    pub(crate) fn checkpoint(&self) -> Answer<()> {
        let mut request = CheckpointTaskRequest::new();
        request.set_id(self.id.clone());
        request.set_path("/run/husk-scenarios-checkpoint".to_owned());
        done(self.call::<Empty>("Checkpoint", &request))
    }

    pub(crate) fn connect(&self) -> Answer<ConnectResponse> {
        let mut request = ConnectRequest::new();
        request.set_id(self.id.clone());
        self.call("Connect", &request)
    }

    pub(crate) fn shutdown(&self, now: bool) -> Answer<()> {
        let mut request = ShutdownRequest::new();
        request.set_id(self.id.clone());
        request.set_now(now);
        done(self.call::<Empty>("Shutdown", &request))
    }

    /// Runs an exec to its end and removes it. Returns its status.
    pub(crate) fn run(&self, exec: &str, streams: &Streams, command: &[&str]) -> Result<u32> {
        granted(self.exec(exec, streams, command))?;
        granted(self.start(exec))?;
        let status = granted(self.wait(exec))?.exit_status();
        granted(self.delete(exec))?;
        Ok(status)
    }
}

/// The answer to a call that must succeed.
pub(crate) fn granted<T>(answer: Answer<T>) -> Result<T> {
    answer?.map_err(|refused| anyhow!("refused with {:?}: {}", refused.code, refused.text))
}

fn done(answer: Answer<Empty>) -> Answer<()> {
    Ok(answer?.map(|_| ()))
}

/// Where the shim of a bundle listens, and the name of its service. containerd 1.6 knows a plain
/// address; later ones keep what the shim has said of itself beside it.
fn address(bundle: &Path) -> Result<(String, &'static str)> {
    const V2: &str = "containerd.task.v2.Task";
    const V3: &str = "containerd.task.v3.Task";
    if let Ok(text) = fs::read_to_string(bundle.join("bootstrap.json")) {
        let said: serde_json::Value = serde_json::from_str(&text)?;
        let address = said["address"].as_str().context("no address")?.to_owned();
        let is_v3 = said["version"].as_u64() == Some(3);
        return Ok((address, if is_v3 { V3 } else { V2 }));
    }
    let path = bundle.join("address");
    let address = fs::read_to_string(&path).with_context(|| format!("cannot read {path:?}"))?;
    Ok((address, V2))
}
