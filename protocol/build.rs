//! Generates ttrpc services and messages from `proto/`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    #[cfg(feature = "agent")]
    generate("proto", &["agent.proto"], &["agent.rs", "agent_ttrpc.rs"])?;
    #[cfg(feature = "containerd")]
    generate(
        "proto/containerd",
        &["streaming.proto", "transfer.proto", "transfer_types.proto"],
        &["streaming.rs", "streaming_ttrpc.rs", "transfer.rs", "transfer_ttrpc.rs", "transfer_types.rs"],
    )?;
    Ok(())
}

#[cfg(any(feature = "agent", feature = "containerd"))]
fn generate(directory: &str, sources: &[&str], generated: &[&str]) -> Result<(), Box<dyn std::error::Error>> {
    use std::{env, fs, path::PathBuf};
    use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

    let sources: Vec<_> = sources.iter().map(|name| format!("{directory}/{name}")).collect();
    for source in &sources {
        println!("cargo::rerun-if-changed={source}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    Codegen::new()
        .out_dir(&out)
        .inputs(&sources)
        .include(directory)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    for name in generated {
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
