//! The mounts that containerd hands over as a container's root file system.

use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nix::mount::MsFlags;

use super::disk::{Disk, DiskRequest};
use super::host_layers::{self, Changes};
use super::idmap::IdMap;
use super::layers::{self, Directory, Layers, Upper};
use super::mount::{Attributes, Bind, in_directory, mount};
use super::{StorageError, overlay};

/// One mount of a CreateTaskRequest, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountRequest {
    /// An overlay, mounted on the host.
    Overlay {
        /// Without those that became the other fields.
        options: Vec<String>,
        /// Not writable.
        read_only: bool,
        /// Other owners than the layers'.
        id_map: Option<IdMap>,
    },
    /// A directory of the host.
    Bind {
        /// The directory.
        source: PathBuf,
        /// With everything mounted below it.
        recursive: bool,
        /// Not writable.
        read_only: bool,
        /// Other owners than the directory's.
        id_map: Option<IdMap>,
    },
    /// A disk for the guest to mount.
    Disk(DiskRequest),
    /// Disks for the guest, or where it cannot the host, to put together.
    Layers(Layers),
}

/// A root file system, ready for the guest.
#[derive(Debug)]
pub enum Rootfs {
    /// Mounted in the container's part of the shared directory.
    Shared,
    /// A disk to attach.
    Disk(Disk),
    /// Disks to attach, and how the guest puts them together.
    Layers {
        /// Topmost first.
        lowers: Vec<Disk>,
        /// The writable disk.
        upper: Option<UpperDisk>,
        /// The overlay's own options.
        options: Vec<String>,
    },
}

/// The disk that takes the changes to layers.
#[derive(Debug)]
pub struct UpperDisk {
    /// The disk.
    pub disk: Disk,
    /// The upper directory on it.
    pub upper: String,
    /// The work directory on it.
    pub work: String,
    /// To be made on it.
    pub directories: Vec<Directory>,
}

impl MountRequest {
    /// Understands containerd's mounts. None means that the root directory is there already.
    ///
    /// # Errors
    /// What is not supported is named.
    pub fn parse(mounts: &[Mount]) -> Result<Option<Self>, StorageError> {
        match mounts {
            [] => Ok(None),
            [mount] if !mount.type_.contains('/') => Self::parse_one(mount).map(Some),
            several => layers::parse(several).map(|layers| Some(Self::Layers(layers))),
        }
    }

    fn parse_one(mount: &Mount) -> Result<Self, StorageError> {
        if let Some(disk) = DiskRequest::parse(mount)? {
            return Ok(Self::Disk(disk));
        }
        let mut options = mount.options.clone();
        let id_map = IdMap::take(&mut options).map_err(StorageError::UnsupportedOption)?;
        if let Some(option) = options.iter().find(|option| option.starts_with("X-containerd.")) {
            return Err(StorageError::UnsupportedOption(option.clone()));
        }
        let has = |name: &str| mount.options.iter().any(|option| option == name);
        let read_only = has("ro");
        let source = PathBuf::from(&mount.source);
        match mount.type_.as_str() {
            "overlay" => {
                options.retain(|option| !matches!(option.as_str(), "ro" | "rw"));
                Ok(Self::Overlay { options, read_only, id_map })
            }
            "bind" | "" if has("bind") || has("rbind") || mount.type_ == "bind" => {
                Ok(Self::Bind { source, recursive: has("rbind"), read_only, id_map })
            }
            other => Err(StorageError::UnknownType(other.to_owned())),
        }
    }

    /// Makes the root file system, on `target` where it is a directory.
    ///
    /// # Errors
    /// Nothing stays mounted.
    pub fn realize(self, target: &Path) -> Result<Rootfs, StorageError> {
        match self {
            Self::Overlay { options, read_only, id_map } => {
                mount_overlay(&options, read_only, id_map.as_ref(), target)
            }
            Self::Bind { source, recursive, read_only, id_map } => {
                let attributes = Attributes { read_only, ..Attributes::default() };
                Bind { recursive, attributes, id_map: id_map.as_ref() }.make(&source, target).map(drop)?;
                Ok(Rootfs::Shared)
            }
            Self::Disk(disk) => disk.open().map(Rootfs::Disk),
            Self::Layers(layers) => realize_layers(layers, target),
        }
    }
}

fn realize_layers(layers: Layers, target: &Path) -> Result<Rootfs, StorageError> {
    let Layers { lowers, upper, mut options } = layers;
    let upper = match upper {
        Upper::Host { upper, work } => {
            let changes = Changes { upper: &upper, work: &work };
            host_layers::mount_layers(&lowers, &changes, &options, target)?;
            return Ok(Rootfs::Shared);
        }
        Upper::None => {
            options.push("ro".to_owned());
            None
        }
        Upper::Disk { disk, upper, work, directories } => {
            Some(UpperDisk { disk: disk.open()?, upper, work, directories })
        }
    };
    let lowers = lowers.into_iter().map(DiskRequest::open).collect::<Result<_, _>>()?;
    Ok(Rootfs::Layers { lowers, upper, options })
}

fn mount_overlay(
    options: &[String],
    read_only: bool,
    id_map: Option<&IdMap>,
    target: &Path,
) -> Result<Rootfs, StorageError> {
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_RDONLY, read_only);
    if let Some(map) = id_map {
        host_layers::mount_mapped(options, map, flags, target)?;
        return Ok(Rootfs::Shared);
    }
    let prepared = overlay::prepare(options)?;
    let call = || mount(Some(Path::new("overlay")), target, Some("overlay"), flags, Some(&prepared.data));
    let mounted = match &prepared.directory {
        Some(directory) => in_directory(directory, call),
        None => call(),
    };
    mounted.map_err(|source| StorageError::Mount { path: target.to_owned(), source })?;
    Ok(Rootfs::Shared)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::Mapping;

    fn mount_of(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        }
    }

    fn parse(kind: &str, source: &str, options: &[&str]) -> Result<Option<MountRequest>, StorageError> {
        MountRequest::parse(&[mount_of(kind, source, options)])
    }

    #[test]
    fn the_snapshotters_mounts_are_understood() {
        assert_eq!(
            parse("overlay", "overlay", &["index=off", "ro", "lowerdir=/a:/b"]).unwrap().unwrap(),
            MountRequest::Overlay {
                options: vec!["index=off".into(), "lowerdir=/a:/b".into()],
                read_only: true,
                id_map: None,
            }
        );
        assert_eq!(
            parse("bind", "/s", &["rbind", "rw"]).unwrap().unwrap(),
            MountRequest::Bind { source: "/s".into(), recursive: true, read_only: false, id_map: None }
        );
        assert_eq!(
            parse("ext4", "/img", &["loop", "rw", "noatime"]).unwrap().unwrap(),
            MountRequest::Disk(DiskRequest {
                source: "/img".into(),
                filesystem: "ext4",
                options: vec!["noatime".into()],
                read_only: false
            })
        );
        assert!(matches!(
            parse("erofs", "/img", &["loop"]).unwrap().unwrap(),
            MountRequest::Disk(DiskRequest { filesystem: "erofs", read_only: true, .. })
        ));
        assert_eq!(MountRequest::parse(&[]).unwrap(), None);
    }

    #[test]
    fn owners_are_mapped_as_the_snapshotter_says() {
        let mapping = |host, size| vec![Mapping { container: 0, host, size }];
        let id_map = Some(IdMap { uids: mapping(1000, 9), gids: mapping(2000, 8) });
        let maps = ["uidmap=0:1000:9", "gidmap=0:2000:8"];
        let overlay = parse("overlay", "overlay", &[maps[0], maps[1], "lowerdir=/a"]).unwrap().unwrap();
        let options = vec!["lowerdir=/a".to_owned()];
        assert_eq!(overlay, MountRequest::Overlay { options, read_only: false, id_map: id_map.clone() });
        let bind = parse("bind", "/s", &[maps[0], maps[1], "rbind"]).unwrap().unwrap();
        let expected = MountRequest::Bind { source: "/s".into(), recursive: true, read_only: false, id_map };
        assert_eq!(bind, expected);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        assert!(parse("zfs", "x", &[]).unwrap_err().to_string().contains("\"zfs\""));
        assert!(matches!(parse("format/mkdir/overlay", "x", &[]), Err(StorageError::NoLowerdir)));
        assert!(matches!(parse("", "/s", &[]), Err(StorageError::UnknownType(_))));
        assert!(matches!(parse("overlay", "o", &["uidmap=0:1:2"]), Err(StorageError::UnsupportedOption(_))));
        let two = [mount_of("bind", "/a", &[]), mount_of("bind", "/b", &[])];
        assert!(matches!(MountRequest::parse(&two), Err(StorageError::UnknownType(_))));
    }

    proptest! {
        #[test]
        fn only_disks_named_as_such_become_disks(kind in "(overlay|bind||ext4|erofs|[a-z]{1,5})", source in "/dev/[a-z]{1,4}") {
            let parsed = parse(&kind, &source, &["loop"]);
            let is_disk = matches!(parsed, Ok(Some(MountRequest::Disk(_))));
            prop_assert_eq!(is_disk, kind == "ext4" || kind == "erofs");
        }
    }
}
