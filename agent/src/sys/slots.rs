//! The machine's slots for disks and network interfaces.
//!
//! An empty slot is a placeholder on the bus (virtio 1.2, section 4.2.2: a device id of 0), which the kernel passes over
//! at boot: it costs a guest that never fills it neither time nor memory. What has been put into it since then is found
//! by asking the driver of the bus to look again.

use nix::errno::Errno;
use std::fs;
use std::io;
use std::path::Path;

const DEVICES: &str = "/sys/bus/platform/devices";
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";

/// Starts the devices of all slots that have been filled. When it comes back they are there, whoever has started them.
pub fn look_again() -> io::Result<()> {
    for entry in fs::read_dir(DEVICES)? {
        let name = entry?.file_name();
        if name.as_encoded_bytes().starts_with(b"virtio-mmio.") {
            bind(&name)?;
        }
    }
    Ok(())
}

fn bind(name: impl AsRef<Path>) -> io::Result<()> {
    let error = match fs::write(DRIVER, name.as_ref().as_os_str().as_encoded_bytes()) {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    match error.raw_os_error().map(Errno::from_raw) {
        // A slot that is still empty; a device that is running already.
        Some(Errno::ENODEV | Errno::EBUSY) => Ok(()),
        _ => Err(error),
    }
}
