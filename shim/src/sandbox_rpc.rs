//! The Sandbox service as ttrpc: decodes, calls [`Service`], encodes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use ttrpc::r#async::{Service as RpcService, TtrpcContext};

use crate::convert::timestamp;
use crate::pod::PodMaker;
use crate::rpc::{packed, status, to_its_end};
use crate::service::Service;

/// The service under its name.
pub(crate) fn service<M: PodMaker + 'static>(
    service: Arc<Service<M>>,
) -> HashMap<String, RpcService> {
    create_sandbox(Arc::new(Rpc { service }))
}

struct Rpc<M: PodMaker> {
    service: Arc<Service<M>>,
}

/// The processor as Go, and with it the images of containers, calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[async_trait]
impl<M: PodMaker + 'static> Sandbox for Rpc<M> {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let service = self.service.clone();
        to_its_end(async move { service.create_sandbox(&request).await }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let service = self.service.clone();
        let start = async move { service.start_sandbox(request.sandbox_id()).await };
        let (pid, created_at) = to_its_end(start).await?;
        let mut response = StartSandboxResponse::new();
        response.set_pid(pid);
        response.set_created_at(timestamp(created_at));
        Ok(response)
    }

    /// The guest's, and the same for all.
    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.service
            .ping_sandbox(request.sandbox_id())
            .map_err(status)?;
        let mut response = PlatformResponse::new();
        let platform = response.mut_platform();
        platform.set_os("linux".to_owned());
        platform.set_architecture(architecture().to_owned());
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let service = self.service.clone();
        to_its_end(async move { service.stop_sandbox(request.sandbox_id()).await }).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.service.wait_sandbox(request.sandbox_id()).await;
        let exit = exit.map_err(status)?;
        let mut response = WaitSandboxResponse::new();
        response.set_exit_status(exit.status);
        response.set_exited_at(timestamp(exit.at));
        Ok(response)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.service
            .sandbox_status(request.sandbox_id(), request.verbose())
            .map_err(status)
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        self.service
            .ping_sandbox(request.sandbox_id())
            .map_err(status)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let service = self.service.clone();
        to_its_end(async move { service.shutdown_sandbox(request.sandbox_id()).await }).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let id = request.sandbox_id();
        let figures = self.service.sandbox_metrics(id).await.map_err(status)?;
        let mut response = SandboxMetricsResponse::new();
        let metrics = response.mut_metrics();
        metrics.set_id(id.to_owned());
        metrics.set_timestamp(timestamp(SystemTime::now()));
        metrics.set_data(packed(&figures)?);
        Ok(response)
    }
}
