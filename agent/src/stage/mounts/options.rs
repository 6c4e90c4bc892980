//! A mount's options, sorted out.
//!
//! An option is a flag, or for the file system. A flag comes in two forms: of mount(2), for a new
//! file system, and as an attribute of mount_setattr(2), for a tree that is bound.

use std::io;
use std::os::fd::BorrowedFd;

use nix::mount::{MsFlags, mount as mount_call};

use super::super::{Step, refusal};
use super::fd_path;
use crate::sys;

/// Options, sorted out.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::stage) struct Options {
    /// Whether a tree is bound, and with all that is mounted below it.
    pub(in crate::stage) bind: Option<Depth>,
    /// Flags of mount(2).
    pub(in crate::stage) flags: MsFlags,
    /// The same as attributes of the mount itself.
    pub(in crate::stage) own: Attributes,
    /// Attributes of the mount and of all that is mounted below it.
    pub(super) tree: Attributes,
    /// Propagation, set by calls of their own.
    pub(super) propagation: Vec<MsFlags>,
    /// Whether the new file system starts with what it covers.
    pub(super) copies_up: bool,
    /// Whether ids are mapped, and how deep.
    pub(in crate::stage) idmap: Option<Depth>,
    /// For the file system.
    pub(in crate::stage) data: Vec<String>,
}

/// How much of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::stage) enum Depth {
    /// One mount.
    Single,
    /// With what is mounted below it.
    Recursive,
}

/// Attributes to set and to clear (`MOUNT_ATTR_…`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::stage) struct Attributes {
    set: u64,
    clear: u64,
}

impl Attributes {
    pub(in crate::stage) const READ_ONLY: Attributes = Attributes {
        set: libc::MOUNT_ATTR_RDONLY,
        clear: 0,
    };

    /// A later one wins over an earlier one.
    fn add(&mut self, word: &Word, is_set: bool) {
        let is_atime = word.attribute & ATIME == word.attribute;
        let set = if is_set { word.attribute } else { 0 };
        // Those for access times are values of one field, which is cleared as a whole.
        let clear = if is_atime { ATIME } else { word.attribute };
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | if is_set && !is_atime { 0 } else { clear };
    }

    /// Takes read-only out; answers with whether it was in.
    pub(super) fn take_read_only(&mut self) -> bool {
        let is_in = self.set & libc::MOUNT_ATTR_RDONLY != 0;
        self.set &= !libc::MOUNT_ATTR_RDONLY;
        is_in
    }

    pub(in crate::stage) fn apply(self, tree: BorrowedFd<'_>, depth: Depth) -> io::Result<()> {
        if self == Attributes::default() {
            return Ok(());
        }
        sys::set_mount_attributes(tree, self.set, self.clear, depth == Depth::Recursive)
    }
}

/// linux/mount.h: the field of access times.
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

impl Options {
    pub(in crate::stage) fn parse(options: &[String]) -> Step<Options> {
        let mut parsed = Options {
            bind: None,
            flags: MsFlags::empty(),
            own: Attributes::default(),
            tree: Attributes::default(),
            propagation: Vec::new(),
            copies_up: false,
            idmap: None,
            data: Vec::new(),
        };
        for option in options {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Step {
        if let Some((word, is_set)) = word_of(option) {
            self.flags.set(word.flag, is_set);
            if word.is_attribute {
                self.own.add(word, is_set);
            }
            return Ok(());
        }
        if let Some((word, is_set)) = option.strip_prefix('r').and_then(word_of)
            && word.is_attribute
        {
            self.tree.add(word, is_set);
            return Ok(());
        }
        if let Some(flag) = propagation_named(option) {
            self.propagation.push(flag);
            return Ok(());
        }
        match option {
            "bind" => self.bind = self.bind.or(Some(Depth::Single)),
            "rbind" => self.bind = Some(Depth::Recursive),
            "idmap" => self.idmap = Some(Depth::Single),
            "ridmap" => self.idmap = Some(Depth::Recursive),
            "tmpcopyup" => self.copies_up = true,
            "defaults" => {}
            "remount" => {
                return Err(refusal(
                    "mounts: the option remount is not supported".into(),
                ));
            }
            data => self.data.push(data.to_owned()),
        }
        Ok(())
    }

    /// What can only be set on a tree that is mounted already.
    pub(super) fn apply_tree(&self, tree: BorrowedFd<'_>) -> io::Result<()> {
        let none: Option<&str> = None;
        for flag in &self.propagation {
            mount_call(none, &fd_path(tree), none, *flag, none)?;
        }
        self.tree.apply(tree, Depth::Recursive)
    }
}

/// A flag with the names that set and clear it.
struct Word {
    on: &'static str,
    off: &'static str,
    flag: MsFlags,
    /// `MOUNT_ATTR_…`, where there is one.
    attribute: u64,
    /// Relatime is an attribute with the value 0.
    is_attribute: bool,
}

const fn word(on: &'static str, off: &'static str, flag: MsFlags, attribute: u64) -> Word {
    Word {
        on,
        off,
        flag,
        attribute,
        is_attribute: true,
    }
}

/// One that belongs to the file system, not to the mount.
const fn file_system(on: &'static str, off: &'static str, flag: MsFlags) -> Word {
    Word {
        is_attribute: false,
        ..word(on, off, flag, 0)
    }
}

/// mount(8), "filesystem-independent mount options". With an `r` in front, those that are attributes
/// are for the whole tree (runtime-spec, config: Linux mount options).
const WORDS: [Word; 16] = [
    word("ro", "rw", MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
    word(
        "nosuid",
        "suid",
        MsFlags::MS_NOSUID,
        libc::MOUNT_ATTR_NOSUID,
    ),
    word("nodev", "dev", MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
    word(
        "noexec",
        "exec",
        MsFlags::MS_NOEXEC,
        libc::MOUNT_ATTR_NOEXEC,
    ),
    word(
        "nosymfollow",
        "symfollow",
        NOSYMFOLLOW,
        libc::MOUNT_ATTR_NOSYMFOLLOW,
    ),
    word(
        "nodiratime",
        "diratime",
        MsFlags::MS_NODIRATIME,
        libc::MOUNT_ATTR_NODIRATIME,
    ),
    word(
        "noatime",
        "atime",
        MsFlags::MS_NOATIME,
        libc::MOUNT_ATTR_NOATIME,
    ),
    word(
        "relatime",
        "norelatime",
        MsFlags::MS_RELATIME,
        libc::MOUNT_ATTR_RELATIME,
    ),
    word(
        "strictatime",
        "nostrictatime",
        MsFlags::MS_STRICTATIME,
        libc::MOUNT_ATTR_STRICTATIME,
    ),
    file_system("sync", "async", MsFlags::MS_SYNCHRONOUS),
    file_system("dirsync", "", MsFlags::MS_DIRSYNC),
    file_system("mand", "nomand", MsFlags::MS_MANDLOCK),
    file_system("iversion", "noiversion", MsFlags::MS_I_VERSION),
    file_system("lazytime", "nolazytime", MsFlags::MS_LAZYTIME),
    file_system("silent", "loud", MsFlags::MS_SILENT),
    file_system("acl", "noacl", MsFlags::MS_POSIXACL),
];

/// linux/mount.h.
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(256);

fn word_of(option: &str) -> Option<(&'static Word, bool)> {
    if option.is_empty() {
        return None;
    }
    WORDS
        .iter()
        .find(|word| word.on == option || word.off == option)
        .map(|word| (word, word.on == option))
}

fn propagation_named(option: &str) -> Option<MsFlags> {
    let (recursive, name) = match option.strip_prefix('r') {
        Some(name) => (MsFlags::MS_REC, name),
        None => (MsFlags::empty(), option),
    };
    let flag = match name {
        "private" => MsFlags::MS_PRIVATE,
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(flag | recursive)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Step<Options> {
        let options: Vec<String> = options.iter().map(|&o| o.to_owned()).collect();
        Options::parse(&options)
    }

    #[test]
    fn unsupported_option_is_refused() {
        assert!(parse(&["remount"]).unwrap_err().is_request_at_fault);
    }

    #[test]
    fn what_is_no_flag_is_for_the_file_system() {
        for option in ["size=64k", "rsync", "r", "", "rlazytime", "nobind"] {
            assert_eq!(parse(&[option]).unwrap().data, [option]);
        }
    }

    #[test]
    fn later_option_wins() {
        let parsed = parse(&["ro", "noexec", "rw", "exec", "nosuid"]).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID);
        let expected = Attributes {
            set: libc::MOUNT_ATTR_NOSUID,
            clear: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC,
        };
        assert_eq!(parsed.own, expected);
        assert_eq!(parse(&["rw", "ro"]).unwrap().own, Attributes::READ_ONLY);
    }

    #[test]
    fn access_times_are_one_field() {
        for (options, set) in [
            (["noatime", "strictatime"], libc::MOUNT_ATTR_STRICTATIME),
            (["strictatime", "noatime"], libc::MOUNT_ATTR_NOATIME),
            (["noatime", "atime"], 0),
            (["noatime", "relatime"], libc::MOUNT_ATTR_RELATIME),
        ] {
            let own = parse(&options).unwrap().own;
            assert_eq!(own, Attributes { set, clear: ATIME }, "{options:?}");
        }
    }

    #[test]
    fn whole_tree_has_attributes_of_its_own() {
        let parsed = parse(&["rbind", "rslave", "rro", "rnoatime", "ro"]).unwrap();
        assert_eq!(parsed.bind, Some(Depth::Recursive));
        assert_eq!(parsed.propagation, [MsFlags::MS_SLAVE | MsFlags::MS_REC]);
        assert_eq!(parsed.own, Attributes::READ_ONLY);
        let tree = Attributes {
            set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOATIME,
            clear: ATIME,
        };
        assert_eq!(parsed.tree, tree);
    }

    #[test]
    fn recursive_bind_stays_recursive() {
        assert_eq!(
            parse(&["rbind", "bind"]).unwrap().bind,
            Some(Depth::Recursive)
        );
    }
}
