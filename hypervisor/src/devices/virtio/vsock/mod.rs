//! virtio-vsock in user space, with the hybrid Unix socket protocol on the host side.
