//! The OCI runtime spec of a container: the parts that the shim reads or changes. Everything else passes through to
//! the agent untouched, also what this version has never heard of.

mod devices;
mod limits;
mod process;
mod spec;
mod transform;

pub use devices::BlockDevice;
pub use limits::Limits;
pub use process::for_guest as process_for_guest;
pub use spec::{Spec, SpecError};
pub use transform::{HostBind, HostParts, Place, for_guest, leave_read_only_to_host, resources_for_guest};
