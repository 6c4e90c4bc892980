//! Which of the machine's network devices serves which interface, as interfaces come and go.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use husk_netlink::Monitor;
use husk_protocol::messages as m;
use husk_vmm_control::{NET_DEVICES_MAX, NetConfig};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::message::request;
use super::{Attached, NetworkError, Survey, attach};
use crate::agent::Agent;
use crate::error::{cap_text, describe};
use crate::netns::Netns;
use crate::vmm::Vmm;
use crate::{ContainerError, Sandbox, StartError, readiness};

/// The interfaces by device; `None` where a device has none.
#[derive(Debug)]
pub(crate) struct Devices {
    links: Vec<Option<u32>>,
    /// Interfaces that can't be had, and why.
    refused: Vec<(u32, String)>,
    /// Interfaces may still come.
    has_spare: bool,
    /// What the guest was last told.
    told: m::ConfigureNetworkRequest,
}

impl Devices {
    /// A device for each tap and some to spare: what the VMM is to be told, and given.
    pub(crate) fn of(
        attached: Vec<Attached>,
        spare: usize,
    ) -> (Self, Vec<NetConfig>, Vec<OwnedFd>) {
        let spare = spare.min(NET_DEVICES_MAX.saturating_sub(attached.len()));
        let mut links: Vec<_> = attached.iter().map(|one| Some(one.link)).collect();
        let mut net: Vec<_> = attached
            .iter()
            .map(|one| NetConfig { mac: Some(one.mac) })
            .collect();
        links.extend(vec![None; spare]);
        net.extend(vec![NetConfig { mac: None }; spare]);
        let taps = attached.into_iter().map(|one| one.tap).collect();
        let told = m::ConfigureNetworkRequest::new();
        let devices = Self {
            links,
            refused: Vec::new(),
            has_spare: spare > 0,
            told,
        };
        (devices, net, taps)
    }

    /// Whether the machine has any, used or not.
    pub(crate) fn has_any(&self) -> bool {
        !self.links.is_empty()
    }

    fn device_of(&self, link: u32) -> Option<usize> {
        self.links.iter().position(|served| *served == Some(link))
    }

    /// Sets the guest's network as it was found, if there is one.
    pub(crate) async fn configure(
        &mut self,
        agent: &Agent,
        vmm: &Vmm,
        survey: &Survey,
    ) -> Result<(), StartError> {
        self.tell(agent, vmm, survey)
            .await
            .map_err(|error| match error {
                ContainerError::VmGone(end) => StartError::VmGone(end),
                other => StartError::GuestNetwork {
                    text: cap_text(&other.to_string()),
                },
            })
    }

    /// Tells the guest what has changed since it was told last.
    async fn tell(
        &mut self,
        agent: &Agent,
        vmm: &Vmm,
        survey: &Survey,
    ) -> Result<(), ContainerError> {
        let request = request(survey, |link| self.device_of(link));
        if request != self.told {
            agent.configure_network(vmm, request.clone()).await?;
            self.told = request;
        }
        Ok(())
    }

    /// Plugs in what has come and pulls out what has gone. Answers with what can't be had, which is not
    /// tried again: a tap that is made, and given up, is a change to follow as well.
    async fn follow(
        &mut self,
        netns: &Netns,
        agent: &Agent,
        vmm: &Vmm,
    ) -> Result<Vec<NetworkError>, ContainerError> {
        let known: Vec<u32> = self.links.iter().copied().flatten().collect();
        let refused = self.refused.iter().map(|(link, _)| *link).collect();
        let free = self.links.len() - known.len();
        let found = attach(netns, known, refused, free).await?;
        let plug = |device, tap| async move {
            let plugged = vmm.plug_net(device, tap).await;
            plugged.map_err(|text| ContainerError::Vmm {
                call: "plug a network device in or out",
                text,
            })
        };
        for (device, served) in self.links.iter_mut().enumerate() {
            let Some(link) = *served else { continue };
            if !found.survey.has(link) {
                plug(device, None).await?;
                *served = None;
            }
        }
        let free = self.links.iter_mut().enumerate();
        let free = free.filter(|(_, served)| served.is_none());
        // As many as it was told are free are attached at most.
        for ((device, served), one) in free.zip(found.attached) {
            plug(device, Some(one.tap)).await?;
            *served = Some(one.link);
        }
        self.refused.retain(|(link, _)| found.survey.has(*link));
        let texts = self.refused.iter().map(|(_, text)| text.clone());
        let mut left: Vec<_> = texts.map(|text| NetworkError::Refused { text }).collect();
        for (link, error) in found.left {
            if !matches!(error, NetworkError::NoDevice { .. }) {
                self.refused.push((link, describe(&error)));
            }
            left.push(error);
        }
        self.tell(agent, vmm, &found.survey).await?;
        Ok(left)
    }
}

impl Sandbox {
    /// Makes the guest's network what the pod's network namespace has now, if interfaces may have come.
    ///
    /// # Errors
    /// [`ContainerError`]; what could follow has followed.
    pub(crate) async fn follow_network(&self) -> Result<(), ContainerError> {
        let mut devices = self.network.lock().await;
        if !devices.has_spare {
            return Ok(());
        }
        let left = devices.follow(&self.netns, &self.agent, &self.vmm).await?;
        match left.into_iter().next() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Has the guest's network follow the pod's network namespace, until the virtual machine ends. The
    /// second call has nothing to do.
    pub async fn follow_network_changes(&self) {
        let monitor = self.monitor.lock();
        let monitor = monitor.unwrap_or_else(PoisonError::into_inner).take();
        let Some(monitor) = monitor else { return };
        let monitor = match readiness::watch(monitor, Interest::READABLE) {
            Ok(monitor) => monitor,
            Err(error) => {
                tracing::warn!(%error, "the pod's network is not followed");
                return;
            }
        };
        let mut told = String::new();
        loop {
            let changed = tokio::select! {
                changed = hear(&monitor) => changed,
                _ = self.vmm.ended() => return,
            };
            if let Err(error) = changed {
                tracing::warn!(%error, "the pod's network is not followed any more");
                return;
            }
            let trouble = self.trouble_with_changes().await;
            // Each change is a new occasion for the same complaint.
            if !trouble.is_empty() && trouble != told {
                tracing::warn!(
                    trouble,
                    "the guest does not have the pod's network as it is"
                );
            }
            told = trouble;
        }
    }

    /// Follows, and says what could not be.
    async fn trouble_with_changes(&self) -> String {
        let mut devices = self.network.lock().await;
        let followed = devices.follow(&self.netns, &self.agent, &self.vmm).await;
        match followed {
            Ok(left) => {
                let texts: Vec<_> = left.iter().map(|error| describe(error)).collect();
                texts.join("; ")
            }
            // Whoever waits for the end is told the reason.
            Err(ContainerError::VmGone(_)) => String::new(),
            Err(error) => describe(&error),
        }
    }
}

/// Waits for a change.
async fn hear(monitor: &AsyncFd<Monitor>) -> io::Result<()> {
    loop {
        let mut ready = monitor.readable().await?;
        if ready.get_inner().take()? {
            return Ok(());
        }
        ready.clear_ready();
    }
}
