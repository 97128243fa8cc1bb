//! Mount options as the OCI spec lists them.
//!
//! The names are those of mount(8), plus the recursive ones (`rro`, …) and the propagation types of the OCI runtime
//! spec. What is in no table is handed to the file system.

use crate::engine::error::{Error, Result};
use crate::sys::mountfd::Attributes;

const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// Name, bits to set, bits to clear.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", libc::MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV, 0),
    ("dev", 0, libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, libc::MOUNT_ATTR_NOEXEC),
    ("noatime", libc::MOUNT_ATTR_NOATIME, ATIME),
    ("atime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("relatime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("norelatime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("strictatime", libc::MOUNT_ATTR_STRICTATIME, ATIME),
    ("nostrictatime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("nodiratime", libc::MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, libc::MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, libc::MOUNT_ATTR_NOSYMFOLLOW),
];

/// Name, `MS_*` type, recursive.
const PROPAGATIONS: &[(&str, u64, bool)] = &[
    ("shared", libc::MS_SHARED, false),
    ("rshared", libc::MS_SHARED, true),
    ("slave", libc::MS_SLAVE, false),
    ("rslave", libc::MS_SLAVE, true),
    ("private", libc::MS_PRIVATE, false),
    ("rprivate", libc::MS_PRIVATE, true),
    ("unbindable", libc::MS_UNBINDABLE, false),
    ("runbindable", libc::MS_UNBINDABLE, true),
];

/// Options that belong to the file system, not to the mount, and have no value; the kernel knows them for every type.
const SUPERBLOCK_FLAGS: &[&str] =
    &["sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand", "silent"];

/// A change of propagation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Propagation {
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or `MS_UNBINDABLE`.
    pub kind: u64,
    /// With everything mounted below.
    pub recursive: bool,
}

impl Propagation {
    /// The propagation of this name.
    pub fn named(name: &str) -> Option<Self> {
        let (_, kind, recursive) = PROPAGATIONS.iter().find(|(known, ..)| *known == name)?;
        Some(Self { kind: *kind, recursive: *recursive })
    }
}

/// Options taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Set on the mount itself.
    pub attributes: Attributes,
    /// Set on it and everything mounted below.
    pub recursive: Attributes,
    /// In the order given.
    pub propagation: Vec<Propagation>,
    /// A bind mount, recursive or not, where one was asked for.
    pub bind: Option<bool>,
    /// Owners shall be mapped, below too where true.
    pub id_map: Option<bool>,
    /// Copy what the mount point holds into the new tmpfs.
    pub copy_up: bool,
    /// For the file system: key and value.
    pub data: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Takes a list of options apart. `field` names the mount in errors.
    pub fn parse<S: AsRef<str>>(options: &[S], field: &str) -> Result<Self> {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option.as_ref(), field)?;
        }
        Ok(parsed)
    }

    /// Whether the mount shall be read-only.
    pub fn read_only(&self) -> bool {
        self.attributes.set & libc::MOUNT_ATTR_RDONLY != 0
    }

    fn add(&mut self, option: &str, field: &str) -> Result<()> {
        match option {
            "" | "defaults" => return Ok(()),
            "bind" => {
                self.bind.get_or_insert(false);
                return Ok(());
            }
            "rbind" => {
                self.bind = Some(true);
                return Ok(());
            }
            "idmap" => {
                self.id_map.get_or_insert(false);
                return Ok(());
            }
            "ridmap" => {
                self.id_map = Some(true);
                return Ok(());
            }
            "tmpcopyup" => {
                self.copy_up = true;
                return Ok(());
            }
            "remount" => {
                return Err(Error::unsupported(
                    format!("{field} option \"remount\""),
                    "give the mount its final options at once",
                ));
            }
            _ => {}
        }
        if let Some(propagation) = Propagation::named(option) {
            self.propagation.push(propagation);
        } else if let Some(change) = attribute(option) {
            apply(&mut self.attributes, change);
        } else if let Some(change) = option.strip_prefix('r').and_then(attribute) {
            apply(&mut self.recursive, change);
        } else if SUPERBLOCK_FLAGS.contains(&option) {
            self.data.push((option.to_owned(), None));
        } else {
            self.data.push(match option.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            });
        }
        Ok(())
    }
}

fn attribute(name: &str) -> Option<(u64, u64)> {
    ATTRIBUTES.iter().find(|(known, ..)| *known == name).map(|(_, set, clear)| (*set, *clear))
}

/// A later option overrules an earlier one.
fn apply(attributes: &mut Attributes, (set, clear): (u64, u64)) {
    let touched = set | clear;
    attributes.set = (attributes.set & !touched) | set;
    attributes.clear = (attributes.clear & !touched) | clear;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(options, "mounts[/x]").unwrap()
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        let parsed = parse(&["ro", "rw"]);
        assert_eq!(parsed.attributes, Attributes { set: 0, clear: libc::MOUNT_ATTR_RDONLY });
        assert!(parse(&["rw", "ro"]).read_only());
        let parsed = parse(&["noatime", "strictatime"]);
        assert_eq!(parsed.attributes, Attributes { set: libc::MOUNT_ATTR_STRICTATIME, clear: ATIME });
    }

    #[test]
    fn relatime_clears_what_it_replaces() {
        let parsed = parse(&["noatime", "relatime"]);
        assert_eq!(parsed.attributes, Attributes { set: 0, clear: ATIME });
    }

    #[test]
    fn recursive_attributes_stand_alone() {
        let parsed = parse(&["rbind", "rro", "rnosuid"]);
        assert_eq!(parsed.bind, Some(true));
        assert_eq!(parsed.recursive.set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
        assert!(parsed.attributes.is_empty());
    }

    #[test]
    fn names_that_begin_with_r_are_not_taken_for_recursive() {
        assert_eq!(parse(&["relatime"]).recursive, Attributes::default());
        assert_eq!(
            parse(&["rprivate"]).propagation,
            [Propagation { kind: libc::MS_PRIVATE, recursive: true }]
        );
    }

    #[test]
    fn the_rest_is_for_the_file_system() {
        let parsed = parse(&["size=64k", "mode=755", "newinstance", "sync"]);
        assert_eq!(
            parsed.data,
            [
                ("size".into(), Some("64k".into())),
                ("mode".into(), Some("755".into())),
                ("newinstance".into(), None),
                ("sync".into(), None)
            ]
        );
    }

    #[test]
    fn remount_is_refused() {
        assert!(MountOptions::parse(&["remount"], "mounts[/x]").is_err());
    }

    proptest! {
        #[test]
        fn no_bit_is_both_kept_and_only_cleared(options in prop::collection::vec(
            prop::sample::select(ATTRIBUTES.iter().map(|a| a.0).collect::<Vec<_>>()), 0..12)) {
            let parsed = parse(&options);
            // mount_setattr(2) refuses atime bits unless the whole field is cleared.
            if parsed.attributes.set & ATIME != 0 {
                prop_assert_eq!(parsed.attributes.clear & ATIME, ATIME);
            }
            prop_assert_eq!(parsed.attributes.set & parsed.attributes.clear & !ATIME, 0);
        }

        #[test]
        fn any_text_is_taken(options in prop::collection::vec(".{0,20}", 0..8)) {
            let _ = MountOptions::parse(&options, "mounts[/x]");
        }
    }
}
