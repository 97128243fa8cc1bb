//! Services of containerd that no published crate has the types of, generated from `proto/containerd/`.

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    nonstandard_style,
    unused,
    rustdoc::all
)]
mod generated {
    pub mod streaming {
        include!(concat!(env!("OUT_DIR"), "/streaming.rs"));
    }
    pub mod streaming_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/streaming_ttrpc.rs"));
    }
    pub mod transfer {
        include!(concat!(env!("OUT_DIR"), "/transfer.rs"));
    }
    pub mod transfer_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/transfer_ttrpc.rs"));
    }
    pub mod transfer_types {
        include!(concat!(env!("OUT_DIR"), "/transfer_types.rs"));
    }
}

pub use generated::streaming::StreamInit;
pub use generated::streaming_ttrpc::{Streaming, StreamingClient, create_streaming};
pub use generated::transfer::TransferRequest;
pub use generated::transfer_ttrpc::{Transfer, TransferClient, create_transfer};
pub use generated::transfer_types::{ContainerPath, Data, ReadStream, WindowUpdate, WriteStream};
