//! Block devices of the host that a container has been given: disks of the guest, which the spec cannot name, since the
//! host does not know their numbers.

use super::error::{Context, Error, Result};
use super::storage;
use super::wire::BlockDevice;
use nix::sys::stat::{SFlag, major, minor, stat};
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    Spec,
};
use std::path::Path;

/// Adds each device with a rule that allows it, and nothing else of its kind, to the spec.
pub fn add(spec: &mut Spec, devices: &[BlockDevice]) -> Result<()> {
    for device in devices {
        let (major, minor) = number(&storage::wait_for(device.slot)?)?;
        let linux = spec.linux_mut().get_or_insert_with(Linux::default);
        add_one(linux, device, major, minor)?;
    }
    Ok(())
}

fn number(device: &Path) -> Result<(i64, i64)> {
    let shown = device.display();
    let found = stat(device).doing(|| format!("look at {shown}"))?;
    if super::rootfs::tree::kind(&found) != SFlag::S_IFBLK {
        return Err(Error::invalid("linux.devices", format!("{shown} is no disk")));
    }
    let fit =
        |number: u64| i64::try_from(number).map_err(|_| Error::invalid("linux.devices", "has no number"));
    Ok((fit(major(found.st_rdev))?, fit(minor(found.st_rdev))?))
}

fn add_one(linux: &mut Linux, device: &BlockDevice, major: i64, minor: i64) -> Result<()> {
    let field = || format!("linux.devices[{}]", device.path.display());
    let node = node(device, major, minor).map_err(|error| Error::invalid(field(), error.to_string()))?;
    let rule = rule(device, major, minor).map_err(|error| Error::invalid(field(), error.to_string()))?;
    linux.devices_mut().get_or_insert_default().push(node);
    let resources = linux.resources_mut().get_or_insert_default();
    resources.devices_mut().get_or_insert_default().push(rule);
    Ok(())
}

fn node(
    device: &BlockDevice,
    major: i64,
    minor: i64,
) -> std::result::Result<LinuxDevice, oci_spec::OciSpecError> {
    LinuxDeviceBuilder::default()
        .path(device.path.clone())
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .file_mode(device.mode)
        .uid(device.uid)
        .gid(device.gid)
        .build()
}

fn rule(
    device: &BlockDevice,
    major: i64,
    minor: i64,
) -> std::result::Result<LinuxDeviceCgroup, oci_spec::OciSpecError> {
    LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .access(device.access.clone())
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_comes_with_a_rule_for_itself_alone() {
        let mut linux: Linux =
            serde_json::from_str(r#"{"resources":{"devices":[{"allow":false,"access":"rwm"}]}}"#).unwrap();
        let device = BlockDevice {
            slot: 3,
            path: "/dev/xvda".into(),
            access: "r".to_owned(),
            mode: 0o640,
            uid: 5,
            gid: 6,
        };
        add_one(&mut linux, &device, 254, 16).unwrap();
        let value = serde_json::to_value(&linux).unwrap();
        assert_eq!(
            value["devices"],
            serde_json::json!([{
                "path": "/dev/xvda", "type": "b", "major": 254, "minor": 16, "fileMode": 0o640, "uid": 5, "gid": 6,
            }])
        );
        assert_eq!(
            value["resources"]["devices"][1],
            serde_json::json!({ "allow": true, "type": "b", "major": 254, "minor": 16, "access": "r" })
        );
    }

    #[test]
    fn only_a_disk_has_a_number() {
        assert!(number(Path::new("/dev/null")).is_err());
        assert!(number(Path::new("/nonexistent")).is_err());
    }
}
