//! The agent's ttrpc service: requests in, containers asked, failures as status codes.
//!
//! One server serves every connection, the one that the agent dialled and those that the host opens.

mod connections;
mod service;

pub use connections::{Connections, serve};
pub use service::Service;
