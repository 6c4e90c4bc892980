//! Pods, through CRI.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use husk_cri::messages::{
    ContainerConfig, LinuxContainerResources, Mount, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxState,
};
use husk_cri::{WebSocket, container, pod};

use crate::ctr::Ctr;
use crate::host;
use crate::kubelet::Kubelet;

pub(super) const MIB: i64 = 1024 * 1024;

/// A cgroup as the kubelet makes one for each pod; removed with this.
pub(super) struct PodCgroup(pub(super) &'static str);

impl PodCgroup {
    pub(super) fn make(path: &'static str) -> Result<Self> {
        let directory = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
        fs::create_dir_all(&directory)?;
        let parents: Vec<&Path> = directory.ancestors().collect();
        // Everybody above hands them down, the root first.
        for parent in parents
            .iter()
            .skip(1)
            .rev()
            .filter(|p| p.starts_with("/sys/fs/cgroup"))
        {
            fs::write(parent.join("cgroup.subtree_control"), "+cpu +memory +pids")?;
        }
        Ok(Self(path))
    }

    pub(super) fn directory(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(self.0.trim_start_matches('/'))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let directory = self.directory();
        for path in directory
            .ancestors()
            .take_while(|path| *path != Path::new("/sys/fs/cgroup"))
        {
            // What is left in it is what the scenario is about, and is told of elsewhere.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Two containers of a pod share what pods share, have limits and figures, are restarted, and end
/// with the pod.
pub(super) fn two_containers(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let cgroup = PodCgroup::make("/husk-test/pod-two")?;
    let mut config = pod(&kubelet.name);
    let linux = config.linux.mut_or_insert_default();
    linux.cgroup_parent = cgroup.0.to_owned();
    let limits = linux.resources.mut_or_insert_default();
    limits.memory_limit_in_bytes = 128 * MIB;
    config.dns_config.mut_or_insert_default().servers = vec!["192.0.2.53".to_owned()];
    kubelet.with_pod(config, |kubelet, pod| {
        let script = "echo a > /dev/shm/word; echo from a | nc -l -p 8080; exec sleep 1000";
        let a = kubelet.start(pod, container("a", &["sh", "-c", script]))?;
        let b = kubelet.start(pod, container("b", &["sleep", "1000"]))?;

        let namespaces = "for kind in ipc uts net; do readlink /proc/self/ns/$kind; done";
        let (of_a, of_b) = (
            kubelet.shell(&a, namespaces)?,
            kubelet.shell(&b, namespaces)?,
        );
        ensure!(of_a == of_b, "not shared: {of_a} and {of_b}");
        let processes = "ps | grep -c 'sleep 1000$'";
        let seen = kubelet.shell(&b, processes)?;
        ensure!(seen == "1", "{seen} containers are seen in one");

        let script = "cat /dev/shm/word; hostname; echo $HOSTNAME; cat /etc/resolv.conf
            df -k /dev/shm | tail -1 | { read name size rest; echo $size; }
            nc 127.0.0.1 8080 < /dev/null";
        let said = kubelet.shell(&b, script)?;
        let name = &kubelet.name;
        let wanted = format!("a\n{name}\n{name}\nnameserver 192.0.2.53\n65536\nfrom a");
        ensure!(said == wanted, "it said {said:?}");

        let failed = kubelet
            .cri
            .exec_sync(&b, &["sh", "-c", "echo no >&2; exit 3"])?;
        ensure!(
            failed.exit_code == 3 && failed.stderr == b"no\n",
            "{failed:?}"
        );
        ensure!(
            kubelet.cri.exec_sync(&b, &["no-such-command"]).is_err(),
            "it was run"
        );

        limits_and_figures(kubelet, &pod.id, &b)?;
        let events = fs::read_to_string(cgroup.directory().join("cgroup.events"))?;
        ensure!(events.contains("populated 1"), "the pod's cgroup is empty");
        if ctr.is_husk() {
            holds_all(&cgroup.directory())?;
        }

        kubelet.cri.stop_container(&a, 0)?;
        ensure!(kubelet.stopped(&a)? == 137, "it was not killed");
        kubelet.cri.remove_container(&a)?;
        let mut again = container("a", &["cat", "/dev/shm/word"]);
        again.metadata.mut_or_insert_default().attempt = 1;
        let again = kubelet.start(pod, again)?;
        ensure!(kubelet.stopped(&again)? == 0, "the second a failed");
        ensure!(kubelet.log(pod, "a")?.ends_with('a'), "its log is another");

        kubelet.cri.stop_pod(&pod.id)?;
        let state = kubelet.cri.pod_status(&pod.id)?.state;
        ensure!(
            state == PodSandboxState::SANDBOX_NOTREADY.into(),
            "{state:?}"
        );
        ensure!(
            kubelet.cri.container_status(&b)?.exit_code == 137,
            "b lives"
        );
        Ok(())
    })
}

/// Kubernetes accounts for all of a pod by its cgroup.
pub(super) fn holds_all(cgroup: &Path) -> Result<()> {
    let below = cgroup.strip_prefix("/sys/fs/cgroup")?.display().to_string();
    for program in ["husk-vmm", "containerd-shim-husk-v2"] {
        let mut all = host::Process::all()?;
        all.retain(|process| process.is(program));
        ensure!(!all.is_empty(), "there is no {program}");
        for process in all {
            let place = fs::read_to_string(format!("/proc/{}/cgroup", process.pid))?;
            ensure!(
                place.contains(&format!("/{below}/")),
                "{program} is in {place:?}"
            );
        }
    }
    Ok(())
}

fn limits_and_figures(kubelet: &Kubelet, pod: &str, container: &str) -> Result<()> {
    let mut limits = LinuxContainerResources::new();
    limits.memory_limit_in_bytes = 48 * MIB;
    kubelet.cri.update(container, limits)?;
    let limit = kubelet.shell(container, "cat /sys/fs/cgroup/memory.max")?;
    ensure!(limit == (48 * MIB).to_string(), "the limit is {limit}");
    let figures = kubelet.cri.container_stats(container)?;
    let used = figures.memory.usage_bytes.value;
    ensure!(
        (1..=48 << 20).contains(&used),
        "the container uses {used} bytes"
    );
    ensure!(figures.cpu.usage_core_nano_seconds.value > 0, "no CPU");
    let figures = kubelet.cri.pod_stats(pod)?;
    ensure!(
        figures.linux.memory.usage_bytes.value > used,
        "the pod uses less"
    );
    Ok(())
}

/// The machine is as big as the pod's limit says, and what it needs for itself.
pub(super) fn machine_size(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let mut config = pod(&kubelet.name);
    let limits = config
        .linux
        .mut_or_insert_default()
        .resources
        .mut_or_insert_default();
    limits.memory_limit_in_bytes = 80 * MIB;
    (limits.cpu_quota, limits.cpu_period) = (100_000, 100_000);
    kubelet.with_pod(config, |kubelet, pod| {
        let script = "grep MemTotal /proc/meminfo; nproc";
        let id = kubelet.start(pod, container("a", &["sh", "-c", script]))?;
        ensure!(kubelet.stopped(&id)? == 0, "it failed");
        let said = kubelet.log(pod, "a")?;
        let total_kib: u32 = said
            .split_whitespace()
            .nth(1)
            .and_then(|word| word.parse().ok())
            .with_context(|| format!("it said {said:?}"))?;
        ensure!(
            (80 << 10..=144 << 10).contains(&total_kib),
            "it has {total_kib} KiB"
        );
        ensure!(said.ends_with("\n1"), "it has other CPUs: {said:?}");
        Ok(())
    })
}

/// Containers see each other's processes if the pod says so; and one that is there to debug another
/// sees that one's.
pub(super) fn shared_processes(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let mut config = pod(&kubelet.name);
    pids(&mut config, NamespaceMode::POD);
    kubelet.with_pod(config, |kubelet, pod| {
        let join = |mut config: ContainerConfig| {
            namespaces_of(&mut config).pid = NamespaceMode::POD.into();
            config
        };
        let a = kubelet.start(pod, join(container("a", &["sleep", "1111"])))?;
        let b = kubelet.start(pod, join(container("b", &["sleep", "2222"])))?;
        let seen = kubelet.shell(&b, "ps")?;
        ensure!(
            seen.contains("sleep 1111") && seen.contains("sleep 2222"),
            "it sees {seen}"
        );
        let first = kubelet.shell(&b, "tr '\\0' ' ' < /proc/1/cmdline")?;
        ensure!(
            !first.starts_with("sleep 1111"),
            "process 1 is a container's"
        );
        let kill = "ps | grep '[s]leep 1111' | { read pid rest; kill -9 $pid; }";
        kubelet.shell(&b, kill)?;
        ensure!(kubelet.stopped(&a)? == 137, "it was not killed");
        ensure!(kubelet.shell(&b, "echo still")? == "still", "b went too");
        Ok(())
    })?;

    let mut config = pod(&kubelet.name);
    pids(&mut config, NamespaceMode::CONTAINER);
    kubelet.with_pod(config, |kubelet, pod| {
        let a = kubelet.start(pod, container("a", &["sleep", "1111"]))?;
        let mut debugger = container("debugger", &["sleep", "2222"]);
        let namespaces = namespaces_of(&mut debugger);
        namespaces.pid = NamespaceMode::TARGET.into();
        namespaces.target_id.clone_from(&a);
        let debugger = kubelet.start(pod, debugger)?;
        let first = kubelet.shell(&debugger, "tr '\\0' ' ' < /proc/1/cmdline")?;
        ensure!(first == "sleep 1111", "process 1 is {first:?}");
        Ok(())
    })
}

fn pids(config: &mut PodSandboxConfig, mode: NamespaceMode) {
    let security = config
        .linux
        .mut_or_insert_default()
        .security_context
        .mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().pid = mode.into();
}

fn namespaces_of(config: &mut ContainerConfig) -> &mut NamespaceOption {
    let security = config
        .linux
        .mut_or_insert_default()
        .security_context
        .mut_or_insert_default();
    security.namespace_options.mut_or_insert_default()
}

/// What `kubectl exec` and `attach` do.
pub(super) fn streams(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let mut config = container(
            "a",
            &["sh", "-c", "read word; echo \"got $word\"; sleep 1000"],
        );
        (config.stdin, config.stdin_once) = (true, true);
        let id = kubelet.start(pod, config)?;

        let script = "read word; echo \"out $word\"; echo err >&2; exit 5";
        let url = kubelet.cri.exec(&id, &["sh", "-c", script], false)?;
        let mut stream = WebSocket::connect(&url, PROTOCOL)?;
        stream.write(b"husk\n")?;
        let streamed = stream.finish()?;
        ensure!(
            streamed.stdout == b"out husk\n" && streamed.stderr == b"err\n" && streamed.status == 5,
            "exec: {streamed:?}"
        );

        let script = "trap 'stty size; exit 0' WINCH; echo ready; sleep 1000 & wait; wait";
        let url = kubelet.cri.exec(&id, &["sh", "-c", script], true)?;
        let mut stream = WebSocket::connect(&url, PROTOCOL)?;
        stream.until("ready")?;
        stream.resize(33, 77)?;
        stream.until("33 77")?;
        drop(stream);

        let mut stream = WebSocket::connect(&kubelet.cri.attach(&id)?, PROTOCOL)?;
        stream.write(b"attached\n")?;
        stream.until("got attached")?;
        Ok(())
    })
}

pub(super) const PROTOCOL: &str = "v4.channel.k8s.io";

/// Volumes as the kubelet makes them: a ConfigMap that changes, and memory that containers share.
pub(super) fn volumes(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let base = Path::new("/var/tmp").join(&kubelet.name);
    let memory = base.join("volumes/kubernetes.io~empty-dir/memory");
    let map = base.join("volumes/kubernetes.io~configmap/map");
    for directory in [&memory, &map] {
        fs::create_dir_all(directory)?;
    }
    set_map(&map, "one")?;
    let options = ["-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs"];
    let mounted = Command::new("mount").args(options).arg(&memory).status()?;
    ensure!(mounted.success(), "cannot mount");

    let config = pod(&kubelet.name);
    let done = kubelet.with_pod(config, |kubelet, pod| {
        let with_volumes = |name: &str| {
            let mut config = container(name, &["sleep", "1000"]);
            config.mounts = vec![mount("/memory", &memory, false), mount("/map", &map, true)];
            config
        };
        let a = kubelet.start(pod, with_volumes("a"))?;
        let b = kubelet.start(pod, with_volumes("b"))?;
        kubelet.shell(&a, "echo shared > /memory/word; mkfifo /memory/fifo")?;
        let script = "cat /memory/word; test -p /memory/fifo; stat -f -c %T /memory
            df -k /memory | tail -1 | { read name size rest; echo $size; }; stat -c %a /memory
            cat /map/key; echo x > /map/new || echo refused";
        let said = kubelet.shell(&b, script)?;
        ensure!(
            said == "shared\ntmpfs\n4096\n1777\none\nrefused",
            "it said {said:?}"
        );
        let full = kubelet.shell(
            &a,
            "dd if=/dev/zero of=/memory/big bs=1M count=5 || echo full",
        )?;
        ensure!(full == "full", "it has no limit");
        set_map(&map, "two")?;
        // The guest believes what it has read for a second; runc's containers see it at once.
        let script = "for i in 1 2 3 4 5 6 7 8 9; do grep two /map/key && break; sleep 1; done";
        let said = kubelet.shell(&b, script)?;
        ensure!(said == "two", "it said {said:?}");
        Ok(())
    });
    let unmounted = Command::new("umount").arg(&memory).status()?;
    fs::remove_dir_all(&base)?;
    ensure!(unmounted.success(), "cannot unmount");
    done
}

/// inotify in a pod hears of what the kubelet does to its ConfigMap on the host.
pub(super) fn volume_changes_heard(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let base = Path::new("/var/tmp").join(&kubelet.name);
    let map = base.join("map");
    fs::create_dir_all(&map)?;
    fs::copy("/share/husk-fscheck", base.join("watch"))?;
    set_map(&map, "one")?;
    let config = pod(&kubelet.name);
    let done = kubelet.with_pod(config, |kubelet, pod| {
        let mut config = container("a", &["/watch", "--watch", "/map", "..data"]);
        config.mounts = vec![
            mount("/map", &map, true),
            mount("/watch", &base.join("watch"), true),
        ];
        let other = kubelet.start(pod, container("b", &["sleep", "1000"]))?;
        let id = kubelet.start(pod, config)?;
        // The watch is there once the log says so.
        while !kubelet.log(pod, "a")?.contains("watching") {
            kubelet.shell(&other, "sleep 0.2")?;
        }
        set_map(&map, "two")?;
        let status = kubelet.stopped(&id)?;
        let heard = kubelet.log(pod, "a")?;
        ensure!(
            status == 0,
            "it ended with {status}, having heard {heard:?}"
        );
        let expected = [
            "create two",
            "create ..data_tmp",
            "from ..data_tmp",
            "to ..data",
        ];
        let mut lines = heard.lines();
        for expected in expected {
            let is_heard = lines.any(|line| line.ends_with(expected));
            ensure!(is_heard, "not {expected:?} in its place, but {heard:?}");
        }
        Ok(())
    });
    fs::remove_dir_all(&base)?;
    done
}

/// Sets a ConfigMap's one key as the kubelet does: a new directory, and a link that is replaced.
pub(super) fn set_map(map: &Path, value: &str) -> Result<()> {
    fs::create_dir(map.join(value))?;
    fs::write(map.join(value).join("key"), format!("{value}\n"))?;
    std::os::unix::fs::symlink(value, map.join("..data_tmp"))?;
    fs::rename(map.join("..data_tmp"), map.join("..data"))?;
    if !map.join("key").exists() {
        std::os::unix::fs::symlink("..data/key", map.join("key"))?;
    }
    Ok(())
}

pub(super) fn mount(inside: &str, host: &Path, readonly: bool) -> Mount {
    let mut mount = Mount::new();
    inside.clone_into(&mut mount.container_path);
    mount.host_path = host.display().to_string();
    mount.readonly = readonly;
    mount
}

/// Pods that ask for the host's namespaces don't run.
pub(super) fn of_the_host(ctr: &Ctr) -> Result<()> {
    let kubelet = Kubelet::new(ctr)?;
    let refused = |name: &str, change: fn(&mut NamespaceOption)| -> Result<()> {
        let mut config = pod(&kubelet.name);
        let linux = config.linux.mut_or_insert_default();
        let security = linux.security_context.mut_or_insert_default();
        change(security.namespace_options.mut_or_insert_default());
        let refusal = kubelet.refusal(config)?;
        ensure!(refusal.contains(name), "{name} is refused with {refusal}");
        Ok(())
    };
    refused("hostNetwork", |options| {
        options.network = NamespaceMode::NODE.into();
    })?;
    refused("hostPID", |options| {
        options.pid = NamespaceMode::NODE.into();
    })?;
    refused("hostIPC", |options| {
        options.ipc = NamespaceMode::NODE.into();
    })
}

/// A pod lives on while containerd is away, whether it has a container or not, and is the same one
/// afterwards.
pub(super) fn without_containerd(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    let empty = kubelet.run(pod(&format!("{}-empty", kubelet.name)))?;
    let config = pod(&kubelet.name);
    kubelet.with_pod(config, |kubelet, pod| {
        let script = "echo still here > /here; exec sleep 10000";
        let id = kubelet.start(pod, container("a", &["sh", "-c", script]))?;
        kubelet.restart_containerd()?;
        for id in [&pod.id, &empty.id] {
            let state = kubelet.cri.pod_status(id)?.state;
            ensure!(state == PodSandboxState::SANDBOX_READY.into(), "{state:?}");
        }
        let said = kubelet.shell(&id, "cat /here")?;
        ensure!(said == "still here", "it says {said:?}");
        let late = kubelet.start(&empty, container("b", &["sh", "-c", "exit 7"]))?;
        let status = kubelet.stopped(&late)?;
        ensure!(status == 7, "a container of later ended with {status}");
        Ok(())
    })?;
    kubelet.cri.stop_pod(&empty.id)?;
    kubelet.cri.remove_pod(&empty.id)
}

/// A pod whose machine or shim is killed can be stopped and removed, and leaves nothing.
pub(super) fn killed(ctr: &Ctr) -> Result<()> {
    let mut kubelet = Kubelet::new(ctr)?;
    for victim in ["husk-vmm", "containerd-shim-husk-v2"] {
        let config = pod(&kubelet.name);
        kubelet.with_pod(config, |kubelet, pod| {
            let id = kubelet.start(pod, container("a", &["sleep", "1000"]))?;
            let processes = host::Process::all()?;
            let process = processes.iter().find(|process| process.is(victim));
            process.context("nobody to kill")?.kill()?;
            ensure!(
                kubelet.stopped(&id)? != 0,
                "{victim} killed, and the container is well"
            );
            Ok(())
        })?;
    }
    Ok(())
}
