//! Mount options as containerd's snapshotters write them: flags of mount(2) and the file system's
//! own, mixed.

use nix::mount::MsFlags;

/// Options, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) flags: MsFlags,
    /// For the file system.
    pub(crate) data: Vec<String>,
}

impl Options {
    /// Takes options apart. Later ones win over earlier ones. The error says what can't be done.
    pub(crate) fn parse(options: &[String]) -> Result<Self, &'static str> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            data: Vec::new(),
        };
        for option in options {
            if let Some((_, effect)) = KNOWN.iter().find(|(name, _)| name == option) {
                match *effect {
                    Effect::Set(flags) => parsed.flags |= flags,
                    Effect::Clear(flags) => parsed.flags -= flags,
                    Effect::Ignore => {}
                    Effect::Refuse(reason) => return Err(reason),
                }
            } else if option.starts_with("uidmap=") || option.starts_with("gidmap=") {
                return Err("mapped ids of a root file system are not supported");
            } else if !option.is_empty() && !option.starts_with("X-containerd.") {
                parsed.data.push(option.clone());
            }
        }
        Ok(parsed)
    }
}

#[derive(Clone, Copy)]
enum Effect {
    Set(MsFlags),
    Clear(MsFlags),
    Ignore,
    Refuse(&'static str),
}

/// mount(8), "filesystem-independent mount options", as far as they are flags. Propagation is left
/// out on purpose: a mount in the share has the one that the share needs.
const KNOWN: &[(&str, Effect)] = &[
    ("defaults", Effect::Ignore),
    ("rw", Effect::Clear(MsFlags::MS_RDONLY)),
    ("ro", Effect::Set(MsFlags::MS_RDONLY)),
    ("bind", Effect::Set(MsFlags::MS_BIND)),
    (
        "rbind",
        Effect::Set(MsFlags::MS_BIND.union(MsFlags::MS_REC)),
    ),
    ("suid", Effect::Clear(MsFlags::MS_NOSUID)),
    ("nosuid", Effect::Set(MsFlags::MS_NOSUID)),
    ("dev", Effect::Clear(MsFlags::MS_NODEV)),
    ("nodev", Effect::Set(MsFlags::MS_NODEV)),
    ("exec", Effect::Clear(MsFlags::MS_NOEXEC)),
    ("noexec", Effect::Set(MsFlags::MS_NOEXEC)),
    ("async", Effect::Clear(MsFlags::MS_SYNCHRONOUS)),
    ("sync", Effect::Set(MsFlags::MS_SYNCHRONOUS)),
    ("dirsync", Effect::Set(MsFlags::MS_DIRSYNC)),
    ("atime", Effect::Clear(MsFlags::MS_NOATIME)),
    ("noatime", Effect::Set(MsFlags::MS_NOATIME)),
    ("diratime", Effect::Clear(MsFlags::MS_NODIRATIME)),
    ("nodiratime", Effect::Set(MsFlags::MS_NODIRATIME)),
    ("relatime", Effect::Set(MsFlags::MS_RELATIME)),
    ("norelatime", Effect::Clear(MsFlags::MS_RELATIME)),
    ("strictatime", Effect::Set(MsFlags::MS_STRICTATIME)),
    ("nostrictatime", Effect::Clear(MsFlags::MS_STRICTATIME)),
    ("mand", Effect::Set(MsFlags::MS_MANDLOCK)),
    ("nomand", Effect::Clear(MsFlags::MS_MANDLOCK)),
    ("private", Effect::Ignore),
    ("rprivate", Effect::Ignore),
    ("shared", Effect::Ignore),
    ("rshared", Effect::Ignore),
    ("slave", Effect::Ignore),
    ("rslave", Effect::Ignore),
    (
        "remount",
        Effect::Refuse("a remount is no mount to start from"),
    ),
    ("loop", Effect::Refuse("loop devices are not supported")),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Options, &'static str> {
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        Options::parse(&options)
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for option in ["loop", "remount", "uidmap=0:1000:1"] {
            assert!(parse(&["rw", option]).is_err(), "{option}");
        }
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = parse(&["ro", "lowerdir=/a:/b", "nosuid", "index=off", "rw"]).unwrap();
        assert_eq!(options.flags, MsFlags::MS_NOSUID);
        assert_eq!(options.data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn rbind_is_recursive() {
        let options = parse(&["rbind"]).unwrap();
        assert_eq!(options.flags, MsFlags::MS_BIND | MsFlags::MS_REC);
    }
}
