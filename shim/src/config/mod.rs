//! The host administrator's settings.
//!
//! [`settings!`](schema) declares every key once: type, default, range and documentation. The structs, the parser's
//! list of known keys and `configuration.toml.example` all come from that declaration. Files are the
//! administrator's, so they are trusted, but never guessed at: a key or value that does not fit is an error that says
//! where it stands and what was meant.

mod annotations;
#[cfg(test)]
mod example;
mod load;
mod options;
mod rates;
mod schema;
mod value;

pub use load::ConfigError;
pub use options::{OptionsError, RuntimeOptions};
pub use schema::{Config, Hypervisor};

/// The file that is read when the runtime options name no other; its absence means the defaults.
pub const DEFAULT_PATH: &str = "/etc/vmshim/configuration.toml";
