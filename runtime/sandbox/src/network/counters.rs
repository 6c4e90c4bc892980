//! What has passed through the pod's interfaces.

use husk_netlink::{Connection, Counters, ETHERNET};

use super::{NetworkError, is_tap};
use crate::netns::{Netns, on_thread};
use crate::{ContainerError, Sandbox};

impl Sandbox {
    /// The counters of the pod's interfaces, as its network namespace on the host has them: there all
    /// that the guest sends and receives passes.
    ///
    /// # Errors
    /// [`ContainerError`]
    pub async fn network_counters(&self) -> Result<Vec<Counters>, ContainerError> {
        Ok(counters(&self.netns).await?)
    }
}

async fn counters(netns: &Netns) -> Result<Vec<Counters>, NetworkError> {
    let netns = netns.clone();
    let list = |source| NetworkError::List {
        what: "interfaces",
        source,
    };
    let work = move || {
        netns.enter().map_err(NetworkError::Enter)?;
        let mut connection = Connection::open().map_err(NetworkError::Enter)?;
        let mut links = connection.links().map_err(list)?;
        links.retain(|link| link.hardware == ETHERNET && !link.has_master && !is_tap(link));
        let mut counters = connection.counters().map_err(list)?;
        counters.retain(|one| links.iter().any(|link| link.index == one.link));
        Ok(counters)
    };
    on_thread("network", work)
        .await
        .map_err(NetworkError::Enter)?
}

#[cfg(test)]
mod tests {
    use husk_netlink::tap;

    use super::*;

    #[tokio::test]
    async fn loopback_and_taps_of_machines_are_not_counted() {
        let netns = match Netns::create().await {
            Ok(netns) => netns,
            Err(error) => {
                eprintln!("SKIPPED: cannot make a network namespace: {error}");
                return;
            }
        };
        let inside = netns.clone();
        let taps = on_thread("test", move || {
            inside.enter().unwrap();
            ["eth0", "husk7"].map(tap::create)
        });
        let [Ok(tap), Ok(machine)] = taps.await.unwrap() else {
            eprintln!("SKIPPED: cannot make taps");
            return;
        };

        let counters = counters(&netns).await.unwrap();

        let names: Vec<_> = counters.into_iter().map(|one| one.name).collect();
        assert_eq!(names, ["eth0"]);
        drop((tap, machine));
    }
}
