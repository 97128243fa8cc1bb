//! Root file systems of several mounts, as containerd 2.2's mount manager describes them: disks first, then an overlay
//! whose options name them by templates (`{{ mount 0 }}/upper`, `{{ overlay 1 5 }}`).
//!
//! Where all layers are disks the guest puts them together; where changes go to a directory of the host, the host must.
//! The templates are Go's, of which only what containerd writes is understood.

use std::path::PathBuf;

use containerd_shim_protos::api::Mount;

use super::StorageError;
use super::disk::DiskRequest;

/// The most layers that an overlay can have.
const MOST_LAYERS: usize = 500;

/// Options by which containerd asks for directories.
const MKDIR: &str = "X-containerd.mkdir.path=";

/// Layers and what lies above them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// Topmost first, each read-only.
    pub lowers: Vec<DiskRequest>,
    /// Where changes go.
    pub upper: Upper,
    /// The overlay's own options.
    pub options: Vec<String>,
}

/// Where the changes to layers go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upper {
    /// Nowhere: the root file system cannot be written.
    None,
    /// To directories of the host.
    Host {
        /// The upper directory.
        upper: PathBuf,
        /// The work directory.
        work: PathBuf,
    },
    /// To a disk.
    Disk {
        /// The disk.
        disk: DiskRequest,
        /// The upper directory on it.
        upper: String,
        /// The work directory on it.
        work: String,
        /// To be made on it.
        directories: Vec<Directory>,
    },
}

/// A directory to be made on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    /// Where on the disk.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A place in the tree of a mount before, or on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Mount { index: usize, path: String },
    Host(PathBuf),
}

/// Understands disks and the overlay over them.
///
/// # Errors
/// What is not supported is named.
pub fn parse(mounts: &[Mount]) -> Result<Layers, StorageError> {
    let Some((top, below)) = mounts.split_last() else { return Err(StorageError::NoLowerdir) };
    let disks: Vec<DiskRequest> = below.iter().map(disk).collect::<Result<_, _>>()?;
    match last_type(&top.type_)? {
        "overlay" => overlay(top, &disks),
        "bind" => view(top, &disks),
        _ => Err(StorageError::UnknownType(top.type_.clone())),
    }
}

fn disk(mount: &Mount) -> Result<DiskRequest, StorageError> {
    DiskRequest::parse(mount)?.ok_or_else(|| StorageError::UnknownType(mount.type_.clone()))
}

/// The type without the transformations that are made here.
fn last_type(text: &str) -> Result<&str, StorageError> {
    let (transformations, last) = text.rsplit_once('/').unwrap_or(("", text));
    let known = transformations.split('/').all(|name| matches!(name, "" | "format" | "mkdir"));
    if known { Ok(last) } else { Err(StorageError::UnknownType(text.to_owned())) }
}

/// A single layer that is only looked at.
fn view(top: &Mount, disks: &[DiskRequest]) -> Result<Layers, StorageError> {
    match places(&top.source, disks.len())?.as_slice() {
        [Place::Mount { index, path }] if path.is_empty() => {
            let lowers = disks.get(*index).cloned().into_iter().collect();
            Ok(Layers { lowers: read_only(lowers), upper: Upper::None, options: Vec::new() })
        }
        _ => Err(StorageError::Template(top.source.clone())),
    }
}

fn overlay(top: &Mount, disks: &[DiskRequest]) -> Result<Layers, StorageError> {
    let (mut lower, mut upper, mut work) = (None, None, None);
    let (mut options, mut directories) = (Vec::new(), Vec::new());
    for option in &top.options {
        if let Some(value) = option.strip_prefix("lowerdir=") {
            lower = Some(places(value, disks.len())?);
        } else if let Some(value) = option.strip_prefix("upperdir=") {
            upper = Some(place(value, disks.len())?);
        } else if let Some(value) = option.strip_prefix("workdir=") {
            work = Some(place(value, disks.len())?);
        } else if let Some(value) = option.strip_prefix(MKDIR) {
            directories.push(directory(value, disks.len())?);
        } else if ["X-containerd.", "uidmap=", "gidmap="].iter().any(|prefix| option.starts_with(prefix)) {
            return Err(StorageError::UnsupportedOption(option.clone()));
        } else {
            options.push(option.clone());
        }
    }
    let lowers = lowers(&lower.ok_or(StorageError::NoLowerdir)?, disks)?;
    let upper = upper_of(upper.zip(work), directories, disks)?;
    Ok(Layers { lowers: read_only(lowers), upper, options })
}

fn lowers(places: &[Place], disks: &[DiskRequest]) -> Result<Vec<DiskRequest>, StorageError> {
    if places.len() > MOST_LAYERS {
        return Err(StorageError::LayerCount(places.len()));
    }
    let lower = |place: &Place| match place {
        Place::Mount { index, path } if path.is_empty() => disks.get(*index).cloned(),
        _ => None,
    };
    places.iter().map(lower).collect::<Option<_>>().ok_or(StorageError::LowerIsNoDisk)
}

fn upper_of(
    places: Option<(Place, Place)>,
    directories: Vec<(usize, Directory)>,
    disks: &[DiskRequest],
) -> Result<Upper, StorageError> {
    let (index, upper, work) = match places {
        None => return Ok(Upper::None),
        Some((Place::Host(upper), Place::Host(work))) if directories.is_empty() => {
            return Ok(Upper::Host { upper, work });
        }
        Some((Place::Mount { index, path: upper }, Place::Mount { index: same, path: work }))
            if index == same =>
        {
            (index, upper, work)
        }
        Some(_) => return Err(StorageError::UpperElsewhere),
    };
    let disk = disks.get(index).filter(|disk| !disk.read_only).ok_or(StorageError::UpperElsewhere)?;
    if directories.iter().any(|(on, _)| *on != index) {
        return Err(StorageError::UpperElsewhere);
    }
    let directories = directories.into_iter().map(|(_, directory)| directory).collect();
    Ok(Upper::Disk { disk: disk.clone(), upper, work, directories })
}

fn read_only(mut disks: Vec<DiskRequest>) -> Vec<DiskRequest> {
    disks.iter_mut().for_each(|disk| disk.read_only = true);
    disks
}

/// `path`, `path:mode` or `path:mode:uid:gid`, the mode in octal.
fn directory(text: &str, mounts: usize) -> Result<(usize, Directory), StorageError> {
    let refused = || StorageError::UnsupportedOption(format!("{MKDIR}{text}"));
    let parts: Vec<&str> = text.split(':').collect();
    let (path, mode, owner) = match parts.as_slice() {
        [path] => (path, "700", None),
        [path, mode] => (path, *mode, None),
        [path, mode, uid, gid] => (path, *mode, Some((uid, gid))),
        _ => return Err(refused()),
    };
    let mode = u32::from_str_radix(mode, 8).ok().filter(|mode| mode & !0o777 == 0).ok_or_else(refused)?;
    let (uid, gid) = match owner {
        None => (0, 0),
        Some((uid, gid)) => (uid.parse().map_err(|_| refused())?, gid.parse().map_err(|_| refused())?),
    };
    match place(path, mounts)? {
        Place::Mount { index, path } if !path.is_empty() => Ok((index, Directory { path, mode, uid, gid })),
        _ => Err(refused()),
    }
}

fn place(text: &str, mounts: usize) -> Result<Place, StorageError> {
    let mut places = places(text, mounts)?;
    match (places.pop(), places.is_empty()) {
        (Some(place), true) => Ok(place),
        _ => Err(StorageError::Template(text.to_owned())),
    }
}

/// Places with a colon between each two.
fn places(text: &str, mounts: usize) -> Result<Vec<Place>, StorageError> {
    let refused = || StorageError::Template(text.chars().take(256).collect());
    let mut places = Vec::new();
    let mut rest = text;
    loop {
        let (found, after) = match rest.strip_prefix("{{") {
            Some(template) => {
                let (template, after) = template.split_once("}}").ok_or_else(refused)?;
                let (suffix, after) = cut_at_colon(after);
                (expand(template, suffix, mounts).ok_or_else(refused)?, after)
            }
            None => {
                let (path, after) = cut_at_colon(rest);
                if !path.starts_with('/') {
                    return Err(refused());
                }
                (vec![Place::Host(path.into())], after)
            }
        };
        places.extend(found);
        match after {
            Some(after) if places.len() <= MOST_LAYERS => rest = after,
            Some(_) => return Err(StorageError::LayerCount(places.len())),
            None => return Ok(places),
        }
    }
}

fn cut_at_colon(text: &str) -> (&str, Option<&str>) {
    text.split_once(':').map_or((text, None), |(before, after)| (before, Some(after)))
}

/// What stands between the braces, with the path behind them.
fn expand(template: &str, suffix: &str, mounts: usize) -> Option<Vec<Place>> {
    let number = |text: &str| text.parse::<usize>().ok().filter(|index| *index < mounts);
    let at = |index| Place::Mount { index, path: suffix.to_owned() };
    if !suffix.is_empty() && (!suffix.starts_with('/') || suffix.contains("{{")) {
        return None;
    }
    match template.split_whitespace().collect::<Vec<_>>().as_slice() {
        ["mount", index] => Some(vec![at(number(index)?)]),
        ["overlay", first, last] if suffix.is_empty() => {
            let (first, last) = (number(first)?, number(last)?);
            let range = first.min(last)..=first.max(last);
            Some(if first > last { range.rev().map(at).collect() } else { range.map(at).collect() })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mount_of(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        }
    }

    fn layered(options: &[&str]) -> Result<Layers, StorageError> {
        parse(&[
            mount_of("ext4", "/rw", &["rw", "loop"]),
            mount_of("erofs", "/a", &["ro", "loop"]),
            mount_of("erofs", "/b", &["ro", "loop"]),
            mount_of("format/mkdir/overlay", "overlay", options),
        ])
    }

    fn sources(layers: &Layers) -> Vec<&str> {
        layers.lowers.iter().map(|disk| disk.source.to_str().unwrap()).collect()
    }

    #[test]
    fn a_disk_for_changes_over_layers() {
        let layers = layered(&[
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0711:5:6",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ mount 2 }}:{{mount 1}}",
            "index=off",
        ])
        .unwrap();
        assert_eq!(sources(&layers), ["/b", "/a"]);
        assert_eq!(layers.options, ["index=off"]);
        let Upper::Disk { disk, upper, work, directories } = layers.upper else { panic!("a disk") };
        assert_eq!((disk.read_only, upper.as_str(), work.as_str()), (false, "/upper", "/work"));
        let directory = |path: &str, mode, uid, gid| Directory { path: path.to_owned(), mode, uid, gid };
        assert_eq!(directories, [directory("/upper", 0o755, 0, 0), directory("/work", 0o711, 5, 6)]);
    }

    #[test]
    fn a_directory_of_the_host_over_layers() {
        let layers = layered(&["workdir=/s/work", "upperdir=/s/fs", "lowerdir={{ overlay 1 2 }}"]).unwrap();
        assert_eq!(sources(&layers), ["/a", "/b"]);
        assert_eq!(layers.upper, Upper::Host { upper: "/s/fs".into(), work: "/s/work".into() });
        assert_eq!(sources(&layered(&["lowerdir={{ overlay 2 1 }}"]).unwrap()), ["/b", "/a"]);
    }

    #[test]
    fn a_single_layer_is_a_view() {
        let layers = parse(&[
            mount_of("erofs", "/a", &["ro", "loop"]),
            mount_of("format/bind", "{{ mount 0 }}", &["ro", "rbind"]),
        ])
        .unwrap();
        assert_eq!((sources(&layers), &layers.upper), (vec!["/a"], &Upper::None));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let upper = ["upperdir={{ mount 0 }}/u", "workdir={{ mount 0 }}/w"];
        let with = |more: &str| {
            let options: Vec<&str> = upper.iter().copied().chain([more]).collect();
            layered(&options).unwrap_err().to_string()
        };
        for bad in [
            "lowerdir={{ mount 3 }}",
            "lowerdir={{ source 1 }}",
            "lowerdir={{ mount 1",
            "lowerdir={{ overlay 1 2 }}/x",
            "lowerdir=relative",
            "lowerdir={{ mount 1 }}{{ mount 2 }}",
            "X-containerd.mkdir.path={{ mount 0 }}/x:999",
            "X-containerd.mkdir.path={{ mount 0 }}/x:4755",
            "X-containerd.mkdir.path=/etc/x",
            "uidmap=0:1:2",
        ] {
            let value = bad.split_once('=').unwrap().1;
            let said = with(bad);
            assert!(said.contains(&format!("{value:?}")[1..value.len()]), "{bad}: {said}");
        }
        assert!(matches!(layered(&["lowerdir=/host"]), Err(StorageError::LowerIsNoDisk)));
        assert!(matches!(layered(&upper), Err(StorageError::NoLowerdir)));
        let onto_layer = ["upperdir={{ mount 1 }}/u", "workdir={{ mount 1 }}/w", "lowerdir={{ mount 2 }}"];
        assert!(matches!(layered(&onto_layer), Err(StorageError::UpperElsewhere)));
        let mkfs = parse(&[mount_of("mkfs/ext4", "/rw", &[]), mount_of("format/overlay", "o", &[])]);
        assert!(mkfs.unwrap_err().to_string().contains("mkfs/ext4"));
    }

    proptest! {
        #[test]
        fn any_template_names_a_mount_that_is_there(text in "(\\{\\{|\\}\\}|mount|overlay|[ 0-9:/a]){0,12}", mounts in 0..4_usize) {
            for place in places(&text, mounts).unwrap_or_default() {
                if let Place::Mount { index, path } = place {
                    prop_assert!(index < mounts && (path.is_empty() || path.starts_with('/')));
                }
            }
        }
    }
}
