//! From an opened root file system, and block devices, to the VM's disk slots and what the agent is told of them.
//!
//! The VM has a few slots and an image may have hundreds of layers, so the layers that are only read are packed: one
//! slot holds many of them, one after the other, and the guest is told where each begins.

use std::fs::File;
use std::os::fd::AsFd;

use containerd_shim_protos::protobuf::MessageField;
use tokio::time::Instant;
use vmshim_protocol::agent as api;
use vmshim_protocol::agent::root_filesystem::Source;
use vmshim_protocol::control::MAX_DISK_PIECES;

use super::TaskError;
use crate::ids::Name;
use crate::oci::BlockDevice;
use crate::storage::{Directory, Disk, OpenedDevice, Rootfs, Slot, Slots, StorageError, UpperDisk};
use crate::vm::Vm;

/// A root file system with the slots that its disks go to.
#[derive(Debug)]
pub struct Plan {
    packs: Vec<Pack>,
    source: Source,
    devices: Vec<api::BlockDevice>,
}

/// What goes to one slot.
#[derive(Debug)]
struct Pack {
    slot: u8,
    files: Vec<File>,
    read_only: bool,
}

impl Plan {
    /// Takes the slots. They are given back when they are dropped.
    ///
    /// # Errors
    /// When there are too few.
    pub fn new(
        rootfs: Rootfs,
        devices: Vec<OpenedDevice>,
        id: &Name,
        slots: &Slots,
    ) -> Result<(Self, Vec<Slot>), StorageError> {
        let mut taken = Taken { slots, owned: Vec::new(), packs: Vec::new() };
        let source = match rootfs {
            Rootfs::Shared => Source::Shared(format!("{id}/rootfs")),
            Rootfs::Disk(disk) => Source::Disk(taken.whole(disk)?),
            Rootfs::Layers { lowers, upper, options } => {
                Source::Overlay(taken.overlay(lowers, upper, options)?)
            }
        };
        let devices = devices.into_iter().map(|device| taken.device(device)).collect::<Result<_, _>>()?;
        Ok((Self { packs: taken.packs, source, devices }, taken.owned))
    }

    /// Puts the disks into their slots.
    ///
    /// # Errors
    /// When the VMM refuses one, does not answer in time, or is gone.
    pub async fn attach(
        self,
        vm: &Vm,
        deadline: Instant,
    ) -> Result<(api::RootFilesystem, Vec<api::BlockDevice>), TaskError> {
        for pack in &self.packs {
            let files: Vec<_> = pack.files.iter().map(AsFd::as_fd).collect();
            vm.attach_disk(pack.slot, &files, pack.read_only, deadline).await?;
        }
        Ok((api::RootFilesystem { source: Some(self.source), ..Default::default() }, self.devices))
    }
}

struct Taken<'a> {
    slots: &'a Slots,
    owned: Vec<Slot>,
    packs: Vec<Pack>,
}

impl Taken<'_> {
    fn slot(&mut self) -> Result<u8, StorageError> {
        let slot = self.slots.take()?;
        let number = slot.number();
        self.owned.push(slot);
        Ok(number)
    }

    fn whole(&mut self, disk: Disk) -> Result<api::Disk, StorageError> {
        let slot = self.slot()?;
        let described = describe(slot, &disk, None);
        self.packs.push(Pack { slot, read_only: disk.read_only, files: vec![disk.file] });
        Ok(described)
    }

    fn device(&mut self, opened: OpenedDevice) -> Result<api::BlockDevice, StorageError> {
        let slot = self.slot()?;
        let OpenedDevice { device, file } = opened;
        self.packs.push(Pack { slot, read_only: device.is_read_only(), files: vec![file] });
        let BlockDevice { path, access, mode, uid, gid, .. } = device;
        let slot = slot.into();
        Ok(api::BlockDevice { slot, path, access, mode, uid, gid, ..api::BlockDevice::default() })
    }

    fn overlay(
        &mut self,
        lowers: Vec<Disk>,
        upper: Option<UpperDisk>,
        options: Vec<String>,
    ) -> Result<api::Overlay, StorageError> {
        let mut overlay = api::Overlay { options, ..api::Overlay::default() };
        let mut rest = lowers.into_iter().peekable();
        while rest.peek().is_some() {
            let pack: Vec<Disk> = rest.by_ref().take(MAX_DISK_PIECES).collect();
            overlay.lowers.extend(self.pack(pack)?);
        }
        if let Some(UpperDisk { disk, upper, work, directories }) = upper {
            overlay.upper = MessageField::some(self.whole(disk)?);
            (overlay.upper_path, overlay.work_path) = (upper, work);
            overlay.directories = directories.into_iter().map(directory).collect();
        }
        Ok(overlay)
    }

    /// Disks that are only read, in one slot.
    fn pack(&mut self, disks: Vec<Disk>) -> Result<Vec<api::Disk>, StorageError> {
        let slot = self.slot()?;
        let mut first_sector = 0;
        let mut described = Vec::with_capacity(disks.len());
        for disk in &disks {
            let part = api::DiskPart { first_sector, sectors: disk.sectors, ..api::DiskPart::default() };
            first_sector = first_sector.saturating_add(disk.sectors);
            described.push(describe(slot, disk, Some(part)));
        }
        let files = disks.into_iter().map(|disk| disk.file).collect();
        self.packs.push(Pack { slot, files, read_only: true });
        Ok(described)
    }
}

fn describe(slot: u8, disk: &Disk, part: Option<api::DiskPart>) -> api::Disk {
    api::Disk {
        slot: slot.into(),
        filesystem: disk.filesystem.to_owned(),
        options: disk.options.clone(),
        part: MessageField(part.map(Box::new)),
        ..api::Disk::default()
    }
}

fn directory(directory: Directory) -> api::Directory {
    let Directory { path, mode, uid, gid } = directory;
    api::Directory { path, mode, uid, gid, ..api::Directory::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(sectors: u64, read_only: bool) -> Disk {
        let file = tempfile::tempfile().unwrap();
        Disk { file, sectors, filesystem: "erofs", options: Vec::new(), read_only }
    }

    fn layers(count: usize) -> Rootfs {
        let upper = UpperDisk {
            disk: disk(9, false),
            upper: "/upper".to_owned(),
            work: "/work".to_owned(),
            directories: vec![Directory { path: "/upper".to_owned(), mode: 0o755, uid: 0, gid: 0 }],
        };
        let lowers = (1..).take(count).map(|sectors| disk(sectors, true)).collect();
        Rootfs::Layers { lowers, upper: Some(upper), options: Vec::new() }
    }

    #[test]
    fn a_hundred_layers_take_two_slots() {
        let id = Name::new("c").unwrap();
        let slots = Slots::new(2);
        let (plan, owned) = Plan::new(layers(100), Vec::new(), &id, &slots).unwrap();
        assert_eq!(owned.len(), 2);
        assert_eq!((plan.packs[0].files.len(), plan.packs[0].read_only), (100, true));
        assert_eq!((plan.packs[1].files.len(), plan.packs[1].read_only), (1, false));
        let Source::Overlay(overlay) = plan.source else { panic!("an overlay") };
        let parts: Vec<_> = overlay.lowers.iter().map(|disk| disk.part.clone().unwrap()).collect();
        assert_eq!((parts[0].first_sector, parts[0].sectors), (0, 1));
        assert_eq!((parts[99].first_sector, parts[99].sectors), (99 * 100 / 2, 100));
        assert_eq!((overlay.upper.slot, overlay.upper.part.is_some()), (1, false));
    }

    #[test]
    fn slots_that_were_taken_in_vain_come_back() {
        let id = Name::new("c").unwrap();
        let slots = Slots::new(2);
        let plan = |rootfs, devices| Plan::new(rootfs, devices, &id, &slots);
        assert!(matches!(plan(layers(MAX_DISK_PIECES + 1), Vec::new()), Err(StorageError::NoSlot)));
        assert!(plan(layers(MAX_DISK_PIECES), Vec::new()).is_ok());
        assert!(matches!(plan(layers(1), vec![device("r")]), Err(StorageError::NoSlot)));
    }

    fn device(access: &str) -> OpenedDevice {
        let device = BlockDevice {
            path: "/dev/xvda".to_owned(),
            major: 8,
            minor: 0,
            access: access.to_owned(),
            mode: 0o660,
            uid: 5,
            gid: 6,
        };
        OpenedDevice { device, file: tempfile::tempfile().unwrap() }
    }

    #[test]
    fn a_block_device_is_writable_where_its_rule_says_so() {
        let id = Name::new("c").unwrap();
        let slots = Slots::new(2);
        let devices = vec![device("rm"), device("rwm")];
        let (plan, owned) = Plan::new(Rootfs::Shared, devices, &id, &slots).unwrap();
        assert_eq!(owned.len(), 2);
        assert_eq!(plan.packs.iter().map(|pack| pack.read_only).collect::<Vec<_>>(), [true, false]);
        let told = &plan.devices[1];
        assert_eq!((told.slot, told.path.as_str(), told.access.as_str()), (1, "/dev/xvda", "rwm"));
        assert_eq!((told.mode, told.uid, told.gid), (0o660, 5, 6));
    }
}
