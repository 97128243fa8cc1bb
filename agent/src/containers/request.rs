//! The shim's requests in the engine's words: the one place where protobuf becomes our own types.

use crate::engine::spec::Namespaces;
use crate::engine::wire::{BlockDevice, Directory, Disk, IdMaps, Part, Root, Size, Upper};
use crate::failure::{Failure, Kind};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType};
use serde::Deserialize;
use std::path::PathBuf;
use vmshim_protocol::agent::root_filesystem::Source;
use vmshim_protocol::agent::{self as proto, CONTAINER_NAMESPACE, RootFilesystem, Stdio};

/// Whose namespace a container joins.
#[derive(Debug, PartialEq, Eq)]
pub enum Donor {
    /// The pod's own.
    Pod,
    /// That of the container of this id.
    Container(String),
}

/// The few parts of a spec that the agent itself has to know; the engine reads all of it.
#[derive(Debug, Default, Deserialize)]
struct Outline {
    #[serde(default)]
    linux: LinuxOutline,
}

#[derive(Debug, Default, Deserialize)]
struct LinuxOutline {
    #[serde(default)]
    namespaces: Vec<NamespaceOutline>,
}

#[derive(Debug, Deserialize)]
struct NamespaceOutline {
    #[serde(rename = "type")]
    kind: LinuxNamespaceType,
    path: Option<String>,
}

/// The namespaces of a spec, and whose are joined.
pub fn namespaces(spec: &[u8]) -> Result<(Namespaces, Vec<(i32, Donor)>), Failure> {
    let outline: Outline =
        serde_json::from_slice(spec).map_err(|error| invalid(format!("config.json: {error}")))?;
    let mut namespaces = Namespaces::default();
    let mut joined = Vec::new();
    for namespace in outline.linux.namespaces {
        let before = namespaces.joined;
        namespaces.add(namespace.kind, namespace.path.as_deref())?;
        let flag = namespaces.joined & !before;
        if flag == 0 {
            continue;
        }
        let path = namespace.path.unwrap_or_default();
        let donor = match path.strip_prefix(CONTAINER_NAMESPACE) {
            Some(id) => Donor::Container(id.to_owned()),
            None => Donor::Pod,
        };
        joined.push((flag, donor));
    }
    Ok((namespaces, joined))
}

/// The maps of a pod's user namespace, if it has one.
pub fn users(uids: &[proto::IdMapping], gids: &[proto::IdMapping]) -> Result<Option<IdMaps>, Failure> {
    if uids.is_empty() && gids.is_empty() {
        return Ok(None);
    }
    let list = |mappings: &[proto::IdMapping]| mappings.iter().map(id_mapping).collect::<Result<_, _>>();
    Ok(Some(IdMaps { uids: list(uids)?, gids: list(gids)? }))
}

fn id_mapping(mapping: &proto::IdMapping) -> Result<LinuxIdMapping, Failure> {
    let builder = LinuxIdMappingBuilder::default().container_id(mapping.container).host_id(mapping.host);
    builder.size(mapping.size).build().map_err(|error| invalid(format!("a pod's users: {error}")))
}

/// The root file system of a request.
pub fn root(rootfs: &RootFilesystem) -> Result<Root, Failure> {
    match &rootfs.source {
        Some(Source::Shared(path)) => Ok(Root::Shared(relative("rootfs.shared", path)?)),
        Some(Source::Disk(it)) => Ok(Root::Disk(disk(it))),
        Some(Source::Overlay(overlay)) => Ok(Root::Overlay {
            lowers: overlay.lowers.iter().map(disk).collect(),
            upper: overlay.upper.as_ref().map(|it| upper(it, overlay).map(Box::new)).transpose()?,
            options: overlay.options.clone(),
        }),
        _ => Err(invalid("rootfs: says neither shared directory nor disk nor overlay")),
    }
}

/// A disk that the container finds as a device node.
pub fn block_device(device: &proto::BlockDevice) -> Result<BlockDevice, Failure> {
    let proto::BlockDevice { slot, path, access, mode, uid, gid, .. } = device;
    let known = access.bytes().all(|letter| b"rwm".contains(&letter));
    if !path.starts_with('/') || !known || mode & !0o7777 != 0 {
        return Err(invalid(format!(
            "linux.devices[{path}]: needs an absolute path, letters of rwm and permission bits"
        )));
    }
    Ok(BlockDevice {
        slot: *slot,
        path: PathBuf::from(path),
        access: access.clone(),
        mode: *mode,
        uid: *uid,
        gid: *gid,
    })
}

/// The terminal's size where one is asked for.
pub fn terminal(stdio: &Stdio) -> Result<Option<Size>, Failure> {
    stdio.terminal.then(|| size(stdio.width, stdio.height)).transpose()
}

/// A terminal's size.
pub fn size(width: u32, height: u32) -> Result<Size, Failure> {
    let fit = |value: u32| {
        u16::try_from(value).map_err(|_| invalid("a terminal has at most 65535 rows and columns"))
    };
    Ok(Size { width: fit(width)?, height: fit(height)? })
}

fn disk(disk: &proto::Disk) -> Disk {
    let part = |part: &proto::DiskPart| Part { first_sector: part.first_sector, sectors: part.sectors };
    Disk {
        slot: disk.slot,
        filesystem: disk.filesystem.clone(),
        options: disk.options.clone(),
        part: disk.part.as_ref().map(part),
    }
}

fn upper(on: &proto::Disk, overlay: &proto::Overlay) -> Result<Upper, Failure> {
    let upper = relative("rootfs.overlay.upper_path", &overlay.upper_path)?;
    let work = relative("rootfs.overlay.work_path", &overlay.work_path)?;
    if upper.as_os_str().is_empty() || work.as_os_str().is_empty() || upper == work {
        return Err(invalid("rootfs.overlay: upper and work must be two directories of the disk"));
    }
    let directory = |it: &proto::Directory| {
        let path = relative("rootfs.overlay.directories", &it.path)?;
        if path.as_os_str().is_empty() || it.mode & !0o7777 != 0 {
            return Err(invalid("rootfs.overlay.directories: needs a path and permission bits"));
        }
        Ok(Directory { path, mode: it.mode, uid: it.uid, gid: it.gid })
    };
    let directories = overlay.directories.iter().map(directory).collect::<Result<_, _>>()?;
    Ok(Upper { disk: disk(on), upper, work, directories })
}

/// A path that stays below where it begins. Links on the way are the opener's business.
fn relative(field: &str, path: &str) -> Result<PathBuf, Failure> {
    use std::path::Component;
    let mut inside = PathBuf::new();
    for component in PathBuf::from(path.trim_start_matches('/')).components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            _ => return Err(invalid(format!("{field}: {path:?} leads out of its directory"))),
        }
    }
    Ok(inside)
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(Kind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn joined_containers_are_found() {
        let spec =
            br#"{"linux":{"namespaces":[{"type":"mount"},{"type":"ipc","path":"vmshim-container:c"},{"type":"uts","path":"vmshim-pod"}]}}"#;
        let (namespaces, joined) = namespaces(spec).unwrap();
        assert_eq!(namespaces.joined, libc::CLONE_NEWIPC | libc::CLONE_NEWUTS);
        let donors =
            [(libc::CLONE_NEWIPC, Donor::Container("c".to_owned())), (libc::CLONE_NEWUTS, Donor::Pod)];
        assert_eq!(joined, donors);
    }

    #[test]
    fn a_pod_has_users_of_its_own_where_there_are_maps() {
        assert!(users(&[], &[]).unwrap().is_none());
        let mapping = proto::IdMapping { container: 0, host: 7, size: 9, ..Default::default() };
        let maps = users(&[mapping], &[]).unwrap().unwrap();
        let uid = maps.uids[0];
        assert_eq!((uid.container_id(), uid.host_id(), uid.size()), (0, 7, 9));
        assert!(maps.gids.is_empty());
    }

    #[test]
    fn an_overlays_directories_stay_on_their_disk() {
        let overlay = |path: &str, mode| proto::Overlay {
            upper: Some(proto::Disk::default()).into(),
            upper_path: "/upper".to_owned(),
            work_path: "work".to_owned(),
            directories: vec![proto::Directory { path: path.to_owned(), mode, ..Default::default() }],
            ..Default::default()
        };
        let parse = |overlay: proto::Overlay| {
            root(&RootFilesystem { source: Some(Source::Overlay(overlay)), ..Default::default() })
        };
        let Ok(Root::Overlay { upper: Some(upper), .. }) = parse(overlay("/upper", 0o755)) else {
            panic!("an overlay")
        };
        assert_eq!((upper.upper, upper.directories[0].mode), (PathBuf::from("upper"), 0o755));
        for (path, mode) in [("../x", 0o755), ("/", 0o755), ("/x", 0o10755)] {
            assert!(parse(overlay(path, mode)).is_err(), "{path} {mode:o}");
        }
    }

    #[test]
    fn malformed_json_is_the_callers_fault() {
        assert_eq!(namespaces(b"{").unwrap_err().kind, Kind::InvalidArgument);
    }

    #[test]
    fn terminals_have_bounds() {
        assert_eq!(size(80, 24).unwrap(), Size { width: 80, height: 24 });
        assert!(size(70_000, 24).is_err());
    }

    proptest! {
        #[test]
        fn relative_paths_never_climb(path in "[a./]{0,20}") {
            if let Ok(inside) = relative("x", &path) {
                let climbs = inside.components().any(|c| !matches!(c, std::path::Component::Normal(_)));
                prop_assert!(!climbs);
            }
        }

        #[test]
        fn any_spec_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = namespaces(&bytes);
        }
    }
}
