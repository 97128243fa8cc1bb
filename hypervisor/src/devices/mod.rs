//! What the guest sees beside its CPUs and its memory.

pub mod legacy;
pub mod virtio;
