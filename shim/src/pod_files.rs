//! `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` of a pod whose containers are given none.
//!
//! CRI's server makes them for the pods that it starts itself. In containerd's Sandbox API that is the
//! runtime's part: they are made in the pod's working directory, which containerd removes with the pod,
//! and bound into each container that has nothing else in their places.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

use crate::pod_config::{Dns, PodConfig};

/// The files of one pod.
#[derive(Debug)]
pub(crate) struct PodFiles {
    directory: PathBuf,
}

/// Their names, here and in a container's `/etc`.
const NAMES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// In the bundle: a link to a directory of this pod's on a disk. What is written to the files is not
/// in the host's memory then.
const WORK: &str = "work";

impl PodFiles {
    /// Makes the files; `hostname` is the pod's.
    ///
    /// # Errors
    /// The file that can't be written, and why.
    pub(crate) fn make(
        bundle: &Path,
        hostname: &str,
        config: &PodConfig,
    ) -> Result<Self, (PathBuf, io::Error)> {
        let work = bundle.join(WORK);
        let place = if work.is_dir() { work } else { bundle.into() };
        let directory = fs::canonicalize(&place).map_err(|error| (place, error))?;
        // A host without a file has nothing to hand on.
        let of_host = |name: &str| fs::read(Path::new("/etc").join(name)).unwrap_or_default();
        let resolv = match resolv_conf(&config.dns) {
            text if text.is_empty() => of_host("resolv.conf"),
            text => text.into_bytes(),
        };
        let contents = [
            format!("{hostname}\n").into_bytes(),
            of_host("hosts"),
            resolv,
        ];
        for (name, content) in NAMES.into_iter().zip(contents) {
            let path = directory.join(name);
            fs::write(&path, content).map_err(|error| (path, error))?;
        }
        Ok(Self { directory })
    }

    /// Binds them into a container, each unless it has another mount there.
    pub(crate) fn bind_into(&self, spec: &mut Spec) {
        let root = spec.root().as_ref();
        let is_read_only = root.and_then(|root| root.readonly()).unwrap_or(false);
        let mounts = spec.mounts_mut().get_or_insert_default();
        for name in NAMES {
            let destination = Path::new("/etc").join(name);
            if mounts
                .iter()
                .any(|mount| *mount.destination() == destination)
            {
                continue;
            }
            let access = if is_read_only { "ro" } else { "rw" };
            let mut mount = Mount::default();
            mount
                .set_destination(destination)
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(self.directory.join(name)))
                .set_options(Some(
                    ["rbind", "rprivate", access].map(str::to_owned).into(),
                ));
            mounts.push(mount);
        }
    }
}

/// resolv.conf(5). Empty for a pod that asks for nothing of its own.
fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> PodConfig {
        let words = |all: &[&str]| all.iter().map(|&word| word.to_owned()).collect();
        PodConfig {
            dns: Dns {
                servers: words(&["10.0.0.1", "10.0.0.2"]),
                searches: words(&["svc", "local"]),
                options: words(&["ndots:5"]),
            },
            ..PodConfig::default()
        }
    }

    fn spec(mounts: &serde_json::Value) -> Spec {
        let spec = json!({ "ociVersion": "1.1.0", "mounts": mounts,
                           "root": { "path": "rootfs", "readonly": true } });
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn files_are_made_where_the_bundle_works() {
        let (bundle, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(work.path(), bundle.path().join(WORK)).unwrap();
        PodFiles::make(bundle.path(), "web", &config()).unwrap();

        let read = |name: &str| fs::read_to_string(work.path().join(name)).unwrap();
        assert_eq!(read("hostname"), "web\n");
        assert_eq!(
            read("resolv.conf"),
            "search svc local\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
        assert_eq!(read("hosts"), hosts);
    }

    #[test]
    fn bundle_that_is_not_there_is_told() {
        let (path, _) = PodFiles::make(Path::new("/no/bundle"), "", &config()).unwrap_err();
        assert_eq!(path, Path::new("/no/bundle"));
    }

    #[test]
    fn mounts_of_the_container_stay() {
        let bundle = tempfile::tempdir().unwrap();
        let files = PodFiles::make(bundle.path(), "web", &config()).unwrap();
        let mut spec = spec(&json!([
            { "destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts" },
        ]));
        files.bind_into(&mut spec);

        let mounts = spec.mounts().as_ref().unwrap();
        let destinations: Vec<_> = mounts.iter().map(Mount::destination).collect();
        assert_eq!(
            destinations,
            ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"].map(Path::new)
        );
        assert_eq!(
            mounts[0].source().as_deref(),
            Some(Path::new("/kubelet/hosts"))
        );
        assert!(
            mounts[1]
                .options()
                .as_ref()
                .unwrap()
                .contains(&"ro".to_owned())
        );
    }
}
