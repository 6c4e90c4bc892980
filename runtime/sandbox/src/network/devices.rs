//! Which of the machine's network devices serves which interface, as interfaces come and go.

use std::os::fd::OwnedFd;

use husk_protocol::messages as m;
use husk_vmm_control::{NET_DEVICES_MAX, NetConfig};

use super::message::request;
use super::{Attached, NetworkError, Survey, attach};
use crate::agent::Agent;
use crate::error::cap_text;
use crate::vmm::Vmm;
use crate::{ContainerError, Sandbox, StartError};

/// The interfaces by device; `None` where a device has none.
#[derive(Debug)]
pub(crate) struct Devices {
    links: Vec<Option<u32>>,
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
            has_spare: spare > 0,
            told,
        };
        (devices, net, taps)
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

    /// Plugs in what has come and pulls out what has gone.
    async fn follow(
        &mut self,
        vmm: &Vmm,
        survey: &Survey,
        attached: Vec<Attached>,
    ) -> Result<(), ContainerError> {
        let plug = |device, tap| async move {
            let plugged = vmm.plug_net(device, tap).await;
            plugged.map_err(|text| ContainerError::Vmm {
                call: "plug a network device in or out",
                text,
            })
        };
        for (device, served) in self.links.iter_mut().enumerate() {
            let Some(link) = *served else { continue };
            if survey.links.iter().all(|found| found.index != link) {
                plug(device, None).await?;
                *served = None;
            }
        }
        for one in attached {
            let Some(device) = self.links.iter().position(Option::is_none) else {
                let found = survey.links.iter().find(|found| found.index == one.link);
                let interface = found.map_or_else(String::new, |found| found.name.clone());
                return Err(NetworkError::NoDevice { interface }.into());
            };
            plug(device, Some(one.tap)).await?;
            self.links[device] = Some(one.link);
        }
        Ok(())
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
        let known = devices.links.iter().copied().flatten().collect();
        let (survey, attached) = attach(&self.netns, known).await?;
        devices.follow(&self.vmm, &survey, attached).await?;
        devices.tell(&self.agent, &self.vmm, &survey).await
    }
}
