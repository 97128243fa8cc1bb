//! How many CPUs a guest brings up.
//!
//! A machine may have more than its pod is to use at first. The kernel leaves all but one alone (`maxcpus=1`); the agent
//! brings up as many as this parameter of the kernel's says, and all where there is none.

/// The parameter's name, a number after `=`.
pub const PARAMETER: &str = "vmshim.cpus";
