//! The Task service as ttrpc: decodes, calls [`Service`], encodes.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageFull};
use containerd_shim_protos::shim_async::{Task, create_task};
use tokio::sync::oneshot;
use ttrpc::r#async::{Service as RpcService, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::convert::timestamp;
use crate::pod::{PodError, PodMaker};
use crate::service::Service;
use crate::stdio::Paths;

/// The service under both of its names. The two versions' messages are the same, so containerd
/// 1.6 to 2.x all find what they expect.
pub(crate) fn services<M: PodMaker + 'static>(
    service: Arc<Service<M>>,
) -> [HashMap<String, RpcService>; 2] {
    let task = Arc::new(Rpc { service });
    let v3 = create_task(task.clone());
    let v2 = create_task(task)
        .into_iter()
        .map(|(name, service)| (name.replace("task.v3", "task.v2"), service))
        .collect();
    [v2, v3]
}

struct Rpc<M: PodMaker> {
    service: Arc<Service<M>>,
}

/// The one place where our errors become the transport's.
pub(crate) fn status(error: PodError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(error.code, error.text))
}

/// Carries a call out to its end even if the caller goes away or its time is up, when ttrpc drops
/// the handler: a task that is half started or half deleted would be so for ever.
pub(crate) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(done) => done.map_err(status),
        Err(error) => Err(status(PodError::new(Code::INTERNAL, error))),
    }
}

/// Figures as containerd's messages carry them.
pub(crate) fn packed(metrics: &Metrics) -> ttrpc::Result<Any> {
    let value = metrics
        .write_to_bytes()
        .map_err(|error| status(PodError::new(Code::INTERNAL, error)))?;
    Ok(Any {
        type_url: Metrics::descriptor().full_name().to_owned(),
        value,
        ..Any::default()
    })
}

#[async_trait]
impl<M: PodMaker + 'static> Task for Rpc<M> {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.service
            .state(request.id(), request.exec_id())
            .map_err(status)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let service = self.service.clone();
        let (answer, answered) = oneshot::channel();
        tokio::spawn(async move { service.create_for(&request, answer).await });
        let created = answered.await.unwrap_or_else(|_| {
            Err(PodError::new(
                Code::INTERNAL,
                "the creation has ended early",
            ))
        });
        let mut response = CreateTaskResponse::new();
        response.set_pid(created.map_err(status)?);
        Ok(response)
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let service = self.service.clone();
        let start = async move { service.start(request.id(), request.exec_id()).await };
        let mut response = StartResponse::new();
        response.set_pid(to_its_end(start).await?);
        Ok(response)
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let service = self.service.clone();
        to_its_end(async move { service.delete(request.id(), request.exec_id()).await }).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let mut response = PidsResponse::new();
        response.processes = self.service.pids(request.id()).await.map_err(status)?;
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let service = self.service.clone();
        to_its_end(async move { service.pause(request.id(), true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let service = self.service.clone();
        to_its_end(async move { service.pause(request.id(), false).await }).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let service = self.service.clone();
        let update = async move {
            let resources = &request.resources().value;
            service.update(request.id(), resources).await
        };
        to_its_end(update).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let metrics = self.service.stats(request.id()).await.map_err(status)?;
        let mut response = StatsResponse::new();
        response.set_stats(packed(&metrics)?);
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let service = self.service.clone();
        let kill = async move {
            let (id, exec) = (request.id(), request.exec_id());
            service
                .kill(id, exec, request.signal(), request.all())
                .await
        };
        to_its_end(kill).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if request.exec_id().is_empty() {
            return Err(status(PodError::new(
                Code::INVALID_ARGUMENT,
                "the exec id is empty",
            )));
        }
        let paths = Paths {
            stdin: request.stdin().to_owned(),
            stdout: request.stdout().to_owned(),
            stderr: request.stderr().to_owned(),
            terminal: request.terminal(),
        };
        let process = request.spec().value.clone();
        let service = self.service.clone();
        let exec = async move {
            let (id, exec_id) = (request.id(), request.exec_id());
            service.exec(id, exec_id, paths, process).await
        };
        to_its_end(exec).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.service
            .resize(
                request.id(),
                request.exec_id(),
                request.width(),
                request.height(),
            )
            .await
            .map_err(status)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        if request.stdin() {
            self.service
                .close_stdin(request.id(), request.exec_id())
                .map_err(status)?;
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self
            .service
            .wait(request.id(), request.exec_id())
            .await
            .map_err(status)?;
        let mut response = WaitResponse::new();
        response.set_exit_status(exit.status);
        response.set_exited_at(timestamp(exit.at));
        Ok(response)
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        Ok(self.service.connect(request.id()))
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.service.checkpoint(request.id()).map_err(status)?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let service = self.service.clone();
        // `now` changes nothing, as with runc's shim: what still runs is not the caller's to end.
        let shutdown = async move {
            service.shutdown(false).await;
            Ok(())
        };
        to_its_end(shutdown).await?;
        Ok(Empty::new())
    }
}
