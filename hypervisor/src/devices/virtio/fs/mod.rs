//! virtio-fs: a host directory, served to the guest inside this process.
