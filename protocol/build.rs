//! Generates the agent's ttrpc service from `proto/agent.proto`.

#[cfg(feature = "agent")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::{env, fs, path::PathBuf};
    use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = out.join(name);
        // Inner attributes and inner docs are not allowed in a file that is taken in by include!.
        let kept: String = fs::read_to_string(&path)?
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .flat_map(|line| [line, "\n"])
            .collect();
        fs::write(path, kept)?;
    }
    Ok(())
}

#[cfg(not(feature = "agent"))]
fn main() {}
