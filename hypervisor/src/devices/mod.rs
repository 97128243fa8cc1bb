//! What the guest sees beside its CPUs and its memory.

pub mod virtio;
